"""The conclusions of tables 9 and 10, counted over their runs in the paper's figures and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["TABLE_10", "conclusions"]

#: net -> its regularized runs in table 10; those of the additive net with shuffles are not printed
TABLE_10 = {
    "additive shuffle": ("FD 5e-5", "NF 1e-5"),
    "additive conv": ("FD 5e-5", "NF 1e-5"),
    "affine shuffle": ("FD 1e-4", "NF 1e-5"),
    "affine conv": ("FD 1e-4", "NF 1e-5"),
}
COLUMNS = ("test_accuracy", "reconstruction_error", "condition_number")
Pair = tuple[str, str]  #: two runs
AGAINST_UNREGULARIZED = tuple(
    (f"{net} {run}", f"{net} none") for net, runs in TABLE_10.items() for run in runs
)
CONV_AND_SHUFFLE = tuple(
    (f"{coupling} conv {run}", f"{coupling} shuffle {run}")
    for coupling in ("additive", "affine")
    for run in ("none", *TABLE_10[f"{coupling} conv"])
)
FD_AND_NF = tuple((f"{net} {fd}", f"{net} {nf}") for net, (fd, nf) in TABLE_10.items())


def _pairs(first: str, second: str) -> tuple[Pair, ...]:
    """Two runs of every net."""
    return tuple((f"{net} {first}", f"{net} {second}") for net in TABLE_10)


@dataclass(frozen=True)
class Conclusion:
    """What the paper says of pairs of runs.

    Attributes:
        text: in words.
        pairs: of runs; a conclusion about single runs has each of them twice.
        holds: whether it is true of the figures of the two.
    """

    text: str
    pairs: tuple[Pair, ...]
    holds: Callable[[pd.Series, pd.Series], bool]

    def counted(self, table: pd.DataFrame) -> str:
        """Number of pairs of which it is true, of those that were run."""
        holds = []
        for a, b in self.pairs:
            if a in table.index and b in table.index:
                holds.append(self.holds(table.loc[a], table.loc[b]))
        return f"{sum(holds)} of {len(holds)}"


def _lost(run: pd.Series) -> bool:
    return not np.isfinite(run["reconstruction_error"])


def _smaller_condition(a: pd.Series, b: pd.Series) -> bool:
    return bool(a["condition_number"] < b["condition_number"])


def _against_unregularized(regularizer: str) -> tuple[Pair, ...]:
    return tuple(pair for pair in AGAINST_UNREGULARIZED if f" {regularizer} " in pair[0])


CONCLUSIONS = (
    Conclusion(
        "without regularizer affine nets lose images, additive ones do not",
        _pairs("none", "none"),
        lambda a, _: _lost(a) == str(a.name).startswith("affine"),
    ),
    Conclusion(
        "with FD or NF no image is lost",
        tuple((a, a) for a, _ in AGAINST_UNREGULARIZED),
        lambda a, _: not _lost(a),
    ),
    Conclusion("FD lowers the condition number", _against_unregularized("FD"), _smaller_condition),
    Conclusion("NF lowers the condition number", _against_unregularized("NF"), _smaller_condition),
    Conclusion(
        "FD leaves a lower one than NF",
        FD_AND_NF,
        _smaller_condition,
    ),
    Conclusion(
        "FD or NF cost at most two points of accuracy",
        AGAINST_UNREGULARIZED,
        lambda a, b: bool(a["test_accuracy"] >= b["test_accuracy"] - 0.02),
    ),
    Conclusion(
        "NF 1e-3 costs more than two points",
        _pairs("NF 1e-3", "none"),
        lambda a, b: bool(a["test_accuracy"] < b["test_accuracy"] - 0.02),
    ),
    Conclusion(
        "FD 1e-3 leaves a lower condition number than FD 1e-4",
        _pairs("FD 1e-3", "FD 1e-4"),
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
    """Every conclusion counted in the paper's figures and in ours, over the runs that both have.

    Args:
        frame: rows of evaluations with ``paper_*`` columns in the last one of each run.
    """
    last = frame.groupby("case", sort=False).tail(1).set_index("case")
    last = last[last["paper_test_accuracy"].notna()]
    paper = last[[f"paper_{name}" for name in COLUMNS]].set_axis(COLUMNS, axis=1)
    return pd.DataFrame(
        {"conclusion": one.text, "paper": one.counted(paper), "ours": one.counted(last)}
        for one in CONCLUSIONS
    )
