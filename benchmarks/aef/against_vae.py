"""Autoencoders within flows against architecturally identical VAEs: bits per dimension, Frechet distance, grids.

    python -m benchmarks.aef.against_vae --preset cpu                   # digits, minutes on one core
    python -m benchmarks.aef.against_vae --preset paper --root FOLDER   # MNIST as in Table 1

A small version of the latter, minutes on one core:

    python -m benchmarks.aef.against_vae --dataset mnist --root FOLDER --models "VAE,AEF linear,AEF spread" \
        --latents 2 --seeds 0,1 --spreads 0.1 --steps 400 --test-images 100 --draws 64 --classifier-steps 250 \
        --out benchmarks/results/mnist

and with --latents 32 --seeds 0 what is in results/mnist_32; ``curves.py`` trains longer.

Every model of one latent dimension has the same nets, flows, data, batches and number of steps. The
likelihood of VAEs and linear AEFs is importance-sampled (the log of the mean weight, and the lower
bound beside it), by the paper's proposals (``bpd``) and by one around the mode of p(z | x)
(``bpd_mode``, see ``laplace.py``); that of partition AEFs is exact. Paper: Table 1, MNIST d = 2:
VAE 2.40, AEF 2.37 bits per dimension; d = 32: VAE 1.80, AEF 1.82.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import inn_guard as ig
from benchmarks.aef.drawing import IMAGES, draw, image_file  # noqa: F401
from benchmarks.aef.laplace import laplace_log_prob
from benchmarks.common.features import classifier_features
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.metrics import (
    FeatureExtractor,
    bits_per_dimension,
    dequantize,
    frechet_distance,
    reconstruction_error,
)
from benchmarks.common.quantized_images import QuantizedImages, mnist, quantized_digits
from benchmarks.common.runner import Row, collect, main
from inn_guard.core.invertible import Invertible
from inn_guard.layers.autoregressive import maf
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.model import LinearAEF, PartitionAEF, center_core, corner_core
from inn_guard.models.aef.networks import small_nets
from inn_guard.models.aef.vae import VAE

Model = ExpandedAutoencoder | PartitionAEF
Bits = Callable[[Tensor], Tensor]  #: log p(x) in nats -> bits per dimension
MODELS: dict[str, Callable[[AutoencoderConfig], Model]] = {
    "VAE": VAE,
    "AEF linear": LinearAEF,
    "AEF spread": LinearAEF,
    "AEF center": partial(PartitionAEF, core=center_core),
    "AEF corner": partial(PartitionAEF, core=corner_core),
}
TEMPERATURE = 0.85


class Dataset(enum.Enum):
    """Which images."""

    DIGITS = "digits"
    MNIST = "mnist"


@dataclass(frozen=True)
class Config:
    """What is trained and how it is measured.

    Attributes:
        dataset: digits or mnist.
        root: folder of MNIST's files.
        train_files: MNIST: train on its training files; else on 7,200 of its 10,000 test images.
        models: of MODELS.
        latents: dimensions d.
        seeds: of weights, batches and noise.
        spreads: of "AEF spread", a linear AEF trained on cores of that deviation around h(x); the
            one of the highest likelihood of validation images is kept. "AEF linear" is the paper's,
            without.
        steps: of Adam at 1e-3, the gradient clipped at 200.
        batch_size: images per step.
        channels: of encoder and decoder.
        hidden: width of the flows' MADE layers.
        test_images: how many are scored by importance sampling.
        draws: K.
        repetitions: A; the estimate uses A K draws.
        classifier_steps: of the net whose features the Frechet distance uses.
        audit_samples: test images at which the condition number of the flow is measured.
    """

    dataset: str = "digits"
    root: str = "data"
    train_files: bool = False
    models: tuple[str, ...] = ("VAE", "AEF linear", "AEF spread", "AEF center")
    latents: tuple[int, ...] = (2, 16)
    seeds: tuple[int, ...] = (0,)
    spreads: tuple[float, ...] = (0.1, 0.3)
    steps: int = 500
    batch_size: int = 128
    channels: tuple[int, ...] = (16, 32)
    hidden: int = 64
    test_images: int = 200
    draws: int = 128
    repetitions: int = 4
    classifier_steps: int = 400
    audit_samples: int = 4


PRESETS = {
    "smoke": {
        "latents": (2,), "seeds": (0,), "spreads": (0.1,), "steps": 4, "channels": (4, 4),
        "hidden": 8, "test_images": 8, "draws": 8, "repetitions": 2, "classifier_steps": 4,
        "audit_samples": 3,
    },
    "cpu": {},  # minutes on one core
    # The setting of Table 1 on MNIST
    "paper": {
        "dataset": "mnist", "train_files": True, "models": tuple(MODELS),
        "latents": (2, 4, 8, 16, 32), "seeds": (0, 1, 2, 3, 4),
        "spreads": (0.01, 0.03, 0.1, 0.3, 1.0), "steps": 100_000, "channels": (64, 128),
        "hidden": 256, "test_images": 10_000, "repetitions": 20, "classifier_steps": 5_000,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One trained model."""

    model: str
    latent: int
    seed: int


