r"""Table 1 of the InjFlow paper: Fréchet distances of reconstructions and samples of eight models.

    inn-guard bench injflow.table1 --preset cpu  # digits, minutes
    inn-guard bench injflow.table1 --preset cpu --data mnist --data-root FOLDER  # MNIST

MNIST's committed table, of its test images, ten minutes on one core:

    inn-guard bench injflow.table1 --preset cpu --data mnist --data-root FOLDER --width 8 \
        --steps 1200 --batch-size 64 --samples 2000 \
        --models "VAE,AE,InjFlow_ln,InjFlow" --seeds 0,1,2 \
        --out benchmarks/results/mnist

All models share encoder, decoder, data order and number of steps. Distances are between the
features of a small classifier trained on the same data (named in the column ``extractor``), so they
are no FID and only compare within this table. Reduced against the paper: data, width and steps
(100,000 there; the weights that grow with the iteration grow as much faster, so that they end where
the paper's end); each model's hyper-parameter is one value of the paper's grid instead of a search.
Codes: a full-covariance Gaussian and a mixture of 10, fitted after training; ``codes.py`` says how
far either is from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.mixture import GaussianMixture
from torch import Tensor

import inn_guard as ig
from benchmarks.common.experiments import find
from benchmarks.common.features import images_and_features
from benchmarks.common.figures import image_grid, save_figure
from benchmarks.common.fit import Batch, FitSettings, fit
from benchmarks.common.metrics import FeatureExtractor, frechet_distance, reconstruction_error
from benchmarks.common.quantized_images import QuantizedImages, by_parts
from benchmarks.common.runner import RESULTS, Row, collect, main
from benchmarks.injflow.codes import Codes, fitted_mixture, off_the_codes, shape_of_codes
from inn_guard.models.autoencoder import Autoencoder, decoder_jacobian
from inn_guard.models.injflow import objectives as terms
from inn_guard.models.injflow.networks import conv_decoder, conv_encoder

CODES = 128  #: encoded test images at which injectivity is measured


@dataclass(frozen=True)
class Config:
    """What is trained."""

    data: str = "digits"  # digits, mnist or cifar10
    data_root: str = ""  # folder of the official files; digits need none
    latent: int = 8  # d; the paper has 32 for MNIST, 128 for CIFAR-10
    width: int = 16  # channels after the first convolution
    steps: int = 1500  # of Adam at 1e-3; the paper has 100,000
    batch_size: int = 128  # images per step; the paper has 128
    samples: int = 300  # images per Fréchet distance, at most as many as there are test images
    seeds: tuple[int, ...] = (0,)  # one run each
    # rows of the table
    models: tuple[str, ...] = (
        "VAE",
        "beta-VAE",
        "AE",
        "CAE",
        "AE+L2",
        "AE+SN",
        "InjFlow_ln",
        "InjFlow",
    )


PRESETS = {
    "smoke": {"width": 4, "steps": 3, "seeds": (0,)},
    "cpu": {},  # minutes on two cores
    # The paper's MNIST setting
    "paper": {
        "data": "mnist", "latent": 32, "width": 64, "steps": 100_000, "samples": 10_000,
        "seeds": (0,),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One model of the table."""

    objective: terms.Objective
    stochastic: bool = False
    spectral: bool = False


RECIPES: dict[str, Recipe] = {
    "VAE": Recipe(
        terms.Objective((terms.Reconstruction(), terms.CodeDivergence(2.0))), stochastic=True
    ),
    "beta-VAE": Recipe(
        terms.Objective((terms.Reconstruction(), terms.CodeDivergence(0.02))), stochastic=True
    ),
    "AE": Recipe(terms.Objective((terms.Reconstruction(),))),
    "CAE": Recipe(terms.Objective((terms.Reconstruction(), terms.EncoderJacobian(0.01)))),
    "AE+L2": Recipe(terms.Objective((terms.Reconstruction(), terms.DecoderWeights(0.001)))),
    "AE+SN": Recipe(terms.Objective((terms.Reconstruction(),)), spectral=True),
}
INJECTIVE: dict[str, Callable[[float], terms.Objective]] = {
    "InjFlow_ln": lambda rate: terms.injflow_log(1e-3, rate=rate),
    "InjFlow": lambda rate: terms.injflow_linear(1e-3, rate=rate),
}
PAPER_STEPS = 100_000
#: column -> what is compared with the test images
KINDS = {"rec": "reconstructions", "normal": "Gaussian samples", "gmm": "mixture samples"}


