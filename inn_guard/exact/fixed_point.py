"""Fixed-point states: values as integers, in which every rule of exact mode computes.

A value is units * 2^(exponent - fraction_bits) with an integer ``units``. Next to it every entry
has an integer ``pushed`` >= 0 that takes the bits which a contraction pushes out of ``units``, and
from which an expansion takes them back.

Both integers are below 2^53 and lie in tensors of float64, where sums, products and quotients of
such numbers are exact and take a fraction of the time that 64-bit integers take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.tensors import dtype_name, finite_rows, norms

__all__ = [
    "LIMIT",
    "SEED",
    "TARGET",
    "Entries",
    "FixedPoint",
    "NoExactRule",
    "as_slice",
    "check_data",
    "close",
    "fraction_bits_for",
    "power_of_two",
]

#: ``pushed`` of every entry at the start. The first expansions take their bits from it, and the
#: decoder must find it again at the end.
SEED = (1 << 28) + 0x2F0F3A7
LIMIT = 2.0**51  #: below which ``units`` stay
TARGET = 49  #: bits of ``units`` after an exponent has been raised

FRACTION_BITS = 32  #: of data between 1 and 2^12
MORE_BITS = 12  #: fraction bits that are added for smaller data, or removed for larger ones
LARGE = 12  #: data below 2^LARGE have room for growth in a word
#: Relative distance of a rule's output from the layer's own above which the rule is not used. Far
#: more than rounding, far less than another map.
SAME_MAP = 1e-3

#: Indices into one flat sample. A slice needs no copy.
Entries = Tensor | slice


class NoExactRule(ValueError):
    """The rule of a layer does not hold for these data; the input of the layer is stored."""


@dataclass(frozen=True)
class FixedPoint:
    """A batch of values as integers.

    Attributes:
        units: (B, *data) float64, integers.
        pushed: (B, *data) float64, integers, not negative.
        exponent: (B, *data) int64, not negative; None where all are zero.
        fraction_bits: of values without an exponent.
        largest: an upper bound of |units|, so that they need not be searched in every layer.
        fullest: an upper bound of ``pushed``.
    """

    units: Tensor
    pushed: Tensor
    exponent: Tensor | None
    fraction_bits: int
    largest: float = math.inf
    fullest: float = math.inf

    @classmethod
    def of(cls, values: Tensor, fraction_bits: int) -> FixedPoint:
        """The nearest state to finite values; entries too large for a word get an exponent."""
        units, exponent = _nearest(values, fraction_bits)
        pushed = torch.full_like(units, SEED)
        return cls(
            units, pushed, exponent, fraction_bits, largest=_largest(units), fullest=float(SEED)
        )

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded, in contiguous memory with the strides of a new tensor.

        Convolutions round in another order for other strides, also where those are of size one.
        Zeros are positive, whatever the sign of ``units``: a network tells one from the other.
        """
        rounded = torch.empty(self.units.shape, dtype=dtype, device=self.units.device)
        self.write_values(rounded)
        return rounded

    def write_values(self, place: Tensor) -> None:
        """The values, rounded, into a tensor of this shape."""
        if self.exponent is None and place.dtype in (torch.float32, torch.float64):
            zero = torch.zeros((), dtype=torch.float64, device=place.device)
            torch.add(zero, self.units, alpha=2.0**-self.fraction_bits, out=place)
        else:
            place.copy_(self._times_unit(self.units, -1)).add_(0.0)

    def take(self, entries: Entries) -> FixedPoint:
        """The entries as a state of shape (B, n); for a slice, of views of this one."""
        return self.mapped(lambda t: _taken(t.flatten(1), entries))

    def put(self, entries: Entries, part: FixedPoint) -> FixedPoint:
        """The state with these entries replaced. Its tensors are overwritten."""
        exponent = None
        if self.exponent is not None or part.exponent is not None:
            exponent = _put(self.exponents(), entries, part.exponents())
        return FixedPoint(
            _put(self.units, entries, part.units),
            _put(self.pushed, entries, part.pushed),
            exponent,
            self.fraction_bits,
            largest=max(self.largest, part.largest),
            fullest=max(self.fullest, part.fullest),
        )

    def mapped(self, move: Callable[[Tensor], Tensor]) -> FixedPoint:
        """The state whose entries ``move`` has brought into another order or shape."""
        exponent = None if self.exponent is None else move(self.exponent)
        return replace(self, units=move(self.units), pushed=move(self.pushed), exponent=exponent)

    def clone(self) -> FixedPoint:
        """A copy, as steps may overwrite the state that they get."""
        return self.mapped(torch.clone)

    def measured(self) -> FixedPoint:
        """The state with its bounds as tight as they can be."""
        return replace(self, largest=_largest(self.units), fullest=float(self.pushed.max()))

    def exponents(self) -> Tensor:
        """The exponents, zeros where there are none."""
        if self.exponent is None:
            return torch.zeros_like(self.units, dtype=torch.long)
        return self.exponent

    def in_units(self, values: Tensor) -> Tensor:
        """Values (float64) in units of this state, not rounded."""
        return self._times_unit(values, 1)

    def equals(self, other: FixedPoint) -> bool:
        """Whether all integers are the same."""
        return (
            torch.equal(self.units, other.units)
            and torch.equal(self.pushed, other.pushed)
            and torch.equal(self.exponents(), other.exponents())
        )

    def shows(self, values: Tensor) -> bool:
        """Whether the values of the state are these, up to rounding and its own resolution."""
        resolution = 2.0**-self.fraction_bits * math.sqrt(values[0].numel())
        return close(self.values(values.dtype), values, resolution=resolution)

    def pushed_bits(self) -> float:
        """Bits in ``pushed``, summed over all entries."""
        return float((self.pushed + 1).log2().sum())

    def _times_unit(self, values: Tensor, sign: int) -> Tensor:
        if self.exponent is None:
            return values * 2.0 ** (sign * self.fraction_bits)
        return values * power_of_two(sign * (self.fraction_bits - self.exponent))


