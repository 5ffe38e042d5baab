"""The full Jacobian and spectrum at one sample, against row-by-row autograd and numpy's SVD.

The 48-block affine Glow trunk (D = 3072), one thread, processor time, ours and the peer
alternating; ratios are medians over the rounds. The peer's Jacobian is extrapolated from ``rows``
of its D equal backward passes. Agreement in the same run: of those rows with ours, and of our
singular values with numpy's.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import median_ratio, processor_seconds
from benchmarks.performance.nets import Sizes
from benchmarks.performance.peer import row_seconds, svd_seconds
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.singular_values import spectrum
from inn_guard.layers.chain import Chain


@dataclass(frozen=True)
class Config(Sizes):
    """What is timed."""

    blocks: int = 48
    rounds: int = 3
    rows: int = 12  # of the Jacobian, by the peer, per round
    dtypes: tuple[str, ...] = ("float32", "float64")


PRESETS = {
    "smoke": {"blocks": 3, "hidden": 8, "size": 8, "batch": 4, "rounds": 1, "rows": 2},
    "cpu": {},  # the claim's sizes
}


def measure(config: Config, dtype: torch.dtype) -> list[Row]:
    """One row per claim: J alone, and J with all of its singular values."""
    torch.set_num_threads(1)
    net, x = config.net(config.blocks).to_dtype(dtype), config.data()[:1].to(dtype)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(config.rounds):
        composing, J = processor_seconds(lambda: composed_jacobian(net, x)[0])
        seconds["J"].append(composing)
        seconds["peer J"].append(row_seconds(net, x, rows=config.rows) * len(J))
        decomposing, values = svd_seconds(J)
        seconds["peer SVD"].append(decomposing)
        own, found = processor_seconds(lambda J=J: spectrum(J[None]).values[0])
        seconds["values"].append(own)
    deviation = ((found - values.double()).abs() / values.double()).max().item()
    both = sums(seconds["J"], seconds["values"])
    peer_both = sums(seconds["peer J"], seconds["peer SVD"])
    claims = {
        "Jacobian": (seconds["J"], seconds["peer J"], row_deviation(net, x, J)),
        "spectrum": (both, peer_both, deviation),
    }
    return [
        {
            "claim": claim,
            "seconds": statistics.median(own),
            "peer_seconds": statistics.median(peer),
            "ratio": median_ratio(peer, own),
            "largest_relative_deviation": deviation,
        }
        for claim, (own, peer, deviation) in claims.items()
    ]


def sums(first: list[float], second: list[float]) -> list[float]:
    """Seconds of two steps together, round by round."""
    return [a + b for a, b in zip(first, second, strict=True)]


def row_deviation(net: Chain, x: Tensor, J: Tensor) -> float:
    """Largest relative deviation of a few rows of J from those of autograd."""
    leaf = x.clone().requires_grad_()
    z = net(leaf).flatten()
    worst = 0.0
    for k in range(0, len(z), max(1, len(z) // 5)):
        row = torch.autograd.grad(z[k], leaf, retain_graph=True)[0].flatten()
        worst = max(worst, ((J[k] - row).norm() / row.norm()).item())
    return worst


def run(config: Config) -> pd.DataFrame:
    return collect(config, {name: getattr(torch, name) for name in config.dtypes}, measure)


if __name__ == "__main__":
    main(__name__)
