"""How often are all extreme singular values of a batch right to 1 %, and how fast are they found?

Five nets, 32 samples each. A run is one iteration from random vectors of its own, as an audit makes
it; it fails if one of the 64 values (sigma_max and sigma_min of every sample) is off by more than
the tolerance. The truth is a dense singular value decomposition in float64, of a Jacobian that is
composed layer by layer or differentiated row by row. ``kept_at_least`` is the lower end of the
Clopper-Pearson interval of the share of runs that do not fail, with 95 % confidence.

``ratio`` is the speed on the same nets: seconds of processor time per sample of row-by-row autograd
and numpy's SVD with vectors, over ours from the model to the values, alternating.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
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
from scipy.stats import beta
from torch import Tensor

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import median_ratio, processor_seconds
from benchmarks.performance.nets import Sizes
from benchmarks.performance.peer import row_seconds, svd_seconds
from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.singular_values import (
    ExtremeSingularValues,
    extreme_singular_values,
    full_jacobian,
)


@dataclass(frozen=True)
class Config:
    """How many runs of each net."""

    runs: int = 200
    together: int = 10  # runs of one case: what a kill can cost
    batch: int = 32
    tolerance: float = 1e-2
    rounds: int = 3  # of the speed
    rows: int = 12  # of the Jacobian, by the peer, per round
    nets: tuple[str, ...] = (
        "Glow",
        "Glow, networks x 1.5",
        "Glow, three levels",
        "nflows affine",
        "nflows additive",
    )


PRESETS = {
    "smoke": {
        "runs": 2, "together": 1, "batch": 2, "rounds": 1, "rows": 1, "nets": ("nflows affine",),
    },
    "cpu": {},
}  # fmt: skip


def glow(*, size: int, levels: int, blocks: int, factor: float, batch: int) -> Invertible:
    """On images of ``size`` pixels a side, its convolutions multiplied by a factor."""
    net = Sizes(hidden=32, levels=levels, size=size, batch=batch).net(blocks)
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


NETS: dict[str, Callable[..., Invertible]] = {
    "Glow": functools.partial(glow, size=8, levels=2, blocks=12, factor=1.0),
    "Glow, networks x 1.5": functools.partial(glow, size=16, levels=2, blocks=12, factor=1.5),
    "Glow, three levels": functools.partial(glow, size=8, levels=3, blocks=18, factor=1.0),
    "nflows affine": functools.partial(
        nflows, AffineCouplingTransform, dimension=64, blocks=16, hidden=64
    ),
    "nflows additive": functools.partial(
        nflows, AdditiveCouplingTransform, dimension=256, blocks=8, hidden=128
    ),
}
SHAPES = {
    "Glow": (3, 8, 8),
    "Glow, networks x 1.5": (3, 16, 16),
    "Glow, three levels": (3, 8, 8),
    "nflows affine": (64,),
    "nflows additive": (256,),
}


@dataclass(frozen=True)
class Case:
    """Some runs of one net, or its speed.

    Attributes:
        net: its name.
        seeds: of the runs; None for the speed.
    """

    net: str
    seeds: range | None


def cases(config: Config) -> Iterator[tuple[str, Case]]:
    """Each case with its key; the nets take turns, so that an unfinished run tells of all."""
    for first in range(0, config.runs, config.together):
        seeds = range(first, min(first + config.together, config.runs))
        for net in config.nets:
            yield f"{net}, runs {seeds.start} to {seeds.stop - 1}", Case(net, seeds)
    for net in config.nets:
        yield f"{net}, speed", Case(net, None)


@functools.cache
def prepared(name: str, batch: int) -> tuple[Invertible, Tensor]:
    """A net and its data."""
    x = torch.randn(batch, *SHAPES[name], generator=torch.Generator().manual_seed(1))
    if x.dim() == 2:
        return NETS[name](), x
    return NETS[name](batch=batch), x


@functools.cache
def truth(name: str, batch: int) -> Tensor:
    """ln sigma_max and ln sigma_min of every sample, (2, B), by float64 decompositions."""
    net, x = prepared(name, batch)
    net, x = net.to_dtype(torch.float64), x.double()
    jacobians = full_jacobian(net, x) if x.dim() == 2 else composed_jacobian(net, x)
    values = torch.linalg.svdvals(jacobians)
    return torch.stack([values[:, 0], values[:, -1]]).log()


def measure(config: Config, case: Case) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    if case.seeds is None:
        return [{"net": case.net, **speed(config, case.net)}]
    net, x = prepared(case.net, config.batch)
    linearization = Linearization(net, x)
    true = truth(case.net, config.batch)
    errors, steps = [], []
    for seed in case.seeds:
        found = extremes(linearization, seed=seed, tolerance=config.tolerance)
        values = torch.stack([found.log_max, found.log_min])
        errors.append((values - true).exp().sub(1).abs().max().item())
        steps.append(
            torch.stack([found.forward.steps, found.backward.steps]).double().mean().item()
        )
    return [
        {
            "net": case.net,
            "D": x[0].numel(),
            "condition_number": (true[0] - true[1]).max().exp().item(),
            "runs": len(errors),
            "failed": sum(error > config.tolerance for error in errors),
            "worst_error": max(errors),
            "steps_mean": statistics.mean(steps),
        }
    ]


def speed(config: Config, name: str) -> Row:
    """Seconds per sample of ours and of the peer."""
    net, x = prepared(name, config.batch)
    size = x[0].numel()
    decomposing, _ = svd_seconds(torch.randn(size, size))
    peer, own = [], []
    for turn in range(config.rounds + 1):
        rows = row_seconds(net, x[:1], rows=config.rows)
        seconds, _ = processor_seconds(
            lambda: extremes(Linearization(net, x), seed=0, tolerance=config.tolerance)
        )
        if turn:  # libraries warm up in the first one
            peer.append(rows * size + decomposing)
            own.append(seconds / len(x))
    return {
        "milliseconds_per_sample": 1e3 * statistics.median(own),
        "ratio": median_ratio(peer, own),
    }


@torch.no_grad()
def extremes(linearization: Linearization, *, seed: int, tolerance: float) -> ExtremeSingularValues:
    """One run."""
    return extreme_singular_values(
        linearization, generator=torch.Generator().manual_seed(seed), tolerance=tolerance
    )


def kept_at_least(runs: int, failed: int) -> float:
    """The smallest share of runs without failure that is not refuted, at 2.5 % on this side."""
    return float(beta.ppf(0.025, runs - failed, failed + 1))


def run(config: Config) -> pd.DataFrame:
    """A row for each net, and one for all of them."""
    parts = collect(config, dict(cases(config)), measure)
    by_net = parts.groupby("net", sort=False)
    frame = by_net.agg(
        D=("D", "max"),
        condition_number=("condition_number", "max"),
        runs=("runs", "sum"),
        failed=("failed", "sum"),
        worst_error=("worst_error", "max"),
        steps_mean=("steps_mean", "mean"),
        milliseconds_per_sample=("milliseconds_per_sample", "max"),
        ratio=("ratio", "max"),
    ).reset_index()
    every = {
        "net": "all",
        "runs": frame["runs"].sum(),
        "failed": frame["failed"].sum(),
        "worst_error": frame["worst_error"].max(),
        "ratio": frame["ratio"].min(),
    }
    frame = pd.concat([frame, pd.DataFrame([every])], ignore_index=True)
    counts = zip(frame["runs"], frame["failed"], strict=True)
    frame["kept_at_least"] = [kept_at_least(runs, failed) for runs, failed in counts]
    frame["failed_share"] = frame["failed"] / frame["runs"]
    return frame


if __name__ == "__main__":
    main(__name__)
