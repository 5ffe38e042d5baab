"""How the image classifiers are shown: the paper's table beside ours, and curves over training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["compare_with_paper", "draw", "draw_angles", "with_theirs"]

TABLE = Path(__file__).parent.parent / "reference" / "cifar10_classifiers_table9.csv"
KEYS = ["coupling", "mixing", "regularizer"]
THEIRS = {
    "test_acc": "their_test_accuracy",
    "recons_err": "their_reconstruction_error",
    "cond": "their_condition_number",
    "min_sv": "their_sigma_min",
    "max_sv": "their_sigma_max",
}
PANELS = {
    "condition_number": "condition number",
    "sigma_min": "smallest singular value",
    "sigma_max": "largest singular value",
    "worst_reconstruction_error": "worst recons. error",
    "mean_angle": "gradient angle, degrees",
    "test_accuracy": "test accuracy",
}
COLOURS = {
    "none": ("#d55e00",),
    "FD": ("#0072b2", "#56b4e9", "#003f63"),
    "NF": ("#009e73", "#7fd1b9", "#00543d"),
}


def with_theirs(frame: pd.DataFrame) -> pd.DataFrame:
    """``their_*`` columns of table 9, filled at the last row of every run on CIFAR-10 that the table has."""
    table = pd.read_csv(TABLE).rename(columns={"permutation": "mixing", **THEIRS})
    table["regularizer"] = table["regularizer"].replace({"fd": "FD", "nf": "NF"})
    table["their_test_accuracy"] /= 100
    frame = frame.copy()
    frame[list(THEIRS.values())] = np.nan
    for index in (
        frame[frame["data"].str.startswith("CIFAR-10")].groupby("case", sort=False).tail(1).index
    ):
        same = (table[KEYS] == frame.loc[index, KEYS]).all(axis=1)
        # the additive net with shuffles stands in the table without its coefficients
        same &= table["coefficient"].isna() | np.isclose(
            table["coefficient"], frame.loc[index, "coefficient"]
        )
        if same.any():
            frame.loc[index, list(THEIRS.values())] = (
                table.loc[same, list(THEIRS.values())].iloc[0].astype(float)
            )
    return frame


def compare_with_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """The last look of every run, ours / the paper's."""
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
    theirs = row[f"their_{name}"]
    absent = pd.isna(theirs) and pd.isna(row["their_test_accuracy"])
    return f"{form.format(row[name])} / {'-' if absent else form.format(theirs)}"


def draw(frame: pd.DataFrame) -> Figure:
    """Figures 14 to 18: what training does to every net, a column for each architecture."""
    nets = list(dict.fromkeys(zip(frame["coupling"], frame["mixing"], strict=True)))
    panels = {name: label for name, label in PANELS.items() if frame[name].notna().any()}
    figure = Figure(figsize=(3.3 * len(nets) + 1.6, 2.1 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), len(nets), sharex=True, sharey="row", squeeze=False)
    colours = _colours(frame)
    for row, (name, label) in zip(axes, panels.items(), strict=True):
        for axis, (coupling, mixing) in zip(row, nets, strict=True):
            _curves(
                axis,
                frame[(frame["coupling"] == coupling) & (frame["mixing"] == mixing)],
                name,
                colours,
            )
        row[0].set_ylabel(label)
    for axis, (coupling, mixing) in zip(axes[0], nets, strict=True):
        axis.set_title(f"{coupling}, {'1x1 convolutions' if mixing == 'conv' else 'shuffles'}")
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    handles = {
        h.get_label(): h
        for axis in axes[0]
        for h in axis.get_lines()
        if not h.get_label().startswith("_")
    }
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
    return f"{regularizer} {coefficient:.0e}".replace("e-0", "e-") if coefficient else regularizer


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
    axis.grid(visible=True, color="#d9dde3", linewidth=0.6)
    for k, (_, curve) in enumerate(runs.groupby("case", sort=False)):
        label = _label(curve["regularizer"].iloc[0], curve["coefficient"].iloc[0])
        finite = np.isfinite(curve[name])
        axis.plot(
            curve["step"],
            curve[name].where(finite),
            "o-",
            markersize=3,
            color=colours[label],
            label=label,
        )
        lost = curve["step"][~finite]
        heights = [0.96 - 0.05 * k] * len(lost)
        axis.plot(lost, heights, "x", color=colours[label], transform=axis.get_xaxis_transform())
