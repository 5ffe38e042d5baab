"""One quantity of a training run against the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inn_guard.report.formatting import format_number, heading, title
from inn_guard.report.plots.axis_scale import scale_for
from inn_guard.report.plots.svg import BAD, HIGH, LOW, Drawing, axes, decades, drawing

__all__ = ["history"]

_DOTS = 60  # more points than this are drawn as a line alone


def history(
    name: str, steps: Sequence[int], values: Sequence[float], *, failed: Sequence[bool]
) -> Drawing:
    """The values against the step, those of audits with findings marked, logarithmic where the numbers ask for it.

    Steps whose value is NaN or Inf, or has no place on a logarithmic axis, are drawn as lines over
    the whole height.

    Args:
        name: the quantity.
        steps: where it was measured.
        values: what was measured, one for each step.
        failed: whether the audit of that step had findings, one for each step.
    """
    step, numbers, marked = (
        np.asarray(steps),
        np.asarray(values, dtype=np.float64),
        np.asarray(failed, dtype=bool),
    )
    scale = scale_for(numbers)
    places = scale.place(numbers)
    shown = ~np.isnan(places)
    figure, axis = axes()
    for lost in step[~shown]:
        axis.axvline(lost, color=BAD, linewidth=1)
    # the line is broken where a value has no place
    axis.plot(
        step, places, "-o" if len(step) <= _DOTS else "-", color=LOW, linewidth=1.2, markersize=3
    )
    axis.plot(step[shown & marked], places[shown & marked], "o", color=HIGH, markersize=4)
    axis.set_xlabel("training step")
    axis.set_ylabel(scale.label(title(_short(name))))
    if scale.logarithmic and shown.any():
        decades(axis.yaxis)
    if not shown.any():
        axis.text(
            0.5, 0.5, "no finite number to show", color=BAD, ha="center", transform=axis.transAxes
        )
    return drawing(
        figure, _caption(step, numbers, shown, marked), title=heading(name.replace(".", ": "))
    )


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _caption(step: np.ndarray, numbers: np.ndarray, shown: np.ndarray, marked: np.ndarray) -> str:
    ends = f"From {format_number(numbers[0])} at step {step[0]} to {format_number(numbers[-1])} at step {step[-1]}."
    findings = (
        f" In orange: the {int(marked.sum())} of {len(step)} audits with findings."
        if marked.any()
        else ""
    )
    lost = (
        f" Vertical lines: {int((~shown).sum())} steps without a number to draw."
        if not shown.all()
        else ""
    )
    return ends + findings + lost
