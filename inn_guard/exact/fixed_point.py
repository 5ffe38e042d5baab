"""Fixed-point states, and the bijections on them that every rule of exact mode is made of.

A value is units * 2^(exponent - fraction_bits) with an integer ``units``. Next to it every entry
has an integer ``pushed`` >= 0 that takes the bits which a contraction pushes out of ``units``, and
from which an expansion takes them back. Everything below is bijective on (units, pushed). What
cannot be computed from the result (spills of full words, changed exponents) is logged on a Tape.

The scale by num / den, both positive integers, is a change of the mixed radix::

    digit = pushed mod num                     pushed <- pushed div num
    mixed = (units mod den) * num + digit
    units <- (units div den) * num + mixed div den
    pushed <- pushed * den + mixed mod den

Its inverse is the same with num and den swapped. ``units`` is divided before it is multiplied, so
nothing but the result has to fit into a word.

References:
    Gradient-based Hyperparameter Optimization through Reversible Learning (Maclaurin, Duvenaud,
    Adams, 2015); iVPF: Numerical Invertible Volume Preserving Flow for Efficient Lossless
    Compression (Zhang, Kang, Ryder, Li, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.tensors import dtype_name, finite_rows, norms
from inn_guard.exact.tape import Packed, PackedMask, Tape

__all__ = [
    "SEED",
    "FixedPoint",
    "NoExactRule",
    "affine",
    "check_data",
    "close",
    "fraction_bits_for",
    "scale_by_ratio",
    "shear",
    "undo_affine",
    "undo_scale_by_ratio",
    "undo_shear",
]

#: ``pushed`` of every entry at the start. The first expansions take their bits from it, and the
#: decoder must find it again at the end.
SEED = (1 << 28) + 0x2F0F3A7
MANTISSA = 24  #: bits of a scale: float32 scales are met exactly
NEAR = 12  #: scales outside 2^-12 ... 2^12 are split into a power of two and a rest
LIMIT = 2.0**60  #: below which ``units`` stay
TARGET = 58  #: bits of ``units`` after an exponent has been raised
SPILL = 16  #: bits of an entry that are moved to the tape at once
STEP = 32  #: largest power of two in one change of the radix


FRACTION_BITS = 32  #: of data between 1 and 2^16
MORE_BITS = 12  #: fraction bits that are added for smaller data, or removed for larger ones
LARGE = 16  #: data below 2^LARGE have room for growth in a word
#: Relative distance of a rule's output from the layer's own above which the rule is not used. Far
#: more than rounding, far less than another map.
SAME_MAP = 1e-3


class NoExactRule(ValueError):
    """The rule of a layer does not hold for these data; the input of the layer is stored."""


@dataclass(frozen=True)
class FixedPoint:
    """A batch of values as integers.

    Attributes:
        units: (B, *data) int64.
        pushed: (B, *data) int64, not negative.
        exponent: (B, *data) int64, not negative; None where all are zero.
        fraction_bits: of values without an exponent.
    """

    units: Tensor
    pushed: Tensor
    exponent: Tensor | None
    fraction_bits: int

    @classmethod
    def of(cls, values: Tensor, fraction_bits: int) -> FixedPoint:
        """The nearest state to finite values; entries too large for a word get an exponent."""
        units, exponent = _nearest(values, fraction_bits)
        return cls(units, torch.full_like(units, SEED), exponent, fraction_bits)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded, in contiguous memory with the strides of a new tensor.

        Convolutions round in another order for other strides, also where those are of size one.
        """
        rounded = torch.empty(self.units.shape, dtype=dtype, device=self.units.device)
        return rounded.copy_(self._times_unit(self.units.double(), -1))

    def take(self, entries: Tensor) -> FixedPoint:
        """The entries (indices into one flat sample) as a state of shape (B, n)."""
        return self.mapped(lambda t: t.flatten(1).index_select(1, entries))

    def put(self, entries: Tensor, part: FixedPoint) -> FixedPoint:
        """The state with these entries replaced."""
        exponent = None
        if self.exponent is not None or part.exponent is not None:
            exponent = _replaced(self.exponents(), entries, part.exponents())
        units = _replaced(self.units, entries, part.units)
        pushed = _replaced(self.pushed, entries, part.pushed)
        return replace(self, units=units, pushed=pushed, exponent=exponent)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> FixedPoint:
        """The state whose entries ``move`` has brought into another order or shape."""
        exponent = None if self.exponent is None else move(self.exponent)
        return replace(self, units=move(self.units), pushed=move(self.pushed), exponent=exponent)

    def exponents(self) -> Tensor:
        """The exponents, zeros where there are none."""
        return torch.zeros_like(self.units) if self.exponent is None else self.exponent

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
        return float((self.pushed.double() + 1).log2().sum())

    def _times_unit(self, values: Tensor, sign: int) -> Tensor:
        if self.exponent is None:
            return values * 2.0 ** (sign * self.fraction_bits)
        return values * _power_of_two(sign * (self.fraction_bits - self.exponent))


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