@dataclass(frozen=True)
class Looks:
    """At the model during training.

    Attributes:
        count: how many, evenly spaced; the last one at the end.
        look: (model in eval mode, step) -> a number to keep.
    """

    count: int
    look: Callable[[Model, int], float]


def cases(config: Config) -> dict[str, Case]:
    return {
        f"{config.dataset} d={latent} {model} seed={seed}": Case(model, latent, seed)
        for latent in config.latents
        for model in config.models
        for seed in config.seeds
    }


def run(config: Config) -> pd.DataFrame:
    return collect(config, cases(config), measure)


def measure(config: Config, case: Case) -> Iterator[Row]:
    """Train one model and score it on the test images."""
    data, extractor = load(config.dataset, config.root, config.train_files), _extractor(config)
    start = time.process_time()
    model, loss = chosen(config, case, data)
    seconds = time.process_time() - start
    noise = torch.Generator().manual_seed(1000 + case.seed)
    test = dequantize(data.test, generator=noise, levels=data.levels)
    scored = test[: config.test_images]
    with torch.no_grad():
        generated = model.sample(len(test), temperature=TEMPERATURE, generator=noise).clamp(0, 1)
        exact_samples = model.sample(len(test), generator=noise).clamp(0, 1)
        reconstructed = torch.cat([model.reconstruct(part).clamp(0, 1) for part in test.split(256)])
    _keep_images(config, case, test, reconstructed, generated)
    yield {
        "dataset": data.name,
        "model": case.model,
        "latent": case.latent,
        "seed": case.seed,
        "steps": config.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **likelihood(config, model, data, scored, noise),
        "training_loss_nats": loss,
        "frechet": frechet_distance(extractor, test, exact_samples).value,
        f"frechet_temperature_{TEMPERATURE}": frechet_distance(extractor, test, generated).value,
        "features": extractor.name,
        "reconstruction_mse": reconstruction_error(test, reconstructed).mean().item(),
        **_stability(config, model, scored),
        "training_cpu_seconds": seconds,
    }


def chosen(config: Config, case: Case, data: QuantizedImages) -> tuple[Model, float]:
    """The trained model; of several spreads the one that gives validation images the highest likelihood bound."""
    if case.model != "AEF spread":
        return trained(config, case, data)
    noise = torch.Generator().manual_seed(2000 + case.seed)
    validation = dequantize(
        data.validation[: config.test_images], generator=noise, levels=data.levels
    )

    def score(candidate: tuple[Model, float]) -> float:
        model = candidate[0]
        assert isinstance(model, LinearAEF)
        model.tune(validation, draws=config.draws, generator=noise)
        return (
            model.importance(validation, draws=config.draws, repetitions=1, generator=noise)
            .lower_bound.mean()
            .item()
        )

    return max((trained(config, case, data, spread=spread) for spread in config.spreads), key=score)


