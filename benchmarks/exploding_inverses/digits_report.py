"""How the digits experiment is shown: table, curves, and a page that links the reports."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.figures import training_curves
from inn_guard.execution.files import atomic_write

__all__ = ["draw", "final_table", "write_index"]

COLOURS = {"none": "#d55e00", "FD": "#0072b2", "NF": "#009e73"}
CURVES = {"condition_number": "worst condition number", "worst_error": "worst reconstruction error"}
HEADINGS = {
    "net": "Net",
    "regularizer": "Regularizer",
    "test_accuracy": "Test acc.",
    "worst_error": "Worst recons. err.",
    "median_error": "Median recons. err.",
    "condition_number": "Cond. num.",
    "sigma_min": "Min SV",
    "sigma_max": "Max SV",
    "verdict": "Verdict",
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Digits: exploding inverses</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; }}
body {{ max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #d9dde3; }}
th:nth-child(-n+2), td:nth-child(-n+2), th:last-child, td:last-child {{ text-align: left; }}
img {{ max-width: 100%; }}
p {{ max-width: 46rem; }}
</style></head><body>
<h1>Exploding inverses on digits</h1>
<p>Invertible classifiers of scikit-learn's digits after training, without a regularizer, with
bi-directional finite differences (FD) and with the normalizing-flow loss (NF). Errors are the
largest entry of F<sup>-1</sup>(F(x)) - x, in the data's units of two grey levels
(x = grey / 2 - 4); condition number and singular values are of the Jacobian, each the worst over
the held-out digits that were audited. Every net's name leads to its full report.</p>
{table}
<p><img alt="Condition number and reconstruction error during training"
src="data:image/png;base64,{image}"></p>
</body></html>
"""


def final_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The last checkpoint of every run, as text in the columns of the paper's table 10."""
    last = frame.groupby(["net", "regularizer"], sort=False).tail(1)
    table = last[list(HEADINGS)].copy()
    table["test_accuracy"] = (100 * table["test_accuracy"]).map("{:.1f} %".format)
    for column in ("worst_error", "median_error", "condition_number", "sigma_min", "sigma_max"):
        table[column] = table[column].map("{:.1e}".format)
    return table.rename(columns=HEADINGS)


def draw(frame: pd.DataFrame) -> Figure:
    """Condition number and reconstruction error over training, a column for each net."""
    nets = list(dict.fromkeys(frame["net"]))
    figure = Figure(figsize=(3.4 * len(nets) + 0.6, 5.4), layout="constrained")
    panels = figure.subplots(len(CURVES), len(nets), sharex=True, sharey="row", squeeze=False)
    for row, (column, label) in zip(panels, CURVES.items(), strict=True):
        for axis, net in zip(row, nets, strict=True):
            _curves(axis, frame[frame["net"] == net], column)
        row[0].set_ylabel(label)
    for axis, net in zip(panels[0], nets, strict=True):
        axis.set_title(f"{net} couplings")
    for axis in panels[-1]:
        axis.set_xlabel("training step")
    panels[0][0].legend(title="regularizer", frameon=False, fontsize=9)
    return figure


def _curves(axis: Axes, runs: pd.DataFrame, column: str) -> None:
    axis.set_yscale("log")
    training_curves(axis, runs, column, by="regularizer", colours=COLOURS)
    lost = runs["step"][~np.isfinite(runs[column])]
    if len(lost):
        axis.annotate(
            "NaN", (lost.min(), 0.9), xycoords=axis.get_xaxis_transform(), fontsize=8, va="top"
        )


def write_index(frame: pd.DataFrame, folder: Path) -> Path:
    """index.html: the table, its nets linked to their reports, and the curves."""
    folder.mkdir(parents=True, exist_ok=True)
    table = final_table(frame)
    pages = table["Net"] + "_" + table["Regularizer"] + ".html"
    table["Net"] = '<a href="' + pages + '">' + table["Net"] + "</a>"
    image = io.BytesIO()
    draw(frame).savefig(image, dpi=110, format="png")
    page = PAGE.format(
        table=table.to_html(index=False, border=0, escape=False),
        image=base64.b64encode(image.getvalue()).decode(),
    )
    with atomic_write(folder / "index.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return folder / "index.html"