def _nearest(values: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor | None]:
    values = values.double()
    exponent = (torch.frexp(values).exponent.long() + fraction_bits - TARGET).clamp(min=0)
    units = (values * _power_of_two(fraction_bits - exponent)).round().long()
    return units, exponent if bool(exponent.any()) else None


def _replaced(t: Tensor, entries: Tensor, part: Tensor) -> Tensor:
    return t.flatten(1).index_copy(1, entries, part.flatten(1)).reshape(t.shape)


def affine(
    state: FixedPoint, scale: Tensor | None, shift: Tensor | None, tape: Tape, *, divide: bool
) -> FixedPoint:
    """x -> x * scale + shift, or (x - shift) / scale if ``divide``.

    Args:
        state: x.
        scale: of the shape of x, not zero; None where it is one.
        shift: of the shape of x; None where it is zero.
        tape: for what cannot be computed from the result.
        divide: apply the inverse map instead.

    Raises:
        NoExactRule: if a scale is zero, or a scale or a shift is not finite.
    """
    if shift is not None and divide:
        state = _translate(state, -shift.double(), tape)
    if scale is not None:
        state = _rescale(state, scale, tape, divide=divide)
    if shift is not None and not divide:
        state = _translate(state, shift.double(), tape)
    return state


def undo_affine(
    state: FixedPoint, scale: Tensor | None, shift: Tensor | None, tape: Tape, *, divide: bool
) -> FixedPoint:
    """The x from which ``affine`` made this state, bit for bit."""
    if shift is not None and not divide:
        state = _undo_translate(state, shift.double(), tape)
    if scale is not None:
        state = _undo_rescale(state, scale, tape, divide=divide)
    if shift is not None and divide:
        state = _undo_translate(state, -shift.double(), tape)
    return state


def _translate(state: FixedPoint, shift: Tensor, tape: Tape) -> FixedPoint:
    low, high = (float(end) for end in torch.aminmax(shift))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NoExactRule("a shift is not finite")
    size = max(-low, high) * 2.0**state.fraction_bits
    if state.exponent is None and _size(state) + size < LIMIT:
        tape.push("exponents", None)
    else:
        state = _make_room(state, shift.abs(), torch.ones_like(shift), tape)
    return replace(state, units=state.units + _rounded(state.in_units(shift)))


def _undo_translate(state: FixedPoint, shift: Tensor, tape: Tape) -> FixedPoint:
    state = replace(state, units=state.units - _rounded(state.in_units(shift)))
    return _undo_make_room(state, tape)


def _rescale(state: FixedPoint, scale: Tensor, tape: Tape, *, divide: bool) -> FixedPoint:
    if _is_near(state, scale, divide=divide):
        state = _near_scale(state, scale, tape, divide=divide)
        tape.push("near", None)
        return state
    scale = scale.double()
    size = scale.abs()
    if not bool((scale.isfinite() & (size > 0)).all()):
        raise NoExactRule("a scale is zero or not finite")
    growth = size.reciprocal() if divide else size
    if not bool(growth.isfinite().all()):
        raise NoExactRule("a scale is too close to zero")
    num, den, power = _rational(size, divide=divide)
    state = _make_room(state, torch.zeros_like(size), growth.clamp(min=1), tape, power=power)
    state = scale_by_ratio(state, num, den, tape)
    return replace(state, units=state.units * _sign(scale))


