"""The autoencoder as a flow: two couplings between a core and a shell, between two flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.core.invertible import Invertible, standard_normal_log_prob
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.core.tensors import draw_normal
from inn_guard.jacobian.network import NetworkJacobian, linearize_module
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.autoregressive import maf
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling, ScaleAndShift
from inn_guard.layers.linear import ElementwiseJacobian
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.partition import Leading
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.scales import SoftplusScale
from inn_guard.models.aef.networks import AutoencoderNets, small_nets

__all__ = [
    "AutoencoderConfig",
    "CoreShellFlow",
    "Negated",
    "ResidualScale",
    "logit_actnorm",
    "no_flow",
]

#: latent dimension -> a flow on vectors of that size
FlowMaker = Callable[[int], Chain]
#: (image shape, latent dimension) -> encoder and decoder
NetsMaker = Callable[[Sequence[int], int], AutoencoderNets]
PreprocessingMaker = Callable[[int], list[Invertible]]  #: channels -> layers on images


def no_flow(latent: int) -> Chain:
    """The identity, in place of a core encoder or a prior flow."""
    return Chain()


def logit_actnorm(channels: int, *, alpha: float = 1e-6) -> list[Invertible]:
    """logit(alpha + (1 - 2 alpha) x), then ActNorm.

    Args:
        channels: of the images.
        alpha: 1e-6 for grey images, 0.05 for colour ones, in the paper.
    """
    return [Logit(alpha), ActNorm(channels)]


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an autoencoder is built from; models of one config have the same architecture.

    Attributes:
        shape: (C, H, W) of one image.
        latent: d, the dimension of z.
        nets: makes encoder and decoder.
        core_encoder: makes n^-1, which maps the core, or the noise of a VAE, before it is scaled
            and shifted. One pass of a ``maf`` forward is one pass of n^-1, so that n is an inverse
            autoregressive flow. ``no_flow``: none.
        prior: makes the flow z -> u with u ~ N(0, I), which is p_0. ``no_flow``: p_0 = N(0, I).
        preprocessing: makes the layers between images in [0, 1] and the autoencoder; for colour
            images ``functools.partial(logit_actnorm, alpha=0.05)``.
    """

    shape: tuple[int, int, int]
    latent: int
    nets: NetsMaker = small_nets
    core_encoder: FlowMaker = maf
    prior: FlowMaker = maf
    preprocessing: PreprocessingMaker = logit_actnorm

    def __post_init__(self) -> None:
        if not 0 < self.latent < self.dims:
            raise ValueError(
                f"expected a latent dimension between 0 and {self.dims}, got {self.latent}"
            )

    @property
    def dims(self) -> int:
        """The number of values in one image, D = C H W."""
        channels, height, width = self.shape
        return channels * height * width

    def flow(self, nets: AutoencoderNets, *, shell: int) -> CoreShellFlow:
        """The flow of [shell, core] with these nets and the config's core encoder and prior."""
        return CoreShellFlow(
            nets,
            core_encoder=self.core_encoder(self.latent),
            prior=self.prior(self.latent),
            shell=shell,
            latent=self.latent,
        )


class Negated(nn.Module):
    """A network f with the other sign: z -> -f(z)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        """The network's output with the other sign, -f(z)."""
        return -self.network(z)


class NegatedJacobian:
    """The two products with -J.

    Args:
        jacobian: of the network.
    """

    def __init__(self, jacobian: NetworkJacobian) -> None:
        self._jacobian, self.output = jacobian, -jacobian.output

    def jvp(self, v: Tensor) -> Tensor:
        """The product -J v."""
        return -self._jacobian.jvp(v)

    def vjp(self, u: Tensor) -> Tensor:
        """The product -J^T u."""
        return -self._jacobian.vjp(u)


@linearize_module.register
def linearize_negated(module: Negated, x: Tensor) -> NetworkJacobian:
    """The Jacobian of -f."""
    return NegatedJacobian(linearize_module(module.network, x))


class ResidualScale(Invertible):
    """delta -> delta / sigma for the first entries of a vector, with sigma = softplus(raw).

    The other entries stay. A residual with the density N(0, diag sigma^2) becomes standard normal.

    Args:
        count: how many entries are residuals.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(count))

    def sigma(self) -> Tensor:
        """The standard deviations of the residuals, (count,)."""
        # as in SoftplusScale: torch's default threshold is too low for float64
        return functional.softplus(self.raw, threshold=40)

    def forward(self, x: Tensor) -> Tensor:
        """The vector [delta / sigma, rest]."""
        return x / self._divisor(x)

    def inverse(self, z: Tensor) -> Tensor:
        """The vector [delta, rest]."""
        return z * self._divisor(z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z, and the log-determinant -sum log sigma."""
        return self.forward(x), -self.sigma().log().sum().expand(len(x))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the log-determinant sum log sigma."""
        return self.inverse(z), self.sigma().log().sum().expand(len(z))

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The diagonal Jacobian of the division by sigma."""
        with torch.no_grad():
            return ElementwiseJacobian(self.forward(x), 1 / self._divisor(x))

    def _divisor(self, x: Tensor) -> Tensor:
        return torch.cat([self.sigma(), x.new_ones(x.shape[1] - len(self.raw))])


