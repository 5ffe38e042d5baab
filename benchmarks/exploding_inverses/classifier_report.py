"""How the image classifiers are shown: the paper's table next to ours, and curves over training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.figures import draw_grid_lines, plot_finite

__all__ = ["compare_with_paper", "draw", "draw_angles", "with_paper_columns"]

TABLE = Path(__file__).parent.parent / "reference" / "cifar10_classifiers_table9.csv"
KEYS = ["coupling", "mixing", "regularizer"]
PAPER_COLUMNS = {
    "test_acc": "paper_test_accuracy",
    "recons_err": "paper_reconstruction_error",
    "cond": "paper_condition_number",
    "min_sv": "paper_sigma_min",
    "max_sv": "paper_sigma_max",
}
PANELS = {
    "condition_number": "condition number",
    "sigma_min": "smallest singular value",
    "sigma_max": "largest singular value",
    "worst_reconstruction_error": "worst recons. error",
    "mean_angle": "gradient angle, degrees",
    "test_accuracy": "test accuracy",
}
MIXING_NAMES = {"conv": "1x1 convolutions", "shuffle": "shuffles"}
COLOURS = {
    "none": ("#d55e00",),
    "FD": ("#0072b2", "#56b4e9", "#003f63"),
    "NF": ("#009e73", "#7fd1b9", "#00543d"),
}


def with_paper_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns ``paper_*`` of table 9, in the last row of every run on CIFAR-10 that it has."""
    table = pd.read_csv(TABLE).rename(columns={"permutation": "mixing", **PAPER_COLUMNS})
    table["regularizer"] = table["regularizer"].replace({"fd": "FD", "nf": "NF"})
    table["paper_test_accuracy"] /= 100
    columns = list(PAPER_COLUMNS.values())
    frame = frame.copy()
    frame[columns] = np.nan
    last = frame[frame["data"].str.startswith("CIFAR-10")].groupby("case", sort=False).tail(1)
    for index, row in last.iterrows():
        same = (table[KEYS] == row[KEYS]).all(axis=1)
        # the table has the additive net with shuffles without its coefficients
        same &= table["coefficient"].isna() | np.isclose(table["coefficient"], row["coefficient"])
        if same.any():
            frame.loc[index, columns] = table.loc[same, columns].iloc[0].astype(float)
    return frame


def compare_with_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of every run, ours / the paper's."""
    rows = []
    for case, group in frame.groupby("case", sort=False):
        last = group.iloc[-1]
        row = {"run": case, "accuracy": _pair(last, "test_accuracy", "{:.1%}")}
        for name in ("reconstruction_error", "condition_number", "sigma_min", "sigma_max"):
            row[name] = _pair(last, name, "{:.1e}")
        row["broken"] = last["broken_images"]
        row["angle"] = f"{last['mean_angle']:.2g}"
        rows.append(row)
    return pd.DataFrame(rows)


def _pair(row: pd.Series, name: str, form: str) -> str:
    paper = "-"
    # a figure that is NaN in the table is one that the paper prints as lost
    if pd.notna(row[f"paper_{name}"]) or pd.notna(row["paper_test_accuracy"]):
        paper = form.format(row[f"paper_{name}"])
    return f"{form.format(row[name])} / {paper}"


def draw(frame: pd.DataFrame) -> Figure:
    """Figures 14 to 18: what training does to every net, a column for each architecture."""
    nets = list(frame.groupby(["coupling", "mixing"], sort=False))
    panels = [name for name in PANELS if frame[name].notna().any()]
    figure = Figure(figsize=(3.3 * len(nets) + 1.6, 2.1 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), len(nets), sharex=True, sharey="row", squeeze=False)
    colours = _colours(frame)
    handles = {}
    for column, ((coupling, mixing), runs) in zip(axes.T, nets, strict=True):
        for axis, name in zip(column, panels, strict=True):
            _curves(axis, runs, name, colours)
        column[0].set_title(f"{coupling}, {MIXING_NAMES[mixing]}")
        column[-1].set_xlabel("training step")
        found, labels = column[0].get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    for axis, name in zip(axes[:, 0], panels, strict=True):
        axis.set_ylabel(PANELS[name])
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right upper",
        frameon=False,
        title="x: not finite",
    )
    return figure


def draw_angles(frame: pd.DataFrame) -> Figure:
    """Figure 18: the gradient's angle and the reconstruction over the steps of training."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("mean_angle", "worst_reconstruction_error"), strict=True):
        _curves(axis, frame, name, _colours(frame))
        axis.set(xlabel="training step", ylabel=PANELS[name])
    axes[0].axhline(90, color="black", linewidth=0.8)
    axes[0].annotate("90 degrees", (0, 90), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes[1].annotate("x: not finite", (0.02, 0.9), xycoords="axes fraction", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _label(regularizer: str, coefficient: float) -> str:
    if not coefficient:
        return regularizer
    return f"{regularizer} {coefficient:.0e}".replace("e-0", "e-")


def _colours(frame: pd.DataFrame) -> dict[str, str]:
    """A hue for each regularizer, a shade for each of its coefficients."""
    shades: dict[str, str] = {}
    for regularizer, group in frame.groupby("regularizer", sort=False):
        palette = COLOURS[str(regularizer)]
        for k, coefficient in enumerate(dict.fromkeys(group["coefficient"])):
            shades[_label(str(regularizer), coefficient)] = palette[k % len(palette)]
    return shades


def _curves(axis: Axes, runs: pd.DataFrame, name: str, colours: dict[str, str]) -> None:
    if name != "test_accuracy":
        axis.set_yscale("log")
    draw_grid_lines(axis)
    for k, (_, curve) in enumerate(runs.groupby("case", sort=False)):
        label = _label(curve["regularizer"].iloc[0], curve["coefficient"].iloc[0])
        # every run has its crosses at a height of its own
        plot_finite(
            axis,
            curve["step"],
            curve[name],
            color=colours[label],
            label=label,
            markersize=3,
            height=0.96 - 0.05 * k,
        )
