"""A training step's peak memory, time, gradient error: stored activations, memory saving, peers.

Images: the affine Glow classifier trunk (3 levels x N blocks x 128 channels, D = 3072, batch 32);
every block is ActNorm, 1x1 convolution, affine coupling. Vectors: blocks of an affine coupling and
a permutation (D = 128, two hidden layers of 128, batch 512). Floors of the time, counting a
forward pass as 1 and a backward pass as 2: 4/3 where one evaluation of a network inverts and
differentiates (ours), 4/3 for checkpoints, 5/3 for MemCNN. Gradient errors are relative to the
gradient of the same net in float64 with stored activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import memcnn
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import (
    alternating_seconds,
    median_ratio,
    peak_allocated,
)
from benchmarks.performance.nets import DEVICE, Sizes
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.scales import SigmoidScale
from inn_guard.memory_saving import memory_saving

Map = Callable[[Tensor], tuple[Tensor, Tensor | float]]  #: x -> (z, log_det)
Step = Callable[[], list[Tensor]]  #: returns the gradients of all parameters


@dataclass(frozen=True)
class Config(Sizes):
    """Which nets take a training step."""

    cases: tuple[str, ...] = ("vectors 48", "images 48", "vectors 256")  # with blocks
    features: int = 128  # of vectors, and units of their networks
    vectors: int = 512  # batch of vectors
    repeats: int = 3
    guard: float = 1e-3  # tolerance of the guard


PRESETS = {
    "smoke": {
        "cases": ("vectors 4", "images 3"),
        "features": 8,
        "vectors": 16,
        "hidden": 8,
        "size": 8,
        "batch": 4,
        "repeats": 1,
    },
    "cpu": {},  # two depths, the claim's sizes
    # the paper's batch, for a GPU
    "paper": {
        "cases": ("vectors 48", "vectors 256", "images 48", "images 255"),
        "batch": 128,
        "repeats": 20,
    },
}


class Block(nn.Module):
    """Layers as one module with the inverse that MemCNN asks for."""

    def __init__(self, layers: Iterable[Invertible]) -> None:
        super().__init__()
        self.chain = Chain(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """z = F(x)."""
        return self.chain(x)

    def inverse(self, z: Tensor) -> Tensor:
        """x = F^-1(z)."""
        return self.chain.inverse(z)


def with_log_det(net: Invertible) -> Map:
    return net.forward_and_log_det


def without_log_det(net: Invertible) -> Map:
    return lambda x: (net(x), 0.0)


def stored(net: Chain, config: Config) -> Invertible:
    return net


def saving(net: Chain, config: Config) -> Invertible:
    return memory_saving(net)


def guarded(net: Chain, config: Config) -> Invertible:
    return memory_saving(net, guard=config.guard)


def exactly(net: Chain, config: Config) -> Invertible:
    return memory_saving(net, exact=True)


def checkpointed(net: Chain, config: Config) -> Callable[[Tensor], Tensor]:
    return _with_checkpoints(_blocks(net))


def sqrt_checkpointed(net: Chain, config: Config) -> Callable[[Tensor], Tensor]:
    blocks = _blocks(net)
    size = math.isqrt(len(blocks))
    starts = range(0, len(blocks), size)
    return _with_checkpoints([nn.Sequential(*blocks[start : start + size]) for start in starts])


def _with_checkpoints(parts: Iterable[nn.Module]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        for part in parts:
            x = checkpoint(part, x, use_reentrant=False)
        return x

    return forward


def with_memcnn(net: Chain, config: Config) -> Callable[[Tensor], Tensor]:
    blocks: list[nn.Module] = []
    for block in _blocks(net):
        # MemCNN cannot take views, which reshaping layers return
        if list(block.parameters()):
            blocks.append(memcnn.InvertibleModuleWrapper(block))
        else:
            blocks.append(block)

    def forward(x: Tensor) -> Tensor:
        x = x.clone()  # MemCNN frees the storage of its input, which must not be the caller's
        for block in blocks:
            x = block(x)
        return x

    return forward


OURS = {
    "stored": stored,
    "memory_saving": saving,
    "memory_saving, guard": guarded,
    "memory_saving, exact": exactly,
}
#: loss -> (how the peers' maps are called, the peers)
PEERS: dict[str, tuple[Callable[[Any], Map], dict[str, Callable[[Chain, Config], Any]]]] = {
    "z": (
        without_log_det,
        {
            **OURS,
            "checkpoint per block": checkpointed,
            "sqrt checkpoints": sqrt_checkpointed,
            "MemCNN": with_memcnn,
        },
    ),
    "likelihood": (with_log_det, OURS),
}


def net_and_data(config: Config, case: str) -> tuple[Chain, Tensor]:
    """The net and the batch of a case such as "vectors 48"."""
    kind, blocks = case.split()
    if kind == "images":
        return config.net(int(blocks)), config.data()
    torch.manual_seed(config.seed)
    layers: list[Invertible] = []
    for _ in range(int(blocks)):
        width = config.features
        network = MLP([width // 2, width, width, width], activation=nn.ReLU)
        nn.init.uniform_(network[-1].weight, -0.05, 0.05)
        permutation = Permutation(torch.randperm(width))
        layers += [AffineCoupling(network, scale=SigmoidScale(1e-3, 1.001)), permutation]
    x = torch.randn(config.vectors, config.features)
    return Chain(*layers).to(DEVICE).eval(), x.to(DEVICE)


def step_of(net: Chain, forward: Map, x: Tensor) -> Step:
    parameters = list(net.parameters())

    def step() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        z, log_det = forward(x)
        (0.5 * z.flatten(1).square().sum(1) - log_det).mean().backward()
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                gradients.append(torch.zeros_like(parameter))
            else:
                gradients.append(parameter.grad)
        return gradients

    return step


def measure(config: Config, case: str) -> list[Row]:
    """One row per loss and peer."""
    torch.set_num_threads(1)
    net, x = net_and_data(config, case)
    gradient_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
    rows: list[Row] = []
    for loss, (call, peers) in PEERS.items():
        steps = {name: step_of(net, call(make(net, config)), x) for name, make in peers.items()}
        seconds = alternating_seconds(steps, repeats=config.repeats)
        gradients = {name: _flat_gradient(step) for name, step in steps.items()}
        allocated = {name: _peak(net, step) for name, step in steps.items()}
        double = net.to_dtype(torch.float64)
        true = _flat_gradient(step_of(double, call(double), x.double()))
        for name in steps:
            beside = allocated[name] - gradient_bytes
            rows.append(
                {
                    "loss": loss,
                    "peer": name,
                    "seconds": sorted(seconds[name])[len(seconds[name]) // 2],
                    "time_ratio": median_ratio(seconds[name], seconds["stored"]),
                    "peak_allocated_MB": allocated[name] / 1e6,
                    "allocated_ratio": allocated[name] / allocated["stored"],
                    "peak_beside_gradients_MB": beside / 1e6,
                    "gradient_error": float((gradients[name] - true).norm() / true.norm()),
                }
            )
    return rows


def _flat_gradient(step: Step) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in step()]).double()


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.cases, measure)


def _peak(net: Chain, step: Step) -> int:
    for parameter in net.parameters():
        parameter.grad = None
    return peak_allocated(step)


def _blocks(net: Chain) -> list[Block]:
    """Every layer that is not part of an ActNorm - 1x1 - coupling triple is a block of its own."""
    blocks, current = [], []
    for layer in net.layers():
        current.append(layer)
        if len(current) == 3 or not list(layer.parameters()):
            blocks.append(Block(current))
            current = []
    return blocks


if __name__ == "__main__":
    main(__name__)
