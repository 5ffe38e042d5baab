"""Whether finite differences on a share of the batch stabilise as well as on all of it, on digits classifiers.

    python -m benchmarks.exploding_inverses.share_of_batch --preset cpu      # about 6 minutes of one idle core

The plain affine net of `digits_classifier`, trained without regularizer and with bi-directional finite differences on
all, a quarter and an eighth of each penalised batch, from the same seeds, which choose weights, batches and the
held-out digits. Measured at the end, on held-out digits, as there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses import digits_classifier

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config:
    """One training per share and seed; share 0 is the net without regularizer.

    Attributes:
        shares: of the batch.
        seeds: of weights, batches, noise and the choice of held-out digits.
        training: everything else.
    """

    shares: tuple[float, ...] = (0.0, 1 / 8, 1 / 4, 1.0)
    seeds: tuple[int, ...] = (1, 2, 3)
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
    training = dataclasses.replace(config.training, seed=seed, fd_fraction=share or 1.0)
    row = digits_classifier.measure(training, "plain", "FD" if share else "none")[-1]
    return [
        {
            "share": share,
            "seed": seed,
            **{key: row[key] for key in row if key not in ("net", "regularizer")},
        }
    ]


def run(config: Config) -> pd.DataFrame:
    """All trainings."""
    cases = {
        f"share {share:g}, seed {seed}": (share, seed)
        for share in config.shares
        for seed in config.seeds
    }
    frame = collect(config, cases, measure)
    shown = frame.groupby("share")[["test_accuracy", "worst_error", "condition_number"]].agg(
        ["min", "median", "max"]
    )
    print(shown.to_string())
    return frame


def draw(frame: pd.DataFrame) -> Figure:
    """Condition number and accuracy of every run against the share."""
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, 2),
        (
            ("condition_number", "worst condition number, held-out digits"),
            ("test_accuracy", "accuracy"),
        ),
        strict=True,
    ):
        for k, share in enumerate(sorted(frame.share.unique())):
            values = frame[frame.share == share][column]
            axes.plot([k] * len(values), values, "o", alpha=0.7)
        axes.set_xticks(
            range(frame.share.nunique()),
            [f"{s:.3g}" if s else "none" for s in sorted(frame.share.unique())],
        )
        axes.set(xlabel="share of the batch that is penalised", ylabel=label)
        if column == "condition_number":
            axes.set_yscale("log")
    return figure


if __name__ == "__main__":
    main(__name__)
