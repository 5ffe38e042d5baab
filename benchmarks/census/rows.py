"""The rows of all committed parts of the census, and what verdicts and truths say together."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.runner import RESULTS

__all__ = [
    "CHECKED_USES",
    "FOLDER",
    "KEY",
    "USES",
    "agreement",
    "failed",
    "origins",
    "passed",
    "read_parts",
    "read_price",
    "read_repairs",
]

FOLDER = RESULTS / "census"
STEM = "census_census"
#: use -> how it is called in tables
USES = {
    "density": "density",
    "sampling": "sampling",
    "reconstruction": "reconstruction",
    "gradients": "gradients",
    "other_inputs": "other inputs",
}
CHECKED_USES = tuple(USES)[:4]  #: of which there is a truth
KEY = ["flow", "data", "depth", "steps", "seed", "dtype"]
PASSED, FAILED = ("stable", "marginal"), ("unstable", "non_finite")
TEXT = ("raised", "sampling_cause", "reconstruction_cause", "weakest_layer")


def read_parts(folder: Path = FOLDER) -> pd.DataFrame:
    """All rows, each model once, in the order of flows, data, depth, steps, seed and dtype.

    Raises:
        FileNotFoundError: if there is no part.
        ValueError: if two parts hold the same model.
    """
    frame = _joined(folder, STEM)
    if not len(frame):
        raise FileNotFoundError(f"expected parts of the census below {folder}, found none")
    twice = frame[frame.duplicated(KEY, keep=False)]
    if len(twice):
        model = ", ".join(str(value) for value in twice[KEY].iloc[0])
        raise ValueError(f"expected every model once; in two parts: {model}")
    for name in (*TEXT, *(f"lowest_{use}" for use in USES), *(f"true_{use}" for use in USES)):
        if name not in frame:
            frame[name] = ""
        frame[name] = frame[name].fillna("").astype(str)
    return frame.sort_values(KEY, kind="stable").reset_index(drop=True)


def read_repairs(folder: Path = FOLDER) -> pd.DataFrame:
    """A row for each repaired model and repair; none if there is no such part."""
    frame = _joined(folder, "census_repairs")
    for name in ("failing", "cured", "broken", "refused"):
        if name in frame:
            frame[name] = frame[name].fillna("").astype(str)
    return frame


def read_price(folder: Path = FOLDER) -> pd.DataFrame:
    """A row for each data set, treatment and seed; none if there is no such part."""
    return _joined(folder, "census_price")


def _joined(folder: Path, stem: str) -> pd.DataFrame:
    parts = []
    for path in sorted(folder.glob(f"*/{stem}*.csv")):
        part = pd.read_csv(path)
        part["part"] = path.parent.name
        parts.append(part)
    if not parts:
        return pd.DataFrame()
    return pd.concat(parts, ignore_index=True)


def origins(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Part -> its command, configuration, versions and checksums."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*/census_*.json"))
    }


def passed(frame: pd.DataFrame, use: str) -> pd.Series:
    """Which rows are fit for a use, says the audit."""
    return frame[use].isin(PASSED)


def failed(frame: pd.DataFrame, use: str) -> pd.Series:
    """Which rows are unfit for a use, says the audit; undecided ones are neither."""
    return frame[use].isin(FAILED)


def agreement(frame: pd.DataFrame, uses: Iterable[str] = CHECKED_USES) -> dict[str, int]:
    """How many verdicts agree with the truth, contradict it, or cannot be held against it.

    A verdict is open if it is undecided, or if the truth is near the limit or was not found.
    """
    counts = {"agree": 0, "contradict": 0, "open": 0}
    for use in uses:
        fit, unfit = frame[f"true_{use}"] == "fit", frame[f"true_{use}"] == "unfit"
        good, bad = passed(frame, use), failed(frame, use)
        agree = int((fit & good).sum() + (unfit & bad).sum())
        contradict = int((fit & bad).sum() + (unfit & good).sum())
        counts["agree"] += agree
        counts["contradict"] += contradict
        counts["open"] += len(frame) - agree - contradict
    return counts


def contradictions(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per verdict that the truth contradicts: model, use, verdict, figures, truth."""
    found = []
    for use in CHECKED_USES:
        truth = frame[f"true_{use}"]
        wrong = ((truth == "fit") & failed(frame, use)) | ((truth == "unfit") & passed(frame, use))
        for _, row in frame[wrong].iterrows():
            found.append(
                {name: row[name] for name in KEY}
                | {
                    "use": use,
                    "verdict": row[use],
                    "figure": row[f"{use}_figure"],
                    "truth": row[f"true_{use}"],
                    "true figure": row[f"true_{use}_figure"],
                }
            )
    return pd.DataFrame(found, columns=[*KEY, "use", "verdict", "figure", "truth", "true figure"])
