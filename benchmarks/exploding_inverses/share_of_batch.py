"""Whether finite differences on a share of the batch stabilise as well as on all of it.

    inn-guard bench exploding_inverses.share_of_batch --preset cpu

The plain affine net of `digits_classifier`, trained without regularizer and with bi-directional
finite differences on all, a quarter and an eighth of each penalised batch, from the same seeds,
which choose weights, batches and the held-out digits. Measured at the end, on held-out digits, as
there.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses import digits_classifier


@dataclass(frozen=True)
class Config:
    """One training per share and seed; share 0 is the net without regularizer."""

    shares: tuple[float, ...] = (0.0, 1 / 8, 1 / 4, 1.0)  # of the batch
    # of weights, batches, noise and the choice of held-out digits
    seeds: tuple[int, ...] = (1, 2, 3)
    # everything else
    training: digits_classifier.Config = field(default=digits_classifier.Config(checkpoints=1))


PRESETS = {
    "smoke": {
        "shares": (1 / 8, 1.0),
        "seeds": (1,),
        "training": digits_classifier.Config(**digits_classifier.PRESETS["smoke"]),
    },
    "cpu": {},  # six minutes of one idle core
}


def measure(config: Config, case: tuple[float, int]) -> list[Row]:
    """Train one net; one row, of its end."""
    share, seed = case
    regularizer = "none"
    if share:
        regularizer = "FD"
    training = dataclasses.replace(config.training, seed=seed, fd_fraction=share or 1.0)
    row = digits_classifier.measure(training, "plain", regularizer)[-1]
    del row["net"], row["regularizer"]
    return [{"share": share, "seed": seed, **row}]


def run(config: Config) -> pd.DataFrame:
    pairs = itertools.product(config.shares, config.seeds)
    cases = {f"share {share:g}, seed {seed}": (share, seed) for share, seed in pairs}
    frame = collect(config, cases, measure)
    columns = frame.groupby("share")[["test_accuracy", "worst_error", "condition_number"]]
    print(columns.agg(["min", "median", "max"]).to_string())
    return frame


def draw(frame: pd.DataFrame) -> Figure:
    """Condition number and accuracy of every run against the share."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "condition_number"), (right, "test_accuracy")):
        ticks = []
        for k, (share, group) in enumerate(frame.groupby("share")):
            axes.plot([k] * len(group), group[column], "o", alpha=0.7)
            ticks.append(f"{share:.3g}")
        if frame.share.min() == 0:
            ticks[0] = "none"
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel="share of the batch that is penalised")
    left.set(ylabel="worst condition number, held-out digits", yscale="log")
    right.set(ylabel="accuracy")
    return figure


if __name__ == "__main__":
    main(__name__)
