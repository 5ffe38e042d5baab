"""Multiscale architectures in one tensor: finished latents in front, what is still worked on behind.

After the first split the state of the chain is a flat vector [finished..., remaining]. Every later layer is an
``OnRemaining``: it acts on the tail of that vector and leaves the rest. So the chain stays flat, one tensor in and one
out, and the result is the concatenation of all scales' latents, in the order in which they were finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.layers.linear_tangent import LinearTangent, Product
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
        """[finished, remaining], (B, D)."""
        remaining, finished = x.split(Halves().sizes(self.shape[0]), dim=1)
        return torch.cat([finished.flatten(1), remaining.flatten(1)], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """The two halves back in their place."""
        kept, out = Halves().sizes(self.shape[0])
        rest = self.shape[1:]
        finished, remaining = z.split([out * math.prod(rest), kept * math.prod(rest)], dim=1)
        return torch.cat(
            [remaining.reshape(-1, kept, *rest), finished.reshape(-1, out, *rest)], dim=1
        )

    def remaining_shape(self) -> tuple[int, ...]:
        """Of one sample's first half."""
        return (Halves().sizes(self.shape[0])[0], *self.shape[1:])


class OnRemaining(Invertible):
    """A layer that acts on the last entries of a flat vector x (B, D) and leaves the first ones as they are.

    Args:
        layer: maps (B, *shape) to (B, *latent_shape).
        shape: how the last entries are laid out for it.
        latent_shape: of its output, with as many entries; ``shape`` unless given.
    """

    def __init__(
        self, layer: Invertible, *, shape: Sequence[int], latent_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.shape = tuple(shape)
        self.latent_shape = self.shape if latent_shape is None else tuple(latent_shape)
        if not layer.bijective or math.prod(self.shape) != math.prod(self.latent_shape):
            raise ValueError(
                f"expected a bijective layer of as many outputs as inputs: {self.shape}, {self.latent_shape}"
            )
        self.size = math.prod(self.shape)

    @property
    def name(self) -> str:
        """The name of the layer within."""
        return self.layer.name

    def forward(self, x: Tensor) -> Tensor:
        """[finished, F(remaining)]."""
        finished, remaining = self._opened(x, self.shape)
        return torch.cat([finished, self._conditioned_layer()(remaining).flatten(1)], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """[finished, F^-1(remaining)]."""
        finished, remaining = self._opened(z, self.latent_shape)
        return torch.cat([finished, self._conditioned_layer().inverse(remaining).flatten(1)], dim=1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant of the layer within."""
        finished, remaining = self._opened(x, self.shape)
        z, log_det = self._conditioned_layer().forward_and_log_det(remaining)
        return torch.cat([finished, z.flatten(1)], dim=1), log_det

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and the inverse's log-determinant of the layer within."""
        finished, remaining = self._opened(z, self.latent_shape)
        x, log_det = self._conditioned_layer().inverse_and_log_det(remaining)
        return torch.cat([finished, x.flatten(1)], dim=1), log_det

    def with_cached_conditioner(self, state: Tensor) -> OnRemaining:
        """The layer within, primed at what remains; itself if that changes its shape."""
        if self.shape != self.latent_shape:
            return self
        layer = self._conditioned_layer()
        with_cached_conditioner = layer.with_cached_conditioner(self._opened(state, self.shape)[1])
        return (
            self
            if with_cached_conditioner is layer
            else OnRemaining(with_cached_conditioner, shape=self.shape)
        )

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The identity on what is finished, the layer's own tangent on what remains."""
        finished, remaining = self._opened(x.detach(), self.shape)
        inner = self._conditioned_layer().linearize(remaining)
        data, latent = self.shape, self.latent_shape
        return LinearTangent(
            output=torch.cat([finished, inner.output.flatten(1)], dim=1),
            jvp=self._on_tail(inner.jvp, data),
            vjp=self._on_tail(inner.vjp, latent),
            inverse_jvp=self._on_tail(inner.inverse_jvp, latent),
            inverse_vjp=self._on_tail(inner.inverse_vjp, data),
            shape=x.shape,
        )

    def _conditioned_layer(self) -> Invertible:
        return self.layer if self.context is None else self.layer.with_context(self.context)

    def _opened(self, x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        finished = x.shape[-1] - self.size
        if finished < 0:
            raise ValueError(f"expected at least {self.size} entries a sample, got {x.shape[-1]}")
        head, tail = x.split([finished, self.size], dim=-1)
        return head, tail.unflatten(-1, shape)

    def _on_tail(self, product: Product, shape: tuple[int, ...]) -> Product:
        def apply(v: Tensor) -> Tensor:
            head, tail = self._opened(v, shape)
            return torch.cat([head, product(tail).flatten(v.dim() - 1)], dim=-1)

        return apply
