r"""The price of stability: penalties and hard bounds against the likelihood, three data sets.

    inn-guard bench census.price --preset smoke
    inn-guard bench census.price --sets moons --out benchmarks/results/census/price_moons

One flow, RealNVP with unbounded exponential scales between invertible linear maps, is trained with
each treatment from the same first weights and on the same batches:

* nothing;
* ``FD c``: c times the squared norms of J_F and J_F^-1 at the data, by finite differences;
* ``NF c``: c times the normalizing-flow loss. Of a flow that is trained by its likelihood this is
  the loss itself once more, so that it can only change the size of a step;
* hard bounds: scales 0.5 to 1, scales 1/e to e, or networks whose linear maps have
  the spectral norm 1.

A row has the likelihood of held-out data, their largest condition number by dense float64
Jacobians, and the share of draws from the base that are lost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import inn_guard as ig
from benchmarks.census.data import load
from benchmarks.census.training import Training, bits, seeded
from benchmarks.census.truth import dense_jacobian, truths
from benchmarks.common.figures import draw_grid_lines
from benchmarks.common.runner import Row, collect, main
from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, zero_last
from inn_guard.layers.scales import ClampedScale, ExpScale, ScaleFunction, squashed_sigmoid
from inn_guard.training.regularizer_hook import Regularizer

__all__ = ["COLOURS", "KINDS", "PRESETS", "TREATMENTS", "Config", "draw", "resolved", "run"]

USES = ("density", "sampling", "reconstruction")
FD_COEFFICIENTS = (0.01, 0.1, 1.0, 10.0)
NF_COEFFICIENTS = (10.0,)
MOST_DIGITS = 16
#: kind of treatment -> colour
COLOURS = {"nothing": "#444444", "FD": "#0072b2", "NF": "#cc79a7", "bound": "#d55e00"}


def plain_network(before: int, after: int, *, width: int) -> nn.Module:
    """An MLP that is zero at first."""
    return zero_last(MLP([before, width, width, after]))


def bounded_network(before: int, after: int, *, width: int) -> nn.Module:
    """An MLP whose linear maps are divided by their spectral norm, found by power iteration."""
    network = MLP([before, width, width, after])
    for module in network:
        if isinstance(module, nn.Linear):
            spectral_norm(module)
    return network


@dataclass(frozen=True)
class Treatment:
    """What keeps a flow stable.

    Attributes:
        kind: nothing, FD, NF or bound.
        scale: of the couplings.
        network: (channels in, channels out, width=) -> a coupling's network.
        penalties: seed -> what is added to the loss.
    """

    kind: str
    scale: ScaleFunction = field(default_factory=ExpScale)
    network: Callable[..., nn.Module] = plain_network
    penalties: Callable[[int], tuple[Regularizer, ...]] = lambda seed: ()


def finite_differences(coefficient: float, seed: int) -> tuple[Regularizer, ...]:
    """Both directions at the data."""
    return (ig.FiniteDifferences(coefficient, seed=seed),)


def likelihood(coefficient: float, seed: int) -> tuple[Regularizer, ...]:
    """The normalizing-flow loss, which draws no noise."""
    return (ig.NormalizingFlowLoss(coefficient),)


TREATMENTS = {
    "nothing": Treatment("nothing"),
    "scales 0.5 to 1": Treatment("bound", scale=squashed_sigmoid()),
    "scales 1/e to e": Treatment("bound", scale=ClampedScale(1.0)),
    "spectral norms of 1": Treatment("bound", network=bounded_network),
}
for c in FD_COEFFICIENTS:
    TREATMENTS[f"FD {c:g}"] = Treatment("FD", penalties=partial(finite_differences, c))
for c in NF_COEFFICIENTS:
    TREATMENTS[f"NF {c:g}"] = Treatment("NF", penalties=partial(likelihood, c))
KINDS = {name: treatment.kind for name, treatment in TREATMENTS.items()}


@dataclass(frozen=True)
class Config:
    """The flows, their treatments and the training."""

    sets: tuple[str, ...] = ("moons", "checkerboard", "cells")
    treatments: tuple[str, ...] = tuple(TREATMENTS)
    seeds: tuple[int, ...] = (0, 1, 2)
    depth: int = 8  # couplings
    width: int = 64
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 1e-3
    rows: int = 128  # held-out samples


PRESETS = {
    "smoke": {
        "sets": ("moons",), "treatments": ("nothing", "FD 1", "scales 0.5 to 1"), "seeds": (0,),
        "depth": 2, "width": 8, "steps": 6, "rows": 16,
    },
    "cpu": {},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One training."""

    data: str
    treatment: str
    seed: int