class CoreShellFlow(Chain):
    """[shell, core] -> [residual, u], a bijection of R^(S + d), with a standard normal base.

        z = g_m(shell) + g_s(shell) * n^-1(core),   delta = shell - f(z)
        log p = log p_0(z) + log r(delta) + log|det J_{n^-1}(core)| + sum log g_s(shell)

    An affine coupling and an additive one, between flows of the last d entries: the residual is
    delta / sigma, and u the prior flow's latent of z, both N(0, I) under the model.

    Args:
        nets: encoder, shell (B, S) -> (B, 2 d), and decoder, z (B, d) -> (B, S).
        core_encoder: n^-1, on (B, d).
        prior: z -> u, on (B, d).
        shell: S.
        latent: d.

    References:
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), equations 4 to 8 and algorithm 1.
    """

    def __init__(
        self, nets: AutoencoderNets, *, core_encoder: Chain, prior: Chain, shell: int, latent: int
    ) -> None:
        before = [OnRemaining(layer, shape=[latent]) for layer in core_encoder.layers()]
        after = [OnRemaining(layer, shape=[latent]) for layer in prior.layers()]
        super().__init__(
            *before,
            AffineCoupling(nets.encoder, partition=Leading(shell), scale=SoftplusScale()),
            AdditiveCoupling(Negated(nets.decoder), partition=Leading(shell, swapped=True)),
            ResidualScale(shell),
            *after,
        )
        self.shell, self.latent = shell, latent
        self._before = len(before)

    def encoding(self, shell: Float[Tensor, "batch shell"]) -> ScaleAndShift:
        """The map w -> g_m(shell) + g_s(shell) * w of the encoder at this shell."""
        coupling = self.steps[self._before]
        return coupling.parameters_of(shell)  # type: ignore[operator, union-attr, return-value]

    def encode(self, state: Float[Tensor, "batch dims"]) -> Float[Tensor, "batch latent"]:
        """The code z of [shell, core]."""
        for step in self.steps[: self._before + 1]:
            state = step(state)
        return state[:, self.shell :]

    def decode(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch shell"]:
        """The decoder f(z), (B, S)."""
        coupling = self.steps[self._before + 1]
        return coupling.network.network(z)  # type: ignore[union-attr, operator]

    def sigma(self) -> Float[Tensor, "shell"]:
        """The standard deviations of the shell around f(z)."""
        return self.steps[self._before + 2].sigma()  # type: ignore[union-attr, operator]

    @property
    def prior(self) -> Chain:
        """The flow z -> u on (B, d), which is p_0."""
        return Chain(*self.steps[self._before + 3 :])

    def prior_inverse(self, u: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch latent"]:
        """The code z ~ p_0 that the prior flow maps to u ~ N(0, I)."""
        for step in reversed(self.steps[self._before + 3 :]):
            u = step.inverse(u)  # type: ignore[operator]
        return u

    def draw(
        self, count: int, *, temperature: float, noise: float, generator: torch.Generator
    ) -> Float[Tensor, "count dims"]:
        """Latents to decode: [noise * N(0, I), temperature * N(0, I)]."""
        shape = (count, self.shell + self.latent)
        latents = draw_normal(shape, like=self.sigma(), generator=generator)
        residual, u = latents.split([self.shell, self.latent], dim=1)
        return torch.cat([noise * residual, temperature * u], dim=1)

    def joint_log_prob(
        self, shell: Float[Tensor, "batch shell"], cores: Float[Tensor, "batch draws latent"]
    ) -> Float[Tensor, "batch draws"]:
        """log p(shell, core) in nats for many cores of each shell, with one encoder pass."""
        draws = cores.shape[1]
        # not by forward_and_log_det of the whole: the encoder depends on the shell only, and is the
        # same for all draws
        encoding = self.encoding(shell)
        w, log_det = _through(self.steps[: self._before], cores.flatten(0, 1))
        z = w * _repeated(encoding.scale, draws) + _repeated(encoding.shift, draws)
        residual = (_repeated(shell, draws) - self.decode(z)) / self.sigma()
        u, prior_log_det = _through(self.steps[self._before + 3 :], z)
        coupling_log_det = _repeated(encoding.log_det(), draws)
        log_det = log_det + prior_log_det + coupling_log_det - self.sigma().log().sum()
        log_p = standard_normal_log_prob(residual) + standard_normal_log_prob(u) + log_det
        return log_p.unflatten(0, (-1, draws))


def _through(steps: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor]:
    """x after all steps, and the sum of their log-determinants, (B,)."""
    total = x.new_zeros(len(x))
    for step in steps:
        x, log_det = step.forward_and_log_det(x)  # type: ignore[operator]
        total = total + log_det
    return x, total


def _repeated(x: Tensor | None, times: int) -> Tensor:
    """Every row of x ``times`` times in a row, as the flattened draws of each shell."""
    if x is None:
        raise TypeError("expected an affine encoding with a scale, got none")
    return x.repeat_interleave(times, dim=0)
