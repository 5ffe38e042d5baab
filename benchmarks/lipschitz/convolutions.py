"""Convolutional flows on 3x32x32: Table 3, products, and the recursion over the whole network.

Additive couplings are bounded everywhere; affine ones on boxes around an image x, [x - radius, x +
radius].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn

from benchmarks.common.runner import Row, collect, main
from benchmarks.lipschitz.nets import conv_flow, images, processor_time
from inn_guard.core.invertible import Invertible
from inn_guard.execution.deadline import Deadline
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import Coupling
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.whole_network import (
    LayerBounds,
    bound_layers,
    forward_factors,
    inverse_factors,
    product,
)
from inn_guard.lipschitz.witness import search
from inn_guard.numerics.intervals import Box
from inn_guard.numerics.spectral_norm import spectral_norm

#: name -> whether the couplings are affine, with scales in (0.5, 1); the radius of the box around
#: an image; the most seconds that it gets
FLOWS = {
    "additive": (False, math.inf, math.inf),
    "affine on an image +- 1e-5": (True, 1e-5, math.inf),
    "additive on an image +- 1/256": (False, 1 / 256, 260.0),
}


@dataclass(frozen=True)
class Config:
    """How much is measured; seconds are of the processor."""

    kinds: tuple[str, ...] = tuple(FLOWS)
    blocks: int = 16
    hidden: int = 128
    steps: int = 40  # of training
    size: int = 32  # of an image's side, in pixels
    seconds: float = 200.0  # for the whole-network bound of one direction everywhere
    boxed: float = 420.0  # for everything together on a box
    searching: float = 30.0  # for witnesses


PRESETS = {
    "smoke": {"blocks": 2, "hidden": 8, "steps": 1, "seconds": 1.0, "boxed": 3.0, "searching": 0.1},
    "cpu": {},  # what the committed table holds: half an hour of one core
    # a linearisation of 3x32x32 takes 1,160 seconds of work, one of 3x16x16 takes 26
    "narrow": {"kinds": ("affine on an image +- 1e-5",), "size": 16, "boxed": 32.0},
    "narrow32": {"kinds": ("affine on an image +- 1e-5",), "boxed": 1200.0},
}


def reshaped_norm(net: nn.Module) -> float:
    """Table 3 taken literally: per layer the window size times the norm of the reshaped kernel."""
    total = 1.0
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            window = math.sqrt(math.prod(module.kernel_size))
            total *= window * spectral_norm(module.weight.flatten(1))
    return total


def measure(config: Config, kind: str) -> list[Row]:
    """Upper bounds of both directions, from loose to tight, and the witnesses."""
    affine, radius, most = FLOWS[kind]
    flow = conv_flow(
        affine=affine,
        blocks=config.blocks,
        hidden=config.hidden,
        steps=config.steps,
        size=config.size,
    )
    if math.isinf(radius):
        rows = _everywhere(config, flow)
    else:
        rows = _boxed(flow, radius, config.size, seconds=min(config.boxed, most))
    return [{"flow": kind, **row} for row in rows]


def _everywhere(config: Config, flow: Chain) -> list[Row]:
    """Step by step, with the time that each takes."""
    box = Box.everywhere((3, config.size, config.size))
    rows: list[Row] = []

    def record(name: str, bounds: Callable[[], tuple[float, float]]) -> None:
        begun = time.process_time()
        rows.extend(_pair(name, bounds()))
        rows[-1]["CPU seconds"] = rows[-2]["CPU seconds"] = round(time.process_time() - begun, 1)

    layers: LayerBounds = ()

    def printed() -> tuple[float, float]:
        nonlocal layers
        named = [(layer.name, bounded_map(layer.block, layer)) for layer in flow.layers()]
        layers = bound_layers(named, box, SearchBudget(steps=0, width=0))
        return _product(layers, "paper_bound")

    def reshaped() -> tuple[float, float]:
        couplings = [layer for layer in flow.layers() if isinstance(layer, Coupling)]
        bound = product([1 + reshaped_norm(coupling.network) for coupling in couplings])
        return bound, bound

    record("Table 3, reshaped norms", reshaped)
    record("Table 3, certified torus norms", printed)
    record("closed forms, certified torus norms", lambda: _product(layers, "bounds"))
    record("whole-network recursion", lambda: _whole(layers, config.seconds))
    record("witness", lambda: _witnessed(flow, box, config.searching))
    return rows


def _boxed(flow: Chain, radius: float, size: int, *, seconds: float) -> list[Row]:
    """What lipschitz_bounds finds on a box."""
    image = images(1, torch.Generator().manual_seed(1), size).double()[0] - 0.5
    begun = time.process_time()
    bounds = lipschitz_bounds(
        flow, Box(image - radius, image + radius), data=image[None], seconds=seconds
    )
    rows = [
        *_pair("Table 3, certified torus norms", bounds.paper_bound),
        *_pair("closed forms, layer by layer", _product(bounds.per_layer, "bounds")),
        *_pair("lipschitz_bounds", (bounds.forward, bounds.inverse), bounds.method),
        *_pair("witness", (bounds.lower_forward, bounds.lower_inverse)),
    ]
    seconds_spent = round(time.process_time() - begun, 1)
    return [{**row, "CPU seconds": seconds_spent} for row in rows]


def _pair(name: str, bounds: tuple[float, float], methods: tuple[str, str] = ("", "")) -> list[Row]:
    sides = zip(("forward", "inverse"), bounds, methods, strict=True)
    return [
        {"direction": side, "bound": name, "method": method, "log10": math.log10(bound)}
        for side, bound, method in sides
    ]


def _product(layers: LayerBounds, part: str) -> tuple[float, float]:
    forward, inverse = [], []
    for layer in layers:
        bounds = getattr(layer, part)
        forward.append(bounds.forward)
        inverse.append(bounds.inverse)
    return product(forward), product(inverse)


def _whole(layers: LayerBounds, seconds: float) -> tuple[float, float]:
    bounds = []
    for whole in (forward_factors, inverse_factors):
        factors = whole(
            layers, SearchBudget(steps=100_000, seconds=math.inf, deadline=Deadline.after(seconds))
        )
        bounds.append(product([f.bound for f in factors]))
    return bounds[0], bounds[1]


def _witnessed(flow: Invertible, box: Box, seconds: float) -> tuple[float, float]:
    points = images(4, torch.Generator().manual_seed(1), box.shape[-1]).double() - 0.5
    return search(flow, points, box, deadline=Deadline.after(seconds)).lower


def run(config: Config) -> pd.DataFrame:
    with processor_time():
        frame = collect(config, config.kinds, measure).drop(columns="case")
    witness = frame[frame["bound"] == "witness"].set_index(["flow", "direction"])["log10"]
    lower = frame.set_index(["flow", "direction"]).index.map(witness)
    return frame.assign(**{"upper/lower": 10 ** (frame["log10"] - lower)})


if __name__ == "__main__":
    main(__name__)
