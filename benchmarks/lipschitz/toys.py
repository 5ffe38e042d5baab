"""2-D flows on [-4, 4]^2: bounds of both directions by branch and bound, and Table 3."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pandas as pd

from benchmarks.common.runner import Row, main
from benchmarks.lipschitz.nets import Kind, box, collect_by_kind, toy
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.networks.conditioner import SearchBudget


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    kinds: tuple[str, ...] = tuple(kind.name for kind in Kind)
    blocks: int = 16
    hidden: int = 128
    steps: int = 300  # of training
    seconds: float = 60.0  # of the processor, for both directions of one flow


PRESETS = {
    "smoke": {
        "kinds": ("ADDITIVE", "SPLINE"), "blocks": 2, "hidden": 8, "steps": 2, "seconds": 2.0,
    },
    "cpu": {},  # what the committed table holds: ten minutes of one core
    # The depth of the paper's 2-D flows
    "paper": {
        "steps": 200, "kinds": ("ADDITIVE", "AFFINE", "AFFINE_HALF"), "blocks": 100,
        "seconds": 120.0,
    },
}  # fmt: skip


def measure(config: Config, kind: Kind) -> list[Row]:
    """A trained flow's bounds, forward and inverse."""
    flow = toy(kind, blocks=config.blocks, hidden=config.hidden, steps=config.steps)
    begun = time.process_time()
    bounds = lipschitz_bounds(
        flow, box(), seconds=config.seconds, effort=SearchBudget(steps=0, width=0)
    )
    busy = round(time.process_time() - begun, 1)
    rows: list[Row] = []
    for k, side in enumerate(("forward", "inverse")):
        upper, lower = getattr(bounds, side), getattr(bounds, f"lower_{side}")
        rows.append(
            {
                "flow": kind.value,
                "blocks": config.blocks,
                "direction": side,
                "upper": upper,
                "lower": lower,
                "upper/lower": upper / lower,
                "method": bounds.method[k],
                "CPU seconds": busy,
                "log10 Table 3": math.log10(bounds.paper_bound[k]),
                "log10 closed forms": math.log10(bounds.certificate.bounds[k]),
            }
        )
    return rows


def run(config: Config) -> pd.DataFrame:
    return collect_by_kind(config, measure)


if __name__ == "__main__":
    main(__name__)
