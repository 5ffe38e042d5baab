"""The forecast of the round trip's rounding error against the measured error, over stacks of three libraries.

    python -m benchmarks.precision.rounding_forecast --preset cpu        # about 5 minutes on one core

Claims measured: the median over the samples of measured / forecast lies in [0.5, 2] where first
order holds (forecast below 0.1 |x|); where the forecast decides (works, breaks), the measurement
agrees in 99 % of the cases; the forecast costs at most ten passes of the inverse, beside the
float64 copy that the measurement in float64 needs as well. A case is one stack in one arithmetic.
Synthetic nets and data: weights as each library initialises them, those of the sub-networks' last
layers multiplied by a gain; x ~ N(0, I).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import FrEIA.framework
import FrEIA.modules
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from nflows import transforms
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from inn_guard.audits.precision.audit import NumberFormat, arithmetics, precision
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.inverse_differences import InverseDifferences
from inn_guard.jacobian.rounding_error import RoundingForecast, rounding_forecast, unit_roundoff
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation

HIDDEN = 48


@dataclass(frozen=True)
class Config:
    """Which stacks are measured.

    Attributes:
        dims: dimensions D.
        depths: numbers of blocks.
        gains: factors on the last layers of the sub-networks; larger ones make the inverse explode.
        samples: data per stack.
        probes: sweeps of the forecast.
        seed: of weights and data.
    """

    dims: tuple[int, ...] = (4, 8)
    depths: tuple[int, ...] = (6, 16)
    gains: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    samples: int = 128
    probes: int = 1
    seed: int = 0


PRESETS = {
    "smoke": {"dims": (4,), "depths": (8,), "gains": (1.0, 4.0), "samples": 32},
    "cpu": {},  # minutes on one core
}


@dataclass(frozen=True)
class Stack:
    """One case: a kind of block, how many of them, in how many dimensions, with which gain."""

    block: str
    dim: int
    depth: int
    gain: float


def ours(block: type) -> Callable[[int, int], nn.Module]:
    """Couplings of this package with a random permutation after each."""

    def build(dim: int, depth: int) -> nn.Module:
        changed = dim // 2
        out = changed if block is AdditiveCoupling else 2 * changed
        couplings = (block(MLP([dim - changed, HIDDEN, HIDDEN, out])) for _ in range(depth))
        return Chain(*(layer for c in couplings for layer in (c, Permutation(torch.randperm(dim)))))

    return build


def nflows(make: Callable[[int, Tensor], nn.Module]) -> Callable[[int, int], nn.Module]:
    """nflows transforms with a random permutation after each."""

    def build(dim: int, depth: int) -> nn.Module:
        mask = (torch.arange(dim) % 2).int()
        chain = [
            t for _ in range(depth) for t in (make(dim, mask), transforms.RandomPermutation(dim))
        ]
        return transforms.CompositeTransform(chain)

    return build


def residual_net(n: int, m: int) -> nn.Module:
    """The conditioner that nflows' own examples use."""
    return ResidualNet(n, m, HIDDEN)


def spline(_: int, mask: Tensor) -> nn.Module:
    """A rational-quadratic spline coupling on [-4, 4]."""
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask, residual_net, tails="linear", tail_bound=4.0
    )


def freia(block: str) -> Callable[[int, int], nn.Module]:
    """FrEIA blocks, a random permutation before each."""

    def build(dim: int, depth: int) -> nn.Module:
        inn = FrEIA.framework.SequenceINN(dim)
        for k in range(depth):
            inn.append(FrEIA.modules.PermuteRandom, seed=k)
            inn.append(
                getattr(FrEIA.modules, block),
                subnet_constructor=lambda n, m: MLP([n, HIDDEN, HIDDEN, m]),
            )
        return inn

    return build


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "ours additive": ours(AdditiveCoupling),
    "ours affine": ours(AffineCoupling),
    "nflows affine": nflows(lambda _, mask: transforms.AffineCouplingTransform(mask, residual_net)),
    "nflows spline": nflows(spline),
    "nflows autoregressive": nflows(
        lambda dim, _: transforms.MaskedAffineAutoregressiveTransform(dim, HIDDEN)
    ),
    "nflows LU": nflows(lambda dim, _: transforms.LULinear(dim, identity_init=False)),
    "FrEIA AllInOneBlock": freia("AllInOneBlock"),
    "FrEIA GLOWCouplingBlock": freia("GLOWCouplingBlock"),
}


def cases(config: Config) -> dict[str, Stack]:
    """Every kind of block in every dimension, depth and gain."""
    stacks = (
        Stack(b, d, n, g)
        for b in BLOCKS
        for d in config.dims
        for n in config.depths
        for g in config.gains
    )
    return {
        f"{stack.block} D={stack.dim} n={stack.depth} gain={stack.gain:g}": stack
        for stack in stacks
    }


