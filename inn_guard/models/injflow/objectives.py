"""InjFlow and its baselines: one autoencoder and a few loss terms.

An objective is a sum of terms; each term turns what one step has computed (codes, reconstructions,
Jacobian products) into one number per sample. The paper's models are sums of these:

    AE       Reconstruction()
    AE+L2    Reconstruction() + DecoderWeights(c)
    AE+SN    Reconstruction(), with spectrally normalised decoder layers (``spectrally_normalised``)
    CAE      Reconstruction() + EncoderJacobian(c)
    VAE      Reconstruction() + CodeDivergence(1),          a stochastic encoder
    beta-VAE Reconstruction() + CodeDivergence(beta)
    InjFlow  CodeNorm(c) + Reconstruction(growing(nu)) + LinearVolume() + Injectivity(growing(nu)),
             Eq. 10
    InjFlow^ln  the same with LogVolume() in place of LinearVolume(), Eq. 9
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from inn_guard.core.tensors import draw_normal
from inn_guard.models.autoencoder import Autoencoder, DirectionalDerivative, forward_mode

__all__ = [
    "CodeDivergence",
    "CodeNorm",
    "DecoderWeights",
    "EncoderJacobian",
    "Injectivity",
    "LinearVolume",
    "LogVolume",
    "Objective",
    "Reconstruction",
    "Step",
    "Term",
    "constant",
    "growing",
    "injflow_linear",
    "injflow_log",
    "spectrally_normalised",
]

Weight = Callable[[int], float]  #: iteration 0, 1, 2, ... -> weight of a penalty
ETA = 0.1  #: singular values below it are pushed up


def constant(value: float) -> Weight:
    """The same weight at every iteration."""
    return lambda _: value


def growing(rate: float = 1.0) -> Weight:
    """1 + i rate / 1000 at iteration i: the penalty method of the paper, rate 1 or 1.3.

    >>> growing(1.3)(2000)
    3.6
    """
    return lambda iteration: 1 + iteration * rate / 1000


ONE = constant(1.0)


class Step:
    """What the terms of one training step share; each quantity is computed once, on demand.

    Args:
        model: the autoencoder.
        x: data, (B, *data).
        iteration: 0, 1, 2, ...
        generator: of v and of the code's noise, on the CPU.
        derivative: how J_g v is computed.
    """

    def __init__(
        self,
        model: Autoencoder,
        x: Tensor,
        *,
        iteration: int,
        generator: torch.Generator,
        derivative: DirectionalDerivative = forward_mode,
    ) -> None:
        self.model, self.x, self.iteration = model, x, iteration
        self._generator, self._derivative = generator, derivative

    @cached_property
    def code(self) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the code."""
        return self.model.code(self.x)

    @cached_property
    def z(self) -> Tensor:
        """The code, drawn from q(z | x) if the encoder is stochastic, (B, d)."""
        mean, log_variance = self.code
        if log_variance is None:
            return mean
        return mean + (0.5 * log_variance).exp() * self.noise(mean)

    @cached_property
    def reconstruction(self) -> Tensor:
        """The decoded code g(z), (B, *data)."""
        return self.model.inverse(self.z)

    @cached_property
    def v(self) -> Tensor:
        """A random direction v ~ N(0, I_d), (B, d)."""
        return self.noise(self.z)

    @cached_property
    def stretch(self) -> Tensor:
        """|J_g(z) v|^2, (B,): its mean over v is |J_g|_F^2."""
        moved = self._derivative(self.model.inverse, self.z, self.v, self.reconstruction)
        return moved.flatten(1).square().sum(1)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers with the shape and dtype of ``like``."""
        return draw_normal(like.shape, like=like, generator=self._generator)


@runtime_checkable
class Term(Protocol):
    """One summand of an objective."""

    def __call__(self, step: Step) -> Tensor:
        """Its value for every sample, (B,)."""
        ...


@dataclass(frozen=True)
class Reconstruction:
    """mu |x - g(z)|^2 with mu a function of the iteration."""

    weight: Weight = ONE

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        error = (step.x - step.reconstruction).flatten(1)
        return self.weight(step.iteration) * error.square().sum(1)


@dataclass(frozen=True)
class CodeNorm:
    """coefficient |h(x)|^2, which is -ln p(h(x)) without its constant.

    p = N(0, sigma^2 I) and coefficient = 1 / (2 sigma^2).
    """

    coefficient: float

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        return self.coefficient * step.z.square().sum(1)


@dataclass(frozen=True)
class LogVolume:
    """d/2 ln max(|J_g v|^2, eta^2 |v|^2), a biased estimate of d/2 ln |J_g|_F^2.

    It is the last term of Eq. 7 and 9.
    """

    eta: float = ETA

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        return step.z.shape[1] / 2 * _floored(step, self.eta).log()


@dataclass(frozen=True)
class LinearVolume:
    """max(|J_g v|^2, eta^2 |v|^2) / (2 lambda), the volume term of Eq. 10 by the bound of Eq. 4."""

    trade: float = 1.0
    eta: float = ETA

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        return _floored(step, self.eta) / (2 * self.trade)


@dataclass(frozen=True)
class Injectivity:
    """mu_in min(|J_g v| / |v| - eta, 0)^2, which keeps singular values of J_g away from zero."""

    weight: Weight = ONE
    eta: float = ETA

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        tiny = torch.finfo(step.v.dtype).tiny  # the square root has no gradient at zero
        gain = (step.stretch / step.v.square().sum(1)).clamp(min=tiny).sqrt()
        return self.weight(step.iteration) * (gain - self.eta).clamp(max=0).square()


@dataclass(frozen=True)
class EncoderJacobian:
    """coefficient |J_h(x)|_F^2, the penalty of the contractive autoencoder.

    It is estimated with one Hutchinson probe: |J_h^T u|^2, u ~ N(0, I_d).
    """

    coefficient: float

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        x = step.x.detach().requires_grad_()
        code = step.model.forward(x)
        (pulled,) = torch.autograd.grad(code, x, step.noise(code), create_graph=True)
        return self.coefficient * pulled.flatten(1).square().sum(1)


@dataclass(frozen=True)
class DecoderWeights:
    """coefficient |theta_g|^2 over the decoder's parameters, the same for every sample."""

    coefficient: float

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,)."""
        total = torch.stack([p.square().sum() for p in step.model.decoder.parameters()]).sum()
        return (self.coefficient * total).expand(len(step.x))


@dataclass(frozen=True)
class CodeDivergence:
    """beta KL(q(z | x) || N(0, I)) in nats, for a stochastic encoder.

    With |x - g(z)|^2 in place of |x - g(z)|^2 / 2 as the reconstruction, this is twice the paper's
    weighting.
    """

    beta: float = 1.0

    def __call__(self, step: Step) -> Tensor:
        """The term of every sample, (B,).

        Raises:
            TypeError: if the encoder is deterministic.
        """
        mean, log_variance = step.code
        if log_variance is None:
            raise TypeError(
                "expected a stochastic encoder: use Autoencoder(encoder, decoder, stochastic=True)"
            )
        return 0.5 * self.beta * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)


@dataclass(frozen=True)
class Objective:
    """The mean over the batch of a sum of terms.

    Attributes:
        terms: the summands.
        derivative: how J_g v is computed: ``forward_mode``, or ``finite_difference`` where that is
            unstable.
    """

    terms: Sequence[Term]
    derivative: DirectionalDerivative = forward_mode

    def __call__(
        self, model: Autoencoder, x: Tensor, *, iteration: int, generator: torch.Generator
    ) -> Tensor:
        """A scalar with gradients for encoder and decoder.

        Args:
            model: the autoencoder.
            x: data, (B, *data).
            iteration: 0, 1, 2, ...: the penalties grow with it.
            generator: of all noise, on the CPU.
        """
        step = Step(model, x, iteration=iteration, generator=generator, derivative=self.derivative)
        return torch.stack([term(step) for term in self.terms]).sum(0).mean()


def injflow_linear(
    prior: float = 1e-3,
    *,
    trade: float = 1.0,
    rate: float = 1.0,
    derivative: DirectionalDerivative = forward_mode,
) -> Objective:
    """InjFlow (Eq. 10): ``prior`` weighs |h(x)|^2, ``trade`` is lambda, ``rate`` is nu."""
    weight = growing(rate)
    volume = LinearVolume(trade)
    terms = (CodeNorm(prior), Reconstruction(weight), volume, Injectivity(weight))
    return Objective(terms, derivative)


def injflow_log(
    prior: float = 1e-3, *, rate: float = 1.0, derivative: DirectionalDerivative = forward_mode
) -> Objective:
    """InjFlow with the logarithm of the volume (Eq. 9)."""
    weight = growing(rate)
    terms = (CodeNorm(prior), Reconstruction(weight), LogVolume(), Injectivity(weight))
    return Objective(terms, derivative)


def spectrally_normalised(network: nn.Module) -> nn.Module:
    """``network`` with every linear and convolutional weight divided by its estimated norm."""
    for module in list(network.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            spectral_norm(module)
    return network


def _floored(step: Step, eta: float) -> Tensor:
    """max(|J_g v|^2, eta^2 |v|^2), (B,): no gain from singular values that are nearly zero."""
    return torch.maximum(step.stretch, eta**2 * step.v.square().sum(1))