def build(features: int, treatment: Treatment, depth: int, width: int) -> Chain:
    """ActNorm, an invertible linear map and an affine coupling, ``depth`` times."""
    network = partial(treatment.network, width=width)
    steps: list[Invertible] = []
    for _ in range(depth):
        steps += [
            ActNorm(features),
            InvertibleLinear(features),
            AffineCoupling.on_halves(features, network, scale=treatment.scale),
        ]
    return Chain(*steps)


def measure(config: Config, case: Case) -> Iterator[Row]:
    """Train one flow; one row."""
    treatment = TREATMENTS[case.treatment]
    split = load(case.data, root="", held_out=config.rows, seed=case.seed)
    train, test = split.train.flatten(1), split.test.flatten(1)
    with seeded(case.seed):
        flow = build(train.shape[1], treatment, config.depth, config.width)
        training = Training(
            flow,
            train,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=case.seed,
            penalties=treatment.penalties(case.seed),
        )
        training.go_on(config.steps)
    report = ig.audit(flow, test, level="quick", uses=USES)
    row: Row = {
        "data": case.data,
        "treatment": case.treatment,
        "seed": case.seed,
        "kind": treatment.kind,
        "bits": bits(flow, test),
        "log10_condition": log10_condition(flow, test),
        "skipped": training.skipped,
        "data_checksum": split.checksum,
        "weights": report.settings["weights"],
    }
    for use in USES:
        row[use] = report.uses[use].verdict.label
        row[f"{use}_figure"] = report.uses[use].figure
    for use, truth in truths(flow, test).items():
        row[f"true_{use}"] = truth.answer
        row[f"true_{use}_figure"] = truth.figure
    yield row


def log10_condition(flow: Invertible, x: Tensor) -> float:
    """Of the sample with the largest one: singular values of the dense Jacobian in float64."""
    wide = copy.deepcopy(flow).double()
    with torch.enable_grad():
        jacobian = dense_jacobian(wide, x.double())
    if not bool(jacobian.isfinite().all()):
        return math.inf
    values = torch.linalg.svdvals(jacobian)
    return (values[:, 0] / values[:, -1]).max().log10().item()


def run(config: Config) -> pd.DataFrame:
    """One row per data set, treatment and seed."""
    unknown = set(config.treatments) - set(TREATMENTS)
    if unknown:
        raise ValueError(f"expected treatments out of {list(TREATMENTS)}; got {sorted(unknown)}")
    cases = {
        f"{data}, {treatment}, seed {seed}": Case(data, treatment, seed)
        for data in config.sets
        for treatment in config.treatments
        for seed in config.seeds
    }
    return collect(config, cases, measure)


def resolved(frame: pd.DataFrame) -> pd.DataFrame:
    """Condition numbers limited to what float64 can tell."""
    return frame.assign(log10_condition=frame["log10_condition"].clip(upper=MOST_DIGITS))


def draw(frame: pd.DataFrame) -> Figure:
    """The front of each data set: every model small, the medians over the seeds large."""
    frame = resolved(frame)
    sets = list(dict.fromkeys(frame["data"]))
    figure = Figure(figsize=(4.2 * len(sets) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, data in zip(axes, sets, strict=True):
        some = frame[frame["data"] == data]
        for kind in COLOURS:
            _draw_kind(axis, some[some["kind"] == kind], kind)
        axis.set_title(data, fontsize=10)
        axis.set_xlabel("bits per dimension, held out (left is better)", fontsize=8)
        axis.margins(x=0.15)
        draw_grid_lines(axis)
    axes[0].set_ylabel("log10 of the largest condition number")
    return figure


def _draw_kind(axis: Axes, rows: pd.DataFrame, kind: str) -> None:
    """FD's medians are joined in the order of the coefficients; every median has its name."""
    colour = COLOURS[kind]
    columns = ["bits", "log10_condition"]
    axis.plot(*rows[columns].to_numpy().T, "o", color=colour, alpha=0.35, markersize=4)
    middle = rows.groupby("treatment")[columns].median()
    middle = middle.loc[[name for name in TREATMENTS if name in middle.index]]
    style = "-o" if kind == "FD" else "o"
    axis.plot(*middle.to_numpy().T, style, color=colour, markersize=7, linewidth=1)
    for name, place in middle.iterrows():
        axis.annotate(
            str(name), place.to_list(), xytext=(5, 5), textcoords="offset points",
            fontsize=7, color=colour,
        )  # fmt: skip


if __name__ == "__main__":
    main(__name__)
