"""Glow by maximum likelihood: its inverse on data, on its own samples, and on other images.

    inn-guard bench exploding_inverses.glow_likelihood --preset cpu --data-root FOLDER

Per evaluation of an affine and of an additive Glow in training: bits per dimension, squared
Euclidean reconstruction errors in [-0.5, 0.5] and condition numbers. After training one row for
each family of inputs: data, noise, constants and so on, digits of MNIST if its files are there.

What the paper leaves open: how many epochs. It takes photographs of textures and other data sets
for its families; here they are made from the data, and MNIST's digits stand for another data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.figures import save_figure
from benchmarks.common.image_files import read_mnist
from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.flow_report import draw, grid
from benchmarks.exploding_inverses.image_classifiers import COUPLINGS
from benchmarks.exploding_inverses.image_flows import FlowConfig, FlowTraining
from benchmarks.exploding_inverses.image_training import (
    checkpoint_of,
    exact_float32,
    train,
    warmed_up,
)
from benchmarks.exploding_inverses.stability import (
    condition_numbers,
    euclidean_errors,
    spectrum_row,
)
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.out_of_distribution.audit import out_of_distribution
from inn_guard.audits.round_trip import round_trip
from inn_guard.layers.chain import Chain
from inn_guard.layers.permutation import Permutation
from inn_guard.memory_saving import memory_saving
from inn_guard.models.glow import GlowConfig, glow_flow
from inn_guard.report.result import AuditResult

__all__ = ["PRESETS", "Config", "draw", "run"]

GRID = 10  #: images in a row


@dataclass(frozen=True)
class Config(FlowConfig):
    """Which Glows, how they are trained, and what is measured. The defaults are the paper's."""

    couplings: tuple[str, ...] = ("affine", "additive")  # affine, additive
    blocks: int = 32
    learning_rate: float = 5e-4
    weight_decay: float = 5e-5  # of Adamax
    warmup: int = 3905
    shift: int = 3  # pixels of the random translation
    memory_saving: bool = False  # train without stored activations
    looks: int = 20  # number of evaluations during a training
    evaluated: int = 1000  # test images for likelihoods and reconstructions
    spectra: int = 16  # test images whose singular values are measured
    outside: int = 32  # inputs per family


PRESETS = {
    # Seconds, on scikit-learn's digits
    "smoke": {
        "couplings": ("affine",), "data": "digits", "data_name": "digits", "train_images": 64,
        "levels": 2, "blocks": 1, "hidden": 4, "steps": 4, "batch_size": 16, "warmup": 2,
        "shift": 1, "looks": 2, "evaluated": 8, "spectra": 2, "outside": 2, "device": "cpu",
        "grids": "",
    },
    # Two minutes of one core: small nets, few steps at a higher rate
    "cpu": {
        "data_name": "CIFAR-10 (JPEG copies)", "train_images": 10_000, "blocks": 4, "hidden": 32,
        "steps": 300, "batch_size": 32, "learning_rate": 5e-3, "warmup": 50, "looks": 5,
        "evaluated": 128, "spectra": 8, "outside": 8, "device": "cpu",
    },
    "paper": {},  # Table 6, 100 epochs, for a GPU
}  # fmt: skip


