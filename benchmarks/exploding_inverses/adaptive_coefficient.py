"""A coefficient that holds the condition number at a target, against a grid of fixed ones.

    inn-guard bench exploding_inverses.adaptive_coefficient --preset cpu

Claim measured: from any start, over four decades, the steered coefficient brings the condition
number to its target and keeps it there, in one run and without a search, at the accuracy of the
grid. Network: a classifier of digits of affine couplings, whose inverse has no bound, with a linear
head; Adam; the normalizing-flow loss every 10 steps. The coefficient is steered by what AuditHook
measures on a few fixed training images every 25 steps; the condition numbers of the table are the
worst of held-out images that no run has seen, which lie somewhat above those of training images.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import inn_guard as ig
from benchmarks.common.digits import Digits, digits
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.digits_nets import Classifier, plain
from inn_guard.audits.quick_check import quick_round_trip
from inn_guard.training.actions import log10_condition_number

SPECTRUM = functools.partial(ig.AUDITS["jacobian_spectrum"], tolerance=0.2, max_steps=10)


@dataclass(frozen=True)
class Config:
    """Which runs are made."""

    fixed: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)  # fixed coefficients, the grid
    starts: tuple[float, ...] = (1e-6, 1e-4, 1e-2)  # values at which the steered coefficient starts
    target: float = 100.0  # condition number to hold
    blocks: int = 8  # couplings
    width: int = 64  # of their networks
    steps: int = 1000  # of Adam, batches of 128
    learning_rate: float = 1e-3  # of Adam
    regularize_every: int = 10  # steps between two penalties
    steer_every: int = 25  # steps between two measurements that steer
    show_every: int = 50  # steps between two rows of the table
    samples: int = 16  # images per measurement
    seed: int = 0  # of weights and batches


PRESETS = {
    "smoke": {
        "fixed": (1e-3,), "starts": (1e-2,), "blocks": 2, "width": 16, "steps": 20,
        "steer_every": 10, "show_every": 10,
    },
    "cpu": {},  # minutes on one core
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run: a coefficient that stays, or one that is steered from there."""

    coefficient: float
    steered: bool


def cases(config: Config) -> dict[str, Run]:
    """The grid, then the steered runs."""
    grid = {f"fixed {c:g}": Run(c, steered=False) for c in config.fixed}
    return grid | {f"adaptive from {c:g}": Run(c, steered=True) for c in config.starts}


def measure(config: Config, run: Run) -> Iterator[Row]:
    """One row per evaluation of the network while it is trained."""
    torch.manual_seed(config.seed)
    data, net = digits(), Classifier(plain(config.blocks, config.width))
    adaptive = ig.AdaptiveCoefficient(
        ig.NormalizingFlowLoss(1.0), target=config.target, initial=run.coefficient or 1.0
    )
    penalties = []
    if run.coefficient:
        penalties.append(adaptive)
    penalty = ig.RegularizerHook(net.inn, penalties, every=config.regularize_every)
    steer = ig.AuditHook(
        net.inn,
        checks=[SPECTRUM],
        every=config.steer_every,
        samples=None,
        actions=[ig.actions.AdaptCoefficient(adaptive)],
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    training = steering = 0.0
    for step, (x, labels) in enumerate(batches(config, data)):
        if step % config.show_every == 0 or step == config.steps - 1:
            yield {
                "coefficient": adaptive.value * bool(run.coefficient),
                "steered": run.steered,
                "target": config.target,
                "step": step,
                **evaluation(net, data, config),
                "seconds_training": training,
                "seconds_steering": steering,
            }
        start = time.process_time()
        loss = nn.functional.cross_entropy(net(x), labels) + penalty(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training += time.process_time() - start
        if run.steered:
            start = time.process_time()
            steer(data.train_images[: config.samples], step=step)
            steering += time.process_time() - start


def batches(config: Config, data: Digits) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random images and labels, the same for every run of one seed."""
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        rows = torch.randint(len(data.train_images), (128,), generator=generator)
        yield data.train_images[rows], data.train_labels[rows]


def evaluation(net: Classifier, data: Digits, config: Config) -> Row:
    """Condition number, round trip and accuracy on held-out images."""
    hook = ig.AuditHook(net.inn, checks=[SPECTRUM, quick_round_trip], samples=None)
    report = hook.report(data.test_images[: config.samples])
    net.eval()
    with torch.no_grad():
        accuracy = (net(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    net.train()
    return {
        "log10_condition": log10_condition_number(report),
        "reconstruction_error": report["quick_round_trip"].values["relative_error"],
        "accuracy": accuracy,
    }


def run(config: Config) -> pd.DataFrame:
    frame = collect(config, cases(config), measure)
    print(summary(frame).to_string(index=False))
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per run: distance from the target in the second half, extremes and accuracy."""
    rows = []
    for case, group in frame.groupby("case", sort=False):
        late, last = group[group.step >= frame.step.max() / 2], group.iloc[-1]
        distance = (late.log10_condition - np.log10(late.target)).abs()
        rows.append(
            {
                "case": case,
                "last log10 condition": last.log10_condition,
                "mean distance in decades": distance.mean(),
                "largest distance": distance.max(),
                "largest log10 condition": group.log10_condition.max(),
                "last coefficient": last.coefficient,
                "accuracy": last.accuracy,
                "steering / training time": last.seconds_steering / last.seconds_training,
            }
        )
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> Figure:
    """Condition number and coefficient against the step."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    condition, coefficient = figure.subplots(1, 2)
    shades = iter(np.linspace(0.75, 0.15, frame[~frame.steered].case.nunique()))
    colours = iter(("#d55e00", "#0072b2", "#009e73", "#cc79a7"))
    for case, group in frame.groupby("case", sort=False):
        steered = bool(group.steered.iloc[0])
        if steered:
            style = {"color": next(colours), "linewidth": 1.8}
        else:
            style = {"color": str(next(shades)), "linestyle": "--"}
        condition.semilogy(group.step, 10**group.log10_condition, label=case, **style)
        if steered or group.coefficient.iloc[0] > 0:
            coefficient.semilogy(group.step, group.coefficient, label=case, **style)
    target = frame.target.iloc[0]
    condition.axhline(target, color="black", linewidth=0.8)
    condition.annotate("target", (0, target), xytext=(2, 3), textcoords="offset points")
    condition.set(
        xlabel="step", ylabel="worst condition number, held-out images", title="Condition number"
    )
    coefficient.set(
        xlabel="step", ylabel="coefficient of the normalizing-flow loss", title="Coefficient"
    )
    figure.legend(
        *condition.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper"
    )
    return figure


if __name__ == "__main__":
    main(__name__)
