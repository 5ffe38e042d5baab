r"""Tables 1 and 2 of the NIF paper: a flow with and without a noisy injective prior.

    inn-guard bench nif.tables --preset cpu  # digits, minutes
    inn-guard bench nif.tables --preset cpu --data mnist --data-root FOLDER --latents 0,16 \
        --diagonal yes --blocks 6 --clamp 2 --learning-rate 2e-3 --steps 4500 --batch-size 32 \
        --noises 0,0.1,0.25,0.5,0.75,1 --temperatures 0.5,1,1.5,2 --samples 500 --seeds 0 \
        --out benchmarks/results/mnist  # MNIST, 15 minutes

The latter with 2 blocks, 900 steps, and without --diagonal, --clamp and --learning-rate gives
results/mnist_unbounded. One row per model, noise scale s and temperature t: bits per dimension of
held-out images (uniform dequantization of their grey values, the standard convention; the paper's
printed figures do not compare), and the Fréchet distance of samples between the features of a small
classifier trained on the same data: no FID, compares within this table only. Plain flow and NIF
share the flow's architecture, initial weights, data order and steps. Reduced against the paper:
data, depth, width, steps. s is tuned on validation images, as the paper tunes it by FID. Where
samples are not finite, ``overflow.py`` names the layer whose inverse overflows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.features import images_and_features
from benchmarks.common.figures import image_grid, save_figure
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.metrics import (
    FeatureExtractor,
    bits_per_dimension,
    dequantize,
    frechet_distance,
)
from benchmarks.common.quantized_images import QuantizedImages, by_parts
from benchmarks.common.runner import RESULTS, Row, collect, main
from benchmarks.nif.overflow import overflow
from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.scales import ClampedScale, SigmoidScale
from inn_guard.models.glow import GlowConfig, glow_flow
from inn_guard.models.nif.model import NIF, GaussianNIF
from inn_guard.models.nif.widening import DenseWidening

ALPHA = 0.05  #: of the logit


@dataclass(frozen=True)
class Config:
    """What is trained and how it is sampled."""

    data: str = "digits"  # digits, mnist or cifar10
    data_root: str = ""  # folder of the official files; digits need none
    latents: tuple[int, ...] = (0, 4, 16)  # dimensions d of the NIFs; 0 is the plain flow
    levels: int = 2  # of Glow; the paper has 5
    blocks: int = 4  # per level; the paper has 16
    hidden: int = 32  # channels; the paper has 256
    # also the flow with a learned mean and deviation of every latent, N(b, Sigma): what a NIF has
    # in addition to its manifold
    diagonal: bool = False
    # bound of |log scale| in the blocks' couplings; 0 for Glow's sigmoid(h + 2), which may come
    # near 0
    clamp: float = 0.0
    learning_rate: float = 1e-3  # of Adam
    steps: int = 1200  # of Adam
    batch_size: int = 64  # images per step
    # values of s; 1 is the trained model, 0 the manifold
    noises: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    temperatures: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)  # values of t at s = the tuned one
    samples: int = 300  # images per Fréchet distance
    seeds: tuple[int, ...] = (0, 1)  # one run each


PRESETS = {
    "smoke": {
        "latents": (0, 4), "blocks": 1, "hidden": 4, "steps": 3, "noises": (0.0, 1.0),
        "temperatures": (1.0,), "seeds": (0,),
    },
    "cpu": {},  # minutes on two cores
    # The paper's CIFAR-10 setting
    "paper": {
        "data": "cifar10", "latents": (0, 64, 128, 256, 512), "levels": 5, "blocks": 16,
        "hidden": 256, "steps": 200_000, "samples": 10_000, "seeds": (0,),
    },
}  # fmt: skip


Model = NIF | Chain  #: a flow with a noisy injective prior, or one with N(0, I)


@dataclass(frozen=True)
class Case:
    """One trained model.

    Attributes:
        latent: d; 0 for a plain flow.
        seed: of weights, batches and noise.
        diagonal: whether the plain flow's prior is N(b, Sigma) with learned b and diagonal Sigma,
            else N(0, I).
    """

    latent: int
    seed: int
    diagonal: bool = False

    @property
    def label(self) -> str:
        """The paper's name of the model; "NF, N(b, S)" is not in the paper."""
        if self.latent:
            return f"NIF-{self.latent}"
        if self.diagonal:
            return "NF, N(b, S)"
        return "NF"


def loaded(config: Config) -> tuple[QuantizedImages, FeatureExtractor]:
    """The images and the extractor trained on them."""
    return images_and_features(config.data, config.data_root, steps=config.steps)


def cases(config: Config) -> dict[str, Case]:
    """Every latent size under every seed."""
    chosen = [Case(d, seed) for seed in config.seeds for d in config.latents]
    if config.diagonal:
        chosen += [Case(0, seed, diagonal=True) for seed in config.seeds]
    return {f"{one.label} seed {one.seed}": one for one in chosen}


def build(config: Config, images: QuantizedImages, case: Case) -> Model:
    """The flow, and behind it the prior of that dimension."""
    scale: ClampedScale | SigmoidScale = SigmoidScale()
    if config.clamp:
        scale = ClampedScale(config.clamp)
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        sizes = GlowConfig(
            levels=config.levels,
            blocks=config.blocks,
            hidden=config.hidden,
            coupling=partial(AffineCoupling.on_halves, scale=scale),
        )
        layers = [Logit(ALPHA), glow_flow(images.shape, config=sizes)]
        if case.diagonal:
            layers.append(Diagonal(images.dims))
        flow = Chain(*layers)
        if not case.latent:
            return flow
        return NIF(flow, GaussianNIF(DenseWidening(case.latent, images.dims), (images.dims,)))


