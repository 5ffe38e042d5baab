"""A 16-block convolutional flow on 3x32x32: Table 3, products, and the whole-network recursion in the Fourier basis."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from benchmarks.lipschitz.nets import conv_flow, images
from inn_guard.layers.coupling import AdditiveCoupling
from inn_guard.lipschitz.conditioners import Effort
from inn_guard.lipschitz.intervals import Box
from inn_guard.lipschitz.maps import bounded_map
from inn_guard.lipschitz.networks import product, stack, whole_forward
from inn_guard.lipschitz.spectral import spectral_norm
from inn_guard.lipschitz.witnesses import measure

RESULTS = Path(__file__).parents[1] / "results" / "lipschitz_convolutions.csv"


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    blocks: int = 16
    hidden: int = 128
    steps: int = 40
    seconds: float = 600.0

    @classmethod
    def smoke(cls) -> Config:
        """Seconds."""
        return cls(blocks=2, hidden=8, steps=1, seconds=2.0)

    @classmethod
    def paper(cls) -> Config:
        """What the committed table holds."""
        return cls()


def reshaped_norm(net: nn.Module) -> float:
    """The product that a reader of Table 3 computes: window size times the norm of the reshaped kernel, per layer."""
    total = 1.0
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            total *= math.sqrt(math.prod(module.kernel_size)) * spectral_norm(module.weight.flatten(1))
    return total


def run(config: Config) -> pd.DataFrame:
    torch.set_num_threads(1)
    flow = conv_flow(blocks=config.blocks, hidden=config.hidden, steps=config.steps)
    shape, rows = (3, 32, 32), []
    box = Box.everywhere(shape)

    def record(name: str, bound: float, seconds: float, busy: float) -> None:
        rows.append(
            {"bound": name, "log10": math.log10(bound), "seconds": round(seconds, 1), "CPU seconds": round(busy, 1)}
        )
        print(rows[-1], flush=True)

    named = [(layer.name, bounded_map(layer.block, layer)) for layer in flow.layers()]
    nets = [layer.network for layer in flow.layers() if isinstance(layer, AdditiveCoupling)]
    record("Table 3, reshaped norms", product([1 + reshaped_norm(net) for net in nets]), 0.0, 0.0)
    wall, busy = time.monotonic(), time.process_time()
    layers = stack(named, box, Effort(steps=0, width=0))
    printed = product([layer.printed.forward for layer in layers])
    record("Table 3, certified torus norms", printed, time.monotonic() - wall, time.process_time() - busy)
    exact = product([layer.bounds.forward for layer in layers])
    record("closed forms, certified torus norms", exact, time.monotonic() - wall, time.process_time() - busy)
    torch.manual_seed(1)
    witness, _ = measure(flow, images(4, torch.Generator().manual_seed(1)).double() - 0.5)
    assert witness is not None
    record("witness", witness.ratio, time.monotonic() - wall, time.process_time() - busy)
    wall, busy = time.monotonic(), time.process_time()
    factors = whole_forward(layers, Effort(steps=2000, seconds=config.seconds))
    record(
        "whole-network recursion",
        product([f.bound for f in factors]),
        time.monotonic() - wall,
        time.process_time() - busy,
    )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, nothing written")
    config = Config.smoke() if parser.parse_args().smoke else Config.paper()
    frame = run(config)
    print(frame.to_string())
    if config == Config.paper():
        frame.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()
