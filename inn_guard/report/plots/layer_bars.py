"""One number per layer, or per row of another table, in the order of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inn_guard.report.formatting import format_number, heading, is_number, legible
from inn_guard.report.plots.axis_scale import Scale, scale_for
from inn_guard.report.plots.svg import (
    BAD,
    GRID,
    HIGH,
    INK,
    LOW,
    Drawing,
    axes,
    decades,
    drawing,
    limit_line,
)

__all__ = ["layer_bars", "layer_label", "numeric_columns", "row_bars"]

_NAMED = 40  #: more layers than this are drawn as a step line, without their names


def layer_label(row: Mapping[str, Any]) -> str:
    """What a plot calls a layer: its own number and its name, at most 30 characters."""
    parts = [str(row[key]) for key in ("index", "name") if key in row]
    text = legible("  ".join(parts)).replace("\n", " ")
    return text if len(text) <= 30 else f"{text[:29]}…"


def numeric_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold a number in some row, in order of appearance; not the layer's index."""
    names: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if is_number(value) and key != "index":
                names[key] = None
    return list(names)


def layer_bars(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    unit: str = "",
    limit: float | None = None,
    title: str = "",
) -> Drawing:
    """One column of `AuditResult.per_layer`, the largest marked; a step line for many layers.

    Layers are named by their own index, never by the position of their row.

    Args:
        name: the column.
        rows: one per layer, first layer first.
        unit: of the numbers.
        limit: what they are held against; it is drawn as a line.
        title: heading. Default: the name.
    """
    values = _column(name, rows)
    labels = list(map(layer_label, rows))
    caption = _caption(name, values, labels, limit, kind="layer")
    if len(rows) <= _NAMED:
        figure = _row_figure(name, labels, values, unit, limit)
        return drawing(figure, caption, title=title or heading(name))
    scale = _scale(name, values, limit)
    figure, axis = axes()
    index = np.array([int(row.get("index", place)) for place, row in enumerate(rows)])
    _steps(axis, index, values, scale)
    axis.set_ylabel(scale.label(name, unit))
    border = _place(limit, scale)
    if border is not None:
        axis.axhline(border, color=BAD, linewidth=1.1, linestyle=(0, (4, 2)))
    return drawing(figure, caption, title=title or heading(name))


def row_bars(
    name: str,
    labels: Sequence[str],
    values: np.ndarray,
    *,
    unit: str = "",
    limit: float | None = None,
    title: str = "",
) -> Drawing:
    """A bar per row: from zero on a linear axis, a dot at the value on a logarithmic one.

    Args:
        name: the quantity.
        labels: of the rows.
        values: the numbers, NaN where a row has none.
        unit: of the numbers.
        limit: what they are held against; it is drawn as a line.
        title: heading. Default: the name.
    """
    figure = _row_figure(name, labels, values, unit, limit)
    caption = _caption(name, values, labels, limit)
    return drawing(figure, caption, title=title or heading(name))


def _row_figure(
    name: str, labels: Sequence[str], values: np.ndarray, unit: str, limit: float | None
) -> Figure:
    """A figure of horizontal bars, as high as its rows need."""
    scale = _scale(name, values, limit)
    figure, axis = axes(5.2, 0.9 + 0.19 * max(4, len(labels)))
    border = _place(limit, scale)
    _bars(axis, values, scale, labels=labels, border=border)
    if limit is not None and border is not None:
        limit_line(axis, border, f"limit {format_number(limit)}")
    axis.set_xlabel(scale.label(name, unit))
    if scale.logarithmic:
        decades(axis.xaxis)
    return figure


