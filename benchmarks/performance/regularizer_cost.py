"""Cost of finite differences: a regularised training step against one without, K = 1 and 10.

The affine Glow trunk of memory_saving.py with Adam and the likelihood as its loss. A cycle of K
steps, of which one is regularised, is timed whole, and divided by K. Floors with a fraction f of
the batch: 1 + 2 f / K.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import alternating_seconds, median_ratio
from benchmarks.performance.nets import Sizes
from inn_guard.core.invertible import Invertible
from inn_guard.memory_saving import memory_saving
from inn_guard.training.regularizer_hook import RegularizerHook
from inn_guard.training.regularizers import Direction, FiniteDifferences


@dataclass(frozen=True)
class Config(Sizes):
    """What is timed."""

    blocks: int = 48  # over all three levels
    repeats: int = 3
    every: tuple[int, ...] = (1, 10)  # periods K
    coefficient: float = 1e-4


PRESETS = {
    "smoke": {"blocks": 3, "hidden": 8, "size": 8, "batch": 8, "repeats": 1, "every": (1, 2)},
    "cpu": {},  # the claim's sizes
    # The paper's batch and periods, for a GPU
    "paper": {"batch": 128, "repeats": 20, "every": (1, 5, 10)},
}


MODES: dict[str, Callable[[Invertible], Invertible]] = {
    "stored": lambda net: net,
    "memory_saving": memory_saving,
}


@dataclass(frozen=True)
class Case:
    """Which directions are penalised, on which share of the batch."""

    direction: Direction
    fraction: float | None = None


CASES = {
    "forward": Case(Direction.FORWARD),
    "inverse": Case(Direction.INVERSE),
    "both": Case(Direction.BOTH),
    "both, 1/4 of the batch": Case(Direction.BOTH, 1 / 4),
    "both, 1/8 of the batch": Case(Direction.BOTH, 1 / 8),
}


def cycle(config: Config, model: Invertible, case: Case | None, steps: int) -> Callable[[], None]:
    """``steps`` training steps, the first of them regularised."""
    x = config.data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    chosen = []
    if case is not None:
        chosen.append(
            FiniteDifferences(config.coefficient, direction=case.direction, fraction=case.fraction)
        )
    hook = RegularizerHook(model, chosen, every=steps)

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            z, log_det = model.forward_and_log_det(x)
            loss = (0.5 * z.flatten(1).square().sum(1) - log_det).mean()
            (loss + hook(x, z=z)).backward()
            optimizer.step()

    return run


def measure(config: Config, case: Case) -> list[Row]:
    """One row per mode and period."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for mode, make in MODES.items():
        model = make(config.net(config.blocks))
        cycles = {"without": cycle(config, model, None, 1)}
        cycles |= {str(k): cycle(config, model, case, k) for k in config.every}
        seconds = alternating_seconds(cycles, repeats=config.repeats)
        for k in config.every:
            per_step = [cycle_seconds / k for cycle_seconds in seconds[str(k)]]
            rows.append(
                {
                    "mode": mode,
                    "every": k,
                    "seconds_per_step": statistics.median(per_step),
                    "seconds_without": statistics.median(seconds["without"]),
                    "ratio": median_ratio(per_step, seconds["without"]),
                    "floor": 1 + _passes(case) / k,
                }
            )
    return rows


def run(config: Config) -> pd.DataFrame:
    return collect(config, CASES, measure)


def _passes(case: Case) -> float:
    """Differentiated passes that are added, in units of the batch."""
    return len(list(case.direction)) * (case.fraction or 1.0)


if __name__ == "__main__":
    main(__name__)
