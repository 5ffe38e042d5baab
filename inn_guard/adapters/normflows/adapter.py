"""normflows: flows and models as Invertibles. The library's forward is latent -> data: here it is the inverse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from normflows.core import (
    ClassCondFlow,
    ConditionalNormalizingFlow,
    MultiscaleFlow,
    NormalizingFlow,
)
from normflows.flows import AffineCoupling, Flow, Split
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.normflows.layers import NormflowsLayer, chain_of, named_errors
from inn_guard.adapters.normflows.multiscale import NormflowsMultiscale
from inn_guard.core.invertible import Context, Invertible

__all__ = ["NormflowsLayer", "NormflowsModel", "NormflowsMultiscale", "adapt"]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A model or a flow layer of normflows as an Invertible, data -> latent.

    Args:
        model: a NormalizingFlow, ConditionalNormalizingFlow, ClassCondFlow, MultiscaleFlow or any Flow.
        context: what the library calls ``context``, or its class labels ``y``.

    Raises:
        TypeError: if the model is none of these, maps lists of tensors, or takes no context and one is given.
    """
    if isinstance(model, MultiscaleFlow):
        return NormflowsMultiscale(model, context)
    if isinstance(model, (NormalizingFlow, ClassCondFlow)):
        return NormflowsModel(model, context)
    if isinstance(model, (Split, AffineCoupling)):
        raise TypeError(
            f"expected a flow of one tensor, got {type(model).__name__}, which maps lists; "
            "type wrap(model) with the AffineCouplingBlock or MultiscaleFlow around it instead"
        )
    if isinstance(model, Flow):
        return NormflowsLayer(model, context)
    raise TypeError(
        f"expected a NormalizingFlow, MultiscaleFlow or Flow of normflows, got {type(model).__name__}; "
        "type wrap(model) with the whole model instead"
    )


class NormflowsModel(Adapted):
    """A NormalizingFlow, with its base distribution; contexts go to all of a conditional one, labels to its base."""

    def __init__(self, module: nn.Module, context: Context = None) -> None:
        super().__init__(module, context)
        if context is not None and not isinstance(
            module, (ConditionalNormalizingFlow, ClassCondFlow)
        ):
            raise TypeError(
                f"expected no context: a {type(module).__name__} takes none; type wrap(model) instead"
            )

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            if isinstance(self.module, NormalizingFlow):
                return self.module.inverse_and_log_det(x, *self._condition())
            return _applied([flow.inverse for flow in reversed(self._flows())], x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            if isinstance(self.module, NormalizingFlow):
                return self.module.forward_and_log_det(z, *self._condition())
            return _applied(self._flows(), z)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), by the model's own base distribution.

        Raises:
            ValueError: if a class-conditional base is asked without labels.
        """
        if isinstance(self.module, ClassCondFlow):
            if self.context is None:
                raise ValueError(
                    "expected the class labels of x: type wrap(model, context=y) instead"
                )
        # not the library's log_prob: MemorySaving puts its own forward_and_log_det in place
        z, log_det = self.forward_and_log_det(x)
        return self._base_log_prob(z) + log_det

    def _base_log_prob(self, z: Tensor) -> Tensor:
        condition = self._condition()
        if isinstance(self.module, ClassCondFlow):
            condition = (self.context,)
        return self.module.q0.log_prob(z, *condition)  # type: ignore[operator, union-attr]

    def layers(self) -> tuple[Invertible, ...]:
        """The flows, flat, from data to latent, in this model's context."""
        context = self._condition()[0] if self._condition() else None
        layers = [layer for flow in reversed(self._flows()) for layer in chain_of(flow)]
        return tuple(layer if context is None else layer.with_context(context) for layer in layers)

    def _condition(self) -> tuple[Any, ...]:
        takes = isinstance(self.module, ConditionalNormalizingFlow) and self.context is not None
        return (self.context,) if takes else ()

    def _flows(self) -> list[Any]:
        return list(self.module.flows)  # type: ignore[arg-type]


def _applied(functions: Iterable[Any], value: Tensor) -> tuple[Tensor, Tensor]:
    """One function after the other, and the sum of their log-determinants."""
    total = value.new_zeros(len(value))
    for function in functions:
        value, log_det = function(value)
        total = total + log_det
    return value, total