def check_data(x: Any) -> None:
    """Check that a batch can be converted to fixed point.

    Raises:
        TypeError: if it is no floating-point tensor.
        ValueError: if it is empty or not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = dtype_name(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected a floating-point tensor, got {kind}; pass x.float()")
    if x.dim() < 1 or not x.numel():
        raise ValueError(f"expected at least one sample, got shape {tuple(x.shape)}")
    bad = int((~finite_rows(x)).sum())
    if bad:
        raise ValueError(
            f"expected finite data, got NaN or Inf in {bad} of {len(x)} samples; "
            "pass x[x.flatten(1).isfinite().all(1)]"
        )


def fraction_bits_for(x: Tensor) -> int:
    """How many fraction bits represent a batch: more for small data, fewer for large ones."""
    places = int(torch.frexp(x.abs().max().double()).exponent)
    more = min(max(-places, 0), MORE_BITS)
    fewer = min(max(places - LARGE, 0), MORE_BITS)
    return FRACTION_BITS + more - fewer


def close(a: Tensor, b: Tensor, *, resolution: float) -> bool:
    """Whether the finite rows of two results of one map agree up to rounding.

    Args:
        a: (B, *data).
        b: the same shape, or another one, which is not close.
        resolution: a distance that is accepted at any size.
    """
    if a.shape != b.shape:
        return False
    rows = finite_rows(a) & finite_rows(b)
    a, b = a[rows].double(), b[rows].double()
    return bool((norms(a - b) <= SAME_MAP * norms(b) + resolution).all())


def power_of_two(power: Tensor) -> Tensor:
    """2^power, float64, for integers from -1022 to 1023."""
    # by its bits: torch.ldexp and torch.pow may round
    return ((power + 1023) << 52).view(torch.float64)


def _largest(units: Tensor) -> float:
    if not units.numel():
        return 0.0
    low, high = torch.aminmax(units)
    return max(-float(low), float(high))


def _nearest(values: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor | None]:
    values = values.double()
    exponent = (torch.frexp(values).exponent.long() + fraction_bits - TARGET).clamp(min=0)
    if not bool(exponent.any()):
        return (values * 2.0**fraction_bits).round_(), None
    return (values * power_of_two(fraction_bits - exponent)).round_(), exponent


def as_slice(entries: Tensor) -> Entries:
    """The slice of these indices if they follow one another, else the indices themselves."""
    start = int(entries[0]) if len(entries) else 0
    following = torch.arange(start, start + len(entries), device=entries.device)
    if torch.equal(entries, following):
        return slice(start, start + len(entries))
    return entries


def _taken(flat: Tensor, entries: Entries) -> Tensor:
    if isinstance(entries, slice):
        return flat[:, entries]
    return flat.index_select(1, entries)


def _put(t: Tensor, entries: Entries, part: Tensor) -> Tensor:
    flat, part = t.flatten(1), part.flatten(1)
    if not isinstance(entries, slice):
        return flat.index_copy_(1, entries, part).reshape(t.shape)
    place = flat[:, entries]
    # a part that has been computed in place is there already
    if place.data_ptr() != part.data_ptr():
        place.copy_(part)
    return flat.reshape(t.shape)