def measure(config: Config, stack: Stack) -> Iterator[Row]:
    """One row per arithmetic: forecast, measurement and their ratio."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        module = BLOCKS[stack.block](stack.dim, stack.depth).eval()
        amplify(module, stack.gain)
        x = torch.randn(config.samples, stack.dim)
    model = ig.wrap(module)
    forecast = forecast_of(model, x, config)
    spent = cost(model, x, config)
    result = precision(model, x, probes=config.probes, seed=config.seed)
    for row, arithmetic in zip(result.tables["arithmetic"], arithmetics(x.device), strict=True):
        yield {
            "block": stack.block,
            "D": stack.dim,
            "depth": stack.depth,
            "gain": stack.gain,
            **{key.replace(" ", "_"): row[key] for key in row},
            **ratios(model, x, arithmetic, forecast),
            **spent,
        }


def forecast_of(model: ig.Invertible, x: Tensor, config: Config) -> RoundingForecast | None:
    """The forecast as the audit makes it, or None where a layer's inverse raises at its own output."""
    for way in (
        lambda: InverseDifferences(model.to_dtype(torch.float64), x.double()),
        lambda: Linearization(model, x),
    ):
        try:
            generator = torch.Generator().manual_seed(config.seed)
            with torch.no_grad():
                return rounding_forecast(way(), probes=config.probes, generator=generator)
        except (ValueError, AssertionError, ig.NotApplicable):
            continue
    return None


def ratios(
    model: ig.Invertible, x: Tensor, arithmetic: NumberFormat, unit: RoundingForecast | None
) -> Row:
    """Quantiles of measured / forecast over the samples for which first order can hold: forecast below 0.1 |x|."""
    nothing = {"first_order_samples": 0, "ratio_median": np.nan, "within_factor_3": np.nan}
    if arithmetic.autocast is not None or unit is None:
        return nothing
    forecast = unit.error(unit_roundoff(arithmetic.storage))
    try:
        twin, cast = model.to_dtype(arithmetic.storage), x.to(arithmetic.storage)
        with torch.no_grad():
            error = (twin.inverse(twin(cast)).double() - cast.double()).norm(dim=1)
    except (RuntimeError, ValueError, NotImplementedError):
        return nothing
    counted = (forecast < 0.1 * x.norm(dim=1)) & error.isfinite() & (forecast > 0)
    ratio = (error / forecast)[counted]
    if not len(ratio):
        return nothing
    return {
        "first_order_samples": len(ratio),
        "ratio_median": ratio.median().item(),
        "within_factor_3": ((ratio > 1 / 3) & (ratio < 3)).double().mean().item(),
    }


def amplify(module: nn.Module, gain: float) -> None:
    """Multiply the last linear layer of every sub-network by ``gain``."""
    children = [m for m in module.modules() if isinstance(m, (MLP, ResidualNet))]
    with torch.no_grad():
        for child in children:
            last = [m for m in child.modules() if isinstance(m, nn.Linear)][-1]
            last.weight.mul_(gain)


def cost(model: ig.Invertible, x: Tensor, config: Config) -> Row:
    """Processor time of the forecast, and of the float64 copy it needs, over one inverse pass; medians of five.

    The measurement in float64 needs the same copy. A spline's inverse that checks its own
    discriminant raises.
    """
    z = model(x).detach()
    generator = torch.Generator().manual_seed(config.seed)
    twin = model.to_dtype(torch.float64)

    def forecast() -> None:
        rounding_forecast(
            InverseDifferences(twin, x.double()), probes=config.probes, generator=generator
        )

    calls = {"copy": lambda: model.to_dtype(torch.float64), "cost": forecast}
    try:
        with torch.no_grad():
            inverse = np.median([seconds(lambda: model.inverse(z)) for _ in range(5)])
            spent = {
                name: np.median([seconds(call) for _ in range(5)]) / inverse
                for name, call in calls.items()
            }
    except (ValueError, AssertionError, ig.NotApplicable):
        spent = dict.fromkeys(calls, np.nan)
    return {f"{name}_in_inverse_passes": float(value) for name, value in spent.items()}


def seconds(function: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def run(config: Config) -> pd.DataFrame:
    """All stacks in all arithmetics."""
    frame = collect(config, cases(config), measure)
    print(summary(frame).to_string(index=False))
    print(
        frame.groupby("case")[["cost_in_inverse_passes", "copy_in_inverse_passes"]]
        .first()
        .describe()
        .to_string()
    )
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per arithmetic: the figures of the claims."""
    rows = []
    for name, group in frame.groupby("arithmetic", sort=False):
        decided = group[
            group.forecast_verdict.isin(["works", "breaks"]) & (group.measured_verdict != "refused")
        ]
        rows.append(
            {
                "arithmetic": name,
                "cases": len(group),
                "refused": (group.measured_verdict == "refused").sum(),
                "decided": len(decided),
                "right": (decided.forecast_verdict == decided.measured_verdict).sum(),
                "median ratio": group.ratio_median.median(),
                "median within factor 3": group.within_factor_3.median(),
            }
        )
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> Figure:
    """Measured against forecast error, one point per stack and arithmetic."""
    figure = Figure(figsize=(6, 5.5))
    axes = figure.subplots()
    shown = frame[np.isfinite(frame.measured) & np.isfinite(frame.forecast) & (frame.forecast > 0)]
    for name, group in shown.groupby("arithmetic", sort=False):
        axes.loglog(group.forecast, group.measured.clip(lower=1e-18), ".", label=name, alpha=0.7)
    ends = np.array([1e-17, 1e3])
    axes.loglog(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(
        ends, ends / 3, ends * 3, color="black", alpha=0.07, label="within a factor of 3"
    )
    axes.axhline(1e-2, color="black", linewidth=0.6, linestyle=":")
    axes.set(
        xlabel="forecast error, 95 % of samples [|x|]",
        ylabel="measured error, 95 % of samples [|x|]",
    )
    axes.set(
        xlim=(1e-17, 1e4),
        ylim=(1e-17, 1e4),
        title=f"{frame.case.nunique()} stacks of three libraries",
    )
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(__name__)
