"""The forecast of the round trip's rounding error against the measured one, for three libraries.

    inn-guard bench precision.rounding_forecast --preset cpu  # about 5 minutes on one core

Claims measured: the median over the samples of measured / forecast lies in [0.5, 2] where first
order holds (forecast below 0.1 |x|); where the forecast decides (works, breaks), the measurement
agrees in 99 % of the cases; the forecast costs at most ten passes of the inverse, in addition to
the float64 copy that the measurement in float64 needs as well. A case is one stack in one number
format. Synthetic nets and data: weights as each library initialises them, those of the
sub-networks' last layers multiplied by a gain; x ~ N(0, I).
"""

from __future__ import annotations

import itertools
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
from benchmarks.performance.measurement import processor_seconds
from inn_guard.audits.precision.audit import precision
from inn_guard.audits.precision.number_format import NumberFormat, number_formats
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.inverse_differences import InverseDifferences
from inn_guard.jacobian.rounding_error import RoundingForecast, rounding_forecast, unit_roundoff
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation

HIDDEN = 48
AUDIT_COLUMNS = (
    "unit roundoff",
    "usable",
    "forecast",
    "forecast verdict",
    "measured",
    "measured median",
    "non-finite samples",
    "measured verdict",
    "remark",
)


@dataclass(frozen=True)
class Config:
    """Which stacks are measured."""

    dims: tuple[int, ...] = (4, 8)  # dimensions D
    depths: tuple[int, ...] = (6, 16)  # numbers of blocks
    # factors on the last layers of the sub-networks; larger ones make the inverse explode
    gains: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    samples: int = 128  # data per stack
    probes: int = 1  # sweeps of the forecast
    seed: int = 0  # of weights and data


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
        changed = out = dim // 2
        if block is AffineCoupling:
            out = 2 * changed
        layers: list[ig.Invertible] = []
        for _ in range(depth):
            layers.append(block(MLP([dim - changed, HIDDEN, HIDDEN, out])))
            layers.append(Permutation(torch.randperm(dim)))
        return Chain(*layers)

    return build


def nflows(make: Callable[[int, Tensor], nn.Module]) -> Callable[[int, int], nn.Module]:
    """nflows transforms with a random permutation after each."""

    def build(dim: int, depth: int) -> nn.Module:
        mask = (torch.arange(dim) % 2).int()
        chain: list[nn.Module] = []
        for _ in range(depth):
            chain += [make(dim, mask), transforms.RandomPermutation(dim)]
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
    cases = {}
    for case in itertools.product(BLOCKS, config.dims, config.depths, config.gains):
        stack = Stack(*case)
        key = f"{stack.block} D={stack.dim} n={stack.depth} gain={stack.gain:g}"
        cases[key] = stack
    return cases


def measure(config: Config, stack: Stack) -> Iterator[Row]:
    """One row per number format: forecast, measurement and their ratio."""
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
    formats = number_formats(x.device)
    for row, number_format in zip(result.tables["number format"], formats, strict=True):
        yield {
            "block": stack.block,
            "D": stack.dim,
            "depth": stack.depth,
            "gain": stack.gain,
            "arithmetic": number_format.name,
            **{name.replace(" ", "_"): row[name] for name in AUDIT_COLUMNS},
            **ratios(model, x, number_format, forecast),
            **spent,
        }


def forecast_of(model: ig.Invertible, x: Tensor, config: Config) -> RoundingForecast | None:
    """The forecast of the audit, or None if a layer's inverse raises an error at its own output."""
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
    model: ig.Invertible, x: Tensor, number_format: NumberFormat, unit: RoundingForecast | None
) -> Row:
    """Measured / forecast error of the samples whose forecast is below 0.1 |x|.

    Above that the forecast, which is of first order, need not hold.
    """
    nothing = {"first_order_samples": 0, "ratio_median": np.nan, "within_factor_3": np.nan}
    if number_format.autocast is not None or unit is None:
        return nothing
    forecast = unit.error(unit_roundoff(number_format.storage))
    try:
        cast_model, cast = model.to_dtype(number_format.storage), x.to(number_format.storage)
        with torch.no_grad():
            error = (cast_model.inverse(cast_model(cast)).double() - cast.double()).norm(dim=1)
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
    for network in module.modules():
        if isinstance(network, (MLP, ResidualNet)):
            *_, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
            with torch.no_grad():
                last.weight.mul_(gain)


def cost(model: ig.Invertible, x: Tensor, config: Config) -> Row:
    """Processor time of the forecast and of its float64 copy over that of one inverse pass.

    The measurement in float64 needs the same copy. A spline's inverse that checks its own
    discriminant raises.
    """
    z = model(x).detach()
    generator = torch.Generator().manual_seed(config.seed)
    exact = model.to_dtype(torch.float64)

    def forecast() -> None:
        differences = InverseDifferences(exact, x.double())
        rounding_forecast(differences, probes=config.probes, generator=generator)

    calls = {"copy": lambda: model.to_dtype(torch.float64), "cost": forecast}
    try:
        with torch.no_grad():
            inverse = median_seconds(lambda: model.inverse(z))
            spent = {name: median_seconds(call) / inverse for name, call in calls.items()}
    except (ValueError, AssertionError, ig.NotApplicable):
        spent = dict.fromkeys(calls, np.nan)
    return {f"{name}_in_inverse_passes": float(value) for name, value in spent.items()}


def median_seconds(call: Callable[[], object]) -> float:
    """Processor time of one call, the median of five."""
    return float(np.median([processor_seconds(call)[0] for _ in range(5)]))


def run(config: Config) -> pd.DataFrame:
    """All stacks in all number formats."""
    frame = collect(config, cases(config), measure)
    print(summary(frame).to_string(index=False))
    costs = frame.groupby("case")[["cost_in_inverse_passes", "copy_in_inverse_passes"]].first()
    print(costs.describe().to_string())
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per number format: the figures of the claims."""
    rows = []
    for name, group in frame.groupby("arithmetic", sort=False):
        decided = group[group.forecast_verdict.isin(["works", "breaks"])]
        decided = decided[decided.measured_verdict != "refused"]
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
    """Measured against forecast error, one point per stack and number format."""
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
        xlabel="forecast error, 95 % of samples, of the feature",
        ylabel="measured error, 95 % of samples, of the feature",
        xlim=(1e-17, 1e4),
        ylim=(1e-17, 1e4),
        title=f"{frame.case.nunique()} stacks of three libraries",
    )
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(__name__)
