r"""Which default flows can be trusted for what: libraries, depths, training, data, precisions.

    inn-guard bench census --preset smoke
    inn-guard bench census --preset cpu --sets gaussians --seeds 0 --out FOLDER   # one part
    inn-guard bench census --preset full --data-root FOLDER                       # days

A part is any part of the grid: data sets, seeds or flows go to several processes or machines by
flags, each with an ``--out`` of its own below ``benchmarks/results/census``, and
``python -m benchmarks.census.page`` reads them all. A part that is killed goes on where it was.

Every row is one model in one dtype: what the audit says of the five uses, and what plain formulas
say (``truth.py``); of the preset full, of a tenth that the keys choose. Rows in float32 have the
checks of level standard; those in other dtypes only the ones that decide a use.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.census.data import load
from benchmarks.census.flows import FLOWS
from benchmarks.census.training import Training, bits, seeded
from benchmarks.census.truth import truths
from benchmarks.common.runner import Row, collect, main
from inn_guard.audits.rates import rate_interval
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.uses import USES

__all__ = ["PRESETS", "Config", "run"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS_OF = ("density", "reconstruction", "sampling")


@dataclass(frozen=True)
class Config:
    """The grid, and how models are trained and audited."""

    flows: tuple[str, ...] = tuple(FLOWS)
    sets: tuple[str, ...] = ("moons", "checkerboard", "gaussians", "cells", "digits")
    data_root: str = ""  # folder of CIFAR-10's files, for the set "patches"
    depths: tuple[int, ...] = (4,)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: tuple[int, ...] = (0, 400)  # of Adam, after which a model is audited; ascending
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")
    width: int = 64  # of all networks
    batch_size: int = 64
    learning_rate: float = 1e-3
    rows: int = 128  # held-out samples at which models are audited
    truth_of: int = 1  # one row of so many is checked by plain formulas


PRESETS = {
    "smoke": {
        "flows": ("our Glow",), "sets": ("moons",), "depths": (2,), "seeds": (0,),
        "steps": (3,), "dtypes": ("float32",), "width": 8, "rows": 16,
    },
    "cpu": {},
    "full": {
        "sets": ("moons", "checkerboard", "gaussians", "cells", "digits", "patches"),
        "depths": (4, 16, 64), "steps": (0, 400, 4000), "truth_of": 10,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One training."""

    flow: str
    data: str
    depth: int
    seed: int

    @property
    def key(self) -> str:
        """Unique in the grid."""
        return f"{self.flow}, {self.data}, depth {self.depth}, seed {self.seed}"


def cases(config: Config) -> dict[str, Case]:
    """The whole grid, seed by seed."""
    grid = (
        Case(flow, data, depth, seed)
        for seed in config.seeds
        for data in config.sets
        for depth in config.depths
        for flow in config.flows
    )
    return {case.key: case for case in grid}


def measure(config: Config, case: Case) -> Iterator[Row]:
    """Rows of one training: after every number of steps in every dtype."""
    split = load(case.data, root=config.data_root, held_out=config.rows, seed=case.seed)
    kind = FLOWS[case.flow]
    if not kind.takes(split.shape):
        return
    train, test = split.train, split.test
    if not kind.images:
        train, test = train.flatten(1), test.flatten(1)
    with seeded(case.seed):
        flow = kind.build(tuple(train.shape[1:]), case.depth, config.width)
        training = Training(
            flow,
            train,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=case.seed,
        )
        for steps in config.steps:
            training.go_on(steps)
            common = {
                "library": kind.library,
                "flow": case.flow,
                "data": case.data,
                "dimensions": split.dims,
                "depth": case.depth,
                "seed": case.seed,
                "steps": steps,
                "skipped": training.skipped,
                "bits": bits(flow, test),
                "data_checksum": split.checksum,
            }
            for dtype in config.dtypes:
                key = f"{case.key}, {steps} steps, {dtype}"
                yield {**common, "dtype": dtype, **audited(config, flow, test, dtype, key)}


