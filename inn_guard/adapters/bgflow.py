"""bgflow: its flows and Boltzmann generators, configurations x -> latent z.

A flow of bgflow is called as ``flow(*ys, inverse=False) -> (*xs, dlogp)`` with dlogp of shape
(B, 1). It maps latents to configurations, so that its inverse is the map x -> z. How many tensors
it takes and returns shows when it is tried on a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.adapters.captured_modules import Closure
from inn_guard.adapters.conventions.calls import Call, Pair
from inn_guard.adapters.conventions.recognise import recognise
from inn_guard.adapters.conventions.recognised import Recognised
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Context, Invertible, InvertibleWrapper
from inn_guard.core.tensors import concatenate_flat

__all__ = ["BoltzmannGenerator", "adapt"]


def adapt(model: nn.Module, context: Context = None, x: Any = None) -> Invertible:
    """A flow, or a Boltzmann generator with its prior, as an Invertible.

    Args:
        model: a ``Flow`` of bgflow or a ``BoltzmannGenerator``.
        context: none is taken by flows of bgflow.
        x: configurations, (B, *data), or a tuple of tensors; as many as the flow returns.

    Raises:
        TypeError: if there are no configurations to try it on, or it does not run on them.
    """
    name = type(model).__name__
    if not isinstance(x, (Tensor, tuple, list)):
        raise TypeError(
            f"expected configurations to see how many tensors {name} maps; call wrap(flow, x=batch)"
            ", or wrap(flow, x=(first, second)) for several"
        )
    is_generator = hasattr(model, "prior") and hasattr(model, "flow")
    flow: Any = model.flow if is_generator else model
    code = "model.flow" if is_generator else "model"
    given = Pair(Call(Closure(flow), code, {"inverse": True}), Call(Closure(flow), code))
    flow = recognise(flow, x, context, given=given)
    return BoltzmannGenerator(flow, model.prior, name) if is_generator else flow


class BoltzmannGenerator(InvertibleWrapper):
    """A flow with the prior that its latents are drawn from.

    Attributes:
        prior: has ``sample(n)`` and ``energy(*z)``, which is -log p(z), (B, 1).
    """

    def __init__(self, flow: Recognised, prior: Any, name: str) -> None:
        super().__init__(flow)
        self.prior = prior
        self._name = name

    def base(self) -> BaseDistribution:
        """The prior."""
        like = next(iter(self.inner.parameters()), torch.empty(0))

        def draw(n: int, context: Context) -> Tensor:
            drawn = self.prior.sample(n)
            return drawn if isinstance(drawn, Tensor) else concatenate_flat(drawn)

        return BaseDistribution(
            draw,
            like.detach().new_empty(0),
            description=f"prior ({type(self.prior).__name__})",
            log_density=self._log_prior,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,): minus the energy of the prior, plus the log-determinant."""
        z, log_det = self.inner.forward_and_log_det(x)
        return self._log_prior(z) + log_det

    def to_dtype(self, dtype: torch.dtype) -> BoltzmannGenerator:
        """A copy of flow and prior in ``dtype``."""
        converted = super().to_dtype(dtype)
        converted.prior = copy.deepcopy(self.prior).to(dtype)
        return converted

    def pack(self, *tensors: Tensor) -> Tensor:
        """Several tensors (B, ...) as the one that the flow takes, (B, D).

        Raises:
            TypeError: if it maps one tensor.
        """
        join = getattr(self.inner, "pack", None)
        if join is None:
            raise TypeError(f"expected one tensor for {self.name}, got {len(tensors)}")
        return join(*tensors)

    @property
    def convention(self) -> str:
        """How the flow is called, as code, with what was measured."""
        flow: Any = self.inner
        return flow.convention

    @property
    def name(self) -> str:
        """The class name of the generator."""
        return self._name

    def _log_prior(self, z: Tensor) -> Tensor:
        flow: Any = self.inner
        parts = flow.latents(z)
        return -self.prior.energy(*parts).reshape(len(z))
