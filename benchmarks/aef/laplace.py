r"""A proposal around the mode of p(z | x), for likelihoods of AEFs and VAEs in many dimensions.

Both models have the same integral, p(x) = int p_0(z) N(x; f(z), diag(sigma^2)) dz: for the AEF by
substituting z for w, for the VAE by definition. With u(z) the prior flow's latent, the residual

    r(z) = [u(z), (f(z) - x) / sigma],   -log p(x, z) = |r(z)|^2 / 2 - log|det du/dz| + constant

has the Gauss-Newton precision H = J_r^T J_r. The proposal is Student's t around the mode with the
scale width^2 H^-1: a Gaussian's tails would be too light for the posterior of a curved f.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.core.invertible import standard_normal_log_prob
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.importance_sampling import (
    ImportanceEstimate,
    Proposal,
    importance_log_prob,
    tuned_width,
)
from inn_guard.models.autoencoder import forward_mode

__all__ = ["LaplaceProposal", "Posterior", "laplace", "laplace_log_prob"]

WIDTHS = (0.5, 0.65, 0.8, 1.0)
FREEDOM = 10  #: degrees of Student's t
ROWS = 4096  #: decoded at once


@dataclass(frozen=True)
class LaplaceProposal(Proposal):
    """Student's t: q(z | x) = t(center, width^2 R R^T) with ``FREEDOM`` degrees of freedom.

    Attributes:
        root: R, (B, d, d), triangular.
    """

    root: Tensor

    def sample(self, draws: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """z (B, K, d) and log q(z) (B, K)."""
        rows, dims = self.center.shape
        normal = torch.randn(
            rows, draws, dims + FREEDOM, generator=generator, dtype=self.center.dtype
        )
        spread = (normal[..., dims:].square().sum(2, keepdim=True) / FREEDOM).rsqrt()
        e = normal[..., :dims] * spread
        log_det = self.root.diagonal(dim1=1, dim2=2).abs().log().sum(1) + dims * math.log(
            self.width
        )
        tail = (FREEDOM + dims) / 2 * torch.log1p(e.square().sum(2) / FREEDOM)
        return self.center[:, None] + self.width * e @ self.root.mT, -tail - log_det[
            :, None
        ] - _log_t_constant(dims)


def _log_t_constant(dims: int) -> float:
    return (
        math.lgamma(FREEDOM / 2)
        - math.lgamma((FREEDOM + dims) / 2)
        + dims / 2 * math.log(FREEDOM * math.pi)
    )


class Posterior:
    """log p(x, z) of one batch of images as a function of z, in nats.

    Args:
        model: an AEF or VAE, in eval mode.
        x: images, (B, C, H, W).
    """

    def __init__(self, model: ExpandedAutoencoder, x: Tensor) -> None:
        self.flow = model.flow
        with torch.no_grad():
            self.shell, self._log_det = model.preprocessed(x)
            self.start = model.encode(x)
            self._sigma = self.flow.sigma()
        self._prior = self.flow.prior

    def residual(self, z: Tensor) -> Tensor:
        """r(z), (B, d + D)."""
        return torch.cat([self._prior(z), (self.flow.decode(z) - self.shell) / self._sigma], dim=1)

    def log_joint(self, z: Tensor, rows: Tensor | None = None) -> Tensor:
        """log p(x, z), (B,), of the images of these rows, of all in their order if None."""
        shell, log_det = (
            (self.shell, self._log_det) if rows is None else (self.shell[rows], self._log_det[rows])
        )
        residual = (shell - self.flow.decode(z)) / self._sigma
        prior = self._prior.log_prob(z)
        return prior + standard_normal_log_prob(residual) - self._sigma.log().sum() + log_det

    def of_draws(self, z: Tensor) -> Tensor:
        """log p(x, z) for z (B, K, d), (B, K)."""
        rows = torch.arange(len(z)).repeat_interleave(z.shape[1])
        parts = zip(z.flatten(0, 1).split(ROWS), rows.split(ROWS), strict=True)
        return torch.cat([self.log_joint(*part) for part in parts]).unflatten(0, z.shape[:2])

    def slope_and_precision(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """d log p(x, z) / dz (B, d) and H (B, d, d)."""
        columns = []
        with torch.no_grad():
            for unit in torch.eye(z.shape[1]):
                columns.append(forward_mode(self.residual, z, unit.expand_as(z).contiguous(), z))
        jacobian = torch.stack(columns, dim=2).double()
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.log_joint(z).sum(), z)
        return slope.double(), jacobian.mT @ jacobian


def laplace(posterior: Posterior, *, steps: int = 12) -> LaplaceProposal:
    """The proposal at the mode of p(z | x), by damped Gauss-Newton steps from the encoder's z."""
    z = posterior.start
    with torch.no_grad():
        value = posterior.log_joint(z)
    damping = torch.full((len(z),), 0.1, dtype=torch.float64)
    for _ in range(steps):
        slope, precision = posterior.slope_and_precision(z)
        damped = precision + torch.diag_embed(damping[:, None] * precision.diagonal(dim1=1, dim2=2))
        tried = z + torch.linalg.solve(damped, slope).to(z.dtype)
        with torch.no_grad():
            reached = posterior.log_joint(tried)
        better = reached > value
        z, value = torch.where(better[:, None], tried, z), torch.where(better, reached, value)
        damping = torch.where(better, damping / 4, damping * 4)
    factor = torch.linalg.cholesky(posterior.slope_and_precision(z)[1])
    unit = torch.eye(z.shape[1], dtype=torch.float64).expand_as(factor)
    root = torch.linalg.solve_triangular(factor.mT, unit, upper=True)
    return LaplaceProposal(z, 1.0, root.to(z.dtype))


def laplace_log_prob(
    model: ExpandedAutoencoder,
    x: Tensor,
    *,
    draws: int,
    repetitions: int,
    generator: torch.Generator,
    widths: Iterable[float] = WIDTHS,
) -> ImportanceEstimate:
    """log p(x) in nats, with new draws of the width of the highest lower bound.

    Args:
        model: an AEF or VAE, in eval mode.
        x: images.
        draws: K.
        repetitions: A.
        generator: on the CPU.
        widths: candidates.
    """
    posterior = Posterior(model, x)
    proposal = laplace(posterior)

    def estimate(width: float, times: int) -> ImportanceEstimate:
        return importance_log_prob(
            posterior.of_draws,
            replace(proposal, width=width),
            draws=draws,
            repetitions=times,
            generator=generator,
        )

    return estimate(tuned_width(lambda width: estimate(width, 1).lower_bound, widths), repetitions)