def audited(config: Config, flow: nn.Module, x: Tensor, dtype: str, key: str) -> Row:
    """What the audit says of a copy in this dtype, and of some of the rows what is true."""
    flow = copy.deepcopy(flow).to(DTYPES[dtype])
    x = x.to(DTYPES[dtype])
    level = "quick"
    if dtype == "float32":
        level = "standard"
    try:
        report = ig.audit(flow, x, level=level, uses=tuple(USES))
    except Exception as error:
        # an audit must never raise: the row says that it did
        return {"raised": f"{type(error).__name__}: {error}"}
    row = {"raised": "", "seconds": report.settings["seconds"], **uses_of(report)}
    row |= explanations(report)
    row["weights"] = report.settings["weights"]
    row["true"] = is_checked(key, config.truth_of)
    if row["true"]:
        for use, truth in truths(flow, x).items():
            row[f"true_{use}"] = truth.answer
            row[f"true_{use}_figure"] = truth.figure
    return row


def is_checked(key: str, of: int) -> bool:
    """Whether a row is one of those that are checked, one of ``of``, by its key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % of == 0


def uses_of(report: AuditReport) -> Row:
    """Verdict and figure of every use, with an interval of the share that fails."""
    row: Row = {}
    for use, found in report.uses.items():
        row[use] = found.verdict.label
        row[f"{use}_figure"] = found.figure
    if "sampling" in report:
        values = report["sampling"].values
        for name in ("rate_low", "rate_high", "draws", "lost_draws", "non_finite_draws"):
            row[f"sampling_{name}"] = values.get(name, math.nan)
        row["sampling_cause"] = report["sampling"].settings.get("cause", "")
    row["density_check"] = report.uses["density"].check
    row["density_estimated"] = "estimate" in str(report.uses["density"].reason)
    row |= _share(report, "density", "error", report.uses["density"].limit)
    row |= _share(report, "reconstruction", "relative_error", report.uses["reconstruction"].limit)
    row["reconstruction_cause"] = report["reconstruction"].settings.get("cause", "")
    return row


def _share(report: AuditReport, check: str, name: str, limit: float) -> Row:
    """How many of the rows are above the limit, with the 95 % interval of their share."""
    if check not in report or name not in report[check].per_sample:
        return {}
    error = report[check].per_sample[name]
    above = int((~(error <= limit)).sum())
    low, high = rate_interval(above, len(error))
    return {f"{check}_above": above, f"{check}_share_low": low, f"{check}_share_high": high}


def explanations(report: AuditReport) -> Row:
    """Condition number, bits lost, weakest layer, lowest precision; empty where not measured."""
    row: Row = {}
    if "jacobian_spectrum" in report:
        values = report["jacobian_spectrum"].values
        row["log10_condition"] = values.get("log10_condition_number", math.nan)
    if "layer_blame" in report:
        blame = report["layer_blame"]
        row["bits_lost"] = blame.values.get("bits_lost", math.nan)
        row["digits_lost"] = blame.values.get("digits_lost", math.nan)
        row["weakest_layer"] = str(blame.settings.get("worst_layer", "")).partition(":")[0]
    if "precision" in report:
        lowest = str(report["precision"].settings.get("lowest", ""))
        for part in lowest.split(", "):
            use, _, number_format = part.partition(" ")
            if use in FORMATS_OF:
                row[f"lowest_{use}"] = number_format
    if "out_of_distribution" in report:
        values = report["out_of_distribution"].values
        row["invertible_radius"] = values.get("invertible_radius", math.nan)
    return row


def run(config: Config) -> pd.DataFrame:
    """One row per model, number of steps and dtype."""
    unknown = set(config.flows) - set(FLOWS)
    if unknown:
        raise ValueError(f"expected flows out of {', '.join(FLOWS)}; got {sorted(unknown)}")
    return collect(config, cases(config), measure)


if __name__ == "__main__":
    main(__name__)
