"""sbi: density estimators and posteriors as Invertibles, parameters theta -> latent.

An estimator holds a flow of nflows or zuko in its attribute ``net``, and a net that embeds the
observation: for nflows inside the flow, for zuko next to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import (
    Context,
    Invertible,
    InvertibleWrapper,
    standard_normal_log_prob,
)
from inn_guard.core.missing import MissingContextError

__all__ = ["SbiEstimator", "VectorField", "adapt"]

NO_OBSERVATIONS = (
    "expected the observations that the estimator is conditioned on, one x for each theta or one "
    "for all; pass wrap(estimator, context=x), or call posterior.set_default_x(x)"
)


def adapt(model: Any, context: Context = None, x: Tensor | None = None) -> Invertible:
    """A density estimator, or a posterior that holds one, as an Invertible.

    Args:
        model: what ``trainer.train()`` or ``trainer.build_posterior()`` of sbi returns.
        context: observations x, (B, *x_shape), one for each theta; or a single one, (1, *x_shape)
            or (*x_shape), for all. Default: the posterior's ``default_x``.
        x: a batch of theta, (B, *theta_shape), whose length a single observation is repeated to.

    Raises:
        TypeError: if there is no flow inside.
    """
    if context is None:
        context = getattr(model, "default_x", None)
    for name in ("posterior_estimator", "vector_field_estimator"):
        model = getattr(model, name, model)
    shape = getattr(model, "condition_shape", None)
    if isinstance(context, Tensor) and shape is not None and context.shape == torch.Size(shape):
        context = context.unsqueeze(0)
    if isinstance(context, Tensor) and isinstance(x, Tensor) and len(context) == 1:
        context = context.expand(len(x), *context.shape[1:])
    if callable(getattr(model, "ode_fn", None)):
        return _vector_field(model, context)
    if not isinstance(getattr(model, "net", None), nn.Module):
        raise TypeError(
            "expected a density estimator of sbi with a flow in its attribute net, "
            f"got {type(model).__name__}; "
            "call wrap(posterior.posterior_estimator, context=x)"
        )
    return SbiEstimator(model, context)


def _vector_field(estimator: Any, context: Context) -> Invertible:
    """A flow matching or score estimator, from theta to the noise that it is sampled from."""
    if context is None:
        raise MissingContextError(NO_OBSERVATIONS)

    def velocity(t: Tensor, theta: Tensor, observations: Tensor) -> Tensor:
        return estimator.ode_fn(theta, observations, t.expand(len(theta)))

    velocity.__name__ = type(estimator).__name__
    times = (float(estimator.t_min), float(estimator.t_max))
    flow = wrap(velocity=velocity, times=times, context=context)
    return VectorField(flow, estimator.mean_base.detach(), estimator.std_base.detach())


class VectorField(InvertibleWrapper):
    """The flow of a vector field, with the normal distribution of the noise that it starts from.

    Args:
        flow: from theta to the noise.
        mean: of the noise, (1, *theta_shape).
        deviation: of the noise, likewise.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, flow: Invertible, mean: Tensor, deviation: Tensor) -> None:
        super().__init__(flow)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def base(self) -> BaseDistribution:
        """The noise, which theta is integrated from."""

        def draw(n: int, observations: Context) -> Tensor:
            shape = (n, *self.mean.shape[1:])
            noise = torch.randn(shape, dtype=self.mean.dtype, device=self.mean.device)
            return self.mean + self.deviation * noise

        return BaseDistribution(
            draw,
            self.mean.new_empty(0),
            context=self.context,
            exact_deviation=self.deviation[0],
            description="noise that it integrates from",
            log_density=self._log_noise,
        )

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p(theta | x), (B,)."""
        z, log_det = self.inner.forward_and_log_det(theta)
        return self._log_noise(z) + log_det

    def to_dtype(self, dtype: torch.dtype) -> VectorField:
        """A copy in ``dtype``."""
        return VectorField(
            self.inner.to_dtype(dtype), self.mean.to(dtype), self.deviation.to(dtype)
        )

    @property
    def convention(self) -> str:
        """How the flow is integrated, in words."""
        flow: Any = self.inner
        return flow.convention

    def _log_noise(self, z: Tensor) -> Tensor:
        log_scale = self.deviation.log().expand_as(z).flatten(1).sum(1)
        return standard_normal_log_prob((z - self.mean) / self.deviation) - log_scale


class SbiEstimator(InvertibleWrapper):
    """A density estimator: its flow, in the observations that are its context.

    Attributes:
        module: the estimator itself, not a copy.
    """

    def __init__(self, module: nn.Module, context: Context = None) -> None:
        # not DerivedMap's: the inner map is made anew at every call, with the embedded observations
        Invertible.__init__(self)
        wrap(module.net)  # raises TypeError if it is not a flow
        self.module = module
        self.context = context
        self.training = module.training

    with_context = Invertible.with_context
    select = Invertible.select
    to_dtype = Invertible.to_dtype
    with_cached_conditioner = Invertible.with_cached_conditioner

    @property
    def inner(self) -> Invertible:  # type: ignore[override]
        """The flow in the embedded observations.

        Raises:
            MissingContextError: if there are no observations.
        """
        if self.context is None:
            raise MissingContextError(NO_OBSERVATIONS)
        return wrap(self.module.net, context=self._flow_context(self.context))

    def base(self) -> BaseDistribution | None:
        """The base distribution of the flow; its context are observations."""
        inner = self.inner.base()
        if inner is None:
            return None

        def sampler(n: int, observations: Context) -> Tensor:
            return inner.sampler(n, self._flow_context(observations))

        return dataclasses.replace(inner, sampler=sampler, context=self.context)

    @property
    def block(self) -> nn.Module:
        """The estimator itself, not the flow inside."""
        return self.module

    @property
    def name(self) -> str:
        """The class name of the estimator."""
        return type(self.module).__name__

    def _flow_context(self, observations: Context) -> Context:
        """The context that the flow takes: a flow of nflows embeds the observations itself."""
        net: Any = self.module.net
        if hasattr(net, "_embedding_net"):
            return observations
        embed: Any = self.module.embedding_net
        return embed(observations)
