"""What a density fitted to codes misses: how Gaussian they are, and how far from them it draws.

Everything is measured in coordinates in which the training codes have covariance I, so that no
model gains by the scale or the shear of its codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.mixture import GaussianMixture
from torch import Tensor

from benchmarks.common.metrics import FeatureExtractor
from benchmarks.common.quantized_images import by_parts
from benchmarks.common.runner import Row
from inn_guard.models.autoencoder import Autoencoder

__all__ = ["Codes", "fitted_mixture", "fitted_normal", "off_the_codes", "shape_of_codes"]

#: of the eigenvalues, relative to the largest: codes of a collapsed encoder have rank 0
FLOOR = 1e-12


@dataclass(frozen=True)
class Codes:
    """Codes of training and of test images, each (n, d), float64."""

    train: np.ndarray
    test: np.ndarray

    @property
    def spectrum(self) -> np.ndarray:
        """Eigenvalues of the covariance of the training codes, ascending."""
        return np.linalg.eigvalsh(np.cov(self.train.T))

    def whitened(self, z: np.ndarray) -> Tensor:
        """z in coordinates in which the training codes have mean 0 and covariance I."""
        values, vectors = np.linalg.eigh(np.cov(self.train.T))
        scale = np.sqrt(np.maximum(values, FLOOR * values.max()))
        return torch.as_tensor((z - self.train.mean(0)) @ vectors / scale)

    def nearest(self, z: np.ndarray) -> Tensor:
        """Distance of every z from the nearest training code, whitened."""
        return torch.cdist(self.whitened(z), self.whitened(self.train)).amin(1)


def fitted_normal(codes: np.ndarray) -> GaussianMixture:
    """The full-covariance Gaussian of the codes."""
    return GaussianMixture(1, reg_covar=1e-5).fit(codes)


def fitted_mixture(codes: np.ndarray, seed: int, *, components: int = 10) -> GaussianMixture:
    """A mixture of full-covariance Gaussians fitted to the codes."""
    return GaussianMixture(components, random_state=seed, reg_covar=1e-5).fit(codes)


def shape_of_codes(codes: Codes, mixture: GaussianMixture) -> Row:
    """How far from one Gaussian the codes are.

    * ``mixture_gain_nats``: held-out log-likelihood under the mixture less that under one Gaussian;
      0 for normal codes
    * ``mardia_kurtosis``: E |w|^4 / (d (d + 2)) of whitened test codes w; 1 for normal codes
    * ``effective_dims``: (sum lambda)^2 / sum lambda^2 of the covariance
    """
    dims = codes.train.shape[1]
    radius = codes.whitened(codes.test).square().sum(1)
    return {
        "mixture_gain_nats": float(
            mixture.score(codes.test) - fitted_normal(codes.train).score(codes.test)
        ),
        "mardia_kurtosis": float(radius.square().mean() / (dims * (dims + 2))),
        "effective_dims": float(codes.spectrum.sum() ** 2 / np.square(codes.spectrum).sum()),
    }


def off_the_codes(
    model: Autoencoder,
    codes: Codes,
    drawn: dict[str, Tensor],
    features: FeatureExtractor,
    real: Tensor,
) -> Row:
    """How far from the codes each density draws, and what becomes of that in the images.

    * ``off_codes_KIND``: median distance of the draws from the nearest training code, over that of
      test codes
    * ``off_images_KIND``: median distance of decoded draws from the nearest real image's features,
      over that of the decoded test codes
    * ``off_correlation_KIND``: rank correlation of the two over the draws

    Args:
        model: in eval mode.
        codes: of its training and test images.
        drawn: kind -> codes drawn from a fitted density, (n, d).
        features: in which images are compared.
        real: training images.
    """
    known = features(real)
    at_home = torch.as_tensor(codes.test, dtype=torch.float32)
    off_codes, off_images = (
        codes.nearest(codes.test).median(),
        _from_images(model, at_home, features, known).median(),
    )
    row: Row = {}
    for kind, z in drawn.items():
        from_codes, from_images = (
            codes.nearest(z.double().numpy()),
            _from_images(model, z, features, known),
        )
        row[f"off_codes_{kind}"] = (from_codes.median() / off_codes).item()
        row[f"off_images_{kind}"] = (from_images.median() / off_images).item()
        row[f"off_correlation_{kind}"] = float(spearmanr(from_codes, from_images).statistic)
    return row


def _from_images(
    model: Autoencoder, z: Tensor, features: FeatureExtractor, known: Tensor
) -> Tensor:
    """Distance of every decoded z from the nearest of the known features."""
    decoded = by_parts(model.inverse, z, 512).clamp(0, 1)
    return torch.cdist(features(decoded), known).amin(1)
