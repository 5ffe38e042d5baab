"""Metrics of generative models: bits per dimension, Fréchet distance, reconstruction errors."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = [
    "FeatureExtractor",
    "FrechetDistance",
    "add_noise",
    "bits_per_dimension",
    "dequantize",
    "feature_error",
    "frechet_distance",
    "inception",
    "reconstruction_error",
]

LEVELS = 256  #: grey values of an 8-bit pixel
INCEPTION = "Inception-v3 pool3"


def dequantize(
    pixels: UInt8[Tensor, "batch *data"], *, generator: torch.Generator, levels: int = LEVELS
) -> Float[Tensor, "batch *data"]:
    """Quantized images as continuous data: (pixels + u) / levels in [0, 1), u ~ U(0, 1), float32.

    A density of the result integrates over each cell of width 1 / levels to a probability of the
    pixels, so that its mean log-likelihood bounds that of the images from below;
    ``bits_per_dimension`` takes the cells into account.

    Args:
        pixels: uint8, below ``levels``.
        generator: on the CPU, of u.
        levels: number of values that one pixel can take; 256 for 8 bits.

    Raises:
        ValueError: if a pixel is not below ``levels``.

    References:
        A Note on the Evaluation of Generative Models (Theis, van den Oord, Bethge, 2016), section
        3.1.
    """
    if pixels.numel() and int(pixels.max()) >= levels:
        raise ValueError(f"expected pixels below {levels}, got {int(pixels.max())}")
    noise = torch.rand(pixels.shape, generator=generator, device="cpu", dtype=torch.float32)
    noise = noise.to(pixels.device)
    # in float32, 255 + u rounds up to 256 once u is within 2^-17 of 1
    largest = 1 - torch.finfo(torch.float32).eps / 2
    return ((pixels + noise) / levels).clamp(max=largest)


def bits_per_dimension(
    log_prob: Float[Tensor, "batch"], *, dims: int, levels: int = LEVELS
) -> Float[Tensor, "batch"]:
    """Bits per dimension of quantized data, (B,), from log p(x) of their dequantized versions.

        bpd = -(log p(x) - D log levels) / (D log 2) = log2 levels - log p(x) / (D log 2)

    Args:
        log_prob: log p(x), x = (pixels + u) / levels.
        dims: D, the number of values of one x.
        levels: number of values that one pixel can take.

    >>> bits_per_dimension(torch.zeros(1), dims=784).item()  # uniform: 8 bits per pixel
    8.0
    """
    if dims < 1 or levels < 2:
        raise ValueError(
            f"expected at least one dimension and two levels, got dims = {dims}, levels = {levels}"
        )
    return math.log2(levels) - log_prob / (dims * math.log(2))


@dataclass(frozen=True)
class FeatureExtractor:
    """A function from images to feature vectors, and the name that labels its results.

    Attributes:
        name: architecture and the data it was trained on, such as "small CNN trained on digits".
        features: images (B, C, H, W) in [0, 1] -> (B, F).
        batch_size: images per call.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    batch_size: int = 256

    @property
    def distance_name(self) -> str:
        """What a Fréchet distance of these features is called on a figure."""
        if self.name == INCEPTION:
            return "FID"
        return f"Fréchet distance ({self.name})"

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch features"]:
        """The features of all images, batch by batch, on the CPU in float64."""
        parts = [self.features(part) for part in images.split(self.batch_size)]
        return torch.cat(parts).cpu().double()


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance with all that it depends on.

    Attributes:
        value: the distance, in squared units of the features.
        name: "FID" for the features of Inception-v3, else "Fréchet distance (name of the
            extractor)".
        real: number of real images.
        generated: number of generated images.
    """

    value: float
    name: str
    real: int
    generated: int


def frechet_distance(
    extractor: FeatureExtractor,
    real: Float[Tensor, "real channels height width"],
    generated: Float[Tensor, "generated channels height width"],
) -> FrechetDistance:
    """Squared 2-Wasserstein distance of Gaussians fitted to the features of two sets of images.

        d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

    In float64 and without a matrix square root: with C_i = R_i^T R_i from a QR decomposition of the
    centred features, tr (C_1 C_2)^(1/2) is the sum of the singular values of R_1 R_2^T, which no
    singular covariance disturbs.

    Only distances of one extractor and of equal numbers of images compare: the estimate falls with
    their number.

    Args:
        extractor: of the features; its name is part of the result.
        real: images in [0, 1].
        generated: images in [0, 1].

    Raises:
        ValueError: if a set has fewer than two images.

    References:
        GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel,
        Ramsauer, Unterthiner, Nessler, Hochreiter, 2017), equation 6.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError(
            f"expected at least two images in each set, got {len(real)} and {len(generated)}"
        )
    value = gaussian_frechet_distance(extractor(real), extractor(generated))
    return FrechetDistance(value, extractor.distance_name, len(real), len(generated))


