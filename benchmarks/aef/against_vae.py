"""Autoencoders within flows against identical VAEs: bits per dimension, Fréchet distance, images.

    inn-guard bench aef.against_vae --preset cpu  # digits, minutes on one core
    inn-guard bench aef.against_vae --preset paper --root FOLDER  # MNIST as in Table 1

A small version of the latter, minutes on one core:

    inn-guard bench aef.against_vae --dataset mnist --root FOLDER \
        --models "VAE,AEF linear,AEF spread" --latents 2 --seeds 0,1 --spreads 0.1 --steps 400 \
        --test-images 100 --draws 64 --classifier-steps 250 --out benchmarks/results/mnist

and with --latents 32 --seeds 0 what is in results/mnist_32; ``curves.py`` trains longer.

Every model of one latent dimension has the same nets, flows, data, batches and number of steps. The
likelihood of VAEs and linear AEFs is importance-sampled (the log of the mean weight, and the lower
bound as well), by the paper's proposals (``bpd``) and by one around the mode of p(z | x)
(``bpd_mode``, see ``laplace.py``); that of partition AEFs is exact. Paper: Table 1, MNIST d = 2:
VAE 2.40, AEF 2.37 bits per dimension; d = 32: VAE 1.80, AEF 1.82.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import inn_guard as ig
from benchmarks.aef.drawing import draw
from benchmarks.aef.laplace import laplace_log_prob
from benchmarks.aef.training import Case, ModelConfig, fit_images, fresh, keep_images
from benchmarks.common.features import classifier_features
from benchmarks.common.fit import FitSettings
from benchmarks.common.metrics import (
    FeatureExtractor,
    bits_per_dimension,
    dequantize,
    frechet_distance,
    reconstruction_error,
)
from benchmarks.common.quantized_images import QuantizedImages, by_parts, mnist, quantized_digits
from benchmarks.common.runner import Row, collect, main
from inn_guard.core.invertible import Invertible
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.importance_sampling import ImportanceEstimate
from inn_guard.models.aef.model import LinearAEF, PartitionAEF, center_core, corner_core
from inn_guard.models.aef.vae import VAE

__all__ = ["PRESETS", "Config", "draw", "run"]

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
    """The data sets on which models are trained."""

    DIGITS = "digits"
    MNIST = "mnist"


@dataclass(frozen=True)
class Config(ModelConfig):
    """What is trained and how it is measured.

    "AEF spread" is a linear AEF trained on cores with a standard deviation around h(x); the one of
    the highest likelihood of validation images counts. "AEF linear" is the paper's, without.
    """

    dataset: str = "digits"  # digits or mnist
    root: str = "data"  # folder of MNIST's files
    # MNIST: train on its training files; else on 7,200 of its 10,000 test images
    train_files: bool = False
    models: tuple[str, ...] = ("VAE", "AEF linear", "AEF spread", "AEF center")
    latents: tuple[int, ...] = (2, 16)
    spreads: tuple[float, ...] = (0.1, 0.3)  # deviations of "AEF spread"
    batch_size: int = 128  # images per step
    test_images: int = 200  # number of images for importance sampling
    draws: int = 128  # K
    repetitions: int = 4  # A; the estimate uses A K draws
    audit_samples: int = 4  # test images at which the condition number of the flow is measured


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
class Evaluations:
    """Of a model during its training.

    Attributes:
        count: how many, evenly spaced; the last one at the end.
        evaluate: (model in eval mode, step) -> a number for the history.
    """

    count: int
    evaluate: Callable[[Model, int], float]


def cases(config: Config) -> dict[str, Case]:
    """Every model of every latent dimension under every seed."""
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
        reconstructed = by_parts(model.reconstruct, test, 256).clamp(0, 1)
    if case.seed == config.seeds[0]:
        images = {"test": test, "reconstructed": reconstructed, "generated": generated}
        keep_images(config.dataset, case, images)
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
    """The trained model; of several spreads that of the highest bound on validation images."""
    if case.model != "AEF spread":
        return trained(config, case, data)
    noise = torch.Generator().manual_seed(2000 + case.seed)
    x = validation_images(config, data, noise)

    def score(candidate: tuple[Model, float]) -> float:
        model = candidate[0]
        assert isinstance(model, LinearAEF)
        model.tune(x, draws=config.draws, generator=noise)
        estimate = model.importance(x, draws=config.draws, repetitions=1, generator=noise)
        return estimate.lower_bound.mean().item()

    return max((trained(config, case, data, spread=spread) for spread in config.spreads), key=score)


def trained(
    config: Config,
    case: Case,
    data: QuantizedImages,
    *,
    spread: float = 0.0,
    evaluations: Evaluations | None = None,
) -> tuple[Model, float]:
    """The model after ``config.steps``, in eval mode, and the mean of its last losses in nats."""
    make = MODELS[case.model]
    if spread:
        make = partial(LinearAEF, spread=spread)
    model = fresh(config, case, data.shape, make)
    every, validate = config.steps, None
    if evaluations is not None:
        every = max(1, config.steps // evaluations.count)
        validate = partial(evaluations.evaluate, model)
    settings = FitSettings(
        config.steps,
        batch_size=config.batch_size,
        clip=200.0,
        seed=case.seed,
        validate_every=every,
    )
    history = fit_images(model, data, settings, validate=validate)
    return model, float(np.mean([value for _, value in history.losses[-20:]]))


def validation_images(config: Config, data: QuantizedImages, noise: torch.Generator) -> Tensor:
    """The first validation images, dequantized."""
    pixels = data.validation[: config.test_images]
    return dequantize(pixels, generator=noise, levels=data.levels)


def tuned_importance(
    config: Config,
    model: ExpandedAutoencoder,
    data: QuantizedImages,
    x: Tensor,
    noise: torch.Generator,
    *,
    rows: int,
) -> Iterator[ImportanceEstimate]:
    """Estimates of log p(x) by the paper's protocol, of that many rows at once.

    The width of a linear AEF's proposal is tuned on validation images.
    """
    if isinstance(model, LinearAEF):
        validation = validation_images(config, data, noise)
        model.tune(validation, draws=config.draws, generator=noise)
    for part in x.split(rows):
        yield model.importance(
            part, draws=config.draws, repetitions=config.repetitions, generator=noise
        )


def likelihood(
    config: Config, model: Model, data: QuantizedImages, x: Tensor, noise: torch.Generator
) -> Row:
    """Bits per dimension: exact for partition AEFs, else by importance sampling."""
    bits = partial(bits_per_dimension, dims=x[0].numel(), levels=data.levels)
    if isinstance(model, PartitionAEF):
        with torch.no_grad():
            exact = bits(model.log_prob(x))
        mean = exact.mean().item()
        return {
            "bpd": mean,
            "bpd_upper": mean,
            "bpd_error": standard_error(exact),
            "bpd_mode": mean,
        }
    estimates = list(tuned_importance(config, model, data, x, noise, rows=50))
    log_prob, bound = bits(joined(estimates, "log_prob")), bits(joined(estimates, "lower_bound"))
    effective = joined(estimates, "effective_draws")
    return {
        "bpd": log_prob.mean().item(),
        "bpd_upper": bound.mean().item(),
        "bpd_error": standard_error(log_prob),
        "effective_draws": effective.median().item(),
        **_at_the_mode(config, model, x, bits, noise),
        **_expansion(model, x),
    }


def joined(estimates: Iterable[ImportanceEstimate], name: str) -> Tensor:
    """One number per image, of estimates of parts of the images."""
    return torch.cat([getattr(estimate, name) for estimate in estimates])


def standard_error(values: Tensor) -> float:
    """The standard error of the mean."""
    return values.std().item() / math.sqrt(len(values))


def _at_the_mode(
    config: Config, model: ExpandedAutoencoder, x: Tensor, bits: Bits, noise: torch.Generator
) -> Row:
    """The same likelihood by a proposal around the mode of p(z | x), for many dimensions."""
    estimates = [
        laplace_log_prob(
            model, part, draws=config.draws, repetitions=config.repetitions, generator=noise
        )
        for part in x.split(100)
    ]
    return {
        "bpd_mode": bits(joined(estimates, "log_prob")).mean().item(),
        "effective_draws_mode": joined(estimates, "effective_draws").median().item(),
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
    """The worst condition number of the flow, and the verdict on its round trip."""
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
    data = load(config.dataset, config.root, config.train_files)
    return classifier_features(data, steps=config.classifier_steps)


if __name__ == "__main__":
    main(__name__)
