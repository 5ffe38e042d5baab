"""Round trips of every model of the test suite in exact mode: values and how many come back wrong.

    inn-guard bench exact.round_trips --preset cpu

Batches are mixtures of two samples of the model's own data, so that they stay in its domain; every
second one has an odd number of samples. Each sample keeps its context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from benchmarks.common.runner import Row, collect, main
from inn_guard.exact import exact
from tests.cases.all import CASES, Case

__all__ = ["PRESETS", "Config", "run"]


@dataclass(frozen=True)
class Config:
    """How much is coded."""

    values: int = 50_000  # of each model, at least
    batches: int = 2  # in which they are coded
    every: int = 1  # take each n-th model of the list
    seed: int = 0  # of the mixtures


PRESETS = {
    "smoke": {"values": 100, "every": 40},
    "cpu": {},  # minutes; more than 10^7 values
}


def measure(config: Config, case: Case) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(config.seed)
    made, x = case.make()
    model, x = made.to_dtype(torch.float32), x.float()
    share = config.values / config.batches / x[0].numel()
    values = wrong = 0
    for turn in range(config.batches):
        count = math.ceil(share) | 1  # odd
        batch = mixtures(x, count + turn % 2, generator)
        rows = torch.arange(len(batch)) % len(x)
        coder = exact(model.select(rows))
        z, kept = coder.encode(batch)
        back = coder.decode(z, kept)
        values += batch.numel()
        wrong += int((back.view(torch.int32) != batch.view(torch.int32)).sum())
    stored = sum(layer.rule == "stored input" for layer in kept.layers)
    return [{"values": values, "wrong_values": wrong, "layers": len(kept.layers), "stored": stored}]


def mixtures(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Samples between row k mod B of x (B, *data) and another one, drawn at random."""
    first = x[torch.arange(count) % len(x)]
    second = x[torch.randint(len(x), (count,), generator=generator)]
    weight = torch.rand(count, *[1] * (x.dim() - 1), generator=generator)
    return (weight * first + (1 - weight) * second).contiguous()


def run(config: Config) -> pd.DataFrame:
    torch.set_default_dtype(torch.float32)
    return collect(config, {case.id: case for case in CASES[:: config.every]}, measure)


if __name__ == "__main__":
    main(__name__)