def recipes(config: Config) -> dict[str, Recipe]:
    """Every model; penalties of the injective ones grow as far as in the paper's 100,000 steps."""
    rate = PAPER_STEPS / config.steps
    return RECIPES | {name: Recipe(objective(rate)) for name, objective in INJECTIVE.items()}


def loaded(config: Config) -> tuple[QuantizedImages, FeatureExtractor]:
    """The images and the extractor trained on them."""
    return images_and_features(config.data, config.data_root, steps=config.steps)


def cases(config: Config) -> dict[str, tuple[str, int]]:
    """Every model under every seed."""
    return {f"{name} seed {seed}": (name, seed) for seed in config.seeds for name in config.models}


def build(config: Config, recipe: Recipe, shape: tuple[int, int, int], seed: int) -> Autoencoder:
    """The recipe's autoencoder; every recipe starts from the same weights under the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = conv_decoder(shape, config.latent, width=config.width)
        encoder = conv_encoder(shape, config.latent * (1 + recipe.stochastic), width=config.width)
        if recipe.spectral:
            decoder = terms.spectrally_normalised(decoder)
    return Autoencoder(encoder, decoder, stochastic=recipe.stochastic)


def train(config: Config, name: str, seed: int) -> Autoencoder:
    """The model of that name, trained."""
    images, _ = loaded(config)
    recipe = recipes(config)[name]
    model = build(config, recipe, images.shape, seed)

    def loss(batch: Batch) -> Tensor:
        x = images.scaled(batch.x)
        return recipe.objective(model, x, iteration=batch.step, generator=batch.generator)

    settings = FitSettings(steps=config.steps, batch_size=config.batch_size, clip=10.0, seed=seed)
    fit(model, loss, (images.train,), settings=settings)
    return model.eval()


def measure(config: Config, case: tuple[str, int]) -> Iterator[Row]:
    """One row: three distances, the reconstruction error, and how injective the decoder is."""
    model = train(config, *case)
    with torch.no_grad():
        yield evaluated(config, model, *case)


def evaluated(config: Config, model: Autoencoder, name: str, seed: int) -> Row:
    """What the table says of a trained model."""
    images, extractor = loaded(config)
    real = images.scaled(images.test[: config.samples])
    codes = Codes(encoded(model, images, images.train), encoded(model, images, images.test))
    rebuilt = model.inverse(model(real)).clamp(0, 1)
    mixture = fitted_mixture(codes.train, seed)
    drawn_codes = {
        "normal": draw_gaussian(codes.train, len(real), seed),
        "gmm": draw_mixture(mixture, len(real), seed),
    }
    drawn = {kind: model.inverse(z).clamp(0, 1) for kind, z in drawn_codes.items()}
    distances = {
        kind: frechet_distance(extractor, real, pictures).value
        for kind, pictures in {"rec": rebuilt, **drawn}.items()
    }
    audits = ig.audit(model, real[:32], checks=["reconstruction", "jacobian_spectrum"])
    spectrum = audits["jacobian_spectrum"].values
    if seed == config.seeds[0]:
        save_images(config, name, {"test": real[:10], "rebuilt": rebuilt[:10], **samples_of(drawn)})
    return {
        "data": images.name,
        "model": name,
        "seed": seed,
        **distances,
        "mse": reconstruction_error(real, rebuilt).mean().item(),
        **injectivity(model, model(real[:CODES]), seed),
        **shape_of_codes(codes, mixture),
        **off_the_codes(model, codes, drawn_codes, extractor, images.scaled(images.train)),
        "encoder_condition_number": spectrum["encoder_condition_number"],
        "decoder_condition_number": spectrum["decoder_condition_number"],
        "code_round_trip": audits["reconstruction"].values["latent_error"],
        "verdict": audits.verdict.label,
        "extractor": extractor.name,
    }


def injectivity(model: Autoencoder, codes: Tensor, seed: int) -> Row:
    """How far the decoder is from folding: its smallest singular values against eta.

    The hinge measures |J_g v| / |v| for one random v a step: a number between the extreme singular
    values.
    """
    jacobian = decoder_jacobian(model, codes)
    smallest = torch.linalg.svdvals(jacobian)[:, -1]
    v = torch.randn(codes.shape, generator=torch.Generator().manual_seed(seed))
    gain = (jacobian @ v[:, :, None]).norm(dim=(1, 2)) / v.norm(dim=1)
    return {
        "smallest_singular_value": smallest.min().item(),
        "median_singular_value": smallest.median().item(),
        "codes_below_eta": (smallest < terms.ETA).double().mean().item(),
        "directions_below_eta": (gain < terms.ETA).double().mean().item(),
    }


def encoded(model: Autoencoder, images: QuantizedImages, pixels: Tensor) -> np.ndarray:
    """Codes of all images, (n, d), float64."""
    return by_parts(model, images.scaled(pixels), 512).double().numpy()


def draw_gaussian(codes: np.ndarray, count: int, seed: int) -> Tensor:
    """Codes from the full-covariance Gaussian of the training codes."""
    generator = np.random.default_rng(seed)
    drawn = generator.multivariate_normal(codes.mean(0), np.cov(codes.T), size=count)
    return torch.as_tensor(drawn, dtype=torch.float32)


def draw_mixture(mixture: GaussianMixture, count: int, seed: int) -> Tensor:
    """Codes from the fitted mixture, in random order."""
    drawn = mixture.sample(count)[0]
    return torch.as_tensor(np.random.default_rng(seed).permutation(drawn), dtype=torch.float32)


def samples_of(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first samples of either density, titled."""
    return {KINDS[kind]: pictures[:20] for kind, pictures in drawn.items()}


