"""Figures of the AEF experiments: bits per dimension, and grids of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["IMAGES", "draw", "grid", "image_file"]

IMAGES = Path("runs") / "aef_images"  #: where a run leaves the images of its first seed
COLUMNS = 16


def image_file(dataset: str, model: str, latent: int) -> Path:
    """The file of one model's images."""
    return IMAGES / f"{dataset}-{model.replace(' ', '_')}-{latent}.npz"


def draw(frame: pd.DataFrame) -> Figure:
    """Bits per dimension; test images, reconstructions and samples of every model."""
    rows = [tuple(row) for row in frame[["model", "latent"]].drop_duplicates().to_numpy()]
    dataset = frame["case"].iloc[0].split(" ")[0]
    figure = Figure(figsize=(15, 1.6 + 0.9 * len(rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.4])
    _bits(left.subplots(), frame)
    axes = right.subplots(len(rows), 2, squeeze=False)
    for (model, latent), (reconstructions, samples) in zip(rows, axes, strict=True):
        path = image_file(dataset, model, latent)
        if not path.exists():
            continue
        with np.load(path) as images:
            pairs = np.concatenate([images["test"][:COLUMNS], images["reconstructed"][:COLUMNS]])
            grid(reconstructions, pairs)
            grid(samples, images["generated"][: 2 * COLUMNS])
        reconstructions.set_title(
            f"{model}, d = {latent}: test images above, reconstructions below", fontsize=8
        )
        samples.set_title("samples, temperature 0.85", fontsize=8)
    return figure


def grid(axes: Axes, images: np.ndarray) -> None:
    """Images (n, C, H, W) in [0, 1], ``COLUMNS`` a row, white on black, with a line between."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=0.5)
    starts = range(0, len(padded), COLUMNS)
    rows = [np.concatenate(padded[start : start + COLUMNS], axis=2) for start in starts]
    axes.imshow(
        np.concatenate(rows, axis=1).transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1
    )
    axes.set_axis_off()


def _bits(axes: Axes, frame: pd.DataFrame) -> None:
    latents = sorted(frame["latent"].unique())
    for offset, (model, rows) in enumerate(frame.groupby("model", sort=False)):
        places = [latents.index(latent) + 0.12 * (offset - 1) for latent in rows["latent"]]
        axes.plot(places, rows["bpd_mode"], "o", label=model, alpha=0.8)
    axes.set_xticks(range(len(latents)), [f"d = {latent}" for latent in latents])
    axes.set(xlim=(-0.5, len(latents) - 0.5), ylabel="bits per dimension, lower is better")
    axes.set_title(
        f"{frame['dataset'].iloc[0]}, {frame['steps'].iloc[0]} steps, one point per seed",
        fontsize=9,
    )
    axes.legend(fontsize=8)