@dataclass(frozen=True)
class Glow:
    """One Glow and what it is measured on, in [-0.5, 0.5]."""

    config: Config
    net: Chain
    training: FlowTraining

    @classmethod
    def fresh(cls, config: Config, coupling: str) -> Glow:
        """A net whose ActNorms are set by the first images."""
        data = config.load(test=config.evaluated)
        sizes = GlowConfig(
            config.levels,
            config.blocks,
            config.hidden,
            coupling=COUPLINGS[coupling],
            mixing=Permutation.reverse,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = config.on_device(glow_flow(data.shape, config=sizes))
        training = FlowTraining(
            config,
            data.to(config.device),
            low=-0.5,
            shift=config.shift,
            mirrored=config.data == "cifar10",
        )
        training.initialise(net, max(config.batch_size, 16))
        return cls(config, net, training)

    def evaluate(self) -> Row:
        """Likelihood, reconstructions and spectrum."""
        config = self.config
        x = self.tests(config.evaluated)
        trip = round_trip(self.net, x, batch_size=64)
        squared = euclidean_errors(trip).square()
        found = jacobian_spectrum(self.net, x, samples=config.spectra, tolerance=0.02)
        return {
            "bits_per_dimension": self.training.bits(self.net, count=config.evaluated),
            "squared_error": squared.mean().item(),
            "worst_squared_error": squared.max().item(),
            "broken_images": int((~trip.finite).sum()),
            "median_condition_number": condition_numbers(found).nanmedian().item(),
            **spectrum_row(found),
        }

    def outside(self) -> AuditResult:
        """The families of inputs."""
        x = self.tests(self.config.outside)
        return out_of_distribution(self.net, x, others=self.others(x), samples=len(x))

    def tests(self, count: int) -> Tensor:
        """The first test images, dequantized."""
        generator = torch.Generator().manual_seed(1)
        return self.training.dequantized(self.training.data.test[:count], generator)

    def others(self, x: Tensor) -> dict[str, Tensor]:
        """MNIST's digits as colour images, where its files are there."""
        if self.config.data != "cifar10" or not (Path(self.config.data_root) / "MNIST").is_dir():
            return {}
        digits = read_mnist(Path(self.config.data_root), train=False).pixels[: len(x)].copy()
        padded = functional.pad(torch.as_tensor(digits), [2] * 4).expand(-1, 3, -1, -1).to(x.device)
        return {"MNIST": self.training.dequantized(padded, torch.Generator().manual_seed(2))}

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """F^-1(z), z ~ N(0, I)."""
        dims = self.training.data.train[0].numel()
        z = torch.randn(count, dims, generator=torch.Generator().manual_seed(3))
        return self.net.inverse(z.to(next(self.net.parameters())))

    def pictures(self, found: AuditResult) -> dict[str, Tensor]:
        """Title -> images in [0, 1]: test images, samples, and the worst input of each family."""
        x = self.tests(GRID)
        groups = {
            "test images": x,
            "their reconstructions": round_trip(self.net, x, batch_size=64).end,
            "samples": self.samples(2 * GRID),
        }
        if "input" in found.images:
            groups["the worst of each family"] = found.images["input"][:GRID]
        if "reconstruction" in found.images:
            # the space tells this title from that of the test images
            groups["their reconstructions "] = found.images["reconstruction"][:GRID]
        return {title: images.cpu() + 0.5 for title, images in groups.items()}


def measure(config: Config, coupling: str) -> Iterator[Row]:
    """Train one Glow; one row per evaluation, then one per family."""
    glow, checkpoint = Glow.fresh(config, coupling), checkpoint_of(config, coupling)
    net = differentiated = glow.net
    if config.memory_saving:
        differentiated = memory_saving(net)
    optimizer = torch.optim.Adamax(
        net.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    rate = warmed_up(config.warmup)
    with exact_float32():
        rows = train(
            net,
            optimizer,
            partial(glow.training.loss, differentiated),
            plan=config.plan(config.steps, evaluations=config.looks, rate=rate),
            evaluate=glow.evaluate,
            checkpoint=checkpoint,
            examples=len(glow.training.data.train),
        )
        found = glow.outside()
    source = config.origin(glow.training.data)
    for row in rows:
        yield {"coupling": coupling, "family": "", **row, **source}
    for family in found.tables.get("families", ()):
        yield {"coupling": coupling, "step": rows[-1]["step"], **family, **source}
    if config.grids:
        path = Path(config.grids) / f"exploding_inverses_glow_{coupling}.png"
        save_figure(grid(glow.pictures(found), columns=GRID), path, dpi=90)
    checkpoint.unlink(missing_ok=True)


def run(config: Config) -> pd.DataFrame:
    return collect(config, config.couplings, measure)


if __name__ == "__main__":
    main(__name__)
