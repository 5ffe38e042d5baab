"""Which search finds the worst dequantized samples at equal cost: the paper's, or one of five others.

    python -m benchmarks.attacks.strategies --preset cpu --data-root data       # about 8 minutes on one core

Every strategy attacks the same held-out images with the same number of forward-equivalents
(operations, counted) and the same seeds. ``found`` is the error over that of random search, per
image, geometric mean over images and seeds; an image whose round trip is not finite under either
counts in ``broken``. The last subject needs CIFAR-10 below --data-root in one of the official
layouts (the committed figures come from JPEG copies of it) and is left out without.
"""

from __future__ import annotations

import functools
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
    Search,
    SpectralAscent,
)
from inn_guard.audits.dequantization_attack.search import run_attack


@dataclass(frozen=True)
class Config:
    """How much is attacked.

    Attributes:
        subjects: which nets.
        images: attacked per net.
        budget: forward-equivalents per image.
        seeds: searches of each strategy.
        data_root: folder with the official CIFAR-10 files.
    """

    subjects: tuple[str, ...] = tuple(SUBJECTS)
    images: int = 8
    budget: int = 800
    seeds: int = 1
    data_root: str = "data"


PRESETS = {
    "smoke": {"subjects": ("digits, ours",), "images": 2, "budget": 40, "seeds": 1},
    "cpu": {"seeds": 2},  # minutes on one core
}


def strategies(budget: int) -> dict[str, Attack]:
    """Every search, with the same budget; the paper's begins again every 200 steps."""
    forever = 10**6
    return {
        "random search": RandomSearch(budget),
        "paper (sign steps)": ProjectedGradient(restarts=forever, budget=budget),
        "averaged ascent": Ascent(budget),
        "spectral ascent": SpectralAscent(budget),
        "gradient-free": GradientFree(budget),
        "implicit gradient": ProjectedGradient(
            restarts=forever, budget=budget, gradient=Search.implicit_gradient
        ),
    }


def cases(config: Config) -> dict[str, tuple[str, str]]:
    """Every strategy on every net; nets whose data are not there are left out."""
    root = Path(config.data_root)
    there = root.is_dir() and any(root.glob("cifar-10-*"))
    names = [name for name in config.subjects if there or not name.startswith("CIFAR-10")]
    return {f"{name} / {search}": (name, search) for name in names for search in strategies(1)}


@functools.lru_cache(maxsize=1)
def subject(name: str, root: str) -> Subject:
    return SUBJECTS[name](Path(root), 0)


def measure(config: Config, case: tuple[str, str]) -> Iterator[Row]:
    """One row per seed and image."""
    name, search_name = case
    who = subject(name, config.data_root)
    images = min(config.images, 4) if name.startswith("CIFAR-10") else config.images
    seeds, budget = (
        (1, config.budget // 2) if name.startswith("CIFAR-10") else (config.seeds, config.budget)
    )
    x = who.x[:images]
    cubes = who.quantization.cubes(x)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            found = run_attack(
                AuditedModel(who.net),
                cubes,
                strategies(budget)[search_name],
                generator=generator,
                seconds=300.0,
            )
        centre = found.curve[0][1]
        for k in range(len(x)):
            yield {
                "net": name,
                "strategy": search_name,
                "seed": seed,
                "image": k,
                "centre_error": centre[k].item(),
                "error": found.error[k].item(),
                "spent": found.spent,
                "steps_price": found.price.get(
                    "gradient", found.price.get("implicit gradient", math.nan)
                ),
                "valid": bool(cubes.contain(found.points)[k]),
            }


def run(config: Config) -> pd.DataFrame:
    """All strategies on all nets."""
    frame = collect(config, cases(config), measure)
    print(summary(frame).to_string(index=False))
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per net and strategy: error over random search's, its standard error, and images broken."""
    index = ["net", "seed", "image"]
    random = frame[frame.strategy == "random search"].set_index(index).error
    rows = []
    for (net, name), group in frame.groupby(["net", "strategy"], sort=False):
        mine = group.set_index(index).error
        ratio = np.log(mine / random.reindex(mine.index))
        ratio = ratio[np.isfinite(ratio)]
        rows.append(
            {
                "net": net,
                "strategy": name,
                "found": np.exp(ratio.mean()) if len(ratio) else np.nan,
                "standard error": np.exp(ratio.mean()) * ratio.std() / np.sqrt(len(ratio))
                if len(ratio)
                else np.nan,
                "compared": len(ratio),
                "broken": int(np.isinf(group.error).sum()),
                "broken at centre": int(np.isinf(group.centre_error).sum()),
                "of": len(group),
                "median error": group.error.median(),
            }
        )
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> Figure:
    """Error found over that of random search, per net; bars of one standard error; images broken in figures."""
    table = summary(frame)
    nets, names = list(dict.fromkeys(table.net)), list(dict.fromkeys(table.strategy))
    figure = Figure(figsize=(10, 1.2 + 0.95 * len(nets)), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(names):
        group = table[table.strategy == name].set_index("net").reindex(nets)
        at = np.arange(len(nets)) + (k - (len(names) - 1) / 2) * 0.13
        axes.errorbar(
            group.found,
            at,
            xerr=group["standard error"],
            fmt="o",
            markersize=5,
            capsize=2,
            label=name,
        )
        for place, (found, broken, of) in zip(
            at, zip(group.found, group.broken, group.of, strict=True), strict=True
        ):
            if broken:
                axes.text(
                    found * 1.02 if np.isfinite(found) else 1.0, place, f"  {broken}/{of} not finite",
                    va="center", fontsize=7,
                )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(nets)), labels=nets)
    axes.invert_yaxis()
    axes.set_xlabel("error found / error found by random search, at equal cost")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main(__name__)
