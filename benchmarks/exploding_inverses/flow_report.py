"""How the flows of images are shown: stability over training, families of inputs, and pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.figures import image_grid, training_curves

__all__ = ["draw", "grid"]

COLOURS = {"affine": "#d55e00", "additive": "#0072b2"}
CURVES = {
    "bits_per_dimension": "bits per dimension, test",
    "condition_number": "worst condition number",
    "worst_squared_error": "worst squared recons. error",
}
CYAN = (0.0, 1.0, 1.0)  #: pixels that are not finite


def draw(frame: pd.DataFrame) -> Figure:
    """Figure 9, and the round trips of every family of inputs at the end."""
    evaluations, families = frame[frame["family"] == ""], frame[frame["family"] != ""]
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    for axis, (name, label) in zip(upper.subplots(1, 3), CURVES.items(), strict=True):
        training_curves(axis, evaluations, name, by="coupling", colours=COLOURS)
        axis.set(xlabel="training step", ylabel=label, yscale="log")
    upper.axes[0].set_yscale("linear")
    upper.axes[0].legend(frameon=False)
    _families(lower.subplots(), families)
    return figure


def _families(axis: Axes, families: pd.DataFrame) -> None:
    """One line per family: the largest error of a round trip, or a cross if one is not finite."""
    names = list(dict.fromkeys(families["family"]))
    height = {name: len(names) - k for k, name in enumerate(names)}
    groups = families.groupby("coupling", sort=False)
    for offset, (coupling, group) in zip((0.15, -0.15), groups, strict=False):
        colour = COLOURS[str(coupling)]
        y = group["family"].map(height) + offset
        error = group["max_error"].astype(float)
        finite = np.isfinite(error)
        axis.plot(error[finite], y[finite], "o", color=colour, label=coupling, markersize=4)
        lost = y[~finite]
        axis.plot(
            [0.985] * len(lost), lost, "x", color=colour, transform=axis.get_yaxis_transform()
        )
    axis.axvline(1e-2, color="black", linewidth=0.8)
    axis.annotate(
        "usable", (1e-2, 0.2), xytext=(-3, 0), textcoords="offset points", ha="right", fontsize=8
    )
    axis.set_yticks(list(height.values()), list(height))
    axis.set(
        xscale="log",
        ylim=(0, len(names) + 1),
        title="Round trips from inputs of every family, after training",
        xlabel="largest error over the scale of the input (x: not finite)",
    )
    axis.grid(visible=True, axis="y", color="#d9dde3", linewidth=0.6)


def grid(groups: Mapping[str, Tensor], *, columns: int) -> Figure:
    """Images in [0, 1], clipped; pixels that are not finite in cyan, as in the paper's table 5."""
    shown = {title: _shown(images) for title, images in groups.items()}
    figure = image_grid(shown, columns=columns)
    for axis in figure.axes:
        if title := axis.get_title(loc="left"):
            # a title wider than its image must not widen the column; a blank one keeps the row's
            # height
            axis.set_title("", loc="left")
            axis.set_title(" ", fontsize=8)
            label = axis.annotate(
                title, (0, 1), (0, 4), "axes fraction", textcoords="offset points", fontsize=8
            )
            label.set_in_layout(False)
    return figure


def _shown(images: Tensor) -> Tensor:
    colour = images.expand(-1, 3, -1, -1)
    lost = ~colour.isfinite().all(1, keepdim=True)
    cyan = torch.tensor(CYAN, dtype=colour.dtype).reshape(1, 3, 1, 1)
    return torch.where(lost, cyan, colour.nan_to_num(0.0)).clamp(0, 1)
