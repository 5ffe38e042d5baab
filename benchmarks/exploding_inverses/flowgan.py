"""A Glow trained as the generator of a GAN, by likelihood, and by both (FlowGAN).

    inn-guard bench exploding_inverses.flowgan --preset cpu  # about 5 minutes on one core
    inn-guard bench exploding_inverses.flowgan --preset paper --data-root FOLDER

Samples are F^-1(z), z from N(0, I). The discriminator is spectrally normalised, has a gradient
penalty and the cross-entropy loss. Rows over training: bits per dimension of test images (inf where
a likelihood is), the Fréchet distance of samples between the features of a small classifier trained
on the same data (no FID: it compares within this table only), the worst round trips of test images
and of samples, condition numbers of test images.

What the paper leaves open: strides and slope of the discriminator, weight of the gradient penalty
(10 here), how many steps, and whether its weight of 1e-3 is of nats per image (as here) or per
value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

import inn_guard as ig
from benchmarks.common.experiments import find
from benchmarks.common.features import images_and_features
from benchmarks.common.figures import save_figure, training_curves
from benchmarks.common.metrics import (
    FeatureExtractor,
    bits_per_dimension,
    dequantize,
    frechet_distance,
)
from benchmarks.common.quantized_images import QuantizedImages, by_parts
from benchmarks.common.runner import RESULTS, Row, collect, main
from benchmarks.exploding_inverses.flow_report import grid
from benchmarks.exploding_inverses.gan import discriminator, gradient_penalty
from benchmarks.exploding_inverses.stability import round_trip_error
from inn_guard.core.invertible import Invertible
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.permutation import Permutation
from inn_guard.models.glow import GlowConfig, glow_flow

REPOSITORY = RESULTS.parents[1]
COUPLINGS = {"additive": AdditiveCoupling.on_halves, "affine": AffineCoupling.on_halves}
COLOURS = {"mle": "#0072b2", "gan": "#d55e00", "flowgan": "#009e73"}
OTHER_WEIGHT = "#cc79a7"  #: of the likelihood in FlowGAN
CURVES = {
    "bpd": "bits per dimension, test",
    "distance": "Fréchet distance of samples",
    "condition_number": "worst condition number, test",
    "error": "worst round trip, test",
}


@dataclass(frozen=True)
class Objective:
    """The generator's loss: adversarial * cross-entropy + likelihood * nats per image."""

    adversarial: float
    likelihood: float


@dataclass(frozen=True)
class Config:
    """What is trained; the defaults are the paper's."""

    data: str = "cifar10"  # digits, mnist or cifar10
    data_root: str = ""  # folder of the official files; digits need none
    # of mle, gan, flowgan, and flowgan with a weight of its own, such as "flowgan 0.048"
    objectives: tuple[str, ...] = ("mle", "gan", "flowgan")
    coupling: str = "additive"  # additive or affine
    levels: int = 3  # of Glow
    blocks: int = 8  # per level
    hidden: int = 128  # channels
    # of the discriminator's convolutions
    widths: tuple[int, ...] = (64, 64, 128, 128, 256, 256, 512)
    likelihood: float = 1e-3  # weight of the likelihood in FlowGAN, in nats per image
    penalty: float = 10.0  # weight of the gradient penalty
    batch_size: int = 32  # of both players
    learning_rate: float = 5e-5  # of Adam with betas (0.5, 0.99), both players
    steps: int = 100_000  # one of each player
    looks: int = 20  # number of evaluations, and rows, per objective
    images: int = 10_000  # for every Fréchet distance, at most as many as there are test images
    looked_at: int = 64  # number of test images for round trips and condition numbers
    # folder for pictures of samples, from the repository's root; "" draws none
    grids: str = "benchmarks/results"
    seed: int = 0  # of weights, order and noise


PRESETS = {
    "smoke": {
        "data": "digits", "levels": 1, "blocks": 1, "hidden": 4, "widths": (4, 4), "batch_size": 4,
        "steps": 2, "looks": 2, "images": 20, "looked_at": 2, "grids": "",
    },
    # Minutes on one core: 8x8 digits, a quarter of the couplings and channels, ten times the rate,
    # 1,200 steps. FlowGAN also with the weight that is the paper's per value: 1e-3 of 3072 values
    # is 0.048 of 64.
    "cpu": {
        "data": "digits", "objectives": ("mle", "gan", "flowgan", "flowgan 0.048"), "levels": 2,
        "blocks": 3, "hidden": 32, "widths": (16, 16, 32, 32, 64, 64, 128), "learning_rate": 5e-4,
        "steps": 1200, "looks": 8, "images": 450, "looked_at": 32,
    },
    "paper": {},  # the paper's nets on CIFAR-10
}  # fmt: skip


def loaded(config: Config) -> tuple[QuantizedImages, FeatureExtractor]:
    """The images and the extractor trained on them."""
    return images_and_features(config.data, config.data_root, steps=config.steps)


def objective(config: Config, name: str) -> Objective:
    """The generator's loss of that name."""
    kind, _, weight = name.partition(" ")
    return {
        "mle": Objective(adversarial=0.0, likelihood=1.0),
        "gan": Objective(adversarial=1.0, likelihood=0.0),
        "flowgan": Objective(adversarial=1.0, likelihood=float(weight or config.likelihood)),
    }[kind]


