"""Table 3, the certified bounds and the witnesses against depth, for the first blocks of trained 2-D flows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.common.runner import Row, collect, main
from benchmarks.lipschitz.nets import BOX, Kind, processor_time, toy
from inn_guard.layers.chain import Chain
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.numerics.intervals import Box


@dataclass(frozen=True)
class Config:
    """How much is measured. ``seconds`` of the processor are for both directions of one depth."""

    kinds: tuple[str, ...] = ("ADDITIVE", "AFFINE")
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    hidden: int = 128
    steps: int = 300
    seconds: float = 25.0


PRESETS = {
    "smoke": {"kinds": ("ADDITIVE",), "depths": (1, 2), "hidden": 8, "steps": 2, "seconds": 1.0},
    "cpu": {},  # what the committed table holds: five minutes of one core
}


def measure(config: Config, kind: Kind) -> list[Row]:
    """One flow's bounds at every depth, log10."""
    rows: list[Row] = []
    box = Box(-BOX * torch.ones(2), BOX * torch.ones(2))
    flow = toy(kind, blocks=max(config.depths), hidden=config.hidden, steps=config.steps)
    for depth in config.depths:
        part = Chain(*flow.steps[: 2 * depth])
        bounds = lipschitz_bounds(
            part, box, seconds=config.seconds, effort=SearchBudget(steps=20, seconds=0.2)
        )
        for k, side in enumerate(("forward", "inverse")):
            closed = sum(math.log10(getattr(layer.bounds, side)) for layer in bounds.per_layer)
            rows.append(
                {
                    "flow": kind.value, "direction": side, "blocks": depth, "table 3": math.log10(bounds.paper_bound[k]),
                    "closed forms": closed, "whole network": math.log10(bounds.certificate.bounds[k]),
                    "best": math.log10(getattr(bounds, side)),
                    "witness": math.log10(getattr(bounds, f"lower_{side}")),
                }
            )  # fmt: skip
    return rows


def run(config: Config) -> pd.DataFrame:
    with processor_time():
        return collect(config, {name: Kind[name] for name in config.kinds}, measure).drop(
            columns="case"
        )


def draw(frame: pd.DataFrame) -> Figure:
    """One panel per flow and direction, log10 of the bounds over the number of blocks."""
    panels = list(frame.groupby(["flow", "direction"], sort=False))
    figure = Figure(figsize=(3.4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    styles = {
        "table 3": "k--",
        "closed forms": "C1-",
        "whole network": "C2-",
        "best": "C0o-",
        "witness": "C3v:",
    }
    names = [
        "Table 3",
        "tightened, layer by layer",
        "runs of layers at once",
        "branch and bound",
        "witnessed lower",
    ]
    for axis, ((flow, side), rows) in zip(axes[0], panels, strict=True):
        for (column, style), name in zip(styles.items(), names, strict=True):
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
