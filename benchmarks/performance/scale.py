"""Audits of large flows in bounded memory: D up to 196,608, one memory budget, peak resident memory and seconds.

A small Glow with its coupling networks' last layers perturbed, so that it does something, audited in a process of its
own within a budget that chooses the micro-batches; beside it what the dry run estimated. One thread.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import inn_guard as ig
from benchmarks.runner import Row, collect, main
from inn_guard.models.glow import GlowConfig, glow_classifier


@dataclass(frozen=True)
class Config:
    """Sides of RGB images, D = 3 side^2; the flow; how much is audited, within how many MiB."""

    sides: tuple[int, ...] = (32, 64, 128, 256)
    levels: int = 3
    blocks: int = 1
    hidden: int = 16
    samples: int = 4
    budget: int = 512
    checks: tuple[str, ...] = ("reconstruction", "jacobian_spectrum", "layer_blame")
    spread: float = 0.05
    seed: int = 0

    @classmethod
    def smoke(cls) -> Config:
        """Seconds."""
        return cls(sides=(8, 16), levels=2, hidden=4, samples=2, budget=1)

    @classmethod
    def cpu(cls) -> Config:
        """Minutes of one core."""
        return cls()


def cases(config: Config) -> dict[str, int]:
    """Dimension -> side."""
    return {f"D={3 * side**2}": side for side in config.sides}


def measure(config: Config, side: int) -> Iterable[Row]:
    """One audit in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_audited, args=(sender, config, side))
    child.start()
    sender.close()
    row = receiver.recv()
    child.join()
    yield row


def _audited(sender: Any, config: Config, side: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    net = glow_classifier((3, side, side), config=GlowConfig(config.levels, config.blocks, config.hidden))
    x = torch.randn(config.samples, 3, side, side)
    with torch.no_grad():
        net(x)  # in training mode it sets what depends on data
        for parameter in net.parameters():
            parameter += config.spread * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
    net.eval()
    memory, checks = config.budget * 2**20, list(config.checks)
    estimate = ig.audit(net, x, checks=checks, memory=memory, dry_run=True)["dry_run"].values
    before, start = _peak(), time.process_time()
    report = ig.audit(net, x, checks=checks, memory=memory)
    sender.send(
        {
            "D": x[0].numel(),
            "parameters": sum(p.numel() for p in net.parameters()),
            "samples": config.samples,
            "budget_mib": config.budget,
            "estimated_mib": estimate["bytes"] / 2**20,
            "peak_growth_mib": (_peak() - before) / 2**10,
            "peak_resident_mib": _peak() / 2**10,
            "estimated_seconds": estimate["seconds"],
            "seconds": time.process_time() - start,
            "verdict": report.verdict.label,
            "relative_error": report["reconstruction"].values["relative_error"],
            "condition_number": report["jacobian_spectrum"].values["condition_number"],
        }
    )


def _peak() -> int:
    """The largest resident memory of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(config: Config) -> pd.DataFrame:
    """One row per dimension."""
    return collect(config, cases(config), measure)


def draw(frame: pd.DataFrame) -> Figure:
    """Memory and time against D, measured and estimated."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    memory.loglog(frame["D"], frame["peak_resident_mib"], "o-", label="peak resident, whole process")
    memory.loglog(frame["D"], frame["estimated_mib"], "s--", label="dry run's estimate, beside model and data")
    memory.axhline(frame["budget_mib"].iloc[0], color="grey", lw=0.8, label="budget")
    seconds.loglog(frame["D"], frame["seconds"], "o-", label="measured")
    seconds.loglog(frame["D"], frame["estimated_seconds"], "s--", label="dry run's estimate")
    for axes, unit in ((memory, "MiB"), (seconds, "seconds of one core")):
        axes.set(xlabel="D", ylabel=unit)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main(Config, run, draw)
