"""Which half of its input a coupling layer keeps, and which it changes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = ["Halves", "Leading", "Mask", "Partition"]


@runtime_checkable
class Partition(Protocol):
    """Splits x (B, C, ...) into a kept and a changed part and joins them again.

    Every tensor may carry more leading dimensions than the (B, C, ...) that ``dims`` counts.
    """

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(kept, changed) of x, the last ``dims`` dimensions of which are (B, C, ...)."""
        ...

    def join(self, kept: Tensor, changed: Tensor, *, dims: int) -> Tensor:
        """The x that splits into ``kept`` and ``changed``."""
        ...

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """A parameter of the changed part, with ``neutral`` wherever nothing is changed."""
        ...


class Halves(nn.Module):
    """The first half of the channels (features) is kept, the second changed; of an odd number the first has one more.

    Args:
        swapped: keep the second half and change the first.

    >>> kept, changed = Halves().split(torch.arange(3.0)[None], dims=2)
    >>> kept.tolist(), changed.tolist()
    ([[0.0, 1.0]], [[2.0]])
    """

    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        self.swapped = swapped

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(kept, changed)."""
        first, second = _cut(x, (x.shape[1 - dims] + 1) // 2, dim=1 - dims)
        return (second, first) if self.swapped else (first, second)

    def join(self, kept: Tensor, changed: Tensor, *, dims: int) -> Tensor:
        """The two halves along dimension 1."""
        return torch.cat([changed, kept] if self.swapped else [kept, changed], dim=1 - dims)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter itself: it has entries for changed ones only."""
        return parameter

    def sizes(self, channels: int) -> tuple[int, int]:
        """How many of ``channels`` are kept and how many changed: the network's input and output."""
        first, second = (channels + 1) // 2, channels // 2
        return (second, first) if self.swapped else (first, second)


class Leading(nn.Module):
    """The first ``count`` channels (features) are kept, the others changed.

    Args:
        count: how many come first.
        swapped: change the first ones and keep the others.

    >>> kept, changed = Leading(1).split(torch.arange(3.0)[None], dims=2)
    >>> kept.tolist(), changed.tolist()
    ([[0.0]], [[1.0, 2.0]])
    """

    def __init__(self, count: int, *, swapped: bool = False) -> None:
        super().__init__()
        self.count, self.swapped = count, swapped

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(kept, changed)."""
        first, second = _cut(x, self.count, dim=1 - dims)
        return (second, first) if self.swapped else (first, second)

    def join(self, kept: Tensor, changed: Tensor, *, dims: int) -> Tensor:
        """The two parts along dimension 1."""
        return torch.cat([changed, kept] if self.swapped else [kept, changed], dim=1 - dims)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter itself: it has entries for changed ones only."""
        return parameter


class Mask(nn.Module):
    """Entries where ``mask`` is true are kept, the others changed; both parts have the whole shape, zero elsewhere.

    Args:
        mask: boolean, of the shape of one sample or broadcasting to it.

    >>> kept, changed = Mask(torch.tensor([True, False])).split(torch.ones(1, 2), dims=2)
    >>> kept.tolist(), changed.tolist()
    ([[1.0, 0.0]], [[0.0, 1.0]])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a boolean mask, got {mask.dtype}; use mask.bool()")
        self.register_buffer("mask", mask)

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(x where kept, x where changed)."""
        return torch.where(self.mask, x, 0), torch.where(self.mask, 0, x)

    def join(self, kept: Tensor, changed: Tensor, *, dims: int) -> Tensor:
        """Kept entries from the one, changed entries from the other."""
        return torch.where(self.mask, kept, changed)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter where x is changed, ``neutral`` elsewhere."""
        return torch.where(self.mask, neutral, parameter)


def _cut(x: Tensor, count: int, *, dim: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` channels and the others: ``split`` takes four times as long, which deep nets notice."""
    return x.narrow(dim, 0, count), x.narrow(dim, count, x.shape[dim] - count)
