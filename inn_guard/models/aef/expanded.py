"""Autoencoders as flows of an expanded space: what linear AEFs and VAEs have in common."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.layers.chain import Chain
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.permutation import Permutation
from inn_guard.models.aef.flow import AutoencoderConfig, CoreShellFlow
from inn_guard.models.aef.importance_sampling import (
    ImportanceEstimate,
    Proposal,
    importance_log_prob,
)
from inn_guard.models.aef.networks import AutoencoderNets

__all__ = ["ExpandedAutoencoder"]


class ExpandedAutoencoder(nn.Module, abc.ABC):
    """A flow of [w, x] in R^(d + D) with all of x as the shell: a linear AEF or a VAE.

    The two differ in where w comes from. ``joint`` is the flow with its preprocessing: a bijection,
    which can be audited at ``expand(x)``.

    Args:
        config: sizes, nets, flows and preprocessing.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        encoder, decoder = config.nets(config.shape, config.latent)
        nets = AutoencoderNets(
            nn.Sequential(nn.Unflatten(1, config.shape), encoder),
            nn.Sequential(decoder, nn.Flatten()),
        )
        flow = config.flow(nets, shell=config.dims)
        preprocessing = config.preprocessing(config.shape[0])
        # of the state [w, x] it acts on x only
        data = [OnRemaining(layer, shape=config.shape) for layer in preprocessing]
        # [w, x] -> [x, w]: the flow takes the core last
        expanded = config.dims + config.latent
        core_last = (torch.arange(expanded) + config.latent) % expanded
        self.joint = Chain(*data, Permutation(core_last), flow)
        self.config = config

    @property
    def flow(self) -> CoreShellFlow:
        """The autoencoder after the preprocessing."""
        return self.joint.steps[-1]  # type: ignore[return-value]

    @abc.abstractmethod
    def proposal(self, shell: Float[Tensor, "batch dims"]) -> Proposal:
        """q(w | x), at preprocessed images: what importance sampling draws w from."""

    @abc.abstractmethod
    def loss(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """The training loss in nats, a scalar."""

    def preprocessed(self, x: Tensor) -> tuple[Float[Tensor, "batch dims"], Float[Tensor, "batch"]]:
        """Preprocessed images, flat, and the log-determinant of the preprocessing, (B,)."""
        state = x.flatten(1)
        total = x.new_zeros(len(x))
        # the last two steps are the permutation and the flow
        for step in self.joint.steps[:-2]:
            state, log_det = step.forward_and_log_det(state)  # type: ignore[operator]
            total = total + log_det
        return state, total

    def expand(self, x: Tensor) -> Float[Tensor, "batch expanded"]:
        """The state [w, x], (B, d + D), with w at the centre of the proposal."""
        return torch.cat([self.proposal(self.preprocessed(x)[0]).center, x.flatten(1)], dim=1)

    @torch.no_grad()
    def importance(
        self,
        x: Tensor,
        *,
        proposal: Proposal | None = None,
        draws: int = 128,
        repetitions: int = 20,
        generator: torch.Generator,
    ) -> ImportanceEstimate:
        """log p(x) in nats by ``importance_log_prob``; default proposal: the model's own."""
        shell, log_det = self.preprocessed(x)
        if proposal is None:
            proposal = self.proposal(shell)
        return importance_log_prob(
            lambda w: self.flow.joint_log_prob(shell, w) + log_det[:, None],
            proposal,
            draws=draws,
            repetitions=repetitions,
            generator=generator,
        )

    def encode(self, x: Tensor) -> Float[Tensor, "batch latent"]:
        """The code z, (B, d), of [x, w] with w at the centre of the proposal."""
        shell, _ = self.preprocessed(x)
        return self.flow.encode(torch.cat([shell, self.proposal(shell).center], dim=1))

    def decode(self, z: Float[Tensor, "batch latent"]) -> Tensor:
        """The decoder's output f(z), as images."""
        return self._images(self.flow.decode(z))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded code of x; a model that was trained on noisy images denoises x."""
        return self.decode(self.encode(x))

    def sample(
        self,
        count: int,
        *,
        temperature: float = 1.0,
        noise: float = 0.0,
        generator: torch.Generator,
    ) -> Float[Tensor, "count channels height width"]:
        """Images x = f(z), u ~ N(0, temperature^2 I), z = u through the prior.

        Args:
            count: number of images.
            temperature: 0.85 in the paper's figures; 1 is the trained model.
            noise: scale of the residuals that are added to f(z), in sigma: 0 in the paper, 1 is the
                trained model.
            generator: on the CPU.
        """
        latents = self.flow.draw(count, temperature=temperature, noise=noise, generator=generator)
        residual, u = latents.split([self.flow.shell, self.flow.latent], dim=1)
        mean = self.flow.decode(self.flow.prior_inverse(u))
        return self._images(mean + residual * self.flow.sigma())

    def _images(self, shell: Tensor) -> Tensor:
        """Images in [0, 1] of a shell, by the inverse of the preprocessing."""
        for step in reversed(self.joint.steps[:-2]):
            shell = step.inverse(shell)  # type: ignore[operator]
        return shell.reshape(-1, *self.config.shape)
