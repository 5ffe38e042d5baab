"""Maps that only move entries: squeeze and flatten; and zero padding, which is injective only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian, Map
from inn_guard.layers.linear import PermutationJacobian

__all__ = ["Flatten", "Rearrangement", "Squeeze", "ZeroPadding", "squeezed_shape"]


class Rearrangement(Invertible):
    """A map that only moves entries: its transpose is its inverse, its log-determinant zero."""

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log-determinant 0, (B,)."""
        return self.forward(x), x.new_zeros(len(x))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and the log-determinant 0, (B,)."""
        return self.inverse(z), z.new_zeros(len(z))

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The Jacobian at x: the rearrangement itself."""
        output = self.forward(x.detach())
        forward = _over_leading(self.forward, dims=x.dim())
        inverse = _over_leading(self.inverse, dims=output.dim())
        return PermutationJacobian.of_moves(x.detach(), forward, inverse, output=output)


class Squeeze(Rearrangement):
    """(B, C, H, W) -> (B, C f^2, H/f, W/f): every block of f x f pixels becomes channels.

    log|det J| = 0.

    Args:
        factor: f.

    >>> Squeeze()(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 12, 4, 4])
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Move every block of f x f pixels into the channels.

        Raises:
            ValueError: if height or width is not a multiple of the factor.
        """
        if x.dim() != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"expected (B, C, H, W) with H and W multiples of {self.factor}, "
                f"got {tuple(x.shape)}"
            )
        batch, channels, height, width = x.shape
        f = self.factor
        if not x.numel():
            # pixel_unshuffle leaves the shape of an empty batch as it is
            return x.reshape(batch, channels * f**2, height // f, width // f)
        return functional.pixel_unshuffle(x, f)

    def inverse(self, z: Tensor) -> Tensor:
        """Move the channels back into blocks of f x f pixels."""
        batch, channels, height, width = z.shape
        f = self.factor
        if not z.numel():
            return z.reshape(batch, channels // f**2, height * f, width * f)
        return functional.pixel_shuffle(z, f)


def squeezed_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape of one image (C, H, W) after a squeeze by 2: (4 C, H/2, W/2).

    Raises:
        ValueError: if height or width is odd.

    >>> squeezed_shape((3, 32, 32))
    (12, 16, 16)
    """
    channels, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(
            f"expected an even height and width at every level, got {height} x {width}; "
            "use fewer levels"
        )
    return 4 * channels, height // 2, width // 2


class Flatten(Rearrangement):
    """(B, *shape) -> (B, D); log|det J| = 0.

    Args:
        shape: of one sample.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """x as vectors, (B, D)."""
        return x.flatten(1)

    def inverse(self, z: Tensor) -> Tensor:
        """z in the shape of the data, (B, *shape)."""
        return z.reshape(len(z), *self.shape)


class ZeroPadding(Invertible):
    """The inverse (latent to data) appends channels of zeros; the forward map drops them.

    Injective only: forward(inverse(z)) = z, and inverse(forward(x)) is the projection of x onto the
    subspace where those channels are zero.

    Args:
        channels: number of channels that are appended in dimension 1.

    >>> ZeroPadding(1).inverse(torch.tensor([[1.0, 2.0]])).tolist()
    [[1.0, 2.0, 0.0]]
    """

    bijective = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"expected at least one channel to append, got {channels}")
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """x without its last channels."""
        if x.shape[1] <= self.channels:
            raise ValueError(f"expected more than {self.channels} channels, got {x.shape[1]}")
        return x[:, : x.shape[1] - self.channels]

    def inverse(self, z: Tensor) -> Tensor:
        """z followed by channels of zeros."""
        return torch.cat([z, z.new_zeros(len(z), self.channels, *z.shape[2:])], dim=1)


def _over_leading(function: Map, *, dims: int) -> Map:
    """``function`` of (B, ...) applied to vectors with more leading dimensions."""

    def apply(v: Tensor) -> Tensor:
        leading = v.dim() - dims
        if leading == 0:
            return function(v)
        return function(v.flatten(0, leading)).unflatten(0, v.shape[: leading + 1])

    return apply
