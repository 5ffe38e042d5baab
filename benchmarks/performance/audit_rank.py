"""One of the processes of benchmarks/performance/processes.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import inn_guard as ig
from inn_guard.layers import MLP, AffineCoupling, Chain, Halves

CHECKS = ["sampling", "reconstruction", "jacobian_spectrum", "gradient_angle"]


def flow(dimensions: int, layers: int) -> Chain:
    """Affine couplings of untrained networks, the same in every process."""
    torch.manual_seed(0)
    half = dimensions // 2
    halves = [Halves(swapped=k % 2 == 1) for k in range(layers)]
    widths = [half, 128, dimensions]
    return Chain(*[AffineCoupling(MLP(widths), partition=partition) for partition in halves])


def audit(folder: Path, dimensions: int, layers: int, samples: int) -> None:
    """Audit with all processes and write this one's times and figures."""
    model, x = flow(dimensions, layers), torch.randn(samples, dimensions)
    ig.audit(model, x[:8], checks=CHECKS, progress=False)  # what is compiled and imported once
    dist.barrier()
    start, processor = time.perf_counter(), time.process_time()
    report = ig.audit(model, x, checks=CHECKS, group=dist.group.WORLD, progress=False)
    answer = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "figures": {
            "lost_draws": report["sampling"].values["lost_draws"],
            "relative_error": report["reconstruction"].values["relative_error"],
            "condition_number": report["jacobian_spectrum"].values["condition_number"],
            "angle": report["gradient_angle"].values["max_angle"],
        },
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    audit(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    dist.destroy_process_group()
