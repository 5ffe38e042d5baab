"""Multiscale architectures in one tensor: finished latents first, the remaining state last.

After the first split the state of the chain is a flat vector [finished..., remaining]. Every later
layer is an ``OnRemaining``: it acts on the tail of that vector and leaves the rest. So the chain
stays flat, and its result is the concatenation of all scales' latents in the order in which they
were finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inn_guard.core.invertible import DerivedMap, Invertible
from inn_guard.core.layer_jacobian import LayerJacobian, Map
from inn_guard.layers.linear import LinearMapJacobian
from inn_guard.layers.partition import Halves
from inn_guard.layers.reshape import Rearrangement

__all__ = ["FactorOut", "OnRemaining"]


class FactorOut(Rearrangement):
    """An image x (B, C, H, W) becomes the flat vector [second half of its channels, first half].

    The second half is finished, the first remains; log|det J| = 0.

    Args:
        shape: of one sample.

    >>> FactorOut([2, 1, 1])(torch.tensor([[1.0, 2.0]]).reshape(1, 2, 1, 1)).tolist()
    [[2.0, 1.0]]
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """The flat vector [finished, remaining], (B, D)."""
        remaining, finished = x.split(Halves().sizes(self.shape[0]), dim=1)
        return torch.cat([finished.flatten(1), remaining.flatten(1)], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """The image with both halves of its channels back in their place, (B, C, H, W)."""
        kept, out = Halves().sizes(self.shape[0])
        pixels = self.shape[1:]
        count = math.prod(pixels)
        finished, remaining = z.split([out * count, kept * count], dim=1)
        first = remaining.reshape(-1, kept, *pixels)
        second = finished.reshape(-1, out, *pixels)
        return torch.cat([first, second], dim=1)

    def remaining_shape(self) -> tuple[int, ...]:
        """Shape of the first half of one sample's channels."""
        return (Halves().sizes(self.shape[0])[0], *self.shape[1:])


class OnRemaining(DerivedMap):
    """A layer that acts on the last entries of a flat vector x (B, D) and leaves the first ones.

    Args:
        inner: the layer, which maps (B, *shape) to (B, *latent_shape).
        shape: of the last entries as the layer takes them.
        latent_shape: of its output, with as many entries. Default: ``shape``.

    Raises:
        ValueError: if the layer is not bijective or the shapes have different numbers of entries.
    """

    def __init__(
        self, inner: Invertible, *, shape: Sequence[int], latent_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__(inner)
        self.shape = tuple(shape)
        self.latent_shape = self.shape if latent_shape is None else tuple(latent_shape)
        self.size = math.prod(self.shape)
        if not inner.bijective or self.size != math.prod(self.latent_shape):
            raise ValueError(
                "expected a bijective layer with as many outputs as inputs; "
                f"got {inner.name} with shapes {self.shape} and {self.latent_shape}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """z = [finished, F(remaining)], (B, D)."""
        finished, remaining = self._split(x, self.shape)
        return torch.cat([finished, self.inner(remaining).flatten(1)], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """x = [finished, F^-1(remaining)], (B, D)."""
        finished, remaining = self._split(z, self.latent_shape)
        return torch.cat([finished, self.inner.inverse(remaining).flatten(1)], dim=1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant of the inner layer."""
        finished, remaining = self._split(x, self.shape)
        z, log_det = self.inner.forward_and_log_det(remaining)
        return torch.cat([finished, z.flatten(1)], dim=1), log_det

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and the log-determinant of the inner layer's inverse."""
        finished, remaining = self._split(z, self.latent_shape)
        x, log_det = self.inner.inverse_and_log_det(remaining)
        return torch.cat([finished, x.flatten(1)], dim=1), log_det

    def with_cached_conditioner(self, state: Tensor) -> OnRemaining:
        """The layer with its inner conditioner evaluated once, at what remains of ``state``.

        A layer that changes the shape stays as it is: ``state`` may be an input or an output.
        """
        if self.shape != self.latent_shape:
            return self
        _, remaining = self._split(state, self.shape)
        return self.rewrapped(self.inner.with_cached_conditioner(remaining))

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The identity on what is finished, the inner layer's Jacobian on what remains."""
        finished, remaining = self._split(x.detach(), self.shape)
        inner = self.inner.linearize(remaining)
        data, latent = self.shape, self.latent_shape
        return LinearMapJacobian(
            output=torch.cat([finished, inner.output.flatten(1)], dim=1),
            jvp=self._on_tail(inner.jvp, data),
            vjp=self._on_tail(inner.vjp, latent),
            inverse_jvp=self._on_tail(inner.inverse_jvp, latent),
            inverse_vjp=self._on_tail(inner.inverse_vjp, data),
            shape=x.shape,
        )

    def _split(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(what is finished, flat; what remains, in ``shape``) along the last dimension."""
        finished = x.shape[-1] - self.size
        if finished < 0:
            raise ValueError(f"expected at least {self.size} entries per sample, got {x.shape[-1]}")
        head, tail = x.split([finished, self.size], dim=-1)
        return head, tail.unflatten(-1, shape)

    def _on_tail(self, product: Map, shape: tuple[int, ...]) -> Map:
        """``product``, which takes vectors (..., B, *shape), on the tails of flat vectors."""

        def apply(v: Tensor) -> Tensor:
            head, tail = self._split(v, shape)
            return torch.cat([head, product(tail).flatten(v.dim() - 1)], dim=-1)

        return apply
