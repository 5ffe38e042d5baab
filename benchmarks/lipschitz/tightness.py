"""How far the bounds lie above the largest ratios found, for random blocks of five libraries.

The blocks are those of the adversary. Their weights are scaled by 0.001 to 10, and half widths of
the boxes are 1e-12 to 1e3, uniform in their logarithms. The truth lies in between.
"""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import dataclass

import pandas as pd
import torch

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.lipschitz import adversary
from inn_guard.numerics.intervals import Box

USELESS = 1e6  #: a bound so many times above the largest ratio found says nothing


@dataclass(frozen=True)
class Config:
    """How many configurations are measured, and how long each may be bounded."""

    entries: tuple[int, ...] = (4, 8)  # of a sample
    configurations: int = 80  # of each
    chunk: int = 20  # measured, and written, together
    first: int = 0
    seconds: float = 1.5  # of work, for both directions of a bound


PRESETS = {
    "smoke": {"configurations": 4, "chunk": 2, "seconds": 0.1},
    "cpu": {},  # what the committed table holds: three minutes of one core
}


def scaled(case: adversary.Case) -> None:
    """Weights and the width of the box, scaled at random."""
    factor, radius = 10 ** random.uniform(-3, 1), 10 ** random.uniform(-12, 3)
    with torch.no_grad():
        for parameter in case.model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(factor)
    if "logit" in case.block:
        # their boxes lie in [0, 1]
        return
    middle = (case.lo / 2 + case.hi / 2).nan_to_num(0, 0, 0)
    case.lo, case.hi = middle - radius, middle + radius


def tightness(seed: int, entries: int, seconds: float) -> Row:
    """Bounds over the largest ratios found, by ascent and by the package's own witnesses."""
    case = adversary.configuration(seed, scaled, entries)
    row: Row = {"seed": seed, "block": case.block, "entries": entries}
    row |= {"forward": math.nan, "inverse": math.nan}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = ig.wrap(case.model)
            bounds = ig.lipschitz_bounds(model, Box(case.lo, case.hi), seconds=seconds)
        except (ValueError, TypeError, ig.NotApplicable):
            return row
        torch.manual_seed(seed)
        found = adversary.climbed(model.to_dtype(torch.float64), case.lo, case.hi)
    width = float((case.hi - case.lo).max())
    row |= {"width": width, "method": bounds.method[0], "reason": bounds.reason}
    row["forward"] = _quotient(bounds.forward, max(found[0], bounds.lower_forward))
    row["inverse"] = _quotient(bounds.inverse, max(found[1], bounds.lower_inverse))
    return row


def _quotient(upper: float, lower: float) -> float:
    if lower <= 0:
        return math.nan
    return upper / lower


def measure(config: Config, case: tuple[int, range]) -> list[Row]:
    """One row for every configuration."""
    torch.set_num_threads(1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        entries, seeds = case
        return [tightness(seed, entries, config.seconds) for seed in seeds]
    finally:
        torch.set_default_dtype(default)


def run(config: Config) -> pd.DataFrame:
    stop = config.first + config.configurations
    cases = {}
    for entries in config.entries:
        for start in range(config.first, stop, config.chunk):
            seeds = range(start, min(start + config.chunk, stop))
            cases[f"{entries} entries, from seed {start}"] = (entries, seeds)
    return table(collect(config, cases, measure))


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares within a factor of two, medians and useless bounds: by block, then of all."""
    groups = [*rows.groupby("block")]
    for entries, group in rows.groupby("entries"):
        groups.append((f"{entries} entries", group))
    groups.append(("all", rows))
    lines = []
    for name, group in groups:
        line: Row = {"block": name, "configurations": len(group)}
        for direction in ("forward", "inverse"):
            ratio = group[direction].dropna()
            bounded = ratio[ratio != math.inf]
            line[f"{direction}: bounded"] = len(bounded)
            line[f"{direction}: within 2"] = round(float((bounded <= 2).mean()), 3)
            line[f"{direction}: median"] = bounded.median()
            line[f"{direction}: above 1e6"] = int((bounded > USELESS).sum())
        lines.append(line)
    return pd.DataFrame(lines)


if __name__ == "__main__":
    main(__name__)
