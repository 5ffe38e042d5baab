r"""Valid training samples whose reconstruction fails, on two affine flows and a residual one.

    inn-guard bench exploding_inverses.dequantization --preset cpu --data-root FOLDER

The committed table of larger and longer trained affine flows under a longer attack, five minutes of
one core:

    inn-guard bench exploding_inverses.dequantization --preset cpu --data-root FOLDER \
        --flows "affine (0 1),affine (0.5 1)" --levels 3 --blocks 4 --hidden 32 --steps 1500 \
        --images 8 --attack-steps 400 --grids benchmarks/results/longer \
        --out benchmarks/results/longer

Three flows are trained by maximum likelihood on images of 5 bits: affine couplings with scales in
(0, 1), with scales in (0.5, 1), and a residual flow. Training images are then attacked within the
cube of their dequantized samples, by the paper's projected gradient and by this package's default
search at the same price. The residual flow is attacked twice: through the converged inverse, and,
as in the paper, through one of five fixed-point iterations, whose points are then reconstructed
again with the converged one.

This differs from the paper in: CIFAR-10 instead of CelebA at 64 x 64, therefore three levels
instead of four; the residual inverse is differentiated by the implicit function theorem instead of
through its iterations.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.common.figures import save_figure
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.attack_report import draw
from benchmarks.exploding_inverses.flow_report import grid
from benchmarks.exploding_inverses.image_flows import FlowConfig, FlowTraining
from benchmarks.exploding_inverses.image_training import (
    checkpoint_of,
    exact_float32,
    train,
    warmed_up,
)
from benchmarks.exploding_inverses.stability import euclidean_errors, spectrum_row
from inn_guard.audits.dequantization_attack import ProjectedGradient, Quantization, SpectralAscent
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.audits.dequantization_attack.search import Attack
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.round_trip import RoundTrip, round_trip
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.residual import Residual
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.models.glow import GlowConfig, glow_classifier
from inn_guard.models.iresnet import IResNetConfig, iresnet
from inn_guard.report.result import AuditResult

__all__ = ["PRESETS", "Config", "draw", "run"]

BITS = 5
PRICE = 4.5  #: forward passes that a step of the paper's attack costs


@dataclass(frozen=True)
class Config(FlowConfig):
    """Which flows are trained and how they are attacked. The defaults are the paper's."""

    flows: tuple[str, ...] = ("affine (0 1)", "affine (0.5 1)", "residual")  # keys of FLOWS
    # per level of the residual flow; ``blocks`` are those of the affine nets
    residual_blocks: int = 16
    coefficient: float = 0.98  # Lipschitz constant of the residual flow's convolutions
    # of training of the residual flow, by Adam; the others have Adamax
    residual_steps: int = 78_100
    images: int = 16  # training images that are attacked
    attack_steps: int = 200  # of the paper's search
    step_size: float = 5e-4  # of its steps, in [0, 1]
    few_iterations: int = 5  # of the inverse in the second attack on the residual flow


PRESETS = {
    # Seconds, on scikit-learn's digits
    "smoke": {
        "flows": ("affine (0 1)", "residual"), "data": "digits", "data_name": "digits",
        "train_images": 64, "levels": 1, "blocks": 1, "residual_blocks": 1, "hidden": 4,
        "coefficient": 0.7, "steps": 3, "residual_steps": 2, "batch_size": 16, "warmup": 2,
        "images": 2, "attack_steps": 3, "device": "cpu", "grids": "",
    },
    # A minute or two of one core: tiny nets, hardly trained, at a higher rate, and three images
    "cpu": {
        "data_name": "CIFAR-10 (JPEG copies)", "train_images": 10_000, "levels": 2, "blocks": 6,
        "residual_blocks": 1, "hidden": 16, "coefficient": 0.9, "steps": 150, "residual_steps": 20,
        "batch_size": 32, "learning_rate": 5e-3, "warmup": 15, "clip": 50.0, "images": 3,
        "attack_steps": 80, "device": "cpu",
    },
    "paper": {},  # Table 7, 100 epochs, for a GPU
}  # fmt: skip


def affine(
    shape: tuple[int, int, int], config: Config, coupling: Callable[..., AffineCoupling]
) -> Chain:
    """Couplings and reversals, nothing factored out."""
    glow = GlowConfig(
        config.levels, config.blocks, config.hidden, coupling=coupling, mixing=Permutation.reverse
    )
    return glow_classifier(shape, config=glow)


def residual(shape: tuple[int, int, int], config: Config) -> Chain:
    """Residual layers with eight exact terms of the log-determinant and a random number more."""
    sizes = IResNetConfig(config.levels, config.residual_blocks, config.hidden, config.coefficient)
    return iresnet(shape, config=sizes)


FLOWS: dict[str, Callable[[tuple[int, int, int], Config], Chain]] = {
    "affine (0 1)": functools.partial(affine, coupling=AffineCoupling.on_halves),
    "affine (0.5 1)": functools.partial(
        affine, coupling=functools.partial(AffineCoupling.on_halves, scale=squashed_sigmoid())
    ),
    "residual": residual,
}


