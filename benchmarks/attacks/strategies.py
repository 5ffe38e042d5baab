"""Which search finds the worst dequantized samples at equal cost: the paper's or four others.

    inn-guard bench attacks.strategies --preset cpu --data-root data  # about 5 minutes on one core

Every strategy attacks the same held-out images with the same number of forward-equivalents: the
operations of all passes through F, F^-1 and their gradients, counted, over those of one forward
pass. The searches of an image from several seeds run in one batch. ``found`` is the error over that
of random search, per image, geometric mean over images and seeds; an image whose round trip is not
finite under either counts in ``broken``. ``against_paper`` has the ratio to the paper's search,
with an interval by bootstrap. The last subject needs CIFAR-10 below --data-root in one of the
official layouts (the committed figures come from JPEG copies of it) and is left out without.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.attacks.nets import SUBJECTS, Subject
from benchmarks.common.runner import Row, collect, main
from inn_guard.audits.audited_model import AuditedModel
from inn_guard.audits.dequantization_attack import (
    Ascent,
    Attack,
    GradientFree,
    ProjectedGradient,
    RandomSearch,
    SpectralAscent,
)
from inn_guard.audits.dequantization_attack.search import run_attack

RANDOM, PAPER = "random search", "paper (sign steps)"
TOGETHER = 8  #: draws in one batch, as in the audit
RESAMPLES = 10_000  #: of the bootstrap


@dataclass(frozen=True)
class Config:
    """How much is attacked."""

    subjects: tuple[str, ...] = tuple(SUBJECTS)  # which nets
    images: int = 8  # attacked per net
    budgets: tuple[int, ...] = (100, 800)  # forward-equivalents per image
    seeds: int = 1  # searches of each image
    data_root: str = "data"  # folder with the official CIFAR-10 files


PRESETS = {
    "smoke": {"subjects": ("digits ours",), "images": 2, "budgets": (40,), "seeds": 1},
    "cpu": {"seeds": 2},  # minutes on one core
}


def strategies(budget: int) -> dict[str, Attack]:
    """Every search, with the same budget; the paper's begins again every 200 steps."""
    forever = 10**6
    return {
        RANDOM: RandomSearch(budget),
        PAPER: ProjectedGradient(restarts=forever, budget=budget),
        "averaged ascent": Ascent(budget),
        "spectral ascent": SpectralAscent(budget),
        "gradient-free": GradientFree(budget),
    }


def cases(config: Config) -> dict[str, tuple[str, str, int]]:
    """Every strategy on every net whose data are there, with every budget."""
    root = Path(config.data_root)
    names = list(config.subjects)
    if not any(root.glob("cifar-10-*")):
        names = [name for name in names if not name.startswith("CIFAR-10")]
    every = itertools.product(names, strategies(1), config.budgets)
    return {
        f"{name} / {search} / {budget}": (name, search, budget) for name, search, budget in every
    }


@functools.lru_cache(maxsize=1)
def subject(name: str, root: str) -> Subject:
    return SUBJECTS[name](Path(root), 0)


def measure(config: Config, case: tuple[str, str, int]) -> Iterator[Row]:
    """One row per seed and image; fewer of both, and half of the budget, for the large images."""
    name, search_name, budget = case
    net = subject(name, config.data_root)
    images, seeds, affordable = config.images, config.seeds, budget
    if name.startswith("CIFAR-10"):
        images, seeds, affordable = min(images, 4), 1, budget // 2
    x = torch.cat([net.x[:images]] * seeds)
    cubes = net.quantization.cubes(x)
    with torch.no_grad():
        found = run_attack(
            AuditedModel(net.net),
            cubes,
            strategies(affordable)[search_name],
            generator=torch.Generator().manual_seed(0),
            seconds=300.0,
            at_once=TOGETHER,
        )
    centre, valid = found.curve[0][1], cubes.contain(found.points)
    for k in range(len(x)):
        yield {
            "net": name,
            "strategy": search_name,
            "budget": budget,
            "seed": k // images,
            "image": k % images,
            "centre_error": centre[k].item(),
            "error": found.error[k].item(),
            "spent": found.spent,
            "steps_price": found.price.get("gradient", math.nan),
            "valid": bool(valid[k]),
        }


