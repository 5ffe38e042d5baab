"""InverseLayer: any bijective map in the other direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inn_guard.core.invertible import DerivedMap, Invertible
from inn_guard.core.layer_jacobian import Castable, LayerJacobian, Selectable

__all__ = ["InverseJacobian", "InverseLayer", "inverse_chain"]


class InverseLayer(DerivedMap):
    """The inverse of a map as a map: forward is ``inner.inverse`` and inverse is ``inner.forward``.

    Args:
        inner: a bijective map.

    Raises:
        ValueError: if it is injective only.

    >>> from inn_guard.layers.permutation import Permutation
    >>> layer = InverseLayer(Permutation(torch.tensor([2, 0, 1])))
    >>> layer(torch.tensor([[30.0, 10.0, 20.0]])).tolist()
    [[10.0, 20.0, 30.0]]
    """

    def __init__(self, inner: Invertible) -> None:
        super().__init__(inner)
        if not inner.bijective:
            raise ValueError(
                f"expected a bijective map to invert, got {inner.name}, which is injective only"
            )

    def forward(self, x: Tensor) -> Tensor:
        """z = inner^-1(x), (B, *latent)."""
        return self.inner.inverse(x)

    def inverse(self, z: Tensor) -> Tensor:
        """x = inner(z), (B, *data)."""
        return self.inner(z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """inner^-1(x) and its own log-determinant, (B,)."""
        return self.inner.inverse_and_log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """inner(z) and its log-determinant, (B,)."""
        return self.inner.forward_and_log_det(z)

    def layers(self) -> tuple[Invertible, ...]:
        """The inner layers in reverse order, each inverted; () if the inner map is opaque."""
        return inverse_chain(self.inner.layers())

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The Jacobian of the inner map at inner^-1(x), with the directions exchanged."""
        return InverseJacobian.at(self.inner, x.detach())

    def with_cached_conditioner(self, state: Tensor) -> InverseLayer:
        """The inverse of the inner map with its conditioner evaluated once."""
        return self.rewrapped(self.inner.with_cached_conditioner(state))

    @property
    def name(self) -> str:
        """What a report calls it: "inverse" and the inner map's name."""
        return f"inverse {self.inner.name}"


def inverse_chain(layers: Sequence[Invertible]) -> tuple[InverseLayer, ...]:
    """The inverse of a chain of layers: the inverse of each, last one first."""
    return tuple(InverseLayer(layer) for layer in reversed(layers))


class InverseJacobian:
    """The Jacobian of the inverse of a map, from the Jacobian of the map at x.

    Args:
        jacobian: of x -> z, at x.
        x: the value of the inverse map at z.
    """

    def __init__(self, jacobian: LayerJacobian, x: Tensor) -> None:
        self.output = x
        self._jacobian = jacobian
        self.jvp, self.vjp = jacobian.inverse_jvp, jacobian.inverse_vjp
        self.inverse_jvp, self.inverse_vjp = jacobian.jvp, jacobian.vjp

    def select(self, rows: Tensor) -> InverseJacobian | None:
        """The Jacobian of these rows; None where that of the map cannot select them."""
        if not isinstance(self._jacobian, Selectable):
            return None
        jacobian = self._jacobian.select(rows)
        return None if jacobian is None else InverseJacobian(jacobian, self.output[rows])

    def in_dtype(self, dtype: torch.dtype) -> InverseJacobian | None:
        """The Jacobian with its large products in ``dtype``; None where it has none."""
        if not isinstance(self._jacobian, Castable):
            return None
        jacobian = self._jacobian.in_dtype(dtype)
        return None if jacobian is None else InverseJacobian(jacobian, self.output)

    @classmethod
    def at(cls, inner: Invertible, z: Tensor) -> InverseJacobian:
        """The Jacobian of ``inner.inverse`` at z."""
        with torch.no_grad():
            x = inner.inverse(z)
        return cls(inner.linearize(x), x)
