"""sigma_max and sigma_min of the Jacobian to 1 % per sample, against the Jacobian row by row and numpy's SVD.

The net is the 48-block affine Glow trunk (D = 3072), one thread, processor time. Ours and the peer
alternate; the ratio is the median over the rounds of the peer's seconds per sample over ours. The
peer's seconds are extrapolated from ``rows`` of its D equal backward passes in every round, plus
one whole decomposition with vectors, timed once (of the first sample's Jacobian, composed).
Accuracy in the same run: of the values of the last round, on the first samples, against the
singular values of J composed in float64.

``bare_ratio`` is what would be left if a pass consisted of its matrix products alone: the peer's
seconds over those of one product per weight and pass (operands ready, convolutions unfolded), as
many passes as steps took, and no check.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.nets import Sizes
from benchmarks.performance.peer import processor_seconds, row_seconds, svd_seconds
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.singular_values import ExtremeSingularValues, extreme_singular_values
from inn_guard.layers.chain import Chain
from inn_guard.layers.linear import InvertibleLinear


@dataclass(frozen=True)
class Config(Sizes):
    """``batches``: samples at once; ``rows`` of the peer per round; ``checked`` samples against the truth."""

    blocks: int = 48
    batches: tuple[int, ...] = (1, 32)
    rounds: int = 3
    rows: int = 12
    checked: int = 1
    tolerance: float = 1e-2


PRESETS = {
    "smoke": {
        "blocks": 3, "hidden": 8, "size": 8, "batch": 4, "batches": (1, 4), "rounds": 1, "rows": 2,
    },
    "cpu": {},  # the claim's sizes
}  # fmt: skip


def ours(net: Chain, x: Tensor, config: Config) -> tuple[float, ExtremeSingularValues]:
    """Seconds of processor time per sample, and the values."""
    start = time.process_time()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(config.seed)
        found = extreme_singular_values(
            Linearization(net, x), generator=generator, tolerance=config.tolerance
        )
    return (time.process_time() - start) / len(x), found


def measure(config: Config, batch: int) -> list[Row]:
    """One row."""
    torch.set_num_threads(1)
    net, x = config.net(config.blocks), config.data()[:batch]
    decomposing = decomposition_seconds(config)
    ours(net, x[:1], config)
    products = matrix_products(net, x)
    peer, own, bare = [], [], []
    for _ in range(config.rounds):
        rows = row_seconds(net, x[:1], rows=config.rows)
        seconds, found = ours(net, x, config)
        peer.append(rows * x[0].numel() + decomposing)
        own.append(seconds)
        bare.append(
            processor_seconds(lambda: [left @ right for left, right in products])[0] / len(x)
        )
    errors = deviations(net, x, found, config)
    steps = torch.stack([found.forward.steps, found.backward.steps]).double()
    passes = 1 + 2 * steps.sum(0).mean().item()
    return [
        {
            "batch": batch,
            "D": x[0].numel(),
            "seconds_per_sample": statistics.median(own),
            "peer_seconds_extrapolated": statistics.median(peer),
            "ratio": statistics.median(p / o for p, o in zip(peer, own, strict=True)),
            "bare_ratio": statistics.median(
                p / (passes * b) for p, b in zip(peer, bare, strict=True)
            ),
            "steps_mean": steps.mean().item(),
            "steps_max": steps.max().item(),
            "sigma_max_error": errors[0],
            "sigma_min_error": errors[1],
            "samples_checked": min(config.checked, batch),
            "error_estimate": max(
                s.relative_error.max().item() for s in (found.forward, found.backward)
            ),
        }
    ]


def matrix_products(net: Chain, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Operands of one product per weight of the net in its order: (batch x positions, fan in) and (fan in, fan out)."""
    products: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        (weight,) = (parameter for parameter in module.parameters() if parameter.dim() > 1)
        right = weight.detach().flatten(1).T.contiguous()
        products.append((output.new_ones(output.numel() // len(weight), len(right)), right))

    hooks = [
        m.register_forward_hook(note)
        for m in net.modules()
        if isinstance(m, nn.Conv2d | InvertibleLinear)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return products


def deviations(
    net: Chain, x: Tensor, found: ExtremeSingularValues, config: Config
) -> tuple[float, float]:
    """Largest relative deviations of sigma_max and of sigma_min from float64 truth."""
    worst = torch.zeros(2, dtype=torch.float64)
    for k in range(min(config.checked, len(x))):
        pair = torch.stack([found.log_max[k].exp(), found.log_min[k].exp()])
        worst = torch.maximum(
            worst, (pair / torch.tensor(true_extremes(config, k), dtype=torch.float64) - 1).abs()
        )
    return worst[0].item(), worst[1].item()


@functools.cache
def decomposition_seconds(config: Config) -> float:
    """Of numpy's decomposition with vectors of the first sample's Jacobian."""
    return svd_seconds(composed_jacobian(config.net(config.blocks), config.data()[:1])[0])[0]


@functools.cache
def true_extremes(config: Config, sample: int) -> tuple[float, float]:
    """sigma_max and sigma_min of one sample's Jacobian, composed and decomposed in float64."""
    twin = config.net(config.blocks).to_dtype(torch.float64)
    values = torch.linalg.svdvals(
        composed_jacobian(twin, config.data()[sample : sample + 1].double())[0]
    )
    return values[0].item(), values[-1].item()


def run(config: Config) -> pd.DataFrame:
    return collect(config, {f"batch {batch}": batch for batch in config.batches}, measure)


if __name__ == "__main__":
    main(__name__)
