"""Extreme singular values of other libraries' nets, against row-by-row autograd and numpy's SVD.

For each library and kind of layer one net: eight layers with permutations between them where the
library's own examples have them. Ours takes a whole batch, the peer one sample, as a user's own
code does; the ratio is the peer's seconds of processor time per sample over ours. Images are
3 x 16 x 16 pixels, vectors have 784 features. ``official Glow`` is a net of the shape of Behrmann
et al. on 3 x 32 x 32 pixels with ``forward_(x, objective)`` and ``reverse_(z, objective)``, given
as two callables.
``products`` tells by what the layers are multiplied: known structure, a recorded pass, autograd.
"""

from __future__ import annotations

import collections
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import inn_guard as ig
from benchmarks.common.runner import Row, collect, keyed, main
from benchmarks.performance.foreign_nets import NETS, Net
from benchmarks.performance.measurement import median_ratio, processor_seconds
from benchmarks.performance.peer import row_seconds, svd_seconds
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.checks import FromLU, FromRows
from inn_guard.jacobian.recorded import RecordedJacobian
from inn_guard.jacobian.singular_values import ExtremeSingularValues, extreme_singular_values


@dataclass(frozen=True)
class Config:
    """What is timed."""

    batch: int = 32  # samples at once, by ours
    rounds: int = 2
    rows: int = 12  # of the Jacobian, by the peer, per round
    tolerance: float = 1e-2
    features: int = 784  # of vectors
    size: int = 16  # height and width of images
    official_size: int = 32  # of those of the official Glow
    layers: int = 8  # of a net
    hidden: int = 128  # units or channels of the networks
    nets: tuple[str, ...] = tuple(NETS)
    checked_up_to: int = 1000  # dimensions: the values are compared with a dense float64 Jacobian
    seed: int = 0


PRESETS = {
    "smoke": {
        "batch": 4, "rounds": 1, "rows": 2, "features": 6, "size": 4, "official_size": 4,
        "layers": 2, "hidden": 8,
    },
    # one round: an hour of a busy core less
    "short": {"rounds": 1, "rows": 6, "checked_up_to": 0, "official_size": 16},
    "cpu": {},
}  # fmt: skip


def extremes(
    net: ig.Invertible, x: Tensor, config: Config
) -> tuple[Linearization, ExtremeSingularValues]:
    """Ours: from the model to the values."""
    linearization = Linearization(net, x)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        found = extreme_singular_values(
            linearization, generator=generator, tolerance=config.tolerance
        )
    return linearization, found


def measure(config: Config, name: str) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    made: Net = NETS[name](config)
    net, x = ig.wrap(**made.model).eval(), made.x
    size = x[0].numel()
    decomposing = decomposition_seconds(size)
    linearization, found = extremes(net, x, config)  # not counted: libraries warm up
    peer, own = [], []
    for _ in range(config.rounds):
        peer.append(row_seconds(net, x[:1], rows=config.rows) * size + decomposing)
        seconds, _ = processor_seconds(lambda: extremes(net, x, config))
        own.append(seconds / len(x))
    worst = (math.nan, math.nan)
    if size <= config.checked_up_to:
        worst = deviations(made, x, found)
    steps = torch.stack([found.forward.steps, found.backward.steps]).double()
    return [
        {
            "net": name,
            "coupling": made.coupling,
            "D": size,
            "batch": len(x),
            "milliseconds_per_sample": 1e3 * statistics.median(own),
            "peer_milliseconds_extrapolated": 1e3 * statistics.median(peer),
            "ratio": median_ratio(peer, own),
            "goal": made.goal,
            "steps_mean": steps.mean().item(),
            "sigma_max_error": worst[0],
            "sigma_min_error": worst[1],
            "products": products(linearization),
        }
    ]


@functools.cache
def decomposition_seconds(size: int) -> float:
    """Of numpy's decomposition with vectors of a matrix of this size."""
    return svd_seconds(torch.randn(size, size))[0]


def deviations(made: Net, x: Tensor, found: ExtremeSingularValues) -> tuple[float, float]:
    """Relative deviations of the first sample's values from a float64 Jacobian's, by autograd."""
    net = ig.wrap(**made.model).eval().to_dtype(torch.float64)
    one = x[:1].double()
    J: Any = torch.autograd.functional.jacobian(lambda x: net(x).flatten(), one)
    values = np.linalg.svd(J.reshape(one.numel(), -1).numpy(), compute_uv=False)
    largest = found.log_max[0].exp().item() / values[0] - 1
    return abs(largest), abs(found.log_min[0].exp().item() / values[-1] - 1)


def products(linearization: Linearization) -> str:
    """How many layers are multiplied in which way."""
    kinds: Callable[[Any], str] = lambda jacobian: {  # noqa: E731
        AutogradJacobian: "autograd",
        RecordedJacobian: "recorded",
        FromLU: "dense",
        FromRows: "dense",
    }.get(type(jacobian), "structured")
    counted = collections.Counter(map(kinds, linearization.jacobians))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))


def run(config: Config) -> pd.DataFrame:
    return collect(config, keyed("{}", config.nets), measure)


if __name__ == "__main__":
    main(__name__)
