"""What finite differences every 1, 5 or 10 steps add to an epoch of memory-saving training.

    inn-guard bench exploding_inverses.regularizer_cost --preset cpu  # about 2 minutes on one core

The paper's net for this, additive couplings and 1x1 convolutions, with its classifier's loss and
Adam. A step without and a step with the penalty are timed in turn; an epoch of K costs (K - 1) of
the one and one of the other for every K steps. ``performance.regularizer_cost`` times whole cycles,
of other directions and shares. Random images: the time of a step does not depend on them. Processor
time on a CPU, seconds between synchronisations on a GPU.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.image_classifiers import (
    Classifier,
    FiniteDifferencesTerm,
    Run,
    Term,
)
from benchmarks.exploding_inverses.image_training import Batch, exact_float32
from benchmarks.performance.measurement import alternating_seconds, median_ratio
from inn_guard.core.invertible import Invertible
from inn_guard.memory_saving import memory_saving

TABLE = Path(__file__).parent.parent / "reference" / "regularizer_cost_table11.csv"
EPOCH = 50_000


@dataclass(frozen=True)
class Config:
    """The net, the batch and the periods. The defaults are the paper's."""

    every: tuple[int, ...] = (1, 5, 10)  # periods K
    # shares of the batch that the penalty takes; the paper takes all of it
    fractions: tuple[float, ...] = (1.0, 0.25)
    blocks: int = 16  # per level, of three levels
    hidden: int = 128  # channels of the couplings' networks
    size: int = 32  # height and width of the images
    batch_size: int = 128  # of a step
    repeats: int = 20  # of every timing
    device: str = "cuda"  # cpu or cuda


PRESETS = {
    "smoke": {"blocks": 1, "hidden": 4, "size": 8, "batch_size": 8, "repeats": 2, "device": "cpu"},
    # Minutes on one core: the paper's net, an eighth of its batch
    "cpu": {"batch_size": 16, "repeats": 4, "device": "cpu"},
    "paper": {},  # Table 11, for a GPU
}


MODES: dict[str, Callable[[Invertible], Invertible]] = {
    "memory-saving": memory_saving,
    "stored": lambda inn: inn,
}


def measure(config: Config, mode: str) -> Iterator[Row]:
    """One row per share of the batch and period, and one without."""
    size = config.size
    net = Classifier(
        Run.parse("additive conv none"),
        (3, size, size),
        levels=3,
        blocks=config.blocks,
        hidden=config.hidden,
        seed=0,
    )
    net = net.to(config.device, memory_format=torch.channels_last)
    step = training_step(config, net, MODES[mode](net.inn))
    steps = {"without": functools.partial(step, Term())}
    for fraction in config.fractions:
        penalty = FiniteDifferencesTerm(1e-4, 1, fraction)
        steps[f"{fraction:g}"] = functools.partial(step, penalty)
    with exact_float32():
        seconds = alternating_seconds(steps, repeats=config.repeats)
    without, steps_per_epoch = statistics.median(seconds["without"]), EPOCH / config.batch_size

    def row(every: int, fraction: float, overhead: float) -> Row:
        step_seconds = without * overhead
        return {
            "mode": mode,
            "every": every,
            "fraction": fraction,
            "step_seconds": step_seconds,
            "epoch_seconds": steps_per_epoch * step_seconds,
            "overhead": overhead,
        }

    yield row(0, 0.0, 1.0) | paper_columns(mode, "unregularized")
    for fraction in config.fractions:
        ratio = median_ratio(seconds[f"{fraction:g}"], seconds["without"])
        for k in config.every:
            measured = row(k, fraction, (k - 1 + ratio) / k)
            if fraction == 1:
                measured |= paper_columns(mode, f"fd_every_{k}")
            yield measured


def training_step(config: Config, net: Classifier, inn: Invertible) -> Callable[[Term], None]:
    """One step of Adam with the given term."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.batch_size, 3, config.size, config.size, generator=generator)
    x = x.to(config.device, memory_format=torch.channels_last)
    labels = torch.randint(10, (config.batch_size,), generator=generator).to(config.device)
    optimizer = torch.optim.Adam(net.parameters(), 1e-6)
    batch = Batch(torch.arange(config.batch_size), 0, generator)
    with torch.no_grad():
        net.inn(x)

    def step(term: Term) -> None:
        optimizer.zero_grad(set_to_none=True)
        z, penalty = term.latents(inn, x, batch)
        (cross_entropy(net.head(z), labels) + penalty).backward()
        optimizer.step()

    return step


def paper_columns(mode: str, method: str) -> Row:
    """The figures of table 11, which is about memory-saving training."""
    table = pd.read_csv(TABLE).set_index("method")
    if mode != "memory-saving" or method not in table.index:
        return {}
    row = table.loc[method]
    return {
        "paper_epoch_seconds": float(row["seconds_per_epoch"]),
        "paper_overhead": float(row["overhead"]),
    }


def run(config: Config) -> pd.DataFrame:
    return collect(config, list(MODES), measure)


def compare_with_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """Table 11: memory-saving training, the whole batch penalised."""
    rows = frame[frame["paper_overhead"].notna()]
    return rows[["every", "epoch_seconds", "paper_epoch_seconds", "overhead", "paper_overhead"]]


def draw(frame: pd.DataFrame) -> Figure:
    """Overhead against K, ours and the paper's."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for (mode, fraction), group in frame[frame["every"] > 0].groupby(
        ["mode", "fraction"], sort=False
    ):
        share = "whole batch"
        if fraction != 1:
            share = f"{fraction:g} of the batch"
        axis.plot(group["every"], group["overhead"], "o-", label=f"{mode}, {share}")
    printed = frame[(frame["every"] > 0) & frame["paper_overhead"].notna()]
    axis.plot(
        printed["every"],
        printed["paper_overhead"],
        "k*",
        markersize=9,
        label="paper, memory-saving",
    )
    axis.set(
        xlabel="steps between two penalties, K",
        ylabel="time of an epoch over one without",
        ylim=(0.9, None),
    )
    axis.set_xticks(sorted(set(frame["every"]) - {0}))
    axis.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main(__name__)
