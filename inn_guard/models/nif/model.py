"""Noisy injective flows: a Gaussian around the image of an injective linear map."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible, NotApplicable, standard_normal_log_prob
from inn_guard.core.tensors import draw_normal
from inn_guard.models.nif.widening import Gram, Widening

__all__ = ["NIF", "GaussianNIF"]

LOG_2PI = math.log(2 * math.pi)
LogDensity = Callable[[Tensor], Tensor]  #: z (B, *latent) -> log p(z), (B,)


class GaussianNIF(Invertible):
    """p(x | z) = N(x; A z + b, Sigma) with a diagonal Sigma: noise around an injective map.

    With Lambda = A^T Sigma^-1 A, r = x - b and w = A^T Sigma^-1 r, the stochastic inverse is

        q(z | x) = p(x | z) / int p(x | z') dz' = N(z; mu, Lambda^-1),   mu = Lambda^-1 w

    As an Invertible it is the deterministic part: inverse(z) = A z + b, and forward(x) = mu, the
    Sigma-weighted pseudo-inverse, so that forward(inverse(z)) = z and inverse(forward(x)) is the
    projection of x onto the image.

    Args:
        widening: A.
        shape: of one x, so of b and of the diagonal of Sigma.

    References:
        Normalizing Flows Across Dimensions / Noisy Injective Flows (Cunningham, Zabounidis,
        Agrawal, Fiterau, Sheldon, 2020), section 4 and appendix A.
    """

    bijective = False

    def __init__(self, widening: Widening, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.widening = widening
        self.bias = nn.Parameter(torch.zeros(shape))
        self.log_variance = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """The embedding mu(x): (B, *data) -> (B, *latent)."""
        return self.gram().solve(self._weighted(x))

    def inverse(self, z: Tensor) -> Tensor:
        """A z + b, the point of the manifold: (B, *latent) -> (B, *data)."""
        return self.widening(z) + self.bias

    def gram(self) -> Gram:
        """The matrix Lambda = A^T Sigma^-1 A."""
        return self.widening.gram((-self.log_variance).exp())

    def manifold_term(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch"]:
        """ln int p(x | z) dz in nats, (B,): it takes the place of a log-determinant.

        -1/2 r^T Sigma^-1 r + 1/2 mu^T Lambda mu - 1/2 ln|Sigma| - 1/2 ln|Lambda|
        - (D - d)/2 ln 2 pi
        """
        gram = self.gram()
        w = self._weighted(x)
        mu = gram.solve(w)
        explained = (w * mu).flatten(1).sum(1)
        dims = x[0].numel() - mu[0].numel()
        constant = self.log_variance.sum() + gram.log_det() + dims * LOG_2PI
        return 0.5 * (explained - self._mahalanobis(x) - constant)

    def posterior_sample(
        self, x: Float[Tensor, "batch *data"], *, generator: torch.Generator
    ) -> Float[Tensor, "batch *latent"]:
        """One draw z ~ q(z | x) = N(mu, Lambda^-1) for every x."""
        gram = self.gram()
        mu = gram.solve(self._weighted(x))
        return mu + gram.inverse_root(draw_normal(mu.shape, like=mu, generator=generator))

    def bound(
        self,
        x: Float[Tensor, "batch *data"],
        log_prior: LogDensity,
        *,
        generator: torch.Generator,
        samples: int = 1,
    ) -> Float[Tensor, "batch"]:
        """Lower bound of ln p(x) in nats, (B,), for any prior (Eq. 10).

        It is a sample mean of E_q[ln p(z)] + ln int p(x | z) dz.

        Args:
            x: data.
            log_prior: ln p(z).
            generator: source of z ~ q(z | x).
            samples: draws of z per sample of x.
        """
        draws = [log_prior(self.posterior_sample(x, generator=generator)) for _ in range(samples)]
        return torch.stack(draws).mean(0) + self.manifold_term(x)

    def log_prob(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch"]:
        """ln p(x) = ln N(x; b, Sigma + A A^T) in nats, (B,), for the prior N(0, I) (Eq. 13).

        By Woodbury and the determinant lemma it is -1/2 [r^T Sigma^-1 r - w^T (I + Lambda)^-1 w]
        - 1/2 ln|Sigma| - 1/2 ln|I + Lambda| - D/2 ln 2 pi.
        """
        widened = self.gram().plus_identity()
        w = self._weighted(x)
        explained = (w * widened.solve(w)).flatten(1).sum(1)
        constant = self.log_variance.sum() + widened.log_det() + x[0].numel() * LOG_2PI
        return 0.5 * (explained - self._mahalanobis(x) - constant)

    def sample_given(
        self, z: Float[Tensor, "batch *latent"], *, noise: float = 1.0, generator: torch.Generator
    ) -> Float[Tensor, "batch *data"]:
        """x ~ N(A z + b, s Sigma), s = ``noise``: 0 on the manifold, 1 for the trained model."""
        mean = self.inverse(z)
        deviation = math.sqrt(noise) * (0.5 * self.log_variance).exp()
        return mean + deviation * draw_normal(mean.shape, like=mean, generator=generator)

    def _weighted(self, x: Tensor) -> Tensor:
        """w = A^T Sigma^-1 (x - b), (B, *latent)."""
        return self.widening.transpose((x - self.bias) * (-self.log_variance).exp())

    def _mahalanobis(self, x: Tensor) -> Tensor:
        """(x - b)^T Sigma^-1 (x - b), (B,)."""
        return ((x - self.bias).square() * (-self.log_variance).exp()).flatten(1).sum(1)


class NIF(Invertible):
    """A flow x -> h with a Gaussian NIF in place of its unit Gaussian prior on h.

        ln p(x) = ln p_NIF(h) + log|det dh/dx|,   h = flow(x)

    With ``inner``, a flow z -> e on the latents, it is the deep variant: the prior of z is that
    flow's, ln p(x) is bounded by Eq. 10 instead of closed. As an Invertible: forward embeds x in
    R^d, inverse goes back onto the learned manifold; forward(inverse(z)) = z.

    Args:
        flow: any Invertible with log-determinants: ours, or an adapted one of nflows or FrEIA.
        prior: the Gaussian NIF on its latents.
        inner: a flow on the low-dimensional latents; None: they are N(0, I).

    References:
        See GaussianNIF; sections 4.3 and B.4.
    """

    bijective = False

    def __init__(
        self, flow: Invertible, prior: GaussianNIF, inner: Invertible | None = None
    ) -> None:
        super().__init__()
        self.flow, self.prior, self.inner = flow, prior, inner

    def forward(self, x: Tensor) -> Tensor:
        """The embedding: (B, *data) -> (B, *latent)."""
        z = self.prior(self.flow(x))
        if self.inner is None:
            return z
        return self.inner(z)

    def inverse(self, z: Tensor) -> Tensor:
        """The point of the manifold: (B, *latent) -> (B, *data)."""
        if self.inner is not None:
            z = self.inner.inverse(z)
        return self.flow.inverse(self.prior.inverse(z))

    def layers(self) -> tuple[Invertible, ...]:
        """The flow's layers, the Gaussian NIF, the inner flow's layers."""
        outer = self.flow.layers() or (self.flow,)
        if self.inner is None:
            return (*outer, self.prior)
        return (*outer, self.prior, *(self.inner.layers() or (self.inner,)))

    def log_prob(self, x: Tensor) -> Tensor:
        """ln p(x) in nats, (B,).

        Raises:
            NotApplicable: if the flow has no log-determinant, or for the deep variant, whose
                density is not closed.
        """
        if self.inner is not None:
            raise NotApplicable(
                "a deep NIF has no closed density; use bound(x, generator=...) instead"
            )
        h, log_det = self.flow.forward_and_log_det(x)
        return self.prior.log_prob(h) + log_det

    def bound(self, x: Tensor, *, generator: torch.Generator, samples: int = 1) -> Tensor:
        """Lower bound of ln p(x) in nats, (B,), by Eq. 10; valid with and without an inner flow."""
        h, log_det = self.flow.forward_and_log_det(x)
        log_prior: LogDensity = standard_normal_log_prob
        if self.inner is not None:
            log_prior = self.inner.log_prob
        return self.prior.bound(h, log_prior, generator=generator, samples=samples) + log_det

    def sample(
        self,
        latents: Tensor,
        *,
        temperature: float = 1.0,
        noise: float = 1.0,
        generator: torch.Generator,
    ) -> Tensor:
        """Samples of x.

        Args:
            latents: draws of N(0, I), (B, *latent); they are multiplied by the temperature.
            temperature: t, z ~ N(0, t^2 I).
            noise: s, Sigma -> s Sigma: 0 samples the manifold, 1 the trained model.
            generator: source of the noise around the manifold.
        """
        z = temperature * latents
        if self.inner is not None:
            z = self.inner.inverse(z)
        return self.flow.inverse(self.prior.sample_given(z, noise=noise, generator=generator))
