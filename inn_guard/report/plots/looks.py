"""Lost draws, look by look: the rate with its interval against the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inn_guard.report.formatting import format_number
from inn_guard.report.plots.svg import HIGH, LOW, Drawing, axes, decades, drawing, limit_line

__all__ = ["looks"]


def looks(rows: Sequence[Mapping[str, Any]], *, limit: float) -> Drawing:
    """A line per look from the lower to the upper bound of the rate of lost draws, in per cent.

    A lower bound of zero lies beyond the left end of the logarithmic axis.

    Args:
        rows: with the columns draws, lost, rate_low, rate_high.
        limit: the rate up to which draws are usable.
    """
    figure, axis = axes(5.2, 1.3 + 0.32 * len(rows))
    upper = [100 * row["rate_high"] for row in rows]
    places = np.log10([100 * limit, *upper])
    # a lower bound of zero lies infinitely far to the left: its line ends at the axis
    left = places.min() - 1.5
    labels = []
    for place, row in enumerate(rows):
        draws, lost = int(row["draws"]), int(row["lost"])
        high = np.log10(100 * row["rate_high"])
        low = left
        if row["rate_low"] > 0:
            low = max(left, np.log10(100 * row["rate_low"]))
        axis.plot([low, high], [place, place], color=LOW, linewidth=3, solid_capstyle="butt")
        if lost:
            axis.plot([np.log10(100 * lost / draws)], [place], "o", color=HIGH, markersize=5)
        labels.append(f"{lost:,} of {draws:,}")
    axis.set_xlim(left, max(places.max() + 0.3, left + 2))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(range(len(rows)), labels=labels)
    axis.set_ylabel("lost draws")
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("rate of lost draws [%]")
    limit_line(axis, places[0], f"limit {format_number(100 * limit)} %")
    decades(axis.xaxis)
    last = rows[-1]
    low, high = format_number(100 * last["rate_low"]), format_number(100 * last["rate_high"])
    caption = f"After {int(last['draws']):,} draws the rate lies between {low} and {high} %."
    return drawing(figure, caption, title="Rate of lost draws")
