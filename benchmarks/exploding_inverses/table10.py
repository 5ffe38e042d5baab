"""The conclusions of tables 9 and 10, each counted over the runs it speaks of: in the paper's figures and in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["TABLE_10", "conclusions"]

#: net -> its regularized runs in table 10; the coefficients of the additive net with shuffles are not printed
TABLE_10 = {
    "additive shuffle": ("FD 5e-5", "NF 1e-5"),
    "additive conv": ("FD 5e-5", "NF 1e-5"),
    "affine shuffle": ("FD 1e-4", "NF 1e-5"),
    "affine conv": ("FD 1e-4", "NF 1e-5"),
}
COLUMNS = ("test_accuracy", "reconstruction_error", "condition_number")
Pair = tuple[str, str]  #: two runs
BESIDE_PLAIN = tuple(
    (f"{net} {run}", f"{net} none") for net, runs in TABLE_10.items() for run in runs
)
OF_PLAIN = tuple((f"{net} none", f"{net} none") for net in TABLE_10)
CONV_AND_SHUFFLE = tuple(
    (f"{coupling} conv {run}", f"{coupling} shuffle {run}")
    for coupling in ("additive", "affine")
    for run in ("none", *TABLE_10[f"{coupling} conv"])
)


@dataclass(frozen=True)
class Conclusion:
    """What the paper says of pairs of runs.

    Attributes:
        text: in words.
        pairs: of runs; a conclusion about single runs has each of them twice.
        holds: whether it is so of the figures of the two.
    """

    text: str
    pairs: tuple[Pair, ...]
    holds: Callable[[pd.Series, pd.Series], bool]

    def counted(self, table: pd.DataFrame) -> str:
        """Of how many pairs of those that were run it is so."""
        there = [(table.loc[a], table.loc[b]) for a, b in self.pairs if {a, b} <= set(table.index)]
        return f"{sum(self.holds(a, b) for a, b in there)} of {len(there)}"


def _lost(run: pd.Series) -> bool:
    return not np.isfinite(run["reconstruction_error"])


def _smaller_condition(a: pd.Series, b: pd.Series) -> bool:
    return bool(a["condition_number"] < b["condition_number"])


def _beside_plain(regularizer: str) -> tuple[Pair, ...]:
    return tuple(pair for pair in BESIDE_PLAIN if f" {regularizer} " in pair[0])


CONCLUSIONS = (
    Conclusion(
        "without regularizer affine nets lose images, additive ones do not",
        OF_PLAIN,
        lambda a, _: _lost(a) == str(a.name).startswith("affine"),
    ),
    Conclusion(
        "with FD or NF no image is lost",
        tuple((a, a) for a, _ in BESIDE_PLAIN),
        lambda a, _: not _lost(a),
    ),
    Conclusion("FD lowers the condition number", _beside_plain("FD"), _smaller_condition),
    Conclusion("NF lowers the condition number", _beside_plain("NF"), _smaller_condition),
    Conclusion(
        "FD leaves a lower one than NF",
        tuple((f"{net} {fd}", f"{net} {nf}") for net, (fd, nf) in TABLE_10.items()),
        _smaller_condition,
    ),
    Conclusion(
        "FD or NF cost at most two points of accuracy",
        BESIDE_PLAIN,
        lambda a, b: bool(a["test_accuracy"] >= b["test_accuracy"] - 0.02),
    ),
    Conclusion(
        "NF 1e-3 costs more than two points",
        tuple((f"{net} NF 1e-3", f"{net} none") for net in TABLE_10),
        lambda a, b: bool(a["test_accuracy"] < b["test_accuracy"] - 0.02),
    ),
    Conclusion(
        "FD 1e-3 leaves a lower condition number than FD 1e-4",
        tuple((f"{net} FD 1e-3", f"{net} FD 1e-4") for net in TABLE_10),
        _smaller_condition,
    ),
    Conclusion(
        "1x1 convolutions classify better than shuffles",
        CONV_AND_SHUFFLE,
        lambda a, b: bool(a["test_accuracy"] > b["test_accuracy"]),
    ),
    Conclusion(
        "and reconstruct worse, or lose images as well",
        CONV_AND_SHUFFLE,
        lambda a, b: _lost(a) or bool(a["reconstruction_error"] > b["reconstruction_error"]),
    ),
)


def conclusions(frame: pd.DataFrame) -> pd.DataFrame:
    """Every conclusion with the counts of the paper's figures and of ours, over the runs that stand in both.

    Args:
        frame: rows of looks with ``their_*`` beside the last one of each run.
    """
    last = frame.groupby("case", sort=False).tail(1).set_index("case")
    last = last[last["their_test_accuracy"].notna()]
    theirs = last[[f"their_{name}" for name in COLUMNS]].set_axis(COLUMNS, axis=1)
    return pd.DataFrame(
        [
            {"conclusion": one.text, "paper": one.counted(theirs), "ours": one.counted(last)}
            for one in CONCLUSIONS
        ]
    )