class Players:
    """Generator and discriminator with their optimizers, and the data they see."""

    def __init__(self, config: Config, images: QuantizedImages) -> None:
        self.config, self.images = config, images
        self.generator = torch.Generator().manual_seed(config.seed)
        sizes = GlowConfig(
            config.levels,
            config.blocks,
            config.hidden,
            coupling=COUPLINGS[config.coupling],
            mixing=Permutation.reverse,
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.flow: Invertible = glow_flow(images.shape, config=sizes)
            self.critic: nn.Module = discriminator(images.shape, config.widths)
        self.flow(self.real(100))  # the first batch sets the ActNorms
        self.flow_optimizer = self._optimizer(self.flow)
        self.critic_optimizer = self._optimizer(self.critic)

    def _optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), self.config.learning_rate, betas=(0.5, 0.99))

    def real(self, count: int) -> Tensor:
        """Dequantized training images in [-0.5, 0.5)."""
        rows = torch.randint(len(self.images.train), (count,), generator=self.generator)
        return centred(self.images, self.images.train[rows], self.generator)

    def samples(self, count: int, generator: torch.Generator) -> Tensor:
        """F^-1 of the prior."""
        return self.flow.inverse(torch.randn(count, self.images.dims, generator=generator))

    def step(self, objective: Objective) -> bool:
        """One step of each player; False if a loss is not finite, which then changes nothing."""
        x = self.real(self.config.batch_size)
        if objective.adversarial and not self._critic_step(x):
            return False
        loss = torch.zeros(())
        if objective.adversarial:
            verdict = self.critic(self.samples(len(x), self.generator))
            loss = loss + objective.adversarial * functional.softplus(-verdict).mean()
        if objective.likelihood:
            loss = loss - objective.likelihood * self.flow.log_prob(x).mean()
        return _updated(loss, self.flow_optimizer)

    def _critic_step(self, x: Tensor) -> bool:
        with torch.no_grad():
            drawn = self.samples(len(x), self.generator)
        loss_on_real = functional.softplus(-self.critic(x)).mean()
        loss = loss_on_real + functional.softplus(self.critic(drawn)).mean()
        penalty = gradient_penalty(self.critic, x, drawn, generator=self.generator)
        return _updated(loss + self.config.penalty * penalty, self.critic_optimizer)


def _updated(loss: Tensor, optimizer: torch.optim.Optimizer) -> bool:
    if not loss.isfinite():
        return False
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return True


def centred(images: QuantizedImages, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantized pixels in [-0.5, 0.5)."""
    return dequantize(pixels, generator=generator, levels=images.levels) - 0.5


def measure(config: Config, name: str) -> Iterator[Row]:
    """Rows of one generator while it is trained; a loss that is not finite ends the training."""
    images, _ = loaded(config)
    players = Players(config, images)
    every = max(1, config.steps // config.looks)
    for step in trange(config.steps + 1, desc=name, disable=None):
        # step 0 is the fresh generator
        trained = step == 0 or players.step(objective(config, name))
        if step % every == 0 or not trained:
            players.flow.eval()
            yield {
                "objective": name,
                "step": step,
                "trained": trained,
                **evaluation(players, config),
            }
            players.flow.train()
        if not trained:
            break
    if config.grids:
        file = f"exploding_inverses_flowgan_{config.data}_{name.replace(' ', '_')}.png"
        save_grid(players, REPOSITORY / config.grids / file)


@torch.no_grad()
def evaluation(players: Players, config: Config) -> Row:
    """Likelihood, samples and stability."""
    images, extractor = loaded(config)
    generator = torch.Generator().manual_seed(config.seed + 1)
    x = centred(images, images.test, generator)
    log_prob = by_parts(players.flow.log_prob, x, 256)
    bits = bits_per_dimension(log_prob, dims=images.dims, levels=images.levels)
    drawn = players.samples(min(config.images, len(x)), generator)
    real = images.scaled(images.test[: len(drawn)])
    audited = x[: config.looked_at]
    report = ig.audit(players.flow, audited, checks=["jacobian_spectrum"])
    return {
        "bpd": finite_or_inf(bits.mean()),
        # clamping leaves values that are not finite as they are
        "distance": frechet_distance(extractor, real, (drawn + 0.5).clamp(0, 1)).value,
        "lost_samples": int((~drawn.isfinite()).flatten(1).any(1).sum()),
        "error": round_trip_error(players.flow, audited).max().item(),
        "error_on_samples": round_trip_error(players.flow, drawn[: config.looked_at]).max().item(),
        "condition_number": report["jacobian_spectrum"].values.get("condition_number", math.inf),
        "extractor": extractor.name,
    }


def finite_or_inf(number: Tensor) -> float:
    """NaN as inf, so that a failure is never the best of its column."""
    return number.nan_to_num(math.inf, posinf=math.inf).item()


@torch.no_grad()
def save_grid(players: Players, path: Path) -> None:
    """Training images and samples as one picture."""
    generator = torch.Generator().manual_seed(0)
    pictures = {
        "training images": players.real(20) + 0.5,
        "samples": players.samples(40, generator) + 0.5,
    }
    save_figure(grid(pictures, columns=10), path)


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.objectives, measure)


def compare_with_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of every objective and table 13."""
    table = find("exploding_inverses.flowgan").published()
    table = table.pivot(index="objective", columns="source", values=["bpd", "fid"])
    table.columns = [f"{number}, {source}" for number, source in table.columns]
    last = frame.groupby("objective", sort=False).tail(1).set_index("objective")
    ours = last[["step", "bpd", "distance", "lost_samples", "error", "condition_number"]]
    return ours.join(table.dropna(axis=1, how="all")).reset_index()


def draw(frame: pd.DataFrame) -> Figure:
    """Every number over the steps; a cross at the top if it is not finite."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        training_curves(axes, frame, column, by="objective", colours=COLOURS, other=OTHER_WEIGHT)
        axes.set(xlabel="step", ylabel=label, yscale="log")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"Features of the {frame.extractor.iloc[0]}; crosses: not finite")
    return figure


if __name__ == "__main__":
    main(__name__)
