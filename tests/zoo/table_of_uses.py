"""Every use of every flow of the zoo: the audit's verdict and the truth, misses, false alarms.

    python -m tests.zoo.table_of_uses --out table.csv [--level quick] [--part 0 --of 2]

writes one row per flow and use, skips what the file has already, and prints the counts.
"""

from __future__ import annotations

import argparse
import collections
import csv
import math
import os
import warnings
from pathlib import Path

import torch

import inn_guard as ig
from tests.zoo.flows import FLOWS, Flow, own_chain
from tests.zoo.truth_of_uses import Truth, truths

ROWS = 64
SEED = 99
COLUMNS = ("flow", "use", "truth", "true_figure", "verdict", "figure", "limit", "outcome", "reason")


def wrapped(flow: Flow) -> object:
    """What a user hands to audit: the library's model, or a chain of modules."""
    module = flow.make()
    if flow.chain is own_chain:
        return ig.wrap(layers=list(module.chain))
    return module


def rows_of(flow: Flow, level: str = "quick") -> list[dict[str, object]]:
    """One row for each use."""
    x = flow.data(ROWS, SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = ig.audit(wrapped(flow), x, level=level, progress=False, seed=3)
        known = truths(flow, x)
    rows = []
    for use, (truth, figure) in known.items():
        said = report.uses.get(use)
        verdict = "missing" if said is None else said.verdict.label
        rows.append(
            {
                "flow": flow.name,
                "use": use,
                "truth": truth.value,
                "true_figure": f"{figure:.3g}",
                "verdict": verdict,
                "figure": f"{math.nan if said is None else said.figure:.3g}",
                "limit": f"{math.nan if said is None else said.limit:.3g}",
                "outcome": outcome(truth, verdict),
                "reason": "" if said is None else said.reason,
            }
        )
    return rows


def outcome(truth: Truth, verdict: str) -> str:
    failed = verdict in ("unstable", "non_finite")
    if truth is Truth.NEAR:
        return "near"
    if verdict in ("undecided", "not_applicable", "missing"):
        return verdict
    if truth is Truth.UNFIT:
        return "found" if failed else "MISS"
    return "FALSE ALARM" if failed else "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--level", default="quick")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {row["flow"] for row in rows}
    for flow in list(FLOWS.values())[options.part :: options.of]:
        if flow.name in done:
            continue
        rows += rows_of(flow, options.level)
        partial = options.out.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, options.out)
        for row in rows[-4:]:
            if row["outcome"] not in ("found", "passed"):
                print(*(row[name] for name in COLUMNS), sep=" | ", flush=True)
    counts = collections.Counter((row["use"], row["outcome"]) for row in rows)
    for key, count in sorted(counts.items()):
        print(*key, count)


if __name__ == "__main__":
    main()
