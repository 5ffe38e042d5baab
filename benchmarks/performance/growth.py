"""Growth of the cost of extreme singular values with depth and dimension.

Claims: time(2L) / time(L) <= 2.2 in depth L, steps(4D) - steps(D) <= 3 in dimension D.

The affine Glow trunk, one thread, processor time. Depth: one linearisation and the same number of
all four products with L and 2L blocks in turn, medians of ratios. Dimension: mean and largest
number of Lanczos steps to 1 %; images of twice the width have one level more, so that the coarsest
level of all is equally large.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pandas as pd
import torch

from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import Step, alternating_seconds, median_ratio
from benchmarks.performance.nets import Sizes
from inn_guard.jacobian.chain import Linearization


@dataclass(frozen=True)
class Config(Sizes):
    """Which depths and dimensions are compared."""

    batch: int = 8
    depths: tuple[int, ...] = (12, 24)  # L, each compared with 2L
    sizes: tuple[int, ...] = (8, 16, 32, 64)  # of images; each has four times the D of the last
    coarsest: int = 4  # height and width of the images of the last level
    blocks: int = 24
    products: int = 3  # of each kind per timed step
    repeats: int = 5
    tolerance: float = 1e-2


PRESETS = {
    "smoke": {
        "hidden": 8, "size": 8, "batch": 4, "depths": (3,), "sizes": (8, 16), "blocks": 6,
        "products": 1, "repeats": 1,
    },
    "cpu": {},  # the claim's sizes
}  # fmt: skip


def passes(config: Config, blocks: int) -> Step:
    """One linearisation and ``config.products`` products of each kind."""
    net, x = config.net(blocks), config.data()

    @torch.no_grad()
    def step() -> None:
        linearization = Linearization(net, x)
        for _ in range(config.products):
            linearization.jvp(x)
            linearization.inverse_vjp(x)
            linearization.vjp(linearization.output)
            linearization.inverse_jvp(linearization.output)

    return step


def measure(config: Config, case: tuple[str, int]) -> list[Row]:
    """One row: a ratio of times, or numbers of steps."""
    torch.set_num_threads(1)
    kind, size = case
    if kind == "depth":
        steps = {"L": passes(config, size), "2L": passes(config, 2 * size)}
        seconds = alternating_seconds(steps, repeats=config.repeats)
        return [{"L": size, "time_ratio": median_ratio(seconds["2L"], seconds["L"])}]
    sized = dataclasses.replace(
        config, size=size, levels=(size // config.coarsest).bit_length() - 1
    )
    net, x = sized.net(config.blocks), sized.data()
    found = config.extremes(net, x, tolerance=config.tolerance)
    forward, backward = found.forward.steps.double(), found.backward.steps.double()
    return [
        {
            "D": x[0].numel(),
            "levels": sized.levels,
            "steps_sigma_max": forward.mean().item(),
            "steps_sigma_min": backward.mean().item(),
            "steps_largest": torch.maximum(forward, backward).max().item(),
        }
    ]


def run(config: Config) -> pd.DataFrame:
    cases = {f"L = {depth}": ("depth", depth) for depth in config.depths}
    cases |= {f"{size} x {size}": ("dimension", size) for size in config.sizes}
    frame = collect(config, cases, measure)
    for column in ("steps_sigma_max", "steps_sigma_min"):
        frame[f"added_{column}"] = frame[column].diff()
    return frame


if __name__ == "__main__":
    main(__name__)
