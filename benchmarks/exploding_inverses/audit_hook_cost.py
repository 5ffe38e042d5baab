"""What audits during training cost: one audit against one training step, on digits classifiers.

    inn-guard bench exploding_inverses.audit_hook_cost --preset cpu

Claim measured: AuditHook's default check, every 100 steps, adds less than one per cent to the time
of training. Processor time, medians; batches of 128 images of 8x8 pixels, Adam. These nets are as
small as they come: most of the time of an audit saves and restores the model's state, module by
module, which does not grow with the size of the modules as a step does. The columns ``glance_*``
are of the default check.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from torch import nn

import inn_guard as ig
from benchmarks.common.digits import digits
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.digits_nets import NETS, Classifier
from benchmarks.performance.measurement import alternating_seconds

SPECTRUM = functools.partial(ig.AUDITS["jacobian_spectrum"], tolerance=0.2, max_steps=10)


@dataclass(frozen=True)
class Config:
    """Which networks are timed."""

    sizes: tuple[str, ...] = ("8x64", "16x128")  # "blocks x width" of each
    repeats: int = 15  # of every timing
    every: int = 100  # steps between two audits


PRESETS = {
    "smoke": {"sizes": ("2x16",), "repeats": 3},
    "cpu": {},  # less than a minute
}


def measure(config: Config, case: tuple[str, str]) -> Iterator[Row]:
    """Milliseconds of a step, of the default audit, and of one of the spectrum of four samples."""
    torch.manual_seed(0)
    name, size = case
    blocks, width = (int(part) for part in size.split("x"))
    data, net = digits(), Classifier(NETS[name](blocks, width))
    optimizer = torch.optim.Adam(net.parameters())
    x, labels = data.train_images[:128], data.train_labels[:128]

    def step() -> None:
        loss = nn.functional.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    quick_round_trip = ig.AuditHook(net.inn, every=1)
    spectrum = ig.AuditHook(net.inn, every=1, checks=[SPECTRUM], samples=4)
    times = {
        "step": milliseconds(step, config.repeats),
        "quick": milliseconds(lambda: quick_round_trip(x), config.repeats),
        "spectrum": milliseconds(lambda: spectrum(x), max(3, config.repeats // 3)),
    }
    percent = 100 / times["step"] / config.every
    yield {
        "net": name,
        "size": size,
        "step_ms": times["step"],
        "glance_ms": times["quick"],
        "spectrum_ms": times["spectrum"],
        "glance_percent": times["quick"] * percent,
        "spectrum_percent": times["spectrum"] * percent,
    }


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call."""
    return 1e3 * statistics.median(alternating_seconds({"": step}, repeats=repeats)[""])


def run(config: Config) -> pd.DataFrame:
    pairs = product(NETS, config.sizes)
    return collect(config, {f"{name} {size}": (name, size) for name, size in pairs}, measure)


if __name__ == "__main__":
    main(__name__)
