"""sigma_max and sigma_min of the Jacobian to 1 %, against row-by-row autograd and numpy's SVD.

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
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.common.runner import Row, collect, keyed, main
from benchmarks.performance.measurement import median_ratio, processor_seconds
from benchmarks.performance.nets import Sizes
from benchmarks.performance.peer import row_seconds, svd_seconds
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.jacobian.singular_values import ExtremeSingularValues
from inn_guard.layers.chain import Chain
from inn_guard.layers.linear import InvertibleLinear


@dataclass(frozen=True)
class Config(Sizes):
    """What is timed and checked."""

    blocks: int = 48
    batches: tuple[int, ...] = (1, 32)  # samples at once
    rounds: int = 3
    rows: int = 12  # of the Jacobian, by the peer, per round
    checked: int = 1  # samples that are compared with the truth
    tolerance: float = 1e-2


PRESETS = {
    "smoke": {
        "blocks": 3, "hidden": 8, "size": 8, "batch": 4, "batches": (1, 4), "rounds": 1, "rows": 2,
    },
    "cpu": {},  # the claim's sizes
}  # fmt: skip


def ours(net: Chain, x: Tensor, config: Config) -> tuple[float, ExtremeSingularValues]:
    """Seconds of processor time per sample, and the values."""
    seconds, found = processor_seconds(lambda: config.extremes(net, x, tolerance=config.tolerance))
    return seconds / len(x), found


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
        multiplying, _ = processor_seconds(lambda: [left @ right for left, right in products])
        peer.append(rows * x[0].numel() + decomposing)
        own.append(seconds)
        bare.append(multiplying / len(x))
    errors = deviations(net, x, found, config)
    steps = torch.stack([found.forward.steps, found.backward.steps]).double()
    estimates = torch.cat([found.forward.relative_error, found.backward.relative_error])
    passes = 1 + 2 * steps.sum(0).mean().item()
    return [
        {
            "batch": batch,
            "D": x[0].numel(),
            "seconds_per_sample": statistics.median(own),
            "peer_seconds_extrapolated": statistics.median(peer),
            "ratio": median_ratio(peer, own),
            "bare_ratio": median_ratio(peer, [passes * seconds for seconds in bare]),
            "steps_mean": steps.mean().item(),
            "steps_max": steps.max().item(),
            "sigma_max_error": errors[0],
            "sigma_min_error": errors[1],
            "samples_checked": min(config.checked, batch),
            "error_estimate": estimates.max().item(),
        }
    ]


def matrix_products(net: Chain, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Operands of one product per weight of the net, in its order.

    Their shapes are (batch x positions, fan in) and (fan in, fan out).
    """
    products: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        (weight,) = (parameter for parameter in module.parameters() if parameter.dim() > 1)
        right = weight.detach().flatten(1).T.contiguous()
        products.append((output.new_ones(output.numel() // len(weight), len(right)), right))

    hooks = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | InvertibleLinear):
            hooks.append(module.register_forward_hook(note))
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
        truth = torch.tensor(true_extremes(config, k), dtype=torch.float64)
        worst = torch.maximum(worst, (pair / truth - 1).abs())
    return worst[0].item(), worst[1].item()


@functools.cache
def decomposition_seconds(config: Config) -> float:
    """Of numpy's decomposition with vectors of the first sample's Jacobian."""
    jacobian = composed_jacobian(config.net(config.blocks), config.data()[:1])[0]
    return svd_seconds(jacobian)[0]


@functools.cache
def true_extremes(config: Config, sample: int) -> tuple[float, float]:
    """sigma_max and sigma_min of one sample's Jacobian, composed and decomposed in float64."""
    net = config.net(config.blocks).to_dtype(torch.float64)
    x = config.data()[sample : sample + 1].double()
    values = torch.linalg.svdvals(composed_jacobian(net, x)[0])
    return values[0].item(), values[-1].item()


def run(config: Config) -> pd.DataFrame:
    return collect(config, keyed("batch {}", config.batches), measure)


if __name__ == "__main__":
    main(__name__)
