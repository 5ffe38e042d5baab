"""How the flows of images are shown: stability over training, families of inputs, and pictures."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.image_grid import image_grid

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
    looks, families = frame[frame["family"] == ""], frame[frame["family"] != ""]
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    for axis, (name, label) in zip(upper.subplots(1, 3), CURVES.items(), strict=True):
        for coupling, group in looks.groupby("coupling", sort=False):
            finite = np.isfinite(group[name])
            style = {"color": COLOURS[str(coupling)], "label": coupling, "markersize": 3}
            axis.plot(group["step"], group[name].where(finite), "o-", **style)
            axis.plot(group["step"][~finite], [0.96] * int((~finite).sum()), "x", color=COLOURS[str(coupling)],
                      transform=axis.get_xaxis_transform())  # fmt: skip
        axis.set(
            xlabel="training step",
            ylabel=label,
            yscale="linear" if name.startswith("bits") else "log",
        )
        axis.grid(visible=True, color="#d9dde3", linewidth=0.6)
    upper.axes[0].legend(frameon=False)
    _families(lower.subplots(), families)
    return figure


def _families(axis: Axes, families: pd.DataFrame) -> None:
    """One line per family: the largest error of a round trip, or a cross where one is not finite."""
    names = list(dict.fromkeys(families["family"]))
    height = {name: len(names) - k for k, name in enumerate(names)}
    for offset, (coupling, group) in zip(
        (0.15, -0.15), families.groupby("coupling", sort=False), strict=False
    ):
        y = np.array([height[name] + offset for name in group["family"]])
        error = group["max_error"].to_numpy(dtype=float)
        finite = np.isfinite(error)
        axis.plot(
            error[finite],
            y[finite],
            "o",
            color=COLOURS[str(coupling)],
            label=coupling,
            markersize=4,
        )
        axis.plot([0.985] * int((~finite).sum()), y[~finite], "x", color=COLOURS[str(coupling)],
                  transform=axis.get_yaxis_transform())  # fmt: skip
    axis.axvline(1e-2, color="black", linewidth=0.8)
    axis.annotate(
        "usable", (1e-2, 0.2), xytext=(-3, 0), textcoords="offset points", ha="right", fontsize=8
    )
    axis.set_yticks(list(height.values()), list(height))
    axis.set(xscale="log", ylim=(0, len(names) + 1), title="Round trips from inputs of every family, after training",
             xlabel="largest error over the scale of the input (x: not finite)")  # fmt: skip
    axis.grid(visible=True, axis="y", color="#d9dde3", linewidth=0.6)


def grid(groups: Mapping[str, Tensor], *, columns: int) -> Figure:
    """Images in [0, 1], clipped; pixels that are not finite in cyan, as in the paper's table 5."""
    figure = image_grid(
        {title: _shown(images) for title, images in groups.items()}, columns=columns
    )
    for axis in figure.axes:
        if title := axis.get_title(loc="left"):
            # a title wider than its image must not widen the column; a blank one keeps the row's height
            axis.set_title("", loc="left")
            axis.set_title(" ", fontsize=8)
            label = axis.annotate(
                title, (0, 1), (0, 4), "axes fraction", textcoords="offset points", fontsize=8
            )
            label.set_in_layout(False)
    return figure


def _shown(images: Tensor) -> Tensor:
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    lost = ~colour.isfinite().all(1, keepdim=True)
    cyan = torch.tensor(CYAN, dtype=colour.dtype).reshape(1, 3, 1, 1)
    return torch.where(lost, cyan, colour.nan_to_num(0.0)).clamp(0, 1)
