"""image_grid: rows of small images with a title to each group."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["image_grid"]


def image_grid(groups: Mapping[str, Tensor], *, columns: int = 10) -> Figure:
    """A figure of image groups, one below the other.

    Args:
        groups: title -> images (n, C, H, W) in [0, 1], C 1 or 3.
        columns: images in a row.
    """
    rows = [(title, part) for title, images in groups.items() for part in images.split(columns)]
    figure = Figure(figsize=(0.8 * columns, 0.85 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for k, (title, part) in enumerate(rows):
        first = k == 0 or rows[k - 1][0] != title
        for j, axes in enumerate(panels[k]):
            axes.axis("off")
            if j < len(part):
                picture = part[j].detach().cpu().permute(1, 2, 0).numpy().squeeze()
                axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if first:
            panels[k][0].set_title(title, fontsize=8, loc="left")
    return figure