def gaussian_frechet_distance(
    first: Float[Tensor, "n features"], second: Float[Tensor, "m features"]
) -> float:
    """The Fréchet distance of two sets of feature vectors; NaN if one is not finite."""
    if not bool(first.isfinite().all() & second.isfinite().all()):
        return math.nan
    (mean1, root1), (mean2, root2) = _moments(first.double()), _moments(second.double())
    shift = (mean1 - mean2).square().sum()
    covariances = root1.square().sum() + root2.square().sum()
    overlap = torch.linalg.svdvals(root1 @ root2.T).sum()
    return max(0.0, float(shift + covariances - 2 * overlap))


def feature_error(
    extractor: FeatureExtractor,
    clean: Float[Tensor, "batch channels height width"],
    reconstructed: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch"]:
    """Mean squared difference of features of clean images and of denoised ones, (B,).

    Args:
        extractor: of the features; name it with the number.
        clean: images in [0, 1] without noise.
        reconstructed: row-aligned with them, in [0, 1].

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), appendix B.
    """
    return (extractor(clean) - extractor(reconstructed)).square().mean(1)


def reconstruction_error(
    x: Float[Tensor, "batch *data"], reconstructed: Float[Tensor, "batch *data"]
) -> Float[Tensor, "batch"]:
    """Mean squared difference per value of x, (B,).

    >>> reconstruction_error(torch.zeros(1, 4), torch.full((1, 4), 0.5)).tolist()
    [0.25]
    """
    return (x - reconstructed).flatten(1).square().mean(1)


def add_noise(
    x: Float[Tensor, "batch *data"], *, deviation: float, generator: torch.Generator
) -> Float[Tensor, "batch *data"]:
    """x + N(0, deviation^2), clipped to [0, 1]: what a denoising model is trained on.

    Args:
        x: images in [0, 1].
        deviation: standard deviation of the white noise.
        generator: on the CPU, of the noise.
    """
    noise = torch.randn(x.shape, generator=generator, device="cpu", dtype=x.dtype).to(x.device)
    return (x + deviation * noise).clamp(0, 1)


def inception(weights: Path, *, batch_size: int = 64) -> FeatureExtractor:
    """The 2048 pool3 features of Inception-v3 by torch-fidelity; only their distances are an FID.

    Args:
        weights: torch-fidelity's file ``weights-inception-2015-12-05-6726825d.pth``, which the user
            provides.
        batch_size: images per call.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise FileNotFoundError(
            f"expected the weights of Inception-v3 at {weights}; there is no such file"
        )
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ModuleNotFoundError(
            "an FID needs the features of torch-fidelity; pip install torch-fidelity"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # refuses a file that holds more than tensors
    torch.load(weights, map_location="cpu", weights_only=True)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).eval()

    def features(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1)
        return network((colour.clamp(0, 1) * 255).round().to(torch.uint8))[0]

    return FeatureExtractor(INCEPTION, features, batch_size)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, R) with the unbiased covariance R^T R."""
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R
