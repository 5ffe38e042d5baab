"""Draws the README's picture from the committed results of the digits classifier.

python docs/figure.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "exploding_inverses_digits_classifier.csv"
IMAGE = ROOT / "docs" / "images" / "exploding_inverse.png"
NET = "plain"
CURVES = {
    "none": ("no regularizer", "#d55e00"),
    "NF": ("normalizing-flow loss", "#009e73"),
    "FD": ("finite differences", "#0072b2"),
}
PANELS = {
    "condition_number": "worst condition number",
    "worst_error": "worst reconstruction error",
}


def draw() -> Figure:
    """Condition number and reconstruction error over training, with and without a regularizer."""
    frame = pd.read_csv(RESULTS)
    frame = frame[frame["net"] == NET]
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    for axis, (column, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("training step")
        axis.set_xticks(sorted(frame["step"].unique()))
        axis.set_xlim(240, 1270)
        axis.grid(visible=True, color="#d9dde3", linewidth=0.6)
        for name, (label, colour) in CURVES.items():
            run = frame[frame["regularizer"] == name]
            axis.plot(run["step"], run[column], "o-", color=colour, markersize=4, label=label)
        _mark_lost(axis, frame[frame["regularizer"] == "none"], column)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="center right")
    return figure


def _mark_lost(axis: Axes, run: pd.DataFrame, column: str) -> None:
    lost = run["step"][run[column].isna()]
    for step in lost:
        axis.annotate(
            "NaN",
            (step, 0.93),
            xycoords=axis.get_xaxis_transform(),
            fontsize=9,
            ha="center",
            va="top",
            color=CURVES["none"][1],
        )


if __name__ == "__main__":
    IMAGE.parent.mkdir(exist_ok=True)
    draw().savefig(IMAGE, dpi=140)
