"""What an attack had found after how many forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inn_guard.report.formatting import format_number
from inn_guard.report.plots.svg import BAD, HIGH, LOW, Drawing, axes, decades, drawing

__all__ = ["attack_curve"]


def attack_curve(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """Median and largest finite error against forward-equivalents, on a logarithmic axis.

    Args:
        rows: with the columns forward_equivalents, median_error, largest_error and broken_samples.
    """
    spent, median, largest = (
        np.array([float(row[key]) for row in rows])
        for key in ("forward_equivalents", "median_error", "largest_error")
    )
    figure, axis = axes()
    for values, colour in ((largest, HIGH), (median, LOW)):
        with np.errstate(all="ignore"):
            powers = np.log10(values)
        axis.step(
            spent,
            np.where(np.isfinite(powers), powers, np.nan),
            where="post",
            color=colour,
            linewidth=1.2,
        )
    broken = [
        (row["forward_equivalents"], row["broken_samples"]) for row in rows if row["broken_samples"]
    ]
    if broken:
        axis.axvline(broken[0][0], color=BAD, linewidth=1)
    axis.set_xlabel("forward passes spent per sample")
    axis.set_ylabel("error found [units of x]")
    decades(axis.yaxis)
    axis.text(0.0, 1.02, "— largest", color=HIGH, size=9, transform=axis.transAxes)
    axis.text(0.24, 1.02, "— median", color=LOW, size=9, transform=axis.transAxes)
    lost = f" First NaN or Inf after {format_number(broken[0][0])} passes (line)." if broken else ""
    caption = (
        f"From {format_number(largest[0])} at the centres to {format_number(largest[-1])}.{lost}"
    )
    return drawing(figure, caption, title="What the attack found")
