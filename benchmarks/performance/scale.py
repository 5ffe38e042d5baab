"""Audits of large flows in bounded memory: D up to 196,608, up to 100 million parameters, one memory budget.

A Glow down to 4 x 4 pixels with its coupling networks perturbed, so that it does something, audited
in a process of its own within a budget that chooses the micro-batches; beside it what the dry run
estimated. One thread; peak resident memory as Linux counts it.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from inn_guard.layers.permutation import Permutation
from inn_guard.models.glow import GlowConfig, glow_classifier


@dataclass(frozen=True)
class Config:
    """Sides of RGB images, D = 3 side^2; channels of the coupling networks, and for each the budget in MiB."""

    sides: tuple[int, ...] = (64, 128, 256)
    hidden: tuple[int, ...] = (16, 448)
    budgets: tuple[int, ...] = (256, 3072)
    samples: int = 3
    checks: tuple[str, ...] = ("reconstruction", "jacobian_spectrum", "layer_blame")
    spread: float = 0.05
    seed: int = 0


PRESETS = {
    "smoke": {"sides": (8, 16), "hidden": (4,), "budgets": (1,)},
    "cpu": {},  # minutes of one core
}


class Size(NamedTuple):
    """One flow."""

    side: int
    hidden: int
    budget: int


def cases(config: Config) -> dict[str, Size]:
    """Dimension and channels -> size."""
    return {
        f"D={3 * side**2}, {wide} channels": Size(side, wide, budget)
        for wide, budget in zip(config.hidden, config.budgets, strict=True)
        for side in config.sides
    }


def measure(config: Config, size: Size) -> Iterable[Row]:
    """One audit in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_audited, args=(sender, config, size))
    child.start()
    sender.close()
    row = receiver.recv()
    child.join()
    yield row


def _audited(sender: Any, config: Config, size: Size) -> None:
    torch.set_num_threads(1)
    net, x = _flow(config, size)
    memory, checks = size.budget * 2**20, list(config.checks)
    estimate = ig.audit(net, x, checks=checks, memory=memory, dry_run=True)["dry_run"].values
    gc.collect()
    _forget_peak()
    before, start = _resident("VmRSS"), time.process_time()
    report = ig.audit(net, x, checks=checks, memory=memory)
    sender.send(
        {
            "D": x[0].numel(),
            "parameters": sum(p.numel() for p in net.parameters()),
            "samples": config.samples,
            "budget_mib": size.budget,
            "estimated_mib": estimate["bytes"] / 2**20,
            "peak_growth_mib": (_resident("VmHWM") - before) / 2**10,
            "model_mib": sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20,
            "peak_resident_mib": _resident("VmHWM") / 2**10,
            "estimated_seconds": estimate["seconds"],
            "seconds": time.process_time() - start,
            "verdict": report.verdict.label,
            "relative_error": report["reconstruction"].values["relative_error"],
            "condition_number": report["jacobian_spectrum"].values["condition_number"],
        }
    )


def _flow(config: Config, size: Size) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(config.seed)
    levels = int(math.log2(size.side)) - 2
    sizes = GlowConfig(levels, blocks=1, hidden=size.hidden, mixing=Permutation.reverse)
    net = glow_classifier((3, size.side, size.side), config=sizes)
    x = torch.randn(config.samples, 3, size.side, size.side)
    with torch.no_grad():
        net(x)  # in training mode it sets what depends on data
        for parameter in net.parameters():
            parameter += (
                config.spread * torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
            )
    return net.eval(), x


def _resident(which: str) -> int:
    """KiB of this process in memory: now (VmRSS), or at most since the peak was forgotten (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def run(config: Config) -> pd.DataFrame:
    """One row per dimension."""
    return collect(config, cases(config), measure)


def draw(frame: pd.DataFrame) -> Figure:
    """Memory and time against D, measured and estimated."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for k, (budget, rows) in enumerate(frame.groupby("budget_mib")):
        label = f"up to {rows['parameters'].max() / 1e6:.3g} million parameters"
        memory.axhline(budget, color=f"C{k}", lw=0.8, label=f"budget, {budget} MiB")
        memory.loglog(
            rows["D"], rows["peak_growth_mib"], "o-", color=f"C{k}", label=f"{label}, measured"
        )
        memory.loglog(
            rows["D"], rows["estimated_mib"], "s--", color=f"C{k}", label="dry run's estimate"
        )
        seconds.loglog(rows["D"], rows["seconds"], "o-", color=f"C{k}", label=f"{label}, measured")
        seconds.loglog(
            rows["D"], rows["estimated_seconds"], "s--", color=f"C{k}", label="dry run's estimate"
        )
    for axes, unit in ((memory, "MiB beside model and data"), (seconds, "seconds of one core")):
        axes.set(xlabel="D", ylabel=unit)
        axes.set_xticks(
            sorted(frame["D"].unique()), [f"{D:,}" for D in sorted(frame["D"].unique())]
        )
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *memory.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    return figure


if __name__ == "__main__":
    main(__name__)
