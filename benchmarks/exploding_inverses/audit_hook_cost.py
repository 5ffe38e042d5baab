"""What watching a training run costs: one audit inside the loop against one training step, on the digits classifiers.

    python -m benchmarks.exploding_inverses.audit_hook_cost --preset cpu           # less than a minute on one core

Claim measured: AuditHook's default check, every 100 steps, adds less than one per cent to the time of training.
Processor time, medians; batches of 128 images of 8x8 pixels, Adam. These nets are as small as they come: the cost of an
audit is mostly that of looking after the model's state, part by part, which does not grow with its size as a step does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import nn

import inn_guard as ig
from benchmarks.common.digits import digits
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.digits_nets import NETS, Classifier

SPECTRUM = functools.partial(ig.AUDITS["jacobian_spectrum"], tolerance=0.2, max_steps=10)


@dataclass(frozen=True)
class Config:
    """Which networks are timed.

    Attributes:
        sizes: "blocks x width" of each.
        repeats: of every timing.
        every: steps between two audits.
    """

    sizes: tuple[str, ...] = ("8x64", "16x128")
    repeats: int = 15
    every: int = 100


PRESETS = {
    "smoke": {"sizes": ("2x16",), "repeats": 3},
    "cpu": {},  # less than a minute
}


def measure(config: Config, case: tuple[str, str]) -> Iterator[Row]:
    """Milliseconds of a step, of the default audit, and of one that adds the spectrum of four samples."""
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
        "glance": milliseconds(lambda: quick_round_trip(x), config.repeats),
        "spectrum": milliseconds(lambda: spectrum(x), max(3, config.repeats // 3)),
    }
    shares = {
        f"{key}_percent": 100 * times[key] / times["step"] / config.every
        for key in ("glance", "spectrum")
    }
    yield {
        "net": name,
        "size": size,
        **{f"{key}_ms": value for key, value in times.items()},
        **shares,
    }


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def run(config: Config) -> pd.DataFrame:
    """All networks."""
    return collect(
        config,
        {f"{name} {size}": (name, size) for name, size in product(NETS, config.sizes)},
        measure,
    )


if __name__ == "__main__":
    main(__name__)