def _undo_rescale(state: FixedPoint, scale: Tensor, tape: Tape, *, divide: bool) -> FixedPoint:
    if tape.events and tape.events[-1][0] == "near":
        tape.pop("near")
        return _undo_near_scale(state, scale, tape, divide=divide)
    scale = scale.double()
    num, den, power = _rational(scale.abs(), divide=divide)
    state = replace(state, units=state.units * _sign(scale))
    state = undo_scale_by_ratio(state, num, den, tape)
    return _undo_make_room(state, tape, power=power)


def _is_near(state: FixedPoint, scale: Tensor, *, divide: bool) -> bool:
    """Whether all scales are near one, and ``units * num`` fits into a word.

    Then ``scale_by_ratio`` needs one division, and shifts for all others.
    """
    if state.exponent is not None:
        return False
    low, high = (float(end) for end in torch.aminmax(scale.abs()))
    # NaN compares false
    if not (low >= 2.0**-NEAR and high < 2.0**NEAR):
        return False
    factor = 2.0**MANTISSA
    if divide:
        factor /= 2.0 ** (math.frexp(low)[1])
    return (_size(state) + 1) * factor < 2.0**62


def _near_scale(state: FixedPoint, scale: Tensor, tape: Tape, *, divide: bool) -> FixedPoint:
    mantissa, places = _mantissa_and_places(scale)
    if divide:
        low = state.pushed & _ones(places)
        pushed = _spill(state.pushed >> places, 1 << 62 - MANTISSA, tape)
        return _divided(_with_sign(state, scale), low, pushed, mantissa, places)
    pushed = torch.div(state.pushed, mantissa, rounding_mode="trunc")
    low = state.pushed - pushed * mantissa
    pushed = _spill(pushed, (1 << 62) >> int(places.max()), tape)
    return _with_sign(_multiplied(state, low, pushed, mantissa, places), scale)


def _undo_near_scale(state: FixedPoint, scale: Tensor, tape: Tape, *, divide: bool) -> FixedPoint:
    mantissa, places = _mantissa_and_places(scale)
    if divide:
        pushed = torch.div(state.pushed, mantissa, rounding_mode="trunc")
        low = state.pushed - pushed * mantissa
        pushed = _undo_spill(pushed, tape)
        return _with_sign(_multiplied(state, low, pushed, mantissa, places), scale)
    low = state.pushed & _ones(places)
    pushed = _undo_spill(state.pushed >> places, tape)
    return _divided(_with_sign(state, scale), low, pushed, mantissa, places)


def _multiplied(
    state: FixedPoint, low: Tensor, pushed: Tensor, mantissa: Tensor, places: Tensor
) -> FixedPoint:
    """``_mixed`` with num = mantissa and den = 2^places."""
    full = torch.addcmul(low, state.units, mantissa)
    pushed = (pushed << places).bitwise_or_(full & _ones(places))
    return replace(state, units=full.bitwise_right_shift_(places), pushed=pushed)


def _divided(
    state: FixedPoint, low: Tensor, pushed: Tensor, mantissa: Tensor, places: Tensor
) -> FixedPoint:
    """``_mixed`` with num = 2^places and den = mantissa."""
    full = (state.units << places).bitwise_or_(low)
    units = _floor_divide(full, mantissa)
    rest = full.sub_(units * mantissa)
    return replace(state, units=units, pushed=rest.addcmul_(pushed, mantissa))


