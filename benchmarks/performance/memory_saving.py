"""Peak memory and time of one training step: stored activations, memory_saving, checkpoints, MemCNN.

The net is the affine Glow classifier trunk (3 levels x N blocks x 128 channels, D = 3072, batch
32): every block is ActNorm, 1x1 convolution, affine coupling. Floors of the time, counting a
forward pass as 1 and a backward pass as 2: 4/3 where one evaluation of a network inverts and
differentiates (ours), 4/3 for checkpoints, 5/3 for MemCNN.
"""

from __future__ import annotations

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
    peak_resident,
)
from benchmarks.performance.nets import Sizes
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.memory_saving import memory_saving

Map = Callable[[Tensor], tuple[Tensor, Tensor | float]]  #: x -> (z, log_det)


@dataclass(frozen=True)
class Config(Sizes):
    """``blocks`` over all three levels; the guard's tolerance."""

    blocks: tuple[int, ...] = (18, 48)
    repeats: int = 7
    guard: float = 1e-3


PRESETS = {
    "smoke": {"blocks": (3,), "hidden": 8, "size": 8, "batch": 4, "repeats": 1},
    "cpu": {},  # two depths, the claim's sizes
    "paper": {"batch": 128, "repeats": 20},  # the paper's batch, for a GPU
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


def plain(net: Chain, config: Config) -> Map:
    return net.forward_and_log_det


def saving(net: Chain, config: Config) -> Map:
    return memory_saving(net).forward_and_log_det


def guarded(net: Chain, config: Config) -> Map:
    return memory_saving(net, guard=config.guard).forward_and_log_det


def plain_z(net: Chain, config: Config) -> Map:
    return lambda x: (net(x), 0.0)


def saving_z(net: Chain, config: Config) -> Map:
    stable = memory_saving(net)
    return lambda x: (stable(x), 0.0)


def guarded_z(net: Chain, config: Config) -> Map:
    stable = memory_saving(net, guard=config.guard)
    return lambda x: (stable(x), 0.0)


def checkpointed_z(net: Chain, config: Config) -> Map:
    blocks = _blocks(net)

    def forward(x: Tensor) -> tuple[Tensor, float]:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x, 0.0

    return forward


def memcnn_z(net: Chain, config: Config) -> Map:
    # it cannot take views, which reshaping layers return
    wrapped = [
        memcnn.InvertibleModuleWrapper(b) if list(b.parameters()) else b for b in _blocks(net)
    ]

    def forward(x: Tensor) -> tuple[Tensor, float]:
        x = x.clone()  # it frees the storage of its input: let that be ours, not the caller's
        for block in wrapped:
            x = block(x)
        return x, 0.0

    return forward


PEERS: dict[str, dict[str, Callable[[Chain, Config], Map]]] = {
    "z": {
        "stored": plain_z,
        "memory_saving": saving_z,
        "memory_saving, guard": guarded_z,
        "checkpoint per block": checkpointed_z,
        "MemCNN": memcnn_z,
    },
    "likelihood": {"stored": plain, "memory_saving": saving, "memory_saving, guard": guarded},
}


def training_step(config: Config, blocks: int, loss: str, peer: str) -> Callable[[], list[Tensor]]:
    """One forward and backward pass; returns the parameters' gradients."""
    net = config.net(blocks)
    return step_of(net, PEERS[loss][peer](net, config), config)


def step_of(net: Chain, forward: Map, config: Config) -> Callable[[], list[Tensor]]:
    x = config.data()
    parameters = list(net.parameters())

    def step() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        z, log_det = forward(x)
        (0.5 * z.flatten(1).square().sum(1) - log_det).mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    return step


def measure(config: Config, blocks: int) -> list[Row]:
    """One row per loss and peer."""
    torch.set_num_threads(1)
    net = config.net(blocks)
    gradient_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
    rows: list[Row] = []
    for loss, peers in PEERS.items():
        steps = {name: step_of(net, make(net, config), config) for name, make in peers.items()}
        seconds = alternating_seconds(steps, repeats=config.repeats)
        gradients = {
            name: torch.cat([g.flatten() for g in step()]).double() for name, step in steps.items()
        }
        true = gradients["stored"]
        allocated = {name: _peak(net, step) for name, step in steps.items()}
        resident = {
            name: peak_resident(training_step, config, blocks, loss, name) for name in steps
        }
        rows += [
            {
                "blocks": blocks,
                "loss": loss,
                "peer": name,
                "seconds": sorted(seconds[name])[len(seconds[name]) // 2],
                "time_ratio": median_ratio(seconds[name], seconds["stored"]),
                "peak_allocated_MB": allocated[name] / 1e6,
                "allocated_ratio": allocated[name] / allocated["stored"],
                "peak_beside_gradients_MB": (allocated[name] - gradient_bytes) / 1e6,
                "peak_resident_MB": resident[name] / 1e6,
                "resident_ratio": resident[name] / resident["stored"],
                "gradient_error": float((gradients[name] - true).norm() / true.norm()),
            }
            for name in steps
        ]
    return rows


def run(config: Config) -> pd.DataFrame:
    return collect(config, {f"{blocks} blocks": blocks for blocks in config.blocks}, measure)


def _peak(net: Chain, step: Callable[[], Any]) -> int:
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
