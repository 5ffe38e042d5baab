"""What a look at singular values costs a training run, from the vectors of the look before.

A net is trained by Adam on noise, by likelihood. After a warm-up, every tenth step an AuditHook
measures the extreme singular values of a few samples to 1 %. Processor time of a look over that of
ten steps; Lanczos steps of the first look and of the later ones.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import processor_seconds
from benchmarks.performance.nets import Sizes
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.partition import Halves
from inn_guard.training.audit_hook import AuditHook


@dataclass(frozen=True)
class Config:
    """Which nets, and for how long they are trained."""

    samples: int = 2  # that are looked at
    every: int = 10
    looks: int = 6
    warm_up: int = 300  # steps before the first look
    learning_rate: float = 1e-4
    nets: tuple[str, ...] = ("demo", "CIFAR-10 net")


PRESETS = {
    "smoke": {"looks": 2, "warm_up": 2, "every": 2, "nets": ("demo",)},
    "cpu": {},
}
GOALS = {"share": 0.01, "steps_later": 2}


def demo() -> tuple[Invertible, Tensor]:
    """Eight couplings of a table of 32 features, batch 512."""
    torch.manual_seed(0)
    halves = [Halves(swapped=k % 2 == 1) for k in range(8)]
    net = Chain(*(AffineCoupling(MLP([16, 256, 256, 32]), partition=part) for part in halves))
    return net, torch.randn(512, 32)


def cifar() -> tuple[Invertible, Tensor]:
    """The trunk of 48 blocks, D = 3072, batch 128."""
    sizes = Sizes(batch=128)
    return sizes.net(48), sizes.data()


NETS = {"demo": demo, "CIFAR-10 net": cifar}


def measure(config: Config, name: str) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    net, x = NETS[name]()
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    hook = AuditHook(net, every=1, checks=["jacobian_spectrum"], samples=config.samples)

    def train() -> None:
        optimizer.zero_grad()
        z, log_det = net.forward_and_log_det(x)
        (0.5 * z.flatten(1).square().sum(1) - log_det).mean().backward()
        optimizer.step()

    for _ in range(config.warm_up):
        train()
    training, looking, steps = [], [], []
    for _ in range(config.looks):
        seconds, _ = processor_seconds(lambda: [train() for _ in range(config.every)])
        training.append(seconds)
        seconds, report = processor_seconds(lambda: hook(x))
        looking.append(seconds)
        values = report["jacobian_spectrum"].values
        steps.append(max(values["sigma_max_steps"], values["sigma_min_steps"]))
    ratios = [look / train for look, train in zip(looking[1:], training[1:], strict=True)]
    return [
        {
            "samples": config.samples,
            "share": statistics.median(ratios),
            "goal_share": GOALS["share"],
            "steps_first": steps[0],
            "steps_later": max(steps[1:]),
            "goal_steps": GOALS["steps_later"],
            "share_first": looking[0] / training[0],
        }
    ]


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.nets, measure)


if __name__ == "__main__":
    main(__name__)
