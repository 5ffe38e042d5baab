"""Forecast and measured error of the round trip, arithmetic by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from inn_guard.report.formatting import format_number, legible
from inn_guard.report.plots.svg import BAD, HIGH, LOW, MUTED, Drawing, axes, decades, drawing

__all__ = ["forecast_against_measured"]


def forecast_against_measured(
    rows: Sequence[Mapping[str, Any]], *, usable: float | None = None
) -> Drawing:
    """One line per arithmetic: a ring where the forecast lies, a dot where the measurement does, on one error axis.

    Args:
        rows: with the columns arithmetic, forecast and measured, errors in units of |x|.
        usable: the error up to which an inverse is usable, drawn as a line.
    """
    forecast, measured = (
        np.array([math.nan if row[key] is None else float(row[key]) for row in rows])
        for key in ("forecast", "measured")
    )
    with np.errstate(all="ignore"):
        hollow, solid = np.log10(forecast), np.log10(measured)
    figure, axis = axes(5.2, 1.2 + 0.32 * len(rows))
    at = np.arange(len(rows))
    for place, ring, dot in zip(at, hollow, solid, strict=True):
        if np.isfinite(ring) and np.isfinite(dot):
            axis.plot([ring, dot], [place, place], color=MUTED, linewidth=0.8)
    axis.plot(
        np.where(np.isfinite(hollow), hollow, np.nan),
        at,
        "o",
        color=LOW,
        markersize=7,
        fillstyle="none",
    )
    axis.plot(np.where(np.isfinite(solid), solid, np.nan), at, "o", color=HIGH, markersize=4)
    if usable is not None:
        axis.axvline(np.log10(usable), color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    _unplaced(axis, [(k, row) for k, row in enumerate(rows) if not np.isfinite(solid[k])])
    axis.set_yticks(at, labels=[legible(row["arithmetic"]) for row in rows], parse_math=False)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("error of the round trip, 95 % of samples [|x|]")
    decades(axis.xaxis)
    axis.text(0.0, 1.02, "○ forecast", color=LOW, size=9, transform=axis.transAxes)
    axis.text(0.24, 1.02, "● measured", color=HIGH, size=9, transform=axis.transAxes)
    return drawing(
        figure, _caption(rows, usable), title="Forecast and measurement in each arithmetic"
    )


def _unplaced(axis: Axes, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """Measurements that have no place on a logarithmic axis, in words at its right end."""
    for place, row in rows:
        exact = row["measured"] == 0
        refused = row.get("measured verdict") == "refused"
        text = (
            "exact"
            if exact
            else "refused"
            if refused
            else f"measured {format_number(row['measured'])}"
        )
        axis.text(
            0.99, place, text, color=MUTED if exact else BAD, ha="right", va="center", size=9,
            transform=axis.get_yaxis_transform(),
        )  # fmt: skip


def _caption(rows: Sequence[Mapping[str, Any]], usable: float | None) -> str:
    decided = [row for row in rows if row.get("forecast verdict") in ("works", "breaks")]
    right = sum(row["forecast verdict"] == row.get("measured verdict") for row in decided)
    line = (
        f" Dashed: {format_number(usable)} |x|, up to which an inverse is usable."
        if usable is not None
        else ""
    )
    return f"The forecast decides {len(decided)} of {len(rows)} arithmetics and is right in {right} of them.{line}"
