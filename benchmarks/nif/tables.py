r"""Tables 1 and 2 of the NIF paper: a flow against the same flow with a noisy injective prior; noise s and temperature.

    python -m benchmarks.nif.tables --preset cpu                                  # digits, minutes
    python -m benchmarks.nif.tables --preset cpu --data mnist --data-root FOLDER --latents 0,16 --diagonal yes \
        --blocks 6 --clamp 2 --learning-rate 2e-3 --steps 4500 --batch-size 32 --noises 0,0.1,0.25,0.5,0.75,1 \
        --temperatures 0.5,1,1.5,2 --samples 500 --seeds 0 --out benchmarks/results/mnist       # MNIST, 15 minutes

The latter with 2 blocks, 900 steps, and without --diagonal, --clamp and --learning-rate gives
results/mnist_unbounded. One row per model, noise scale s and temperature t: bits per dimension of
held-out images (uniform dequantization of their grey values, the standard convention; the paper's
printed figures do not compare), and the Frechet distance of samples between the features of a small
classifier trained on the same data: no FID, compares within this table only. Plain flow and NIF
share the flow's architecture, initial weights, data order and steps. Reduced against the paper:
data, depth, width, steps. s is tuned on validation images, as the paper tunes it by FID. Where
samples are not finite, ``overflow.py`` names the layer whose inverse overflows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common.features import classifier_features
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.image_grid import image_grid
from benchmarks.common.metrics import (
    FeatureExtractor,
    bits_per_dimension,
    dequantize,
    frechet_distance,
)
from benchmarks.common.quantized_images import QuantizedImages, quantized_images
from benchmarks.common.runner import RESULTS, Row, collect, main
from benchmarks.nif.overflow import overflow
from inn_guard.core.invertible import Invertible
from inn_guard.execution.files import atomic_write
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
    """What is trained and how it is sampled.

    Attributes:
        data: digits, mnist or cifar10.
        data_root: folder of the official files; digits need none.
        latents: dimensions d of the NIFs; 0 is the plain flow.
        levels: of Glow; the paper has 5.
        blocks: per level; the paper has 16.
        hidden: channels; the paper has 256.
        diagonal: also the flow with a learned mean and deviation of every latent, N(b, Sigma): what
            a NIF has beside its manifold.
        clamp: bound of |log scale| in the blocks' couplings; 0 for Glow's sigmoid(h + 2), which may
            come near 0.
        learning_rate: of Adam.
        steps: of Adam.
        batch_size: images per step.
        noises: values of s; 1 is the trained model, 0 the manifold.
        temperatures: values of t at s = the tuned one.
        samples: images per Frechet distance.
        seeds: one run each.
    """

    data: str = "digits"
    data_root: str = ""
    latents: tuple[int, ...] = (0, 4, 16)
    levels: int = 2
    blocks: int = 4
    hidden: int = 32
    diagonal: bool = False
    clamp: float = 0.0
    learning_rate: float = 1e-3
    steps: int = 1200
    batch_size: int = 64
    noises: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    temperatures: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    samples: int = 300
    seeds: tuple[int, ...] = (0, 1)


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
        """What the paper calls the model; "NF, N(b, S)" is none of its."""
        if self.latent:
            return f"NIF-{self.latent}"
        return "NF, N(b, S)" if self.diagonal else "NF"


@cache
def loaded(config: Config) -> tuple[QuantizedImages, FeatureExtractor]:
    """The images and the extractor trained on them."""
    images = quantized_images(config.data, Path(config.data_root) if config.data_root else None)
    return images, classifier_features(images, steps=min(600, 2 * config.steps))


def cases(config: Config) -> dict[str, Case]:
    """Every latent size under every seed."""
    chosen = [Case(d, seed) for seed in config.seeds for d in config.latents]
    chosen += [Case(0, seed, diagonal=True) for seed in config.seeds if config.diagonal]
    return {f"{one.label} seed {one.seed}": one for one in chosen}


def build(config: Config, images: QuantizedImages, case: Case) -> Model:
    """The flow, and behind it the prior of that dimension."""
    scale = ClampedScale(config.clamp) if config.clamp else SigmoidScale()
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        sizes = GlowConfig(
            levels=config.levels,
            blocks=config.blocks,
            hidden=config.hidden,
            coupling=partial(AffineCoupling.on_halves, scale=scale),
        )
        own = [Diagonal(images.dims)] if case.diagonal else []
        flow = Chain(Logit(ALPHA), glow_flow(images.shape, config=sizes), *own)
        if not case.latent:
            return flow
        return NIF(flow, GaussianNIF(DenseWidening(case.latent, images.dims), (images.dims,)))


def train(config: Config, case: Case) -> Model:
    """The model, trained by maximum likelihood."""
    images, _ = loaded(config)
    model = build(config, images, case)

    def loss(batch: Batch) -> Tensor:
        return (
            -model.log_prob(
                dequantize(batch.x, generator=batch.generator, levels=images.levels)
            ).mean()
            / images.dims
        )

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
        tuned = tuned_noise(config, model, case) if case.latent else 1.0
        settings = [(s, 1.0) for s in (config.noises if case.latent else (1.0,))]
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
                "non_finite_pixels": 0
                if bool(pictures.isfinite().all())
                else int((~pictures.isfinite()).any(1).sum()),
                **overflow(trunk(model), latents, real),
                "extractor": extractor.name,
            }
        if case.seed == config.seeds[0]:
            save_images(config, model, case, tuned)


def bits(model: Model, images: QuantizedImages, seed: int) -> float:
    """Mean bits per dimension of the test images."""
    x = dequantize(images.test, generator=torch.Generator().manual_seed(seed), levels=images.levels)
    log_prob = torch.cat([model.log_prob(part) for part in x.split(256)])
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
    return model.flow if isinstance(model, NIF) else model


def flow_latents(
    config: Config, model: Model, case: Case, *, noise: float, temperature: float
) -> Tensor:
    """What the flow's inverse makes images of; the same random numbers for every s and t."""
    images, _ = loaded(config)
    generator = torch.Generator().manual_seed(case.seed)
    latents = temperature * torch.randn(
        config.samples, case.latent or images.dims, generator=generator
    )
    return (
        model.prior.sample_given(latents, noise=noise, generator=generator)
        if isinstance(model, NIF)
        else latents
    )


