"""Peak memory and time of a training step: stored activations, memory saving and its peers.

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

from benchmarks.common.runner import Row, collect, keyed, main
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
Step = Callable[[], list[Tensor]]  #: returns the gradients of all parameters


@dataclass(frozen=True)
class Config(Sizes):
    """Which nets take a training step."""

    blocks: tuple[int, ...] = (18, 48)  # over all three levels
    repeats: int = 7
    guard: float = 1e-3  # tolerance of the guard


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


def checkpointed(net: Chain, config: Config) -> Callable[[Tensor], Tensor]:
    blocks = _blocks(net)

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
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


OURS = {"stored": stored, "memory_saving": saving, "memory_saving, guard": guarded}
#: loss -> (how the peers' maps are called, the peers)
PEERS: dict[str, tuple[Callable[[Any], Map], dict[str, Callable[[Chain, Config], Any]]]] = {
    "z": (
        without_log_det,
        {**OURS, "checkpoint per block": checkpointed, "MemCNN": with_memcnn},
    ),
    "likelihood": (with_log_det, OURS),
}


def training_step(config: Config, blocks: int, loss: str, peer: str) -> Step:
    """One forward and backward pass; returns the parameters' gradients."""
    net = config.net(blocks)
    call, peers = PEERS[loss]
    return step_of(net, call(peers[peer](net, config)), config)


def step_of(net: Chain, forward: Map, config: Config) -> Step:
    x = config.data()
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


def measure(config: Config, blocks: int) -> list[Row]:
    """One row per loss and peer."""
    torch.set_num_threads(1)
    net = config.net(blocks)
    gradient_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
    rows: list[Row] = []
    for loss, (call, peers) in PEERS.items():
        steps = {
            name: step_of(net, call(make(net, config)), config) for name, make in peers.items()
        }
        seconds = alternating_seconds(steps, repeats=config.repeats)
        gradients = {name: _flat_gradient(step) for name, step in steps.items()}
        allocated = {name: _peak(net, step) for name, step in steps.items()}
        resident = {}
        for name in steps:
            resident[name] = peak_resident(training_step, config, blocks, loss, name)
        true = gradients["stored"]
        for name in steps:
            rows.append(
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
            )
    return rows


def _flat_gradient(step: Step) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in step()]).double()


def run(config: Config) -> pd.DataFrame:
    return collect(config, keyed("{} blocks", config.blocks), measure)


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
