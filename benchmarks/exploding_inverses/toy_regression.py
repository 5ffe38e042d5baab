"""A regression onto a line, which a bijection fits by flattening the plane; NF keeps the inverse.

    inn-guard bench exploding_inverses.toy_regression --preset cpu  # about 2 minutes of one core

Inputs (x1, x2) are independent standard normal; targets (y1, y2) have y1 of variance 1e-24, that is
nothing, and y2 = x2. Rows: mean squared error, worst round trip and worst condition number of the
training inputs over the steps. What the paper leaves open: how many blocks; 16 here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import trange

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.stability import round_trip_error, singular_values
from inn_guard.core.invertible import Invertible
from inn_guard.models.toy import regression_net

COLOURS = ("#d55e00", "#009e73", "#0072b2", "#cc79a7")
CURVES = {
    "mse": "mean squared error",
    "error": "worst round-trip error",
    "condition_number": "worst condition number",
}


@dataclass(frozen=True)
class Config:
    """What is trained; the defaults are the paper's."""

    # of the normalizing-flow loss; 0 is the unregularized net
    coefficients: tuple[float, ...] = (0.0, 1e-8)
    # ActNorm, reverse permutation and affine coupling each; not printed in the paper
    blocks: int = 16
    hidden: int = 128  # width of the two hidden layers
    samples: int = 10_000  # all of them at every step
    steps: int = 40_000  # of Adam
    learning_rate: float = 1e-4  # of Adam
    looks: int = 40  # number of evaluations per net, evenly spaced on the logarithm of the steps
    looked_at: int = 1000  # number of inputs of an evaluation
    seed: int = 0  # of weights and samples


PRESETS = {
    "smoke": {"blocks": 2, "hidden": 8, "samples": 32, "steps": 4, "looks": 3, "looked_at": 32},
    # Minutes on one core: 4 narrow blocks, 256 samples, an eighth of the steps at five times the
    # rate. So few steps leave errors of 1e-6, far above what a coefficient of 1e-8 weighs: a larger
    # one is shown as well.
    "cpu": {
        "coefficients": (0.0, 1e-8, 1e-3), "blocks": 4, "hidden": 64, "samples": 256, "steps": 5000,
        "looks": 12, "learning_rate": 5e-4, "looked_at": 256,
    },
    "paper": {},  # the paper's setting
}  # fmt: skip


def data(config: Config) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (samples, 2) each: the pairs of equations 13 and 14."""
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(config.samples, 2, generator=generator)
    nothing = 1e-12 * torch.randn(config.samples, generator=generator)
    return x, torch.stack([nothing, x[:, 1]], dim=1)


def measure(config: Config, coefficient: float) -> Iterator[Row]:
    """Rows of one net while it is trained; a loss that is not finite ends the training."""
    x, y = data(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        net = regression_net(blocks=config.blocks, hidden=config.hidden)
    penalties = []
    if coefficient:
        penalties.append(ig.NormalizingFlowLoss(coefficient))
    hook = ig.RegularizerHook(net, penalties, every=1)
    optimizer = torch.optim.Adam(net.parameters(), config.learning_rate)
    evaluated = evaluation_steps(config)
    for step in trange(config.steps + 1, desc=f"coefficient {coefficient:g}", disable=None):
        z = net(x)
        mse = (z - y).square().sum(dim=1).mean()
        if step in evaluated or not mse.isfinite():
            row = {"coefficient": coefficient, "step": step, "mse": mse.item()}
            yield row | evaluation(net, x[: config.looked_at])
        if not mse.isfinite():
            return
        optimizer.zero_grad()
        (mse + hook(x, z=z)).backward()
        optimizer.step()


def evaluation_steps(config: Config) -> set[int]:
    """Steps 1 to the last one, evenly spaced on a logarithmic axis."""
    spaced = torch.logspace(0, torch.tensor(float(config.steps)).log10().item(), config.looks)
    return {round(step) for step in spaced.tolist()}


def evaluation(net: Invertible, x: Tensor) -> Row:
    """The worst of the inputs: round trip, condition number, singular values."""
    sigma_max, sigma_min = singular_values(net, x)
    condition = (sigma_max / sigma_min).nan_to_num(torch.inf, posinf=torch.inf)
    return {
        "error": round_trip_error(net, x).max().item(),
        "condition_number": condition.max().item(),
        "sigma_max": sigma_max.max().item(),
        "sigma_min": sigma_min.min().item(),
    }


def run(config: Config) -> pd.DataFrame:
    cases = {}
    for coefficient in config.coefficients:
        name = "none"
        if coefficient:
            name = f"NF {coefficient:g}"
        cases[name] = coefficient
    frame = collect(config, cases, measure)
    print(frame.groupby("case", sort=False).tail(1).to_string(index=False))
    return frame


def draw(frame: pd.DataFrame) -> Figure:
    """Error of the task, round trip and condition number over the steps."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for colour, (case, group) in zip(COLOURS, frame.groupby("case", sort=False), strict=False):
            axes.loglog(group.step, group[column], label=case, color=colour)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(title="regularizer", frameon=False)
    return figure


if __name__ == "__main__":
    main(__name__)