def drawn(
    config: Config, model: Model, case: Case, *, noise: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Samples in [0, 1]."""
    images, _ = loaded(config)
    latents = flow_latents(config, model, case, noise=noise, temperature=temperature)
    return trunk(model).inverse(latents).reshape(-1, *images.shape).clamp(0, 1)


def save_images(config: Config, model: Model, case: Case, tuned: float) -> None:
    """Test images and samples over s and t as one picture beside the results."""
    if config.steps < 100:
        return
    images, _ = loaded(config)
    groups = {"test": images.scaled(images.test[:10])}
    for s in dict.fromkeys((0.0, tuned, 1.0)) if case.latent else (1.0,):
        groups[f"s = {s:g}"] = drawn(config, model, case, noise=s)[:10]
    groups["t = 2"] = drawn(config, model, case, noise=tuned, temperature=2.0)[:10]
    path = RESULTS / f"nif_{config.data}_{re.sub('[^A-Za-z0-9-]+', '_', case.label).strip('_')}.png"
    with atomic_write(path) as partial_file:
        image_grid(groups).savefig(partial_file, dpi=80, bbox_inches="tight", format="png")


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
        left.plot(at_one.index, at_one, "o-" if len(at_one) > 1 else "o", label=model)
        at_tuned = _means(group[group.s == group.tuned_s], "t")
        right.plot(at_tuned.index, at_tuned, "o-", label=model)
    left.set(xlabel="noise scale s at t = 1", ylabel="Frechet distance, lower is better")
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
