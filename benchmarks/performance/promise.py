"""Are all samples' extreme singular values right to 1 %: runs in which one of them is not.

Five nets, 32 samples each. A run is one iteration from random vectors of its own; it fails if one
of the 64 values (sigma_max and sigma_min of every sample) is off by more than the tolerance. The
truth is the same iteration to 1e-6, of which dense decompositions in the tests are the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    CompositeTransform,
    RandomPermutation,
)
from torch import Tensor

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.nets import Sizes
from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.singular_values import ExtremeSingularValues, extreme_singular_values


@dataclass(frozen=True)
class Config:
    """How many runs of each net."""

    runs: int = 200
    batch: int = 32
    tolerance: float = 1e-2
    nets: tuple[str, ...] = (
        "Glow",
        "Glow, networks x 1.5",
        "Glow, three levels",
        "nflows affine",
        "nflows additive",
    )


PRESETS = {
    "smoke": {"runs": 1, "batch": 2, "nets": ("nflows affine",)},
    "cpu": {},
}


def glow(*, levels: int, blocks: int, hidden: int, factor: float, batch: int) -> Invertible:
    """On 16 x 16 images, its convolutions multiplied by a factor."""
    net = Sizes(hidden=hidden, levels=levels, size=16, batch=batch).net(blocks)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.mul_(factor)
    return net


def nflows(kind: Callable[..., object], *, dimension: int, blocks: int, hidden: int) -> Invertible:
    """Couplings and random permutations, perturbed."""
    torch.manual_seed(3)
    steps = []
    for _ in range(blocks):
        mask = torch.arange(dimension) % 2
        steps.append(RandomPermutation(dimension))
        steps.append(kind(mask, lambda n, m: ResidualNet(n, m, hidden)))
    flow = CompositeTransform(steps)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.025 * torch.randn_like(parameter))
    return ig.wrap(flow.eval())


NETS: dict[str, Callable[[int], Invertible]] = {
    "Glow": functools.partial(glow, levels=2, blocks=12, hidden=32, factor=1.0),
    "Glow, networks x 1.5": functools.partial(glow, levels=2, blocks=12, hidden=32, factor=1.5),
    "Glow, three levels": functools.partial(glow, levels=3, blocks=24, hidden=64, factor=1.0),
    "nflows affine": functools.partial(
        nflows, AffineCouplingTransform, dimension=64, blocks=16, hidden=64
    ),
    "nflows additive": functools.partial(
        nflows, AdditiveCouplingTransform, dimension=256, blocks=8, hidden=128
    ),
}
DIMENSIONS = {"nflows affine": (64,), "nflows additive": (256,)}


def measure(config: Config, name: str) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    if name in DIMENSIONS:
        net = NETS[name]()
        x = torch.randn(config.batch, *DIMENSIONS[name], generator=torch.Generator().manual_seed(1))
    else:
        net = NETS[name](batch=config.batch)
        x = Sizes(size=16, batch=config.batch).data()
    linearization = Linearization(net, x)
    truth = extremes(linearization, seed=2**31, tolerance=1e-6)
    failed, worst, steps = 0, 0.0, 0.0
    for run in range(config.runs):
        found = extremes(linearization, seed=run, tolerance=config.tolerance)
        error = (logs(found) - logs(truth)).exp().sub(1).abs().max().item()
        failed += error > config.tolerance
        worst = max(worst, error)
        both = torch.stack([found.forward.steps, found.backward.steps])
        steps += both.double().mean().item() / config.runs
    return [
        {
            "D": x[0].numel(),
            "condition_number": truth.log_condition.max().exp().item(),
            "runs": config.runs,
            "values_per_run": 2 * len(x),
            "failed": failed,
            "worst_error": worst,
            "steps_mean": steps,
        }
    ]


def extremes(linearization: Linearization, *, seed: int, tolerance: float) -> ExtremeSingularValues:
    return extreme_singular_values(
        linearization,
        generator=torch.Generator().manual_seed(seed),
        tolerance=tolerance,
        max_steps=200,
    )


def logs(found: ExtremeSingularValues) -> Tensor:
    return torch.stack([found.log_max, found.log_min])


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.nets, measure)


if __name__ == "__main__":
    main(__name__)