def save_images(config: Config, name: str, groups: dict[str, Tensor]) -> None:
    """Originals, reconstructions and samples as one picture in the folder of the results."""
    if config.steps < 100:
        return
    path = RESULTS / f"injflow_{config.data}_{name.replace('+', '_')}.png"
    save_figure(image_grid(groups), path)


def run(config: Config) -> pd.DataFrame:
    """All models under all seeds."""
    frame = collect(config, cases(config), measure)
    print(summary(frame).to_string())
    return frame


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds, their standard errors, and the paper's MNIST column."""
    columns = [*KINDS, "mse", "mixture_gain_nats", "off_codes_normal", "smallest_singular_value"]
    seeds = frame.groupby("model", sort=False)
    paper = find("injflow.table1").published().set_index("model")
    ours = seeds[columns].mean().join(seeds[list(KINDS)].sem().add_suffix("_error"))
    return ours.join(paper[["mnist_rec", "mnist_normal", "mnist_gmm"]].add_prefix("paper_"))


def draw(frame: pd.DataFrame) -> Figure:
    """The distances of every model; that of Gaussian samples against how Gaussian the codes are."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    tables, cloud = figure.subfigures(1, 2, width_ratios=[2.6, 1])
    panels = tables.subplots(1, 3, sharey=True)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        axes.plot(frame[kind], frame.model, "o", alpha=0.6)
        axes.set(xscale="log", xlabel=title)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    axes = cloud.subplots()
    for model, rows in frame.groupby("model", sort=False):
        axes.plot(rows["mixture_gain_nats"], rows["normal"], "o", label=model, alpha=0.6)
    axes.set(
        xlabel="nats a mixture gains on a Gaussian, held-out codes",
        ylabel=KINDS["normal"],
        yscale="log",
    )
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
    figure.suptitle(f"Fréchet distance ({frame.extractor[0]}), lower is better")
    return figure


if __name__ == "__main__":
    main(__name__)