def trained(
    config: Config,
    case: Case,
    data: QuantizedImages,
    *,
    spread: float = 0.0,
    looks: Looks | None = None,
) -> tuple[Model, float]:
    """The model after ``config.steps``, in eval mode, and the mean of its last training losses in nats."""
    recipe = AutoencoderConfig(
        data.shape,
        case.latent,
        nets=partial(small_nets, channels=tuple(config.channels)),  # type: ignore[arg-type]
        core_encoder=partial(maf, hidden=config.hidden),
        prior=partial(maf, hidden=config.hidden),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = LinearAEF(recipe, spread=spread) if spread else MODELS[case.model](recipe)

    def loss(batch: Batch) -> Tensor:
        x = dequantize(batch.x, generator=batch.generator, levels=data.levels)
        return model.loss(x, generator=batch.generator)

    every = config.steps // looks.count if looks else config.steps
    settings = FitSettings(
        config.steps,
        batch_size=config.batch_size,
        clip=200.0,
        seed=case.seed,
        validate_every=max(1, every),
    )
    watch = partial(looks.look, model) if looks else None
    history = fit(model, loss, (data.train,), settings=settings, validate=watch)
    last = float(np.mean([value for _, value in history.losses[-20:]]))
    return model.eval(), last


def likelihood(
    config: Config, model: Model, data: QuantizedImages, x: Tensor, noise: torch.Generator
) -> Row:
    """Bits per dimension, importance-sampled unless the density is exact, with the width tuned on validation data."""
    bits = partial(bits_per_dimension, dims=x[0].numel(), levels=data.levels)
    if isinstance(model, PartitionAEF):
        with torch.no_grad():
            exact = bits(model.log_prob(x))
        spread = exact.std().item() / math.sqrt(len(x))
        mean = exact.mean().item()
        return {"bpd": mean, "bpd_upper": mean, "bpd_error": spread, "bpd_mode": mean}
    if isinstance(model, LinearAEF):
        validation = dequantize(
            data.validation[: config.test_images], generator=noise, levels=data.levels
        )
        model.tune(validation, draws=config.draws, generator=noise)
    estimates = [
        model.importance(part, draws=config.draws, repetitions=config.repetitions, generator=noise)
        for part in x.split(50)
    ]
    log_prob, bound, effective = (
        torch.cat([getattr(estimate, name) for estimate in estimates])
        for name in ("log_prob", "lower_bound", "effective_draws")
    )
    return {
        "bpd": bits(log_prob).mean().item(),
        "bpd_upper": bits(bound).mean().item(),
        "bpd_error": bits(log_prob).std().item() / math.sqrt(len(x)),
        "effective_draws": effective.median().item(),
        **_at_the_mode(config, model, x, bits, noise),
        **_expansion(model, x),
    }


def _at_the_mode(
    config: Config, model: ExpandedAutoencoder, x: Tensor, bits: Bits, noise: torch.Generator
) -> Row:
    """The same likelihood from a proposal around the mode of p(z | x), which finds it in many dimensions too."""
    estimates = [
        laplace_log_prob(
            model, part, draws=config.draws, repetitions=config.repetitions, generator=noise
        )
        for part in x.split(100)
    ]
    log_prob = torch.cat([estimate.log_prob for estimate in estimates])
    return {
        "bpd_mode": bits(log_prob).mean().item(),
        "effective_draws_mode": torch.cat([estimate.effective_draws for estimate in estimates])
        .median()
        .item(),
    }


def _expansion(model: ExpandedAutoencoder, x: Tensor) -> Row:
    """How large the linear features are, and how wide the tuned proposal: both shrink together."""
    if not isinstance(model, LinearAEF):
        return {}
    with torch.no_grad():
        features = model.proposal(model.preprocessed(x)[0]).center
    return {
        "spread": model.spread,
        "width": float(model.width),
        "features_deviation": features.std(0).mean().item(),
    }


def _stability(config: Config, model: Model, x: Tensor) -> Row:
    """Condition number of the whole flow in the worst sample, and the audit's verdict on the round trip."""
    x = x[: config.audit_samples]
    flow: Invertible = model
    if isinstance(model, ExpandedAutoencoder):
        flow, x = model.joint, model.expand(x).detach()
    report = ig.audit(flow, x, checks=["reconstruction", "jacobian_spectrum"])
    condition = report["jacobian_spectrum"].values
    return {
        "log10_condition": condition.get("log10_condition_number", math.nan),
        "round_trip_verdict": report["reconstruction"].verdict.name.lower(),
    }


@cache
def load(dataset: str, root: str, train_files: bool) -> QuantizedImages:  # noqa: FBT001
    if Dataset(dataset) is Dataset.DIGITS:
        return quantized_digits()
    return mnist(Path(root), train_files=train_files)


@cache
def _extractor(config: Config) -> FeatureExtractor:
    return classifier_features(
        load(config.dataset, config.root, config.train_files), steps=config.classifier_steps
    )


def _keep_images(
    config: Config, case: Case, test: Tensor, reconstructed: Tensor, generated: Tensor
) -> None:
    """The first images of the first seed, for the grids."""
    if case.seed != config.seeds[0]:
        return
    IMAGES.mkdir(parents=True, exist_ok=True)
    kept = {"test": test, "reconstructed": reconstructed, "generated": generated}
    np.savez(
        image_file(config.dataset, case.model, case.latent),
        **{name: part[:64].numpy() for name, part in kept.items()},
    )


if __name__ == "__main__":
    main(__name__)
