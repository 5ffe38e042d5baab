"""Autoencoder: encoder h: R^D -> R^d, decoder g: R^d -> R^D, Jacobians and densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from inn_guard.core.invertible import Invertible, standard_normal_log_prob

__all__ = [
    "Autoencoder",
    "ManifoldDensity",
    "decoder_jacobian",
    "finite_difference",
    "forward_mode",
    "manifold_density",
]

#: (g, z, v, g(z)) -> J_g(z) v: how the objectives differentiate the decoder
DirectionalDerivative = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]


class Autoencoder(Invertible):
    """forward is the encoder h, inverse the decoder g: injective as far as h undoes g.

    Nothing forces forward(inverse(z)) = z; the reconstruction audit measures how far it holds.

    Args:
        encoder: (B, *data) -> (B, d), or (B, 2 d) with the logarithm of the code's variance after
            its mean.
        decoder: (B, d) -> (B, *data).
        stochastic: whether the encoder gives mean and log-variance.
    """

    bijective = False

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, stochastic: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder, self.stochastic = encoder, decoder, stochastic

    def forward(self, x: Tensor) -> Tensor:
        """h(x), the code's mean: (B, *data) -> (B, d)."""
        return self.code(x)[0]

    def inverse(self, z: Tensor) -> Tensor:
        """g(z): (B, d) -> (B, *data)."""
        return self.decoder(z)

    def code(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of q(z | x); the latter None for a deterministic encoder."""
        output = self.encoder(x)
        if not self.stochastic:
            return output, None
        mean, log_variance = output.chunk(2, dim=1)
        return mean, log_variance


def forward_mode(decoder: Callable[[Tensor], Tensor], z: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """J_g(z) v, exact, by forward-mode differentiation; itself differentiable."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(decoder(forward_ad.make_dual(z, v))).tangent


def finite_difference(
    decoder: Callable[[Tensor], Tensor], z: Tensor, v: Tensor, at_z: Tensor
) -> Tensor:
    """J_g(z) v as (g(z + eps v) - g(z)) / eps with eps = 0.01 (Eq. 8), without forward mode."""
    eps = 0.01
    return (decoder(z + eps * v) - at_z) / eps


def decoder_jacobian(
    model: Invertible, z: Float[Tensor, "batch latent"]
) -> Float[Tensor, "batch data latent"]:
    """J_g(z) of every sample, column by column in forward mode: (B, D, d)."""
    columns = []
    for k in range(z.shape[1]):
        unit = torch.zeros_like(z)
        unit[:, k] = 1
        columns.append(forward_mode(model.inverse, z, unit, z).flatten(1))
    return torch.stack(columns, dim=2)


@dataclass(frozen=True)
class ManifoldDensity:
    """ln p(x) in nats, (B,), of points x = g(z) on the manifold, and lower bounds of it.

    Attributes:
        exact: ln p(z) - 1/2 ln det(J_g^T J_g) (Eq. 3).
        linear_bound: ln p(z) - |J_g|_F^2 / (2 lambda) - d/2 ln lambda + d/2 (Eq. 4).
        log_bound: ln p(z) - d/2 ln(|J_g|_F^2 / d), the best of the former over lambda (Eq. 5).
        smallest_singular_value: of J_g(z): positive is what injectivity near z needs.
    """

    exact: Tensor
    linear_bound: Tensor
    log_bound: Tensor
    smallest_singular_value: Tensor


def manifold_density(
    model: Invertible, z: Float[Tensor, "batch latent"], *, sigma: float = 1.0, trade: float = 1.0
) -> ManifoldDensity:
    """Density of g(z) for z ~ N(0, sigma^2 I) and its two lower bounds, from the dense J_g.

    Args:
        model: an injective map; its inverse is g.
        z: codes, (B, d).
        sigma: standard deviation of the prior.
        trade: lambda of Eq. 4.

    References:
        Regularized Autoencoders via Relaxed Injective Probability Flow (Kumar, Poole, Murphy,
        2020), Eq. 3 to 5.
    """
    dim = z.shape[1]
    sigmas = torch.linalg.svdvals(decoder_jacobian(model, z))
    prior = standard_normal_log_prob(z / sigma) - dim * math.log(sigma)
    frobenius = sigmas.square().sum(1)
    return ManifoldDensity(
        exact=prior - sigmas.log().sum(1),
        linear_bound=prior - frobenius / (2 * trade) - dim / 2 * math.log(trade) + dim / 2,
        log_bound=prior - dim / 2 * (frobenius / dim).log(),
        smallest_singular_value=sigmas[:, -1],
    )
