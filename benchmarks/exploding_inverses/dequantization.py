r"""Valid training samples whose reconstruction fails: the dequantization attack on two affine flows and a residual one.

    python -m benchmarks.exploding_inverses.dequantization --preset cpu --data-root FOLDER

The committed table of larger and longer trained affine flows under a longer attack, five minutes of one core:

    python -m benchmarks.exploding_inverses.dequantization --preset cpu --data-root FOLDER \
        --flows "affine (0 1),affine (0.5 1)" --levels 3 --blocks 4 --hidden 32 --steps 1500 --images 8 \
        --attack-steps 400 --grids benchmarks/results/longer --out benchmarks/results/longer

Three flows are trained by maximum likelihood on images of 5 bits: affine couplings with scales in (0, 1), with scales
in (0.5, 1), and a residual flow. Training images are then attacked within the cube of their dequantized samples, by the
paper's projected gradient and by this package's default search at the same price. The residual flow is attacked twice:
through the converged inverse, and, as in the paper, through one of five fixed-point iterations, whose points are then
reconstructed again with the converged one.

This differs from the paper in: CIFAR-10 instead of CelebA at 64 x 64, therefore three levels instead of four; the
residual inverse is differentiated by the implicit function theorem instead of through its iterations.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.common.runner import Row, collect, main
from benchmarks.exploding_inverses.attack_report import draw, grid
from benchmarks.exploding_inverses.image_data import DATA
from benchmarks.exploding_inverses.image_flows import Augmentation, FlowTraining
from benchmarks.exploding_inverses.image_training import (
    Plan,
    exact_float32,
    looks_until,
    train,
    unfinished,
    warmed_up,
)
from inn_guard.audits.dequantization_attack import ProjectedGradient, Quantization, SpectralAscent
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.audits.dequantization_attack.search import Attack
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.round_trip import round_trip
from inn_guard.execution.files import atomic_write
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.residual import Residual
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.models.glow import GlowConfig, glow_classifier
from inn_guard.models.iresnet import IResNetConfig, iresnet
from inn_guard.report.result import AuditResult

BITS = 5
PRICE = 4.5  #: forward passes that a step of the paper's attack costs


@dataclass(frozen=True)
class Config:
    """Which flows are trained and how they are attacked. The defaults are the paper's.

    Attributes:
        flows: keys of FLOWS.
        data: digits or cifar10.
        data_root: folder of the official files.
        data_name: what the results call the data.
        train_images: the first so many.
        levels: of the nets.
        blocks: per level of the affine nets.
        residual_blocks: per level of the residual flow.
        hidden: channels of the networks.
        coefficient: Lipschitz constant of the residual flow's convolutions.
        steps: of training of the affine nets.
        residual_steps: of the residual flow.
        batch_size: of training.
        learning_rate: of Adamax for the affine nets, of Adam for the residual flow.
        warmup: steps over which the rate rises.
        clip: largest norm of the gradient; the paper prints none.
        images: training images that are attacked.
        attack_steps: of the paper's search.
        step_size: of its steps, in [0, 1].
        few_iterations: of the inverse that the residual flow is attacked through, the second time.
        device: cpu or cuda.
        channels_last: memory format.
        grids: folder for a picture of what was found in each net; "" draws none.
        seed: of weights, batches, noise and attacks.
    """

    flows: tuple[str, ...] = ("affine (0 1)", "affine (0.5 1)", "residual")
    data: str = "cifar10"
    data_root: str = "data"
    data_name: str = "CIFAR-10"
    train_images: int = 50_000
    levels: int = 3
    blocks: int = 16
    residual_blocks: int = 16
    hidden: int = 512
    coefficient: float = 0.98
    steps: int = 78_100
    residual_steps: int = 78_100
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 1000
    clip: float = math.inf
    images: int = 16
    attack_steps: int = 200
    step_size: float = 5e-4
    few_iterations: int = 5
    device: str = "cuda"
    channels_last: bool = True
    grids: str = "benchmarks/results"
    seed: int = 0


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
        data = DATA[config.data](Path(config.data_root)).first(train=config.train_images, test=256)
        data = data.in_bits(BITS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            net = FLOWS[name](data.shape, config)
        net = net.to(
            config.device, memory_format=torch.channels_last if config.channels_last else None
        )
        training = FlowTraining(data.to(config.device), 0.0, Augmentation(), config.channels_last)
        with torch.no_grad():
            net(
                training.dequantized(
                    training.data.train[:64], torch.Generator().manual_seed(config.seed)
                )
            )
        return cls(config, name, net, training)

    @property
    def attacked(self) -> Tensor:
        """Training images at the centres of their cubes."""
        return (self.training.data.train[: self.config.images].float() + 0.5) / 2**BITS

    def look(self) -> Row:
        """Likelihood and spectrum."""
        found = jacobian_spectrum(self.net, self.attacked, tolerance=0.02)
        names = ("condition_number", "sigma_min", "sigma_max")
        return {"bits_per_dimension": self.training.bits(self.net, count=128)} | {
            name: found.values.get(name, math.nan) for name in names
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

    def few(self) -> Chain:
        """The same net with an inverse of few fixed-point iterations; parameters are shared."""
        twin = Chain(*(copy.copy(layer) for layer in self.net.layers()))
        for layer in twin.layers():
            if isinstance(layer, Residual):
                layer.solver = FixedPoint(max_iterations=self.config.few_iterations)
        return twin.eval()


def attacks(config: Config, flow: Flow) -> Iterator[tuple[str, str, AuditResult]]:
    """(inverse, search, what was found)."""
    paper = ProjectedGradient(config.attack_steps, config.step_size)
    yield "exact", "paper", flow.attack(flow.net, paper)
    yield "exact", "spectral", flow.attack(flow.net, SpectralAscent(PRICE * config.attack_steps))
    if flow.name == "residual":
        yield f"{config.few_iterations} iterations", "paper", flow.attack(flow.few(), paper)


def measure(config: Config, name: str) -> Iterator[Row]:
    """Train one flow; rows of its training, of each attack's curve, and of the images at its end."""
    flow = Flow.fresh(config, name)
    checkpoint = unfinished(config, name)
    with exact_float32():
        looks = trained(flow, checkpoint)
        flow.net.eval()
        source = {"flow": name, "data": config.data_name, "files": flow.training.data.checksum[:12]}
        yield from ({"kind": "training", **source, **row} for row in looks)
        pictures: dict[str, Tensor] = {}
        for inverse, search, found in attacks(config, flow):
            about = {**source, "inverse": inverse, "search": search}
            for point in found.tables["attack_curve"]:
                yield {"kind": "curve", **about, **point}
            yield from ({"kind": "image", **about, **row} for row in images(flow, found))
            pictures |= shown(flow, f"{search}, {inverse} inverse", found)
    if config.grids:
        slug = name.replace(" ", "_").replace("(", "").replace(")", "")
        save_grid(Path(config.grids) / f"exploding_inverses_dequantization_{slug}.png", pictures)
    checkpoint.unlink(missing_ok=True)


