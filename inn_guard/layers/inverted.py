"""InverseLayer: any bijective map run the other way round."""

from __future__ import annotations

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian

__all__ = ["InverseLayer", "InvertedTangent"]


class InverseLayer(Invertible):
    """The inverse of a map as a map: forward is ``inner.inverse`` and inverse is ``inner.forward``, with its context.

    Args:
        inner: a bijective map.

    Raises:
        ValueError: if it is injective only.

    >>> from inn_guard.layers.permutation import Permutation
    >>> InverseLayer(Permutation(torch.tensor([2, 0, 1])))(torch.tensor([[30.0, 10.0, 20.0]])).tolist()
    [[10.0, 20.0, 30.0]]
    """

    def __init__(self, inner: Invertible) -> None:
        super().__init__()
        if not inner.bijective:
            raise ValueError(
                f"expected a bijective map to invert, got {inner.name}, which is injective only"
            )
        self.inner = inner
        self.context = inner.context
        self.training = inner.training

    def forward(self, x: Tensor) -> Tensor:
        """z = inner^-1(x)."""
        return self._inner().inverse(x)

    def inverse(self, z: Tensor) -> Tensor:
        """x = inner(z)."""
        return self._inner()(z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """inner^-1(x) and its own log-determinant, (B,)."""
        return self._inner().inverse_and_log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """inner(z) and its log-determinant, (B,)."""
        return self._inner().forward_and_log_det(z)

    def layers(self) -> tuple[Invertible, ...]:
        """The inner layers in reverse order, each inverted; () if the inner map is opaque."""
        return tuple(InverseLayer(layer) for layer in reversed(self._inner().layers()))

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The tangent of the inner map at inner^-1(x), with the directions exchanged."""
        return InvertedTangent(self._inner(), x.detach())

    def with_cached_conditioner(self, state: Tensor) -> InverseLayer:
        """The inner map, primed, inverted."""
        inner = self._inner()
        with_cached_conditioner = inner.with_cached_conditioner(state)
        return self if with_cached_conditioner is inner else InverseLayer(with_cached_conditioner)

    def to_dtype(self, dtype: torch.dtype) -> InverseLayer:
        """The inner map's copy in ``dtype``, inverted."""
        return InverseLayer(self._inner().to_dtype(dtype))

    @property
    def name(self) -> str:
        """Inverse of the inner map's name."""
        return f"inverse {self.inner.name}"

    def _inner(self) -> Invertible:
        return self.inner.with_context(self.context)


class InvertedTangent:
    """The tangent of a map with forward and inverse products exchanged.

    Args:
        inner: the map.
        z: a value of it, (B, *latent).
    """

    def __init__(self, inner: Invertible, z: Tensor) -> None:
        with torch.no_grad():
            self.output = inner.inverse(z)
        tangent = inner.linearize(self.output)
        self.jvp, self.vjp = tangent.inverse_jvp, tangent.inverse_vjp
        self.inverse_jvp, self.inverse_vjp = tangent.jvp, tangent.vjp
