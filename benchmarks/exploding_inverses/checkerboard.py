"""Three large flows of one checkerboard: where the inverse fails, densities, certified bounds.

    inn-guard bench exploding_inverses.checkerboard --preset cpu  # about 5 minutes on one core

Affine couplings with scales in (0, 1), affine couplings with scales in (0.5, 1) and a residual flow
are trained by maximum likelihood. The rows of a net, by their place:

* "training": a look during training. The share of the grid outside the data's box whose round trip
  is not finite, the largest finite error there, and the largest error on held-out samples;
* "grid": a point of a grid around the data;
* "data": held-out samples. Mean log-density, worst round trip, extreme singular values;
* "certified": bounds on the data's box [-4, 4]^2 (sigma_max at most, sigma_min at least that);
* "witnessed": the witnesses that bound the same numbers from the other side;
* "table 3": the bounds as the paper prints them.

Round trips are Euclidean errors in float32.

What the paper leaves open: how many steps. This differs from the paper in: this package's layers
compute log g(s) without computing g(s), so that no density is NaN where only the inverse fails.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.image_training import (
    Batch,
    Plan,
    checkpoint_of,
    evaluation_steps,
    train,
)
from benchmarks.exploding_inverses.stability import round_trip_error, singular_values
from benchmarks.lipschitz.nets import BOX, checkerboard
from inn_guard.layers.chain import Chain
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.models.iresnet import checkerboard_residual_flow
from inn_guard.models.toy import checkerboard_net

AFFINE, HALF, RESIDUAL = "affine (0 1)", "affine (0.5 1)", "residual"
BOUNDS = ("witnessed", "certified", "table 3")  #: rows that bound the singular values over the box


@dataclass(frozen=True)
class Config:
    """What is trained; the defaults are the paper's."""

    nets: tuple[str, ...] = (AFFINE, HALF, RESIDUAL)  # which of the three
    blocks: int = 100  # couplings
    residual_blocks: int = 100  # residual layers
    hidden: int = 128  # width of the four hidden layers
    steps: int = 50_000  # of Adam at 1e-3 with weight decay 1e-5
    residual_steps: int = 50_000  # of the residual flow
    batch_size: int = 500  # new samples at every step
    looks: int = 12  # during training; a killed run goes on from the last one
    extent: float = 8.0  # the grid covers [-extent, extent]^2
    points: int = 101  # of the grid in each direction
    seconds: float = 600.0  # for the certified bounds of each net
    seed: int = 0  # of weights and samples


PRESETS = {
    "smoke": {
        "blocks": 2, "residual_blocks": 1, "hidden": 8, "steps": 2, "residual_steps": 2,
        "batch_size": 16, "looks": 1, "points": 5, "seconds": 1.0,
    },
    # Minutes on one core: narrow networks, small batches, few steps, and a residual flow of few
    # layers. Inverses then fail only far from the data, so the grid is wide.
    "cpu": {
        "residual_blocks": 6, "hidden": 32, "steps": 800, "residual_steps": 300, "batch_size": 128,
        "extent": 16.0, "points": 41, "seconds": 15.0,
    },
    "paper": {},  # the paper's nets
}  # fmt: skip


