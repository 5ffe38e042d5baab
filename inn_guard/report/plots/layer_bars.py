"""One number per layer, as bars in the order of the chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from inn_guard.report.formatting import format_number, heading, is_number, legible, title
from inn_guard.report.plots.axis_scale import Scale, scale_for
from inn_guard.report.plots.svg import BAD, HIGH, INK, LOW, Drawing, axes, decades, drawing

__all__ = ["layer_bars", "layer_label", "numeric_columns"]

_NAMED = 40  # more layers than this are drawn as a step line, without their names


def layer_label(row: Mapping[str, Any], index: int) -> str:
    """What a plot calls layer ``index``: its number and its name, at most 30 characters."""
    name = next((str(row[key]) for key in ("layer", "name") if isinstance(row.get(key), str)), "")
    text = legible(f"{index}  {name}".strip()).replace("\n", " ")
    return text if len(text) <= 30 else f"{text[:29]}…"


def numeric_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold a number in some row, in order of appearance; a layer's own index is not one."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    return [name for name in names if name not in ("index", "layer", "position")]


def layer_bars(name: str, rows: Sequence[Mapping[str, Any]], *, unit: str = "") -> Drawing:
    """Bars of one column of `AuditResult.per_layer`, the largest marked; a step line where there are many layers.

    Args:
        name: the column.
        rows: one per layer, first layer first.
        unit: of the numbers.
    """
    values = np.array([float(row[name]) if is_number(row.get(name)) else np.nan for row in rows])
    scale = Scale(logarithmic=False) if _are_shares(values) else scale_for(values)
    places = scale.place(values)
    if len(rows) <= _NAMED:
        figure, axis = axes(5.2, 0.9 + 0.19 * max(4, len(rows)))
        _bars(
            axis,
            places,
            scale,
            values=values,
            labels=[layer_label(row, index) for index, row in enumerate(rows)],
        )
        axis.set_xlabel(scale.label(title(name), unit))
    else:
        figure, axis = axes()
        _steps(axis, places, scale)
        axis.set_ylabel(scale.label(title(name), unit))
    return drawing(figure, _caption(values, rows), title=heading(name))


def _are_shares(values: np.ndarray) -> bool:
    """Whether the numbers are parts of a whole, to be compared by their lengths."""
    return bool(
        values.size > 1 and ((values >= 0) & (values <= 1)).all() and abs(values.sum() - 1) < 1e-6
    )


def _bars(
    axis: Axes, places: np.ndarray, scale: Scale, *, values: np.ndarray, labels: list[str]
) -> None:
    rows = np.arange(len(places))
    start = _start(places, scale)
    colours = [HIGH if row == _worst(values) else LOW for row in rows]
    axis.barh(rows, np.nan_to_num(places - start), left=start, color=colours, height=0.68)
    for row in rows[np.isnan(places)]:
        axis.text(start, row, f" {format_number(values[row])}", color=BAD, va="center", size=9)
    axis.set_yticks(rows, labels=labels, parse_math=False)
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    if scale.logarithmic:
        decades(axis.xaxis)


def _steps(axis: Axes, places: np.ndarray, scale: Scale) -> None:
    rows = np.arange(len(places))
    axis.step(rows, places, where="mid", color=LOW, linewidth=1)
    for row in rows[np.isnan(places)]:
        axis.axvline(row, color=BAD, linewidth=1)
    if not np.isnan(places).all():
        worst = int(np.nanargmax(places))
        axis.plot([worst], [places[worst]], "o", color=HIGH, markersize=5)
        axis.annotate(
            f"layer {worst}",
            (worst, places[worst]),
            xytext=(6, 0),
            textcoords="offset points",
            color=INK,
            size=9,
        )
    axis.set_xlabel("layer")
    if scale.logarithmic:
        decades(axis.yaxis)


def _start(places: np.ndarray, scale: Scale) -> float:
    """Where bars begin: at 0; on a logarithmic axis at 1, or below the smallest if all lie below 1."""
    if not scale.logarithmic or np.isnan(places).all():
        return 0.0
    low, high = np.nanmin(places), np.nanmax(places)
    return 0.0 if low >= 0 else float(np.floor(low - 0.08 * max(1.0, high - low)))


def _worst(values: np.ndarray) -> int:
    """The largest value's row; a NaN or Inf is larger than any number."""
    return int(np.argmax(np.where(np.isnan(values), np.inf, values)))


def _caption(values: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> str:
    worst = _worst(values)
    which = "largest" if np.isfinite(values[worst]) else "first that is not finite"
    bad = int((~np.isfinite(values)).sum())
    count = f" {bad} of {len(rows)} layers have no finite number." if bad else ""
    return f"{len(rows)} layers; {which}: {format_number(values[worst])} in {layer_label(rows[worst], worst)}.{count}"