def trained(flow: Flow, checkpoint: Path) -> list[Row]:
    """Train it; a row per look."""
    config = flow.config
    steps = config.residual_steps if flow.name == "residual" else config.steps
    plan = Plan(
        steps=steps,
        batch_size=config.batch_size,
        looks=looks_until(steps, 3),
        rate=warmed_up(config.warmup),
        clip=config.clip,
        seed=config.seed,
    )
    kind = torch.optim.Adam if flow.name == "residual" else torch.optim.Adamax
    return train(
        flow.net,
        kind(flow.net.parameters(), config.learning_rate),
        functools.partial(flow.training.loss, flow.net),
        plan=plan,
        look=flow.look,
        checkpoint=checkpoint,
        examples=len(flow.training.data.train),
    )


def images(flow: Flow, found: AuditResult) -> Iterator[Row]:
    """One row per attacked image, the worst first; with the error of the converged inverse at the point found."""
    points = found.images["point found"].to(flow.attacked)
    again = round_trip(flow.net, points, batch_size=64)
    order = found.per_sample["error"].argsort(descending=True)[: len(points)].tolist()
    for place, image in enumerate(order):
        yield {
            "image": image,
            "centre_error": found.per_sample["centre_error"][image].item(),
            "error": found.per_sample["error"][image].item(),
            "converged_error": again.l2[place].item() if bool(again.finite[place]) else math.inf,
            "spent": found.values["spent"],
            "verdict": found.verdict.label,
        }


def shown(flow: Flow, title: str, found: AuditResult) -> dict[str, Tensor]:
    """Original, point found, reconstruction, and the converged reconstruction."""
    names = {
        "original": "original",
        "point found": "perturbed within its cube",
        "reconstruction": "reconstructed",
    }
    groups = {f"{title}: {label}": found.images[name] for name, label in names.items()}
    if "iterations" in title:
        points = found.images["point found"].to(flow.attacked)
        groups[f"{title}: reconstructed, converged"] = round_trip(
            flow.net, points, batch_size=64
        ).end.cpu()
    return groups


def save_grid(path: Path, pictures: dict[str, Tensor]) -> None:
    """The pictures as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = max(8, *(len(images) for images in pictures.values()))
    with atomic_write(path) as partial:
        grid(pictures, columns=columns).savefig(partial, dpi=90, bbox_inches="tight", format="png")


def run(config: Config) -> pd.DataFrame:
    """All flows."""
    return collect(config, {name: name for name in config.flows}, measure)


if __name__ == "__main__":
    main(__name__)
