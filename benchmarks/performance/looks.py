"""What a look at singular values costs a training run, from the vectors of the look before.

A net is trained by Adam on noise, by likelihood. After a warm-up, an AuditHook looks at the extreme
singular values of the first samples at every tenth step, in two ways: ``tracked_spectrum``, one
step a side at one sample, and ``jacobian_spectrum``, to 1 % at two. Processor time of a look over
that of ten steps. Then ``tracked_spectrum`` once more, with ``share=0.01``: what all calls of the
hook take of the whole training, and how many of the looks that were due were made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import processor_seconds
from benchmarks.performance.nets import Sizes
from inn_guard.audits.tracked_spectrum import tracked_spectrum
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.partition import Halves
from inn_guard.report.result import AuditResult
from inn_guard.training.audit_hook import AuditHook


@dataclass(frozen=True)
class Training:
    """How long one net is trained.

    Attributes:
        warm_up: steps before the first look.
        looks: that are made, each after ``every`` steps.
        steps: of the run with a share.
    """

    warm_up: int
    looks: int
    steps: int


@dataclass(frozen=True)
class Config:
    """Which nets, and for how long they are trained."""

    every: int = 10
    learning_rate: float = 1e-4
    share: float = 0.01
    demo: Training = Training(warm_up=300, looks=30, steps=1000)
    cifar: Training = Training(warm_up=2, looks=3, steps=30)
    nets: tuple[str, ...] = ("demo", "CIFAR-10 net")


SHORT = Training(warm_up=2, looks=2, steps=8)
PRESETS = {
    "smoke": {"every": 2, "demo": SHORT, "nets": ("demo",)},
    "demo": {"nets": ("demo",)},  # one minute
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
    length = config.demo if name == "demo" else config.cifar
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)

    def train() -> None:
        optimizer.zero_grad()
        z, log_det = net.forward_and_log_det(x)
        (0.5 * z.flatten(1).square().sum(1) - log_det).mean().backward()
        optimizer.step()

    for _ in range(length.warm_up):
        train()
    tracked = AuditHook(net, checks=[tracked_spectrum], every=1)
    spectrum = AuditHook(net, checks=["jacobian_spectrum"], every=1, samples=2)
    training, tracking, measuring, steps, off = [], [], [], [], []
    for _ in range(length.looks):
        training.append(sum(processor_seconds(train)[0] for _ in range(config.every)))
        seconds, bound = processor_seconds(lambda: _look(tracked, x))
        tracking.append(seconds)
        seconds, found = processor_seconds(lambda: _look(spectrum, x))
        measuring.append(seconds)
        steps.append(max(found.values["sigma_max_steps"], found.values["sigma_min_steps"]))
        truth = found.per_sample["log10_condition_number"][0].item()
        off.append(1 - 10 ** (bound.values["log10_condition_number"] - truth))
    share, made = with_share(config, length, net, x, train)
    return [
        {
            "share": share,
            "goal_share": GOALS["share"],
            "looks_made": made,
            "looks_due": math.ceil(length.steps / config.every),
            "look_over_ten_steps": _over_ten(tracking[1:], training[1:], config.every),
            "below_first": off[0],
            "below_last": off[-1],
            "spectrum_over_ten_steps": _over_ten(measuring[1:], training[1:], config.every),
            "steps_first": steps[0],
            "steps_later": statistics.median(steps[1:]),
            "steps_most": max(steps[1:]),
            "goal_steps": GOALS["steps_later"],
        }
    ]


def _look(hook: AuditHook, x: Tensor) -> AuditResult:
    report = hook(x)
    assert report is not None  # every step is due
    return report.results[0]


def _over_ten(looks: list[float], training: list[float], every: int) -> float:
    """Median time of a look over that of ten steps."""
    ratios = [look / train for look, train in zip(looks, training, strict=True)]
    return statistics.median(ratios) * every / 10


def with_share(
    config: Config, length: Training, net: Invertible, x: Tensor, train: Callable[[], None]
) -> tuple[float, int]:
    """What the calls of a hook with a share take of the whole, and how many looks it made."""
    hook = AuditHook(net, checks=[tracked_spectrum], every=config.every, share=config.share)
    training, looking, made = 0.0, 0.0, 0
    for _ in range(length.steps):
        seconds, _ = processor_seconds(train)
        training += seconds
        seconds, report = processor_seconds(lambda: hook(x))
        looking += seconds
        made += report is not None
    return looking / (training + looking), made


def run(config: Config) -> pd.DataFrame:
    frame = collect(config, config.nets, measure)
    print(frame.T.to_string(header=False))
    return frame


if __name__ == "__main__":
    main(__name__)
