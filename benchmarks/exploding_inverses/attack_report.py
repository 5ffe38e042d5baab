"""How the attacks on flows are shown: the errors they found against what they cost, and pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.exploding_inverses.flow_report import grid

__all__ = ["draw", "grid"]

COLOURS = {"affine (0 1)": "#d55e00", "affine (0.5 1)": "#cc79a7", "residual": "#0072b2"}
LINES = {"paper": "-", "spectral": "--"}


def draw(frame: pd.DataFrame) -> Figure:
    """Figure 11, left: the largest error found so far against forward passes, and every image before and after."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, before_after = figure.subplots(1, 2)
    points = frame[frame["kind"] == "curve"]
    for (flow, inverse, search), group in points.groupby(["flow", "inverse", "search"], sort=False):
        finite = group[
            np.isfinite(group["largest_error"].astype(float)) & (group["largest_error"] > 0)
        ]
        few = inverse != "exact"
        style = {"color": COLOURS[str(flow)], "linestyle": ":" if few else LINES[str(search)]}
        label = f"{flow}, {search}" + (f", {inverse}" if few else "")
        curves.plot(finite["forward_equivalents"], finite["largest_error"], label=label, **style)
        lost = group[group["broken_samples"] > 0].head(1)
        curves.plot(lost["forward_equivalents"], [0.96] * len(lost), "x", color=style["color"],
                    transform=curves.get_xaxis_transform())  # fmt: skip
    curves.set(yscale="log", xlabel="forward passes per image", ylabel="largest error found, Euclidean",
               title="x: a reconstruction is not finite")  # fmt: skip
    images = frame[(frame["kind"] == "image") & (frame["inverse"] == "exact")]
    for (flow, search), group in images.groupby(["flow", "search"], sort=False):
        marker = "o" if search == "paper" else "^"
        before_after.loglog(group["centre_error"], group["error"], marker, color=COLOURS[str(flow)],
                            markersize=4, label=f"{flow}, {search}")  # fmt: skip
    before_after.axline((1e-6, 1e-6), (1e-5, 1e-5), color="black", linewidth=0.8)
    before_after.set(xlabel="error at the centre of the cube", ylabel="largest error found")
    for axis in (curves, before_after):
        axis.grid(visible=True, color="#d9dde3", linewidth=0.6)
    curves.legend(frameon=False, fontsize=7)
    return figure
