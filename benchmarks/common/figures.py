"""Figures: grids of images, curves with crosses where a value is not finite, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inn_guard.execution.files import atomic_write

__all__ = ["draw_grid_lines", "image_grid", "plot_finite", "save_figure", "training_curves"]


def save_figure(figure: Figure, path: Path, *, dpi: int = 80) -> None:
    """Write a figure as PNG, cropped to its content; its folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=dpi, bbox_inches="tight", format="png")


def image_grid(groups: Mapping[str, Tensor], *, columns: int = 10) -> Figure:
    """A figure of image groups, one below the other.

    Args:
        groups: title -> images (n, C, H, W) in [0, 1], C 1 or 3.
        columns: images in a row.
    """
    rows = [(title, part) for title, images in groups.items() for part in images.split(columns)]
    figure = Figure(figsize=(0.8 * columns, 0.85 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    previous = None
    for (title, part), row in zip(rows, panels, strict=True):
        for axes in row:
            axes.axis("off")
        for axes, image in zip(row, part, strict=False):
            picture = image.detach().cpu().permute(1, 2, 0).numpy().squeeze()
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if title != previous:
            row[0].set_title(title, fontsize=8, loc="left")
        previous = title
    return figure


def plot_finite(
    axis: Axes,
    x: pd.Series,
    y: pd.Series,
    line: str = "o-",
    *,
    color: str | None = None,
    label: str | None = None,
    markersize: float = 4,
    height: float = 0.96,
) -> None:
    """A curve of the finite values, and a cross at ``height`` of the axis for every other one."""
    finite = np.isfinite(y.astype(float))
    lost = x[~finite]
    axis.plot(x, y.where(finite), line, color=color, label=label, markersize=markersize)
    axis.plot(
        lost,
        [height] * len(lost),
        "x",
        color=color,
        markersize=markersize,
        transform=axis.get_xaxis_transform(),
    )


def training_curves(
    axis: Axes,
    frame: pd.DataFrame,
    column: str,
    *,
    by: str,
    colours: Mapping[str, str],
    other: str | None = None,
) -> None:
    """One curve of a column over the column "step" for each value of the column ``by``.

    Args:
        axis: to draw on.
        frame: rows of all curves.
        column: to draw.
        by: column that tells the curves apart; its values are their labels.
        colours: of the curves.
        other: colour of a curve that ``colours`` lacks; default: the next one of matplotlib.
    """
    for name, group in frame.groupby(by, sort=False):
        colour = colours.get(str(name), other)
        plot_finite(axis, group["step"], group[column], color=colour, label=str(name))
    draw_grid_lines(axis)


def draw_grid_lines(axis: Axes) -> None:
    """Light grid lines in both directions."""
    axis.grid(visible=True, color="#d9dde3", linewidth=0.6)