def build(config: Config, name: str) -> Chain:
    """The net of that name, with the seed's weights."""
    makers: dict[str, Callable[[], Chain]] = {
        AFFINE: functools.partial(checkerboard_net, blocks=config.blocks, hidden=config.hidden),
        HALF: functools.partial(
            checkerboard_net, scale=squashed_sigmoid(), blocks=config.blocks, hidden=config.hidden
        ),
        RESIDUAL: functools.partial(
            checkerboard_residual_flow, blocks=config.residual_blocks, hidden=config.hidden
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return makers[name]()


def trained(config: Config, name: str) -> tuple[Chain, list[Row]]:
    """The net after maximum likelihood, and a row for every look on the way."""
    net = build(config, name)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-5, fused=True)
    steps = config.steps
    if name == RESIDUAL:
        steps = config.residual_steps
    looks = evaluation_steps(steps, config.looks)
    checkpoint = checkpoint_of(config, name)

    def loss(batch: Batch) -> Tensor:
        return -net.log_prob(checkerboard(config.batch_size, batch.generator)).mean()

    rows = train(
        net,
        optimizer,
        loss,
        plan=Plan(steps, config.batch_size, looks, seed=config.seed),
        evaluate=lambda: seen(config, net),
        checkpoint=checkpoint,
        examples=config.batch_size,
    )
    checkpoint.unlink(missing_ok=True)
    return net.eval().requires_grad_(requires_grad=False), rows


def seen(config: Config, net: Chain) -> Row:
    """Round trips on the grid outside of the data's box, and of held-out samples."""
    points = grid(config)
    outside = round_trip_error(net, points[points.abs().amax(1) > BOX])
    finite = outside[outside.isfinite()]
    return {
        # NaN where no point of a small grid lies outside
        "not_finite": float((~outside.isfinite()).double().mean()),
        "largest_outside": max(finite.tolist(), default=math.nan),
        "error": round_trip_error(net, held_out(config)).max().item(),
    }


def held_out(config: Config) -> Tensor:
    return checkerboard(1000, torch.Generator().manual_seed(config.seed + 1))


def measure(config: Config, name: str) -> Iterator[Row]:
    """A row per look and per point of the grid, then the rows of a whole net."""
    net, looks = trained(config, name)
    for row in looks:
        yield {"net": name, "place": "training", **row}
    samples = held_out(config)
    for row in evaluation(net, grid(config)).to_dict("records"):
        yield {"net": name, "place": "grid", **row}
    yield {"net": name, "place": "data", **worst_values(evaluation(net, samples))}
    for place, sigma_max, sigma_min in bounded(net, samples, config):
        yield {"net": name, "place": place, "sigma_max": sigma_max, "sigma_min": sigma_min}


def grid(config: Config) -> Tensor:
    axis = torch.linspace(-config.extent, config.extent, config.points)
    return torch.cartesian_prod(axis, axis)


def evaluation(net: Chain, x: Tensor) -> pd.DataFrame:
    """Log-density in nats, Euclidean round-trip error and extreme singular values of each point."""
    sigma_max, sigma_min = singular_values(net, x)
    with torch.no_grad():
        log_prob = net.log_prob(x)
    columns = {
        "x1": x[:, 0],
        "x2": x[:, 1],
        "log_prob": log_prob,
        "error": round_trip_error(net, x),
        "sigma_max": sigma_max,
        "sigma_min": sigma_min,
    }
    return pd.DataFrame(columns).map(float)


def worst_values(frame: pd.DataFrame) -> Row:
    """The mean log-density, the largest error and the extreme singular values."""
    return {
        "log_prob": frame.log_prob.mean(),
        "error": frame.error.max(),
        "sigma_max": frame.sigma_max.max(),
        "sigma_min": frame.sigma_min.min(),
    }


def bounded(net: Chain, samples: Tensor, config: Config) -> list[tuple[str, float, float]]:
    """(place, sigma_max, sigma_min) over the box of the data: certified, witnessed, Table 3."""
    corner = BOX * torch.ones(2, dtype=torch.float64)
    box = ig.Box(-corner, corner)
    bounds = ig.lipschitz_bounds(net, box, data=samples, seconds=config.seconds)
    pairs = {
        "certified": (bounds.forward, bounds.inverse),
        "witnessed": (bounds.lower_forward, bounds.lower_inverse),
        "table 3": bounds.paper_bound,
    }
    return [(place, forward, 1 / inverse) for place, (forward, inverse) in pairs.items()]


def run(config: Config) -> pd.DataFrame:
    frame = collect(config, config.nets, measure)
    print(summary(frame).to_string(index=False))
    return frame


@np.errstate(divide="ignore")
def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One line per net: the data, the grid outside of their box, and the bounds on the box."""
    lines = []
    for name, group in frame.groupby("net", sort=False):
        data, *bounds = (group[group.place == place].iloc[0] for place in ("data", *BOUNDS))
        outside = group[(group.place == "grid") & (group[["x1", "x2"]].abs().max(axis=1) > BOX)]
        line = {
            "net": name,
            "nats": -data.log_prob,
            "error on data": data.error,
            "outside: not finite": f"{np.mean(~np.isfinite(outside.error)):.1%}",
            "worst finite error": outside.error[np.isfinite(outside.error)].max(),
            "log p not finite": f"{np.mean(~np.isfinite(outside.log_prob)):.1%}",
            "condition, data": data.sigma_max / data.sigma_min,
        }
        for place, bound in zip(BOUNDS, bounds, strict=True):
            line[f"Lip F, {place}"] = bound.sigma_max
        for place, bound in zip(BOUNDS, bounds, strict=True):
            line[f"Lip F^-1, {place}"] = np.divide(1.0, bound.sigma_min)
        lines.append(line)
    return pd.DataFrame(lines)


def draw(frame: pd.DataFrame) -> Figure:
    """Per net log-density, round-trip error and condition number; orange where not finite."""
    nets = list(dict.fromkeys(frame.net))
    points = frame[frame.place == "grid"]
    points = points.assign(
        condition=points.sigma_max / points.sigma_min,
        log_prob=points.log_prob.clip(lower=-15),
        error=points.error.clip(lower=1e-7),  # many round trips are exact, which no logarithm shows
    )
    columns: dict[str, tuple[str, Normalize]] = {
        "log_prob": ("log p(x) in nats", Normalize(-15, 0)),
        "error": ("round-trip error", LogNorm(1e-7, 1e1)),
        "condition": ("condition number", LogNorm(1, 1e7)),
    }
    figure = Figure(figsize=(3.2 * len(nets) + 0.8, 9), layout="constrained")
    panels = figure.subplots(len(columns), len(nets), squeeze=False, sharex=True, sharey=True)
    for row, (column, (label, norm)) in zip(panels, columns.items(), strict=True):
        for axes, name in zip(row, nets, strict=True):
            own = points[points.net == name].pivot(index="x2", columns="x1", values=column)
            shown = axes.pcolormesh(
                own.columns, own.index, np.ma.masked_invalid(own.to_numpy()), norm=norm
            )
            axes.set(facecolor="#d55e00", aspect="equal")
            axes.add_patch(
                Rectangle(
                    (-BOX, -BOX), 2 * BOX, 2 * BOX, fill=False, edgecolor="white", linewidth=0.8
                )
            )
        figure.colorbar(shown, ax=row, label=label)
    for axes, name in zip(panels[0], nets, strict=True):
        axes.set_title(name)
    figure.suptitle("Checkerboard; white: the box of the data; orange: not finite")
    return figure


if __name__ == "__main__":
    main(__name__)
