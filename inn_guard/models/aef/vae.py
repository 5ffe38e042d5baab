"""Baselines of AEFs, of the same parts: a variational and a denoising autoencoder."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.core.invertible import standard_normal_log_prob
from inn_guard.core.tensors import draw_normal
from inn_guard.layers.chain import Chain
from inn_guard.models.aef.expanded import ExpandedAutoencoder
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.importance_sampling import Proposal

__all__ = ["VAE", "DenoisingAutoencoder"]


class VAE(ExpandedAutoencoder):
    """A VAE with an inverse autoregressive posterior and a masked autoregressive prior.

        z = g_m(x) + g_s(x) * n^-1(w),   w ~ N(0, I)
        ELBO = E_w[log p(x, w) - log N(w; 0, I)]
             = E_q(z|x)[log p(x | z) + log p_0(z) - log q(z | x)]

    with the same joint flow p(x, w) as a linear AEF. The two differ only in where w comes from.

    Args:
        config: sizes, nets, flows and preprocessing.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2014).
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans,
        Jozefowicz, Chen, Sutskever, Welling, 2016).
    """

    def proposal(self, shell: Float[Tensor, "batch dims"]) -> Proposal:
        """The proposal N(0, I) for w, under which z is a draw of the encoder's posterior."""
        return Proposal(shell.new_zeros(len(shell), self.config.latent), 1.0)

    def elbo(self, x: Tensor, *, generator: torch.Generator) -> Float[Tensor, "batch"]:
        """A lower bound of log p(x) in nats in expectation, from one w for every x, (B,)."""
        w = draw_normal((len(x), self.config.latent), like=x, generator=generator)
        joint = self.joint.log_prob(torch.cat([w, x.flatten(1)], dim=1))
        return joint - standard_normal_log_prob(w)

    def loss(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """-ELBO, the mean over the batch, in nats."""
        return -self.elbo(x, generator=generator).mean()


class DenoisingAutoencoder(nn.Module):
    """f(g_m(x)), trained by least squares on noisy images; it has no density.

    Args:
        config: sizes, nets and preprocessing; its flows are not used.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.preprocessing = Chain(*config.preprocessing(config.shape[0]))
        self.encoder, self.decoder = config.nets(config.shape, config.latent)
        self.config = config

    def encode(self, x: Tensor) -> Float[Tensor, "batch latent"]:
        """The code g_m(x), (B, d)."""
        return self.encoder(self.preprocessing(x)).chunk(2, dim=1)[0]

    def decode(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        """The decoder's output f(z), as images."""
        return self.preprocessing.inverse(self.decoder(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The reconstruction f(g_m(x)), as images."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Mean squared difference between images and reconstructions; the generator is not used."""
        return (x - self.reconstruct(x)).square().mean()
