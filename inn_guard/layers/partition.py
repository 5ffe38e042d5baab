"""Which part of its input a coupling layer leaves as it is, and which part it transforms."""

from __future__ import annotations

import abc
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Halves", "Leading", "Mask", "Partition"]


@runtime_checkable
class Partition(Protocol):
    """Splits x (B, C, ...) into an identity part and a transformed part, and joins them again.

    Every tensor may carry more leading dimensions than the (B, C, ...) that ``dims`` counts.
    """

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(identity part, transformed part) of x; its last ``dims`` dimensions are (B, C, ...)."""
        ...

    def join(self, identity: Tensor, transformed: Tensor, *, dims: int) -> Tensor:
        """The x that splits into ``identity`` and ``transformed``."""
        ...

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """A parameter of the transformed part, with ``neutral`` where nothing is transformed."""
        ...


class _TwoBlocks(nn.Module, abc.ABC):
    """Two consecutive blocks of channels, one of which is the identity part.

    Args:
        swapped: transform the first block instead of the second.
    """

    def __init__(self, *, swapped: bool) -> None:
        super().__init__()
        self.swapped = swapped

    @abc.abstractmethod
    def first_size(self, channels: int) -> int:
        """Number of channels of the first block."""

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(identity part, transformed part) of x; both are views of it."""
        dim = 1 - dims
        channels = x.shape[dim]
        size = self.first_size(channels)
        # ``split`` takes four times as long as ``narrow``, which deep nets notice
        first, second = x.narrow(dim, 0, size), x.narrow(dim, size, channels - size)
        if self.swapped:
            return second, first
        return first, second

    def join(self, identity: Tensor, transformed: Tensor, *, dims: int) -> Tensor:
        """The x whose two blocks of channels these are."""
        if self.swapped:
            return torch.cat([transformed, identity], dim=1 - dims)
        return torch.cat([identity, transformed], dim=1 - dims)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter itself: it has entries for the transformed part only."""
        return parameter


class Halves(_TwoBlocks):
    """The first half of the channels (features) is the identity part, the second is transformed.

    Of an odd number of channels the first half has one more.

    Args:
        swapped: transform the first half instead.

    >>> identity, transformed = Halves().split(torch.arange(3.0)[None], dims=2)
    >>> identity.tolist(), transformed.tolist()
    ([[0.0, 1.0]], [[2.0]])
    """

    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__(swapped=swapped)

    def first_size(self, channels: int) -> int:
        """Number of channels of the first block: half of them, rounded up."""
        return (channels + 1) // 2

    def sizes(self, channels: int) -> tuple[int, int]:
        """Channels of the identity and of the transformed part: the network's input and output."""
        first = self.first_size(channels)
        if self.swapped:
            return channels - first, first
        return first, channels - first


class Leading(_TwoBlocks):
    """The first ``count`` channels (features) are the identity part, the others are transformed.

    Args:
        count: channels of the first block.
        swapped: transform the first block instead.

    >>> identity, transformed = Leading(1).split(torch.arange(3.0)[None], dims=2)
    >>> identity.tolist(), transformed.tolist()
    ([[0.0]], [[1.0, 2.0]])
    """

    def __init__(self, count: int, *, swapped: bool = False) -> None:
        super().__init__(swapped=swapped)
        self.count = count

    def first_size(self, channels: int) -> int:
        """Number of channels of the first block: ``count``, however many there are."""
        return self.count


class Mask(nn.Module):
    """Entries where ``mask`` is true are the identity part, the others are transformed.

    Both parts have the shape of x, with zeros in the other part's place.

    Args:
        mask: boolean, of the shape of one sample or broadcasting to it.

    Raises:
        TypeError: if the mask is not boolean.

    >>> identity, transformed = Mask(torch.tensor([True, False])).split(torch.ones(1, 2), dims=2)
    >>> identity.tolist(), transformed.tolist()
    ([[1.0, 0.0]], [[0.0, 1.0]])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a boolean mask, got {mask.dtype}; pass mask.bool() instead")
        self.register_buffer("mask", mask)

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(x in the identity part, x in the transformed part), zero elsewhere."""
        return torch.where(self.mask, x, 0), torch.where(self.mask, 0, x)

    def join(self, identity: Tensor, transformed: Tensor, *, dims: int) -> Tensor:
        """The x that has the entries of each part in its place."""
        return torch.where(self.mask, identity, transformed)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter in the transformed part, ``neutral`` elsewhere."""
        return torch.where(self.mask, neutral, parameter)
