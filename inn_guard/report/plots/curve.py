"""One quantity of a training run against the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inn_guard.report.formatting import heading
from inn_guard.report.plots.axis_scale import Scale, scale_for
from inn_guard.report.plots.svg import (
    BAD,
    HIGH,
    LOW,
    Drawing,
    axes,
    decades,
    drawing,
    message,
)

__all__ = ["history"]

_DOTS = 60  #: more points than this are drawn as a line alone


def history(
    name: str, steps: Sequence[int], values: Sequence[float], *, failed: Sequence[bool]
) -> Drawing:
    """The values against the step, those of audits with findings marked.

    A vertical line marks each step whose value is NaN or Inf. A value without a place on a
    logarithmic axis, such as zero, is not drawn, and counted.

    Args:
        name: the quantity, "check.quantity" for one of a check.
        steps: where it was measured.
        values: what was measured, one for each step.
        failed: whether the audit of that step had findings, one for each step.
    """
    step = np.asarray(steps)
    numbers = np.asarray(values, dtype=np.float64)
    marked = np.asarray(failed, dtype=bool)
    quantity = name.rpartition(".")[2]
    scale = scale_for(numbers, quantity)
    places = scale.place(numbers)
    shown = ~np.isnan(places)
    label = scale.label(quantity)
    heads = heading(name.replace(".log10_", ": ").replace(".", ": ").removeprefix("log10_"))
    caption = _caption(step, numbers, scale, marked)
    if not shown.any():
        return drawing(message("no finite number to show", label), caption, title=heads)
    figure, axis = axes()
    for lost in step[~np.isfinite(numbers)]:
        axis.axvline(lost, color=BAD, linewidth=1)
    style = "-o" if len(step) <= _DOTS else "-"
    # the line is broken where a value has no place
    axis.plot(step, places, style, color=LOW, linewidth=1.2, markersize=3)
    axis.plot(step[shown & marked], places[shown & marked], "o", color=HIGH, markersize=4)
    axis.set_xlabel("training step")
    axis.set_ylabel(label)
    if scale.logarithmic:
        decades(axis.yaxis)
    return drawing(figure, caption, title=heads)


def _caption(step: np.ndarray, numbers: np.ndarray, scale: Scale, marked: np.ndarray) -> str:
    """First and last value, the audits with findings, and what is not drawn."""
    first, last = scale.text(numbers[0]), scale.text(numbers[-1])
    parts = [f"From {first} at step {step[0]} to {last} at step {step[-1]}."]
    if len(step) == 1:
        parts = [f"{first} at step {step[0]}, the only one."]
    if marked.any():
        parts.append(f"In orange: the {int(marked.sum())} of {len(step)} audits with findings.")
    lost = int((~np.isfinite(numbers)).sum())
    if lost:
        parts.append(f"Vertical lines: {lost} of {len(step)} steps with NaN or Inf.")
    absent = int(np.isnan(scale.place(numbers)).sum()) - lost
    if absent:
        parts.append(f"Not drawn: {absent} of {len(step)} steps, zero or negative.")
    return " ".join(parts)
