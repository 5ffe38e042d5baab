"""Forecast and measured error of the round trip in each number format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from inn_guard.report.formatting import format_number, legible
from inn_guard.report.plots.svg import (
    BAD,
    HIGH,
    LOW,
    MUTED,
    Drawing,
    axes,
    decades,
    drawing,
    legend,
)

__all__ = ["forecast_against_measured"]


def forecast_against_measured(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """A line per number format: a ring at the forecast, a dot at the measurement, a limit.

    Args:
        rows: with the columns "number format", forecast and measured, errors of the
            feature, and usable: the error up to which an inverse in that format is usable.
    """
    figure, axis = axes(5.2, 1.2 + 0.32 * len(rows))
    for place, row in enumerate(rows):
        _draw_row(axis, place, row)
    labels = [legible(row["number format"]) for row in rows]
    axis.set_yticks(range(len(rows)), labels=labels, parse_math=False)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first row at the top
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("error of the round trip, 95 % of samples, of the feature")
    decades(axis.xaxis)
    legend(axis, ("○ forecast", LOW), ("● measured", HIGH), ("¦ limit", BAD))
    return drawing(figure, _caption(rows), title="Forecast and measurement in each number format")


def _draw_row(axis: Axes, place: int, row: Mapping[str, Any]) -> None:
    """Ring, dot and limit of one number format, at this height."""
    forecast = _log10(row, "forecast")
    measured = _log10(row, "measured")
    if "usable" in row:
        usable = _log10(row, "usable")
        axis.plot([usable, usable], [place - 0.38, place + 0.38], color=BAD, linestyle=(0, (3, 2)))
    if math.isfinite(forecast) and math.isfinite(measured):
        axis.plot([forecast, measured], [place, place], color=MUTED, linewidth=0.8)
    if math.isfinite(forecast):
        axis.plot([forecast], [place], "o", color=LOW, markersize=7, fillstyle="none")
    if math.isfinite(measured):
        axis.plot([measured], [place], "o", color=HIGH, markersize=4)
    else:
        _in_words(axis, place, row)


def _log10(row: Mapping[str, Any], name: str) -> float:
    """log10 of an error; NaN where it was not measured, not finite or zero."""
    if row.get(name) is None:
        return math.nan
    with np.errstate(all="ignore"):
        return float(np.log10(float(row[name])))


def _in_words(axis: Axes, place: int, row: Mapping[str, Any]) -> None:
    """A measurement that has no place on a logarithmic axis, to the right of it."""
    text, colour = "not measured", MUTED
    if row.get("measured verdict") == "refused":
        text, colour = "refused", BAD
    elif row["measured"] == 0:
        text = "exact"
    elif row["measured"] is not None:
        text, colour = f"measured {format_number(row['measured'])}", BAD
    where = axis.get_yaxis_transform()
    axis.text(1.01, place, text, color=colour, va="center", size=9, transform=where)


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many number formats the forecast decides, and how often it is right."""
    decided = right = 0
    for row in rows:
        if row.get("forecast verdict") in ("works", "breaks"):
            decided += 1
            if row["forecast verdict"] == row.get("measured verdict"):
                right += 1
    return (
        f"The forecast decides {decided} of {len(rows)} number formats and is right in {right} of "
        "them."
    )