def run(config: Config) -> pd.DataFrame:
    """All strategies on all nets."""
    frame = collect(config, cases(config), measure)
    print(summary(frame).to_string(index=False))
    print(against_paper(frame).to_string(index=False))
    return frame


def log_ratios(frame: pd.DataFrame, name: str, other: str) -> pd.DataFrame:
    """ln(error of one strategy / error of another) of every budget, net, image and seed."""
    errors = frame.pivot(
        index=["budget", "net", "image", "seed"], columns="strategy", values="error"
    )
    ratios = np.log(errors[name] / errors[other])
    return ratios[np.isfinite(ratios)].rename("ratio").reset_index()


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per budget, net and strategy: error over random search's, and images broken."""
    rows = []
    for name in dict.fromkeys(frame.strategy):
        ratios = log_ratios(frame, name, RANDOM)
        for (budget, net), group in frame[frame.strategy == name].groupby(
            ["budget", "net"], sort=False
        ):
            ratio = ratios[(ratios.budget == budget) & (ratios.net == net)].ratio
            # without a finite ratio the mean is NaN
            found = np.exp(ratio.mean())
            rows.append(
                {
                    "budget": budget,
                    "net": net,
                    "strategy": name,
                    "found": found,
                    "standard error": found * ratio.sem(),
                    "compared": len(ratio),
                    "broken": int(np.isinf(group.error).sum()),
                    "broken at centre": int(np.isinf(group.centre_error).sum()),
                    "of": len(group),
                    "median error": group.error.median(),
                }
            )
    return pd.DataFrame(rows)


def against_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """Geometric mean over the nets of the error over that of the paper's search, 95 % intervals.

    Bootstrap: images of each net are drawn with all their seeds.
    """
    rows = []
    for name in dict.fromkeys(frame.strategy):
        ratios = log_ratios(frame, name, PAPER)
        for budget, group in ratios.groupby("budget"):
            of_images = group.groupby(["net", "image"]).ratio.mean()
            generator = np.random.default_rng(0)
            drawn = []
            for _, values in of_images.groupby("net"):
                chosen = generator.integers(len(values), size=(RESAMPLES, len(values)))
                drawn.append(values.to_numpy()[chosen].mean(axis=1))
            low, high = np.quantile(np.exp(np.mean(drawn, axis=0)), [0.025, 0.975])
            mean = np.exp(of_images.groupby("net").mean().mean())
            rows.append(
                {"budget": budget, "strategy": name, "ratio": mean, "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> Figure:
    """Error over that of random search, per net, with standard errors and broken images.

    With the largest budget.
    """
    table = summary(frame[frame.budget == frame.budget.max()])
    nets, names = list(dict.fromkeys(table.net)), list(dict.fromkeys(table.strategy))
    figure = Figure(figsize=(10, 1.2 + 0.95 * len(nets)), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(names):
        group = table[table.strategy == name].set_index("net").reindex(nets)
        heights = np.arange(len(nets)) + (k - (len(names) - 1) / 2) * 0.13
        axes.errorbar(
            group.found,
            heights,
            xerr=group["standard error"],
            fmt="o",
            markersize=5,
            capsize=2,
            label=name,
        )
        for height, row in zip(heights, group.itertuples(), strict=True):
            if row.broken:
                at = 1.0
                if np.isfinite(row.found):
                    at = row.found * 1.02
                text = f"  {row.broken}/{row.of} not finite"
                axes.text(at, height, text, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(nets)), labels=nets)
    axes.invert_yaxis()
    axes.set_xlabel("error found / error found by random search, at equal cost")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main(__name__)
