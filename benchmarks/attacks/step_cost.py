"""What one step of the paper's attack costs in forward passes.

A step is F, F^-1 and two vector-Jacobian products: at least 4.

    inn-guard bench attacks.step_cost --preset cpu  # about 3 minutes on one core

CPU time of one thread, forward passes and steps alternated, medians; and operations, counted. A
step of the paper's public code measures the reconstruction once more for its log; a step here takes
the error from the pass it makes. Synthetic: random weights, random images.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import alternating_seconds
from inn_guard.audits.audited_model import AuditedModel
from inn_guard.audits.dequantization_attack import ProjectedGradient, Quantization, Search
from inn_guard.models.glow import GlowConfig, glow_classifier


@dataclass(frozen=True)
class Config:
    """Nets of 3 levels on 3 x 32 x 32."""

    blocks: tuple[int, ...] = (4, 16)  # per level, of each net
    batches: tuple[int, ...] = (2, 8)  # batch sizes
    hidden: int = 128  # channels of the couplings' networks
    repeats: int = 7  # of every timing


PRESETS = {
    "smoke": {"blocks": (1,), "batches": (2,), "hidden": 8, "repeats": 2},
    "cpu": {},  # minutes on one core
}


def cases(config: Config) -> dict[str, tuple[int, int]]:
    return {f"{n} blocks, batch {b}": (n, b) for n in config.blocks for b in config.batches}


def measure(config: Config, case: tuple[int, int]) -> Iterator[Row]:
    """One row: forward, forward and inverse, gradient, whole step."""
    blocks, batch = case
    torch.manual_seed(0)
    net = glow_classifier(config=GlowConfig(3, blocks, config.hidden))
    with torch.no_grad():
        net(torch.rand(8, 3, 32, 32))  # initialises ActNorm from data
        for parameter in net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    net.eval()
    x = torch.rand(batch, 3, 32, 32)
    cubes = Quantization().cubes(x)
    search = Search(
        AuditedModel(net),
        cubes,
        budget=float("inf"),
        generator=torch.Generator().manual_seed(0),
        seconds=600.0,
    )
    search.errors(cubes.centre)
    search.gradient(cubes.centre)
    attack = ProjectedGradient()

    def step() -> None:
        pulled = search.gradient(x)
        cubes.project(x + attack.step_size * cubes.span * pulled.to_x.sign())

    @torch.no_grad()
    def forward() -> None:
        net(x)

    def logged_step() -> None:
        step()
        search.errors(x)

    calls = {
        "forward": forward,
        "round trip": lambda: search.errors(x),
        "step": step,
        "logged": logged_step,
    }
    seconds = alternating_seconds(calls, repeats=config.repeats)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    yield {
        "blocks": 3 * blocks,
        "batch": batch,
        "forward_seconds": times["forward"],
        "round_trip_in_forwards": times["round trip"] / times["forward"],
        "step_in_forwards": times["step"] / times["forward"],
        "step_with_logging_in_forwards": times["logged"] / times["forward"],
        "step_operations_in_forwards": search.price["gradient"],
    }


def run(config: Config) -> pd.DataFrame:
    return collect(config, cases(config), measure)


if __name__ == "__main__":
    main(__name__)
