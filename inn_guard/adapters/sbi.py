"""sbi: density estimators and posteriors as Invertibles, parameters theta -> latent.

An estimator holds a flow of nflows or zuko in its attribute ``net``, and a net that embeds the
observation: for nflows inside the flow, for zuko next to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Context, Invertible, InvertibleWrapper
from inn_guard.core.missing import MissingContextError

__all__ = ["SbiEstimator", "adapt"]


def adapt(model: Any, context: Context = None) -> Invertible:
    """A density estimator, or a posterior that holds one, as an Invertible.

    Args:
        model: what ``trainer.train()`` or ``trainer.build_posterior()`` of sbi returns.
        context: observations x, (B, *x_shape), one for each theta.

    Raises:
        TypeError: if there is no flow inside.
    """
    estimator = getattr(model, "posterior_estimator", model)
    if not isinstance(getattr(estimator, "net", None), nn.Module):
        raise TypeError(
            "expected a density estimator of sbi with a flow in its attribute net, "
            f"got {type(model).__name__}; "
            "call wrap(posterior.posterior_estimator, context=x)"
        )
    return SbiEstimator(estimator, context)


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
            raise MissingContextError(
                "expected the observations that the estimator is conditioned on, one x for each "
                "theta; pass wrap(estimator, context=x)"
            )
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