@dataclass(frozen=True)
class Flow:
    """One flow, its data, and the cubes of its training images."""

    config: Config
    name: str
    net: Chain
    training: FlowTraining

    @classmethod
    def fresh(cls, config: Config, name: str) -> Flow:
        """A net whose ActNorms are set by the first images; pixels are cut to 5 bits."""
        data = config.load(test=256).in_bits(BITS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = config.on_device(FLOWS[name](data.shape, config))
        training = FlowTraining(config, data.to(config.device), low=0.0)
        training.initialise(net, 64)
        return cls(config, name, net, training)

    @property
    def attacked(self) -> Tensor:
        """Training images at the centres of their cubes."""
        return (self.training.data.train[: self.config.images].float() + 0.5) / 2**BITS

    def train(
        self, *, evaluations: int, evaluate: Callable[[], Row], checkpoint: Path
    ) -> list[Row]:
        """Train it by maximum likelihood; a row per evaluation."""
        config = self.config
        steps, optimizer = config.steps, torch.optim.Adamax
        if self.name == "residual":
            steps, optimizer = config.residual_steps, torch.optim.Adam
        return train(
            self.net,
            optimizer(self.net.parameters(), config.learning_rate),
            functools.partial(self.training.loss, self.net),
            plan=config.plan(steps, evaluations=evaluations, rate=warmed_up(config.warmup)),
            evaluate=evaluate,
            checkpoint=checkpoint,
            examples=len(self.training.data.train),
        )

    def evaluate(self) -> Row:
        """Likelihood and spectrum."""
        found = jacobian_spectrum(self.net, self.attacked, tolerance=0.02)
        return {
            "bits_per_dimension": self.training.bits(self.net, count=128),
            **spectrum_row(found),
        }

    def attack(self, net: Chain, strategy: Attack) -> AuditResult:
        """The search for the worst point of every cube."""
        return dequantization_attack(
            net,
            self.attacked,
            quantization=Quantization(BITS),
            strategy=strategy,
            samples=self.config.images,
            seed=self.config.seed,
        )

    def with_few_iterations(self) -> Chain:
        """The same net with an inverse of few fixed-point iterations; parameters are shared."""
        copied = Chain(*(copy.copy(layer) for layer in self.net.layers()))
        for layer in copied.layers():
            if isinstance(layer, Residual):
                layer.solver = FixedPoint(max_iterations=self.config.few_iterations)
        return copied.eval()

    def converged(self, found: AuditResult) -> RoundTrip:
        """The round trip of the points found, through the converged inverse."""
        points = found.images["point found"].to(self.attacked)
        return round_trip(self.net, points, batch_size=64)


def attacks(config: Config, flow: Flow) -> Iterator[tuple[str, str, AuditResult]]:
    """(inverse, search, what was found)."""
    paper = ProjectedGradient(config.attack_steps, config.step_size)
    yield "exact", "paper", flow.attack(flow.net, paper)
    yield "exact", "spectral", flow.attack(flow.net, SpectralAscent(PRICE * config.attack_steps))
    if flow.name == "residual":
        found = flow.attack(flow.with_few_iterations(), paper)
        yield f"{config.few_iterations} iterations", "paper", found


def measure(config: Config, name: str) -> Iterator[Row]:
    """Train one flow; rows of its training, of each attack's curve, and of the attacked images."""
    flow = Flow.fresh(config, name)
    checkpoint = checkpoint_of(config, name)
    with exact_float32():
        rows = flow.train(evaluations=3, evaluate=flow.evaluate, checkpoint=checkpoint)
        flow.net.eval()
        source = {"flow": name, **config.origin(flow.training.data)}
        for row in rows:
            yield {"kind": "training", **source, **row}
        pictures: dict[str, Tensor] = {}
        for inverse, search, found in attacks(config, flow):
            about = {**source, "inverse": inverse, "search": search}
            for point in found.tables["attack_curve"]:
                yield {"kind": "curve", **about, **point}
            for row in image_rows(flow, found):
                yield {"kind": "image", **about, **row}
            pictures |= image_groups(flow, f"{search}, {inverse} inverse", found)
    if config.grids:
        slug = name.replace(" ", "_").replace("(", "").replace(")", "")
        columns = max(8, *(len(images) for images in pictures.values()))
        path = Path(config.grids) / f"exploding_inverses_dequantization_{slug}.png"
        save_figure(grid(pictures, columns=columns), path, dpi=90)
    checkpoint.unlink(missing_ok=True)


def image_rows(flow: Flow, found: AuditResult) -> Iterator[Row]:
    """One row per attacked image, the worst first."""
    converged = euclidean_errors(flow.converged(found))
    order = found.per_sample["error"].argsort(descending=True)[: len(converged)].tolist()
    for place, image in enumerate(order):
        yield {
            "image": image,
            "centre_error": found.per_sample["centre_error"][image].item(),
            "error": found.per_sample["error"][image].item(),
            "converged_error": converged[place].item(),
            "spent": found.values["spent"],
            "verdict": found.verdict.label,
        }


def image_groups(flow: Flow, title: str, found: AuditResult) -> dict[str, Tensor]:
    """Original, point found, reconstruction, and the converged reconstruction."""
    groups = {
        f"{title}: original": found.images["original"],
        f"{title}: perturbed within its cube": found.images["point found"],
        f"{title}: reconstructed": found.images["reconstruction"],
    }
    if "iterations" in title:
        groups[f"{title}: reconstructed, converged"] = flow.converged(found).end.cpu()
    return groups


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.flows, measure)


if __name__ == "__main__":
    main(__name__)
