"""How the attacks on flows are shown: the errors they found against what they cost."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.figures import draw_grid_lines

__all__ = ["draw"]

COLOURS = {"affine (0 1)": "#d55e00", "affine (0.5 1)": "#cc79a7", "residual": "#0072b2"}
LINES = {"paper": "-", "spectral": "--"}
MARKERS = {"paper": "o", "spectral": "^"}


def draw(frame: pd.DataFrame) -> Figure:
    """Figure 11, left: errors found against forward passes; right: images before and after."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, before_after = figure.subplots(1, 2)
    _curves(curves, frame[frame["kind"] == "curve"])
    images = frame[(frame["kind"] == "image") & (frame["inverse"] == "exact")]
    for (flow, search), group in images.groupby(["flow", "search"], sort=False):
        before_after.loglog(
            group["centre_error"],
            group["error"],
            MARKERS[str(search)],
            color=COLOURS[str(flow)],
            markersize=4,
            label=f"{flow}, {search}",
        )
    before_after.axline((1e-6, 1e-6), (1e-5, 1e-5), color="black", linewidth=0.8)
    before_after.set(xlabel="error at the centre of the cube", ylabel="largest error found")
    for axis in (curves, before_after):
        draw_grid_lines(axis)
    curves.legend(frameon=False, fontsize=7)
    return figure


def _curves(axis: Axes, points: pd.DataFrame) -> None:
    """The largest error found so far; a cross where a reconstruction is not finite."""
    for (flow, inverse, search), group in points.groupby(["flow", "inverse", "search"], sort=False):
        error = group["largest_error"].astype(float)
        finite = group[np.isfinite(error) & (error > 0)]
        colour, line, label = COLOURS[str(flow)], LINES[str(search)], f"{flow}, {search}"
        if inverse != "exact":
            line, label = ":", f"{label}, {inverse}"
        axis.plot(
            finite["forward_equivalents"],
            finite["largest_error"],
            color=colour,
            linestyle=line,
            label=label,
        )
        lost = group[group["broken_samples"] > 0].head(1)
        axis.plot(
            lost["forward_equivalents"],
            [0.96] * len(lost),
            "x",
            color=colour,
            transform=axis.get_xaxis_transform(),
        )
    axis.set(
        yscale="log",
        xlabel="forward passes per image",
        ylabel="largest error found, Euclidean",
        title="x: a reconstruction is not finite",
    )
