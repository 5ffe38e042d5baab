"""2-D flows of 16 blocks on [-4, 4]^2: upper and lower bounds of both directions by branch and bound, and Table 3's."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.lipschitz.nets import BOX, Kind, toy
from inn_guard.lipschitz.bounding import lipschitz_bounds
from inn_guard.lipschitz.conditioners import Effort
from inn_guard.lipschitz.intervals import Box

RESULTS = Path(__file__).parents[1] / "results" / "lipschitz_toys.csv"


@dataclass(frozen=True)
class Config:
    """How much is measured."""

    kinds: tuple[Kind, ...] = tuple(Kind)
    blocks: int = 16
    hidden: int = 128
    steps: int = 200
    seconds: float = 180.0

    @classmethod
    def smoke(cls) -> Config:
        """Seconds."""
        return cls(kinds=(Kind.ADDITIVE,), blocks=2, hidden=8, steps=2, seconds=2.0)

    @classmethod
    def paper(cls) -> Config:
        """What the committed table holds."""
        return cls()


def run(config: Config) -> pd.DataFrame:
    torch.set_num_threads(1)
    rows = []
    for kind in config.kinds:
        flow = toy(kind, blocks=config.blocks, hidden=config.hidden, steps=config.steps)
        box = Box(-BOX * torch.ones(2), BOX * torch.ones(2))
        begun, busy = time.monotonic(), time.process_time()
        bounds = lipschitz_bounds(flow, box, seconds=config.seconds, effort=Effort(steps=0, width=0))
        seconds, busy = time.monotonic() - begun, time.process_time() - busy
        for k, side in enumerate(("forward", "inverse")):
            upper, lower = getattr(bounds, side), getattr(bounds, f"lower_{side}")
            rows.append(
                {
                    "flow": kind.value, "blocks": config.blocks, "direction": side, "upper": upper, "lower": lower,
                    "upper/lower": upper / lower, "method": bounds.method[k], "seconds": round(seconds, 1),
                    "CPU seconds": round(busy, 1),
                    "log10 Table 3": math.log10(bounds.printed[k]),
                    "log10 closed forms": math.log10(bounds.certificate.bounds[k]),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, nothing written")
    parser.add_argument("--kind", choices=[kind.name.lower() for kind in Kind], help="one flow only")
    arguments = parser.parse_args()
    if arguments.smoke:
        print(run(Config.smoke()).to_string())
        return
    kinds = tuple(Kind) if arguments.kind is None else (Kind[arguments.kind.upper()],)
    frame = run(replace(Config.paper(), kinds=kinds))
    if RESULTS.exists():
        before = pd.read_csv(RESULTS)
        frame = pd.concat([before[~before["flow"].isin(frame["flow"])], frame])
    print(frame.to_string())
    frame.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()