def _column(name: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """One column of a table of layers; NaN where a row has no number."""
    values = np.full(len(rows), np.nan)
    for place, row in enumerate(rows):
        if is_number(row.get(name)):
            values[place] = float(row[name])
    return values


def _scale(name: str, values: np.ndarray, limit: float | None) -> Scale:
    """The axis that fits the values and the limit."""
    shares = values.size > 1 and ((values >= 0) & (values <= 1)).all()
    if shares and abs(values.sum() - 1) < 1e-6:
        # parts of a whole are compared by their lengths
        return Scale(logarithmic=False)
    against = [] if limit is None else [limit]
    return scale_for(np.concatenate([values, against]), name)


def _place(limit: float | None, scale: Scale) -> float | None:
    """Where a limit lies; None without one, or where zero has no place."""
    if limit is None or np.isnan(scale.place(np.array(limit))):
        return None
    return float(scale.place(np.array(limit)))


def _bars(
    axis: Axes, values: np.ndarray, scale: Scale, *, labels: Sequence[str], border: float | None
) -> None:
    """Bars of the rows, or dots on a logarithmic axis, which has no zero for bars to start from."""
    places = scale.place(values)
    rows = np.arange(len(places))
    colours = np.where(rows == _worst(values), HIGH, LOW)
    drawn = ~np.isnan(places)
    if scale.logarithmic:
        start, end = _ends(places, border)
        axis.hlines(rows[drawn], start, places[drawn], color=GRID, linewidth=1.5)
        axis.scatter(places[drawn], rows[drawn], c=colours[drawn], s=22, zorder=3, linewidths=0)
        axis.set_xlim(start, end)
    else:
        start = 0.0
        axis.barh(rows[drawn], places[drawn], color=colours[drawn], height=0.68)
    for row in rows[~np.isfinite(values)]:
        # exactly zero has no place on a logarithmic axis either, but it is no finding
        axis.text(start, row, f" {format_number(values[row])}", color=BAD, va="center", size=9)
    axis.set_yticks(rows, labels=labels, parse_math=False)
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")


def _ends(places: np.ndarray, border: float | None) -> tuple[float, float]:
    """Both ends of a logarithmic axis with room for all places and for the line of the limit."""
    shown = places[~np.isnan(places)]
    if border is not None:
        shown = np.append(shown, border)
    if not shown.size:
        return 0.0, 1.0
    margin = 0.1 * max(0.5, shown.max() - shown.min())
    return float(shown.min() - margin), float(shown.max() + margin)


def _steps(axis: Axes, index: np.ndarray, values: np.ndarray, scale: Scale) -> None:
    """A step line over many layers, the largest value named."""
    places = scale.place(values)
    axis.step(index, places, where="mid", color=LOW, linewidth=1)
    axis.plot(index, places, "o", color=LOW, markersize=1.8)
    for lost in index[~np.isfinite(values)]:
        axis.axvline(lost, color=BAD, linewidth=1)
    worst = _worst(values)
    if not np.isnan(places[worst]):
        axis.plot([index[worst]], [places[worst]], "o", color=HIGH, markersize=5)
        axis.annotate(
            f"layer {index[worst]}",
            (index[worst], places[worst]),
            xytext=(6, 0),
            textcoords="offset points",
            color=INK,
            size=9,
        )
    axis.set_xlabel("layer")
    if scale.logarithmic and not np.isnan(places).all():
        decades(axis.yaxis)


def _worst(values: np.ndarray) -> int:
    """The row of the largest value; NaN and Inf are larger than any number."""
    return int(np.argmax(np.where(np.isnan(values), np.inf, values)))


def _caption(
    name: str,
    values: np.ndarray,
    labels: Sequence[str],
    limit: float | None,
    *,
    kind: str = "",
) -> str:
    """The largest number, and how many were not drawn; ``kind`` says what a row is."""
    scale = _scale(name, values, limit)
    worst = _worst(values)
    which = "Largest"
    if not np.isfinite(values[worst]):
        which = "First that is not finite"
    where = " ".join(f"{kind} {labels[worst]}".split())
    parts = [f"{which}: {scale.text(values[worst])} in {where}."]
    counts = {}
    if limit is not None:
        counts[f"are above the limit {format_number(limit)}"] = (values > limit).sum()
    if scale.logarithmic and not scale.exponents:
        counts["are exactly zero and not drawn"] = (values == 0).sum()
    counts["have no finite number"] = (~np.isfinite(values)).sum()
    for what, count in counts.items():
        if count:
            parts.append(f"{count} of {len(values)} {what}.")
    return " ".join(parts)
