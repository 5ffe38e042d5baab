"""Audits of large flows in bounded memory: D up to 196,608, up to 100 million parameters.

A Glow down to 4 x 4 pixels whose coupling networks are perturbed is audited in a process of its
own, within a memory budget from which the sizes of the batches follow. The table has the estimates
of the dry run as well. One thread; peak resident memory as Linux counts it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.performance.measurement import (
    forget_peak,
    in_own_process,
    peak_resident_bytes,
    processor_seconds,
    resident_bytes,
)
from inn_guard.layers.permutation import Permutation
from inn_guard.models.glow import GlowConfig, glow_classifier


@dataclass(frozen=True)
class Config:
    """Which flows are audited."""

    sides: tuple[int, ...] = (64, 128, 256)  # of RGB images, D = 3 side^2
    hidden: tuple[int, ...] = (16, 448)  # channels of the coupling networks
    budgets: tuple[int, ...] = (256, 3072)  # MiB, for each of them
    samples: int = 3
    checks: tuple[str, ...] = ("reconstruction", "jacobian_spectrum", "layer_blame")
    spread: float = 0.05  # of the perturbation of the weights
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
    yield in_own_process(_audited, config, size)


def _audited(config: Config, size: Size) -> Row:
    torch.set_num_threads(1)
    net, x = _flow(config, size)
    memory, checks = size.budget * 2**20, list(config.checks)
    estimate = ig.audit(net, x, checks=checks, memory=memory, dry_run=True)["dry_run"].values
    gc.collect()
    forget_peak()
    before = resident_bytes()
    seconds, report = processor_seconds(lambda: ig.audit(net, x, checks=checks, memory=memory))
    peak = peak_resident_bytes()
    parameters = list(net.parameters())
    return {
        "D": x[0].numel(),
        "parameters": sum(p.numel() for p in parameters),
        "samples": config.samples,
        "budget_mib": size.budget,
        "estimated_mib": estimate["bytes"] / 2**20,
        "peak_growth_mib": (peak - before) / 2**20,
        "model_mib": sum(p.nbytes for p in parameters) / 2**20,
        "peak_resident_mib": peak / 2**20,
        "estimated_seconds": estimate["seconds"],
        "seconds": seconds,
        "verdict": report.verdict.label,
        "relative_error": report["reconstruction"].values["relative_error"],
        "condition_number": report["jacobian_spectrum"].values["condition_number"],
    }


def _flow(config: Config, size: Size) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(config.seed)
    levels = int(math.log2(size.side)) - 2
    sizes = GlowConfig(levels, blocks=1, hidden=size.hidden, mixing=Permutation.reverse)
    net = glow_classifier((3, size.side, size.side), config=sizes)
    x = torch.randn(config.samples, 3, size.side, size.side)
    with torch.no_grad():
        net(x)  # in training mode it sets what depends on data
        for parameter in net.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter += config.spread * torch.randn_like(parameter) / fan_in**0.5
    return net.eval(), x


def run(config: Config) -> pd.DataFrame:
    return collect(config, cases(config), measure)


def draw(frame: pd.DataFrame) -> Figure:
    """Memory and time against D, measured and estimated."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    for k, (budget, rows) in enumerate(frame.groupby("budget_mib")):
        colour = f"C{k}"
        label = f"up to {rows['parameters'].max() / 1e6:.3g} million parameters, measured"
        memory.axhline(budget, color=colour, lw=0.8, label=f"budget, {budget} MiB")
        for axes, measured, estimated in (
            (memory, "peak_growth_mib", "estimated_mib"),
            (seconds, "seconds", "estimated_seconds"),
        ):
            axes.loglog(rows["D"], rows[measured], "o-", color=colour, label=label)
            axes.loglog(rows["D"], rows[estimated], "s--", color=colour, label="dry run's estimate")
    dims = sorted(frame["D"].unique())
    for axes, unit in (
        (memory, "MiB in addition to model and data"),
        (seconds, "seconds of one core"),
    ):
        axes.set(xlabel="D", ylabel=unit)
        axes.set_xticks(dims, [f"{D:,}" for D in dims])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles = memory.get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main(__name__)