def _mantissa_and_places(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Integers with |scale| = mantissa / 2^places, from the bits of float32."""
    bits = scale.float().view(torch.int32)
    mantissa = (bits & (1 << MANTISSA - 1) - 1).bitwise_or_(1 << MANTISSA - 1)
    places = 126 + MANTISSA - ((bits >> MANTISSA - 1) & 255)
    return mantissa.long(), places.long()


def _ones(places: Tensor) -> Tensor:
    """Numbers with that many lowest bits set."""
    return (torch.ones_like(places) << places).sub_(1)


def _with_sign(state: FixedPoint, scale: Tensor) -> FixedPoint:
    negative = scale < 0
    if not bool(negative.any()):
        return state
    return replace(state, units=torch.where(negative, -state.units, state.units))


def scale_by_ratio(state: FixedPoint, num: Tensor, den: Tensor, tape: Tape) -> FixedPoint:
    """x -> x * num / den by a change of the mixed radix (see the module's docstring).

    Args:
        state: x; |x num / den| must be below 2^62 units.
        num: positive, of the shape of x.
        den: positive, of the shape of x; num * den < 2^62.
        tape: for words that are full.
    """
    digit = state.pushed % num
    pushed = _floor_divide(state.pushed, num)
    pushed = _spill(pushed, (1 << 62) // int(den.max()), tape)
    return _mixed(state, pushed, digit, num, den)


def undo_scale_by_ratio(state: FixedPoint, num: Tensor, den: Tensor, tape: Tape) -> FixedPoint:
    """The x from which ``scale_by_ratio`` made this state."""
    digit = state.pushed % den
    pushed = _undo_spill(_floor_divide(state.pushed, den), tape)
    return _mixed(state, pushed, digit, den, num)


def _mixed(
    state: FixedPoint, pushed: Tensor, digit: Tensor, num: Tensor, den: Tensor
) -> FixedPoint:
    quotient = _floor_divide(state.units, den)
    mixed = (state.units - quotient * den) * num + digit
    carry = _floor_divide(mixed, den)
    return replace(state, units=quotient * num + carry, pushed=pushed * den + (mixed - carry * den))


def _spill(pushed: Tensor, room: int, tape: Tape) -> Tensor:
    """Move the lowest bits of entries to the tape until all are below ``room``."""
    spills = []
    while int(pushed.max()) >= room:
        full = pushed >= 1 << SPILL
        low = (pushed[full] & (1 << SPILL) - 1).to(torch.int32).to(torch.uint16)
        pushed = torch.where(full, pushed >> SPILL, pushed)
        tape.spilled_bits += SPILL * low.numel()
        everywhere = low.numel() == full.numel()
        if not everywhere:
            tape.logged_bits += full.numel()
        spills.append((None if everywhere else PackedMask.of(full), low))
    tape.push("spills", spills)
    return pushed


def _undo_spill(pushed: Tensor, tape: Tape) -> Tensor:
    for mask, low in reversed(tape.pop("spills")):
        words = low.to(pushed.device, torch.int32).long()
        if mask is None:
            pushed = (pushed << SPILL) | words.reshape(pushed.shape)
            continue
        full = mask.unpack().to(pushed.device)
        pushed = pushed.clone()
        pushed[full] = (pushed[full] << SPILL) | words
    return pushed


def _times_power_of_two(state: FixedPoint, power: Tensor, tape: Tape) -> FixedPoint:
    """x -> x * 2^power; bits below one unit go to ``pushed`` or come from there."""
    steps = math.ceil(int(power.abs().max()) / STEP)
    for k in range(steps):
        state = scale_by_ratio(state, *_powers(power, k), tape)
    # the decoder of an autoregressive layer does not know all powers from the beginning
    tape.push("steps", steps)
    return state


def _undo_times_power_of_two(state: FixedPoint, power: Tensor, tape: Tape) -> FixedPoint:
    for k in reversed(range(tape.pop("steps"))):
        state = undo_scale_by_ratio(state, *_powers(power, k), tape)
    return state


def _powers(power: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(num, den) of step k: the k-th ``STEP`` bits of the power."""
    size = (power.abs() - STEP * k).clamp(0, STEP)
    one = torch.ones_like(size)
    up = torch.where(power > 0, size, 0)
    down = torch.where(power < 0, size, 0)
    return one << up, one << down


def _rational(size: Tensor, *, divide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(num, den, power) with num / den * 2^power = size, or 1 / size."""
    mantissa, exponent = torch.frexp(size)
    exponent = exponent.long()
    # entries that the decoder of an autoregressive layer does not know yet may be NaN or zero
    integer = (mantissa.nan_to_num(0.5).clamp(0.5, 1) * 2**MANTISSA).round().long()
    near = exponent.clamp(-NEAR, NEAR)
    two = torch.ones_like(integer) << (MANTISSA - near)
    if divide:
        return two, integer, near - exponent
    return integer, two, exponent - near


def _make_room(
    state: FixedPoint,
    added: Tensor,
    growth: Tensor,
    tape: Tape,
    *,
    power: Tensor | None = None,
) -> FixedPoint:
    """x -> x * 2^power, with exponents such that ``|x| * growth + added`` fits into the word.

    Exponents that are not needed any more are lowered again. The decision is logged.
    """
    if state.exponent is None and _largest(state, added, growth) < LIMIT:
        if power is not None:
            state = _times_power_of_two(state, power, tape)
        tape.push("exponents", None)
        return state
    needed = (state.units.abs().double() + 1) * growth + state.in_units(added)
    bits = torch.frexp(needed).exponent.long()
    raised = (bits - TARGET).clamp(min=0)
    lowered = torch.minimum(state.exponents(), (24 - bits).clamp(0, 24))
    change = raised - lowered
    # at once: one unit of a state that has been made smaller first could outgrow the word
    state = _times_power_of_two(state, _combined(power, change), tape)
    tape.push("exponents", Packed.of(change))
    tape.logged_bits += tape.events[-1][1].bits
    return replace(state, exponent=state.exponents() + change)


def _undo_make_room(state: FixedPoint, tape: Tape, *, power: Tensor | None = None) -> FixedPoint:
    packed = tape.pop("exponents")
    if packed is None:
        if power is None:
            return state
        return _undo_times_power_of_two(state, power, tape)
    change = packed.unpack().to(state.units.device)
    exponent = state.exponents() - change
    state = _undo_times_power_of_two(state, _combined(power, change), tape)
    return replace(state, exponent=exponent if bool(exponent.any()) else None)


def _combined(power: Tensor | None, change: Tensor) -> Tensor:
    return -change if power is None else power - change


def _largest(state: FixedPoint, added: Tensor, growth: Tensor) -> float:
    # one more unit: an expansion fills the new places with bits from ``pushed``
    return (_size(state) + 1) * float(growth.max()) + float(state.in_units(added).max())


def _size_of(values: Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _size(state: FixedPoint) -> float:
    """The largest of the units."""
    return _size_of(state.units)


def shear(state: FixedPoint, matrix: Tensor, tape: Tape) -> FixedPoint:
    """x -> x + M x, rounded to units, for M whose targets and sources are different features.

    Args:
        state: (N, C).
        matrix: M, (C, C) float64 with M^2 = 0.
        tape: for changed exponents.
    """
    added = state.values(torch.float64) @ matrix.T
    if state.exponent is None:
        in_units = state.in_units(added)
        if _size(state) + _size_of(in_units) < LIMIT:
            tape.push("exponents", None)
            return replace(state, units=state.units + _rounded(in_units))
    state = _make_room(state, 2 * added.abs(), torch.ones_like(added), tape)
    # the sources may have other exponents now: what is added is computed from them as the decoder
    # sees them
    return replace(state, units=state.units + _sheared(state, matrix))


def undo_shear(state: FixedPoint, matrix: Tensor, tape: Tape) -> FixedPoint:
    """The x from which ``shear`` made this state."""
    state = replace(state, units=state.units - _sheared(state, matrix))
    return _undo_make_room(state, tape)


def _sheared(state: FixedPoint, matrix: Tensor) -> Tensor:
    return _rounded(state.in_units(state.values(torch.float64) @ matrix.T))


def _rounded(in_units: Tensor) -> Tensor:
    return in_units.round().long()


def _power_of_two(power: Tensor) -> Tensor:
    # by its bits: torch.ldexp and torch.pow may round
    return ((power + 1023) << 52).view(torch.float64)


def _floor_divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")


def _sign(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, -1, 1)
