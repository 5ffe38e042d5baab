"""What the dequantization attack finds in affine flows, against their depth and training.

    inn-guard bench exploding_inverses.attack_growth --preset cpu --data-root FOLDER

The flows of ``dequantization`` with scales in (0, 1), one for each number of blocks, attacked at
several steps of their training by maximum likelihood, by the paper's search and by this package's
default at the same price. Rows: likelihood and spectrum, errors at the centres of the cubes and at
the points found, Euclidean, and images lost altogether.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.common.figures import draw_grid_lines, plot_finite
from benchmarks.common.runner import Row, collect, keyed, main
from benchmarks.exploding_inverses import dequantization
from benchmarks.exploding_inverses.dequantization import PRICE, Flow
from benchmarks.exploding_inverses.image_training import checkpoint_of, exact_float32
from inn_guard.audits.dequantization_attack import ProjectedGradient, SpectralAscent

FLOW = "affine (0 1)"
LINES = {
    "spectral_error": ("o-", "spectral ascent"),
    "paper_error": ("o--", "the paper's search"),
    "centre_error": ("o:", "centres of the cubes"),
}
COLOURS = ("#56b4e9", "#0072b2", "#009e73", "#e69f00", "#d55e00")


@dataclasses.dataclass(frozen=True)
class Config(dequantization.Config):
    """As in ``dequantization``; only affine flows with scales in (0, 1)."""

    flows: tuple[str, ...] = (FLOW,)
    depths: tuple[int, ...] = (4, 8, 16)  # blocks per level, a flow for each
    looks: int = 20  # number of attacks during a training


def preset(base: str, **changes: object) -> dict[str, object]:
    """That preset of ``dequantization``, for affine flows only, with these changes."""
    return {**dequantization.PRESETS[base], "flows": (FLOW,), **changes}


PRESETS = {
    "smoke": preset("smoke", depths=(1, 2), looks=2),
    # six minutes of one core: up to 4 blocks of 32 channels, eight images, the paper's 200 steps
    "cpu": preset(
        "cpu", levels=3, hidden=32, steps=1500, depths=(1, 2, 4), looks=4, images=8,
        attack_steps=200,
    ),
    "paper": {},  # Table 7, 100 epochs, for a GPU
}  # fmt: skip


def evaluate(flow: Flow) -> Row:
    """Likelihood, spectrum, and what either search finds for the same number of forward passes."""
    steps = flow.config.attack_steps
    row = flow.evaluate()
    for name, strategy in (
        ("paper", ProjectedGradient(steps, flow.config.step_size)),
        ("spectral", SpectralAscent(PRICE * steps)),
    ):
        found = flow.attack(flow.net, strategy)
        centre = found.per_sample["centre_error"].nan_to_num(math.inf, posinf=math.inf)
        worst = found.per_sample["error"].nan_to_num(math.inf, posinf=math.inf)
        row |= {
            "centre_error": centre.max().item(),
            f"{name}_error": worst.max().item(),
            f"{name}_median_error": worst.median().item(),
            f"{name}_lost_images": int((~worst.isfinite()).sum()),
            f"{name}_verdict": found.verdict.label,
        }
    return row


def measure(config: Config, depth: int) -> list[Row]:
    """Train one flow; a row per evaluation."""
    flow = Flow.fresh(dataclasses.replace(config, blocks=depth), FLOW)
    checkpoint = checkpoint_of(config, str(depth))
    with exact_float32():
        rows = flow.train(
            evaluations=config.looks,
            evaluate=functools.partial(evaluate, flow),
            checkpoint=checkpoint,
        )
    checkpoint.unlink(missing_ok=True)
    return [{"blocks": depth, **row, **config.origin(flow.training.data)} for row in rows]


def run(config: Config) -> pd.DataFrame:
    return collect(config, keyed("{} blocks", config.depths), measure)


def draw(frame: pd.DataFrame) -> Figure:
    """Errors at the centres and under attack, and the spectrum, over the steps of training."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    errors, spectrum = figure.subplots(1, 2)
    for colour, (depth, group) in zip(COLOURS, frame.groupby("blocks", sort=False), strict=False):
        blocks = "1 block per level"
        if depth != 1:
            blocks = f"{depth} blocks per level"
        for column, (line, label) in LINES.items():
            plot_finite(
                errors,
                group["step"],
                group[column],
                line,
                color=colour,
                label=f"{blocks}, {label}",
                height=0.97,
            )
        for column, line, label in (
            ("sigma_max", "^-", "largest"),
            ("sigma_min", "v--", "smallest"),
        ):
            spectrum.plot(
                group["step"],
                group[column],
                line,
                color=colour,
                markersize=4,
                label=f"{blocks}, {label}",
            )
    errors.set(ylabel="worst round trip, Euclidean", title="x: a reconstruction is not finite")
    spectrum.set(ylabel="singular values at the images")
    for axis in (errors, spectrum):
        axis.set(xlabel="step of training", yscale="log")
        draw_grid_lines(axis)
    spectrum.legend(frameon=False, fontsize=7, handlelength=4)
    shown = [line for line in errors.get_lines() if not line.get_label().startswith("_")]
    figure.legend(
        handles=shown, loc="outside left center", frameon=False, fontsize=7, handlelength=4
    )
    return figure


if __name__ == "__main__":
    main(__name__)
