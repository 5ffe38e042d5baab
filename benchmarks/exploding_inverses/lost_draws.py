"""Which regularizer repairs a flow that loses draws of its base while its data are fine?

    inn-guard bench exploding_inverses.lost_draws --preset cpu

14 affine couplings with unbounded scales exp(s), trained by maximum likelihood on heavy-tailed data
in 8 dimensions, with one penalty each, every 5th step; from the same seeds, which choose weights,
batches and noise. Afterwards draws of the base are mapped to x and back: a draw is lost if it does
not come back to 1 % of its length. ``bounded`` has no penalty but scales in (1/2, 2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.runner import Row, collect, main
from inn_guard import FiniteDifferences, RegularizerHook
from inn_guard.core.invertible import Invertible, standard_normal_log_prob
from inn_guard.core.tensors import norms
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP, zero_last
from inn_guard.layers.scales import ClampedScale, ExpScale
from inn_guard.training.regularizer_hook import Regularizer

WIDE = 2.5  #: the deviation of the base in units of x: wider than most of the data
LOST = 0.01  #: of the length of a draw


@dataclass(frozen=True)
class Config:
    """One training per repair and seed."""

    repairs: tuple[str, ...] = (
        "none",
        "both at data",
        "inverse at data",
        "log at prior",
        "bounded",
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    dimension: int = 8
    couplings: int = 14
    hidden: int = 48
    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 1e-3
    clip: float = 10.0
    every: int = 5
    draws: int = 20_000


PRESETS = {
    "smoke": {
        "repairs": ("none", "both at data", "inverse at data", "log at prior", "bounded"),
        "seeds": (0,),
        "couplings": 2,
        "steps": 5,
        "draws": 100,
    },
    "cpu": {},  # ten minutes of one idle core
}


def penalties(repair: str, seed: int) -> Sequence[Regularizer]:
    """The regularizers of one repair; two that are usual, and the two that act on draws."""
    chosen: dict[str, Sequence[Regularizer]] = {
        "none": [],
        "bounded": [],
        "both at data": [FiniteDifferences(1e-3, seed=seed)],
        "inverse at data": [FiniteDifferences(1.0, direction="inverse", seed=seed)],
        "log at prior": [
            FiniteDifferences(1.0, direction="inverse", at="prior", form="log", seed=seed)
        ],
    }
    return chosen[repair]


def flow(config: Config, *, bounded: bool) -> Chain:
    """Couplings that start at the identity, and a fixed division by the base's deviation."""

    def network(channels: int, out: int) -> torch.nn.Module:
        return zero_last(MLP([channels, config.hidden, config.hidden, out]))

    layers: list[Invertible] = []
    for k in range(config.couplings):
        scale = ClampedScale(math.log(2)) if bounded else ExpScale()
        swapped = k % 2 == 1
        layers.append(
            AffineCoupling.on_halves(config.dimension, network, swapped=swapped, scale=scale)
        )
    base = Diagonal(config.dimension)
    base.requires_grad_(requires_grad=False)
    base.log_scale.fill_(-math.log(WIDE))
    return Chain(*layers, base)


def heavy_tails(count: int, dimension: int) -> Tensor:
    """Normal directions with lengths that vary over orders of magnitude, (count, dimension)."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(count, dimension, generator=generator)
    return WIDE * directions * torch.rand(count, 1, generator=generator).pow(2.5)


def negative_log_likelihood(model: Invertible, x: Tensor) -> Tensor:
    """In nats per sample, (B,)."""
    z, log_det = model.forward_and_log_det(x)
    return -standard_normal_log_prob(z) - log_det


def measure(config: Config, case: tuple[str, int]) -> list[Row]:
    """Train one flow; one row of its draws, and of the likelihood and round trips of test data."""
    repair, seed = case
    train, test = heavy_tails(4000, config.dimension).chunk(2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = flow(config, bounded=repair == "bounded")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, config.learning_rate)
    hook = RegularizerHook(model, penalties(repair, seed), every=config.every)
    order = torch.Generator().manual_seed(200 + seed)
    for _ in range(config.steps):
        x = train[torch.randint(len(train), (config.batch_size,), generator=order)]
        loss = negative_log_likelihood(model, x).mean() + hook(x)
        hook.step(loss, optimizer, clip=config.clip)
    model.eval()
    with torch.no_grad():
        z = torch.randn(config.draws, config.dimension, generator=torch.Generator().manual_seed(77))
        off = norms(model(model.inverse(z)) - z) / norms(z)
        likelihood = negative_log_likelihood(model, test)
        trip = norms(model.inverse(model(test)) - test) / norms(test).clamp(min=1.0)
    return [
        {
            "repair": repair,
            "seed": seed,
            "lost": int((~(off <= LOST)).sum()),
            "draws": config.draws,
            "lost_test_samples": int((~(trip <= LOST)).sum()),
            "median_nll": likelihood.nanmedian().item(),
            "median_trip": trip.nanmedian().item(),
            "skipped_steps": hook.skipped_steps,
        }
    ]


def run(config: Config) -> pd.DataFrame:
    pairs = itertools.product(config.repairs, config.seeds)
    cases = {f"{repair}, seed {seed}": (repair, seed) for repair, seed in pairs}
    frame = collect(config, cases, measure)
    columns = frame.groupby("repair", sort=False)[["lost", "median_nll"]]
    print(columns.agg(["min", "median", "max"]).to_string())
    return frame


def draw(frame: pd.DataFrame) -> Figure:
    """Lost draws and likelihood of every run against the repair."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = list(frame.groupby("repair", sort=False))
    for axes, column in ((left, "lost"), (right, "median_nll")):
        for k, (_, group) in enumerate(groups):
            axes.plot([k] * len(group), group[column], "o", alpha=0.7)
        axes.set_xticks(range(len(groups)), [name.replace(" at ", "\nat ") for name, _ in groups])
    left.set(ylabel=f"lost of {frame.draws.max():,} draws")
    left.set_yscale("symlog", linthresh=1)
    right.set(ylabel="median nats per test sample")
    return figure


if __name__ == "__main__":
    main(__name__)