def train(config: Config, case: Case) -> Model:
    """The model, trained by maximum likelihood."""
    images, _ = loaded(config)
    model = build(config, images, case)

    def loss(batch: Batch) -> Tensor:
        x = dequantize(batch.x, generator=batch.generator, levels=images.levels)
        return -model.log_prob(x).mean() / images.dims

    settings = FitSettings(
        config.steps,
        config.batch_size,
        learning_rate=config.learning_rate,
        clip=10.0,
        seed=case.seed,
    )
    fit(model, loss, (images.train,), settings=settings)
    return model.eval()


def measure(config: Config, case: Case) -> Iterator[Row]:
    """Rows over s at t = 1, then over t at the s that validation images chose."""
    images, extractor = loaded(config)
    model = train(config, case)
    with torch.no_grad():
        bpd = bits(model, images, case.seed)
        noises, tuned = (1.0,), 1.0
        if case.latent:
            noises, tuned = config.noises, tuned_noise(config, model, case)
        settings = [(s, 1.0) for s in noises]
        settings += [(tuned, t) for t in config.temperatures if (tuned, t) not in settings]
        real = images.scaled(images.test[: config.samples])
        for noise, temperature in settings:
            latents = flow_latents(config, model, case, noise=noise, temperature=temperature)
            pictures = drawn(config, model, case, noise=noise, temperature=temperature)
            yield {
                "data": images.name,
                "model": case.label,
                "seed": case.seed,
                "s": noise,
                "t": temperature,
                "tuned_s": tuned,
                "bpd": bpd,
                "distance": frechet_distance(extractor, real, pictures).value,
                "non_finite_pixels": int((~pictures.isfinite()).any(1).sum()),
                **overflow(trunk(model), latents, real),
                "extractor": extractor.name,
            }
        if case.seed == config.seeds[0]:
            save_images(config, model, case, tuned)


def bits(model: Model, images: QuantizedImages, seed: int) -> float:
    """Mean bits per dimension of the test images."""
    x = dequantize(images.test, generator=torch.Generator().manual_seed(seed), levels=images.levels)
    log_prob = by_parts(model.log_prob, x, 256)
    return bits_per_dimension(log_prob, dims=images.dims, levels=images.levels).mean().item()


def tuned_noise(config: Config, model: Model, case: Case) -> float:
    """The s whose samples are nearest to the validation images."""
    images, extractor = loaded(config)
    real = images.scaled(images.validation)
    other = replace(case, seed=case.seed + 1000)
    distances = [
        frechet_distance(extractor, real, drawn(config, model, other, noise=s)).value
        for s in config.noises
    ]
    return config.noises[int(np.nanargmin(distances))]


def trunk(model: Model) -> Invertible:
    """The flow of the whole space."""
    if isinstance(model, NIF):
        return model.flow
    return model


def flow_latents(
    config: Config, model: Model, case: Case, *, noise: float, temperature: float
) -> Tensor:
    """Inputs of the flow's inverse; the same random numbers for every s and t."""
    images, _ = loaded(config)
    generator = torch.Generator().manual_seed(case.seed)
    dims = case.latent or images.dims
    latents = temperature * torch.randn(config.samples, dims, generator=generator)
    if isinstance(model, NIF):
        return model.prior.sample_given(latents, noise=noise, generator=generator)
    return latents


def drawn(
    config: Config, model: Model, case: Case, *, noise: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Samples in [0, 1]."""
    images, _ = loaded(config)
    latents = flow_latents(config, model, case, noise=noise, temperature=temperature)
    return trunk(model).inverse(latents).reshape(-1, *images.shape).clamp(0, 1)


def save_images(config: Config, model: Model, case: Case, tuned: float) -> None:
    """Test images and samples over s and t as one picture in the folder of the results."""
    if config.steps < 100:
        return
    images, _ = loaded(config)
    groups = {"test": images.scaled(images.test[:10])}
    noises = [1.0]
    if case.latent:
        noises = list(dict.fromkeys((0.0, tuned, 1.0)))
    for s in noises:
        groups[f"s = {s:g}"] = drawn(config, model, case, noise=s)[:10]
    groups["t = 2"] = drawn(config, model, case, noise=tuned, temperature=2.0)[:10]
    label = re.sub("[^A-Za-z0-9-]+", "_", case.label).strip("_")
    save_figure(image_grid(groups), RESULTS / f"nif_{config.data}_{label}.png")


def run(config: Config) -> pd.DataFrame:
    """All models under all seeds."""
    frame = collect(config, cases(config), measure)
    means = frame.groupby(["model", "s", "t"], sort=False)[["bpd", "distance"]]
    print(means.agg(lambda values: values.mean(skipna=False)).to_string())
    return frame


def draw(frame: pd.DataFrame) -> Figure:
    """Distance against s, and against t."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for model, group in frame.groupby("model", sort=False):
        at_one = _means(group[group.t == 1], "s")
        left.plot(at_one.index, at_one, "o-", label=model)
        at_tuned = _means(group[group.s == group.tuned_s], "t")
        right.plot(at_tuned.index, at_tuned, "o-", label=model)
    left.set(xlabel="noise scale s at t = 1", ylabel="Fréchet distance, lower is better")
    right.set(xlabel="temperature t at the tuned s")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(
        f"Features of the {frame.extractor[0]}; no point where a sample is not finite", fontsize=10
    )
    return figure


def _means(rows: pd.DataFrame, key: str) -> pd.Series:
    """Distances over the seeds; NaN where one is."""
    return rows.groupby(key).distance.agg(lambda distances: distances.mean(skipna=False))


if __name__ == "__main__":
    main(__name__)
