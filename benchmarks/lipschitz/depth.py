"""Table 3, certified bounds and witnesses against depth: the first blocks of trained 2-D flows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.common.runner import Row, main
from benchmarks.lipschitz.nets import Kind, box, collect_by_kind, toy
from inn_guard.layers.chain import Chain
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.networks.conditioner import SearchBudget


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    kinds: tuple[str, ...] = ("ADDITIVE", "AFFINE")
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)  # numbers of blocks
    hidden: int = 128
    steps: int = 300  # of training
    seconds: float = 25.0  # of the processor, for both directions of one depth


PRESETS = {
    "smoke": {"kinds": ("ADDITIVE",), "depths": (1, 2), "hidden": 8, "steps": 2, "seconds": 1.0},
    "cpu": {},  # what the committed table holds: five minutes of one core
}


def measure(config: Config, kind: Kind) -> list[Row]:
    """One flow's bounds at every depth, log10."""
    rows: list[Row] = []
    flow = toy(kind, blocks=max(config.depths), hidden=config.hidden, steps=config.steps)
    for depth in config.depths:
        part = Chain(*flow.steps[: 2 * depth])
        bounds = lipschitz_bounds(
            part, box(), seconds=config.seconds, effort=SearchBudget(steps=20, seconds=0.2)
        )
        for k, side in enumerate(("forward", "inverse")):
            closed = sum(math.log10(getattr(layer.bounds, side)) for layer in bounds.per_layer)
            rows.append(
                {
                    "flow": kind.value,
                    "direction": side,
                    "blocks": depth,
                    "table 3": math.log10(bounds.paper_bound[k]),
                    "closed forms": closed,
                    "whole network": math.log10(bounds.certificate.bounds[k]),
                    "best": math.log10(getattr(bounds, side)),
                    "witness": math.log10(getattr(bounds, f"lower_{side}")),
                }
            )
    return rows


def run(config: Config) -> pd.DataFrame:
    return collect_by_kind(config, measure)


def draw(frame: pd.DataFrame) -> Figure:
    """One panel per flow and direction, log10 of the bounds over the number of blocks."""
    panels = list(frame.groupby(["flow", "direction"], sort=False))
    figure = Figure(figsize=(3.4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    curves = {
        "table 3": ("k--", "Table 3"),
        "closed forms": ("C1-", "tightened, layer by layer"),
        "whole network": ("C2-", "runs of layers at once"),
        "best": ("C0o-", "branch and bound"),
        "witness": ("C3v:", "witnessed lower"),
    }
    for axis, ((flow, side), rows) in zip(axes[0], panels, strict=True):
        for column, (style, name) in curves.items():
            axis.plot(rows["blocks"], rows[column], style, label=name, markersize=4)
        axis.set(
            title=f"{flow}, {side}", xlabel="blocks", xscale="log", xticks=rows["blocks"].tolist()
        )
        axis.set_xticklabels(rows["blocks"].tolist())
        axis.minorticks_off()
    axes[0, 0].set_ylabel("log10 of the Lipschitz constant")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    main(__name__)
