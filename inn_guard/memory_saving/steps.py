"""Steps of a walk: a layer taken from data to latent, or from latent to data, behind one face."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from inn_guard.core.invertible import Invertible

__all__ = ["Backward", "Forward", "Measure", "Step", "output_and_log_det", "output_only"]

Self = TypeVar("Self", bound="Step")


@dataclass(frozen=True)
class Step(abc.ABC):
    """One layer in the direction of the walk.

    Attributes:
        layer: the layer.
    """

    layer: Invertible

    @property
    @abc.abstractmethod
    def invertible(self) -> bool:
        """Whether ``undo`` gives back the input, rather than a projection of it."""

    @abc.abstractmethod
    def apply(self, state: Tensor) -> Tensor:
        """The output."""

    @abc.abstractmethod
    def apply_with_log_det(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the logarithm of how it changes volumes, (B,)."""

    @abc.abstractmethod
    def undo(self, state: Tensor) -> Tensor:
        """The input that gives this output."""

    def of(self: Self, layer: Invertible) -> Self:
        """The same direction through another layer."""
        return replace(self, layer=layer)


class Forward(Step):
    """x -> z."""

    @property
    def invertible(self) -> bool:
        """Of an injective map, inverse(forward(x)) is a projection of x."""
        return self.layer.bijective

    def apply(self, state: Tensor) -> Tensor:
        """z = F(x)."""
        return self.layer(state)

    def apply_with_log_det(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """z and log|det dz/dx|."""
        return self.layer.forward_and_log_det(state)

    def undo(self, state: Tensor) -> Tensor:
        """x = F^-1(z)."""
        return self.layer.inverse(state)


class Backward(Step):
    """z -> x."""

    @property
    def invertible(self) -> bool:
        """Always, forward(inverse(z)) being z for injective maps too."""
        return True

    def apply(self, state: Tensor) -> Tensor:
        """x = F^-1(z)."""
        return self.layer.inverse(state)

    def apply_with_log_det(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """x and log|det dx/dz|."""
        return self.layer.inverse_and_log_det(state)

    def undo(self, state: Tensor) -> Tensor:
        """z = F(x)."""
        return self.layer(state)


Measure = Callable[
    [Step, Tensor], tuple[Tensor, ...]
]  #: what of a step is computed: (output,) or (output, log_det)


def output_only(step: Step, state: Tensor) -> tuple[Tensor, ...]:
    """(output,)."""
    return (step.apply(state),)


def output_and_log_det(step: Step, state: Tensor) -> tuple[Tensor, ...]:
    """(output, log_det)."""
    return step.apply_with_log_det(state)
