"""One audit on one, two and four processes under torchrun: the figures, and the time of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.common.runner import Row, collect, main

ROOT = Path(__file__).parents[2]
PRESETS = {
    "smoke": {"processes": (1,), "dimensions": 8, "samples": 16},
    "cpu": {},
}


@dataclass(frozen=True)
class Config:
    """How many processes, and what they audit."""

    processes: tuple[int, ...] = (1, 2, 4)
    dimensions: int = 512
    layers: int = 32
    samples: int = 1024


def run(config: Config) -> pd.DataFrame:
    """One row for each number of processes."""
    return collect(config, {str(count): count for count in config.processes}, measure)


def measure(config: Config, count: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        sizes = (config.dimensions, config.layers, config.samples)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(count), "-m", "benchmarks.performance.audit_rank"]
        subprocess.run(
            [*command, folder, *map(str, sizes)],
            check=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    yield {
        "processes": count,
        "cores": os.cpu_count(),
        "seconds": max(rank["seconds"] for rank in ranks),
        "processor_seconds": max(rank["processor_seconds"] for rank in ranks),
        **ranks[0]["figures"],
    }


if __name__ == "__main__":
    main(__name__)
