"""What an attack had found after how many forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inn_guard.report.formatting import format_number
from inn_guard.report.plots.svg import BAD, HIGH, LOW, Drawing, axes, decades, drawing, legend

__all__ = ["attack_curve"]


def attack_curve(rows: Sequence[Mapping[str, Any]], *, limit: float | None = None) -> Drawing:
    """The median and the largest finite error against forward passes, on a logarithmic axis.

    Args:
        rows: with the columns forward_equivalents, median_error, largest_error and broken_samples.
        limit: the error up to which a round trip is usable; drawn as a line.
    """
    spent = np.array([float(row["forward_equivalents"]) for row in rows])
    largest = np.array([float(row["largest_error"]) for row in rows])
    median = np.array([float(row["median_error"]) for row in rows])
    figure, axis = axes()
    for values, colour in ((largest, HIGH), (median, LOW)):
        # an error of zero, NaN or Inf has no place on a logarithmic axis
        with np.errstate(all="ignore"):
            powers = np.log10(values)
        drawn = np.where(np.isfinite(powers), powers, np.nan)
        axis.step(spent, drawn, where="post", color=colour, linewidth=1.2)
    lost = ""
    for row in rows:
        if row["broken_samples"]:
            passes = row["forward_equivalents"]
            axis.axvline(passes, color=BAD, linewidth=1)
            lost = f" First NaN or Inf after {format_number(passes)} passes (vertical line)."
            break
    if limit is not None and limit > 0:
        axis.axhline(np.log10(limit), color=BAD, linewidth=1.1, linestyle=(0, (4, 2)))
    axis.set_xlabel("forward passes spent per sample")
    axis.set_ylabel("error found [units of x]")
    decades(axis.yaxis)
    legend(axis, ("— largest", HIGH), ("— median", LOW))
    first, last = format_number(largest[0]), format_number(largest[-1])
    return drawing(
        figure, f"From {first} at the centres to {last}.{lost}", title="What the attack found"
    )
