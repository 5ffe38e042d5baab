"""Table 3, the certified bounds and the witnesses against depth, for the first blocks of trained 2-D flows."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from benchmarks.lipschitz.nets import BOX, Kind, toy
from inn_guard.layers.chain import Chain
from inn_guard.lipschitz.bounding import lipschitz_bounds
from inn_guard.lipschitz.intervals import Box

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    kinds: tuple[Kind, ...] = (Kind.ADDITIVE, Kind.AFFINE)
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    hidden: int = 128
    steps: int = 200
    seconds: float = 40.0

    @classmethod
    def smoke(cls) -> Config:
        """Seconds."""
        return cls(kinds=(Kind.ADDITIVE,), depths=(1, 2), hidden=8, steps=2, seconds=1.0)

    @classmethod
    def paper(cls) -> Config:
        """What the committed table holds."""
        return cls()


def run(config: Config) -> pd.DataFrame:
    torch.set_num_threads(1)
    rows = []
    box = Box(-BOX * torch.ones(2), BOX * torch.ones(2))
    for kind in config.kinds:
        flow = toy(kind, blocks=max(config.depths), hidden=config.hidden, steps=config.steps)
        for depth in config.depths:
            bounds = lipschitz_bounds(Chain(*flow.steps[: 2 * depth]), box, seconds=config.seconds)
            for k, side in enumerate(("forward", "inverse")):
                row = {"flow": kind.value, "direction": side, "blocks": depth, "table 3": math.log10(bounds.printed[k])}
                row["closed forms"] = sum(math.log10(getattr(layer.bounds, side)) for layer in bounds.per_layer)
                row["whole network"] = math.log10(bounds.certificate.bounds[k])
                row |= {
                    "best": math.log10(getattr(bounds, side)),
                    "witness": math.log10(getattr(bounds, f"lower_{side}")),
                }
                rows.append(row)
                print(row, flush=True)
    return pd.DataFrame(rows)


def plot(frame: pd.DataFrame, path: Path) -> None:
    """One panel per flow and direction, log10 of the bounds over the number of blocks."""
    panels = list(frame.groupby(["flow", "direction"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, layout="constrained")
    styles = {"table 3": "k--", "closed forms": "C1-", "whole network": "C2-", "best": "C0o-", "witness": "C3v:"}
    names = ["Table 3", "tightened, layer by layer", "whole-network recursion", "branch and bound", "witnessed lower"]
    for axis, ((flow, side), rows) in zip(axes[0], panels, strict=True):
        for (column, style), name in zip(styles.items(), names, strict=True):
            axis.plot(rows["blocks"], rows[column], style, label=name, markersize=4)
        axis.set(title=f"{flow}, {side}", xlabel="blocks", xscale="log", xticks=rows["blocks"].tolist())
        axis.set_xticklabels(rows["blocks"].tolist())
    axes[0, 0].set_ylabel("log10 of the Lipschitz constant")
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, nothing written")
    config = Config.smoke() if parser.parse_args().smoke else Config.paper()
    frame = run(config)
    print(frame.to_string())
    if config == Config.paper():
        frame.to_csv(RESULTS / "lipschitz_depth.csv", index=False)
        plot(frame, RESULTS / "lipschitz_depth.png")


if __name__ == "__main__":
    main()
