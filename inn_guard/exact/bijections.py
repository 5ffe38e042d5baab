"""The bijections on fixed-point states that every rule of exact mode is made of.

All of them are bijective on (units, pushed). What cannot be computed from the result (spills of
full words, changed exponents) is logged on a Tape. They may overwrite the state that they get, but
not before they know that their rule holds.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.exact.fixed_point import LIMIT, TARGET, FixedPoint, NoExactRule
from inn_guard.exact.tape import Packed, PackedMask, Tape

__all__ = [
    "Block",
    "Shear",
    "affine",
    "scale_by_ratio",
    "shear",
    "undo_affine",
    "undo_scale_by_ratio",
    "undo_shear",
]

MANTISSA = 24  #: bits of a scale: float32 scales are met exactly
EPS = 2.0**-23  #: relative distance of a scale of float64 from its float32
#: Scales from 2^-SMALL up to 2^NEAR are num / den with num * den below 2^53.
SMALL = 5
NEAR = 12  #: scales outside 2^-12 ... 2^12 are split into a power of two and a rest
WORD = 52  #: bits of ``pushed``
SPILL = 16  #: bits of an entry that are moved to the tape at once
STEP = 32  #: largest power of two in one change of the radix
CHUNK = 1 << 14  #: entries that are worked on at a time: their temporaries fit into the cache


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
    sizes = None if scale is None else _sizes_of(scale, divide=divide)
    longest = 0.0 if shift is None else _longest(shift)
    if shift is not None and divide:
        state = _translate(state, shift, longest, tape, sign=-1)
    if scale is not None and sizes is not None:
        state = _rescale(state, scale, sizes, tape, divide=divide)
    if shift is not None and not divide:
        state = _translate(state, shift, longest, tape, sign=1)
    return state


def undo_affine(
    state: FixedPoint, scale: Tensor | None, shift: Tensor | None, tape: Tape, *, divide: bool
) -> FixedPoint:
    """The x from which ``affine`` made this state, bit for bit."""
    if shift is not None and not divide:
        state = _undo_translate(state, shift, tape, sign=1)
    if scale is not None:
        state = _undo_rescale(state, scale, tape, divide=divide)
    if shift is not None and divide:
        state = _undo_translate(state, shift, tape, sign=-1)
    return state


@dataclass(frozen=True)
class _Sizes:
    """The range of |scale|, and whether a scale is negative."""

    low: float
    high: float
    negative: bool


def _sizes_of(scale: Tensor, *, divide: bool) -> _Sizes:
    """The range of the sizes of scales.

    Raises:
        NoExactRule: if there is no rule for one of them.
    """
    low, high = (float(end) for end in torch.aminmax(scale))
    negative = low < 0
    if negative:
        low, high = (float(end) for end in torch.aminmax(scale.abs()))
    # NaN compares false
    if not (low > 0 and high < math.inf):
        raise NoExactRule("a scale is zero or not finite")
    if divide and not 1 / low < math.inf:
        raise NoExactRule("a scale is too close to zero")
    return _Sizes(low, high, negative)


def _longest(shift: Tensor) -> float:
    """The size of the largest shift.

    Raises:
        NoExactRule: if a shift is not finite.
    """
    low, high = (float(end) for end in torch.aminmax(shift))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NoExactRule("a shift is not finite")
    return max(-low, high)


def _translate(
    state: FixedPoint, shift: Tensor, longest: float, tape: Tape, *, sign: int
) -> FixedPoint:
    size = longest * 2.0**state.fraction_bits + 1
    if state.exponent is None and not state.largest + size < LIMIT:
        state = state.measured()
    if state.exponent is None and state.largest + size < LIMIT:
        tape.push("exponents", None)
        state = replace(state, largest=state.largest + size)
    else:
        shift = shift.double()
        state = _make_room(state, shift.abs(), torch.ones_like(shift), tape)
    state.units.add_(_shift_in_units(state, shift), alpha=sign)
    return state


def _undo_translate(state: FixedPoint, shift: Tensor, tape: Tape, *, sign: int) -> FixedPoint:
    state.units.sub_(_shift_in_units(state, shift), alpha=sign)
    return _undo_make_room(state, tape)


def _shift_in_units(state: FixedPoint, shift: Tensor) -> Tensor:
    """The shift in units, rounded. Powers of two are exact: float32 gives the same integers."""
    if state.exponent is None and shift.dtype == torch.float32:
        return shift.mul(2.0**state.fraction_bits).round_()
    return state.in_units(shift.double()).round_()


def _rescale(
    state: FixedPoint, scale: Tensor, sizes: _Sizes, tape: Tape, *, divide: bool
) -> FixedPoint:
    near = _with_room(state, sizes, divide=divide)
    if near is not None:
        places = _common_places(sizes)
        _scale_in_place(near, scale, places, negative=sizes.negative, divide=divide)
        tape.push("near", (sizes.negative, places))
        return near
    scale = scale.double()
    size = scale.abs()
    growth = size.reciprocal() if divide else size
    num, den, power = _rational(size, divide=divide)
    state = _make_room(state, torch.zeros_like(size), growth.clamp(min=1), tape, power=power)
    state = scale_by_ratio(state, num, den, tape)
    state.units.mul_(_sign(scale))
    return state


def _undo_rescale(state: FixedPoint, scale: Tensor, tape: Tape, *, divide: bool) -> FixedPoint:
    if tape.events and tape.events[-1][0] == "near":
        negative, places = tape.pop("near")
        _scale_in_place(state, scale, places, negative=negative, divide=not divide)
        return state
    scale = scale.double()
    num, den, power = _rational(scale.abs(), divide=divide)
    state.units.mul_(_sign(scale))
    state = undo_scale_by_ratio(state, num, den, tape)
    return _undo_make_room(state, tape, power=power)


def _with_room(state: FixedPoint, sizes: _Sizes, *, divide: bool) -> FixedPoint | None:
    """The state with the bounds that it has after the scale, where ``_scale_in_place`` is exact.

    None where it is not: for exponents, for extreme scales, and where a word would overflow.
    """
    if state.exponent is not None:
        return None
    if not (sizes.low >= 2.0**-SMALL and sizes.high < 2.0**NEAR):
        return None
    # as they are in float32
    low, high = sizes.low * (1 - EPS), sizes.high * (1 + EPS)
    den = 2.0 ** _places(low)
    if divide:
        # of both kinds of denominators, that of each entry and the common one
        low, high, den = 1 / high, 1 / low, 2.0**MANTISSA * sizes.high / sizes.low * 2
    for known in (lambda: state, state.measured):
        now = known()
        # one more unit: an expansion fills the new places with bits from ``pushed``
        largest = (now.largest + 1) * high + 1
        fullest = now.fullest / low + den
        if largest < LIMIT and fullest < 2.0**WORD:
            return replace(state, largest=largest, fullest=fullest)
    return None


def _places(size: float) -> int:
    """The places after the point of a float32 of this size."""
    return MANTISSA - math.frexp(size)[1]


def _common_places(sizes: _Sizes) -> int | None:
    """k with integers scale * 2^k for all scales, if these times 2^k are below 2^53; else None."""
    places = _places(sizes.low)
    if sizes.high * (1 + EPS) * 2.0 ** (2 * places) < 2.0**53:
        return places
    return None


def _scale_in_place(
    state: FixedPoint, scale: Tensor, places: int | None, *, negative: bool, divide: bool
) -> None:
    """``scale_by_ratio`` for scales that ``_with_room`` has accepted.

    Args:
        state: is overwritten.
        scale: of the shape of the state.
        places: the denominator of all scales is 2^places; None: each has its own.
        negative: whether a scale is negative.
        divide: by the scale.
    """
    scale = scale.expand(state.units.shape)
    for rows in _chunks(state.units):
        units, pushed = state.units[rows], state.pushed[rows]
        part = scale[rows].float()
        if negative:
            part = part.abs()
        if negative and divide:
            _flip_signs(units, scale[rows])
        numerator, denominator = _fraction(part, places)
        if divide:
            _change_radix(units, pushed, num=denominator, den=numerator)
        else:
            _change_radix(units, pushed, num=numerator, den=denominator)
        if negative and not divide:
            _flip_signs(units, scale[rows])


def _change_radix(
    units: Tensor, pushed: Tensor, *, num: Tensor | float, den: Tensor | float
) -> None:
    """The change of the radix in float64, in place; num * den must be below 2^53.

    A power of two is passed as a number: then no division is needed.
    """
    left = _quotient(pushed, num).floor_()
    digit = _added(pushed, left, num, sign=-1)
    whole = _quotient(units, den).floor_()
    rest = _added(units, whole, den, sign=-1)
    mixed = _added(digit, rest, num, sign=1, out=digit)
    carry = _quotient(mixed, den, out=rest).floor_()
    low = _added(mixed, carry, den, sign=-1, out=mixed)
    _added(carry, whole, num, sign=1, out=units)
    _added(low, left, den, sign=1, out=pushed)


def _quotient(a: Tensor, b: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    if isinstance(b, Tensor):
        return torch.div(a, b, out=out)
    return torch.mul(a, 1 / b, out=out)


def _added(
    a: Tensor, b: Tensor, c: Tensor | float, *, sign: int, out: Tensor | None = None
) -> Tensor:
    """a + sign * b * c."""
    if isinstance(c, Tensor):
        return torch.addcmul(a, b, c, value=sign, out=out)
    return torch.add(a, b, alpha=sign * c, out=out)


def _fraction(scale: Tensor, places: int | None) -> tuple[Tensor, Tensor | float]:
    """Integers (float64) with scale = numerator / denominator, the latter a power of two."""
    if places is None:
        return _mantissa_and_denominator(scale)
    return scale.mul(2.0**places).double(), 2.0**places


def _mantissa_and_denominator(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (float64) with scale = mantissa / denominator, the latter a power of two.

    The denominator is 2^(23 - e) for a scale between 2^e and 2^(e + 1), read off its bits.
    """
    exponent = ~scale.view(torch.int32) & 0x7F800000
    denominator = exponent.add_((MANTISSA - 2) << 23).view(torch.float32)
    return scale.mul(denominator).double(), denominator.double()


def _flip_signs(units: Tensor, scale: Tensor) -> None:
    units.mul_(_sign(scale))


def _sign(scale: Tensor) -> Tensor:
    return torch.where(scale < 0, -1.0, 1.0)


def _chunks(t: Tensor) -> Iterator[slice]:
    """Slices of the batch of about ``CHUNK`` entries each."""
    rows = max(1, CHUNK * len(t) // t.numel())
    for start in range(0, len(t), rows):
        yield slice(start, start + rows)


def scale_by_ratio(state: FixedPoint, num: Tensor, den: Tensor, tape: Tape) -> FixedPoint:
    """x -> x * num / den by a change of the mixed radix (see the module's docstring).

    Args:
        state: x; |x num / den| must be below 2^51 units.
        num: positive, int64, of the shape of x.
        den: positive, int64, of the shape of x, below 2^36; num * den < 2^62.
        tape: for words that are full.

    Raises:
        NoExactRule: if a ``den`` is too large.
    """
    room = (1 << WORD) // int(den.max())
    if room < 1 << SPILL:
        raise NoExactRule("a scale has too many digits")
    before = state.pushed.long()
    left = _floor_divide(before, num)
    pushed = _spill(left, room, tape)
    return _mixed(state, pushed, before - left * num, num, den)


def undo_scale_by_ratio(state: FixedPoint, num: Tensor, den: Tensor, tape: Tape) -> FixedPoint:
    """The x from which ``scale_by_ratio`` made this state."""
    before = state.pushed.long()
    left = _floor_divide(before, den)
    return _mixed(state, _undo_spill(left, tape), before - left * den, den, num)


def _mixed(
    state: FixedPoint, pushed: Tensor, digit: Tensor, num: Tensor, den: Tensor
) -> FixedPoint:
    # 64-bit integers: the product of a rest and ``num`` may need more bits than float64 has
    units = state.units.long()
    quotient = _floor_divide(units, den)
    mixed = (units - quotient * den) * num + digit
    carry = _floor_divide(mixed, den)
    return FixedPoint(
        (quotient * num + carry).double(),
        (pushed * den + (mixed - carry * den)).double(),
        state.exponent,
        state.fraction_bits,
    )


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
    if state.exponent is None and _needed(state, added, growth) < LIMIT:
        if power is not None:
            state = _times_power_of_two(state, power, tape)
        tape.push("exponents", None)
        return state
    needed = (state.units.abs() + 1) * growth + state.in_units(added)
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


def _needed(state: FixedPoint, added: Tensor, growth: Tensor) -> float:
    # one more unit: an expansion fills the new places with bits from ``pushed``
    largest = state.measured().largest
    return (largest + 1) * float(growth.max()) + float(state.in_units(added).max())


@dataclass(frozen=True)
class Block:
    """A part of a shear: in each of n groups of neighbouring features, some get added the others.

    Attributes:
        start: the first feature of the first group.
        matrices: (n, targets, sources) float64.
        sources_first: whether the sources are the first features of a group.
    """

    start: int
    matrices: Tensor
    sources_first: bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(targets, sources) of x (C, N): views (n, targets, N) and (n, sources, N)."""
        count, targets, sources = self.matrices.shape
        size = targets + sources
        groups = x[self.start : self.start + count * size].view(count, size, -1)
        if self.sources_first:
            return groups[:, sources:], groups[:, :sources]
        return groups[:, :targets], groups[:, targets:]

    def product(self, sources: Tensor) -> Tensor:
        """What the targets get added, (n, targets, N)."""
        if sources.shape[1] == 1:
            return self.matrices * sources
        return torch.bmm(self.matrices, sources)


@dataclass(frozen=True)
class Shear:
    """x -> x + M x for x (C, N), with features in dimension 0.

    Attributes:
        blocks: the parts of M that are not zero. No source is a target, so that M^2 = 0.
        growth: of the largest |x_i| to the largest |(M x)_i|, an upper bound.
    """

    blocks: tuple[Block, ...]
    growth: float

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Shear:
        """The shear with these blocks."""
        blocks = tuple(blocks)
        return cls(blocks, max(float(one.matrices.abs().sum(2).max()) for one in blocks))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Shear:
        """The shear with ``function(tensor)`` in the place of every tensor."""
        blocks = tuple(replace(one, matrices=function(one.matrices)) for one in self.blocks)
        return replace(self, blocks=blocks)

    def product(self, x: Tensor) -> Tensor:
        """M x."""
        whole = torch.zeros_like(x)
        for one in self.blocks:
            one.split(whole)[0].copy_(one.product(one.split(x)[1]))
        return whole


def shear(state: FixedPoint, step: Shear, tape: Tape, *, sign: int) -> FixedPoint:
    """x -> x + sign * M x, rounded to units.

    Args:
        state: (C, N).
        step: M.
        tape: for changed exponents.
        sign: 1, or -1 for the inverse map.
    """
    if state.exponent is None:
        for known in (lambda: state, state.measured):
            largest = known().largest * (1 + step.growth) + 1
            if largest < LIMIT:
                tape.push("exponents", None)
                _add_sheared(state, step, sign)
                return replace(state, largest=largest)
    added = step.product(state.values(torch.float64))
    state = _make_room(state, 2 * added.abs(), torch.ones_like(added), tape)
    # the sources may have other exponents now: what is added is computed from them as the decoder
    # sees them
    _add_sheared(state, step, sign)
    return replace(state, largest=math.inf)


def undo_shear(state: FixedPoint, step: Shear, tape: Tape, *, sign: int) -> FixedPoint:
    """The x from which ``shear`` made this state."""
    _add_sheared(state, step, -sign)
    return _undo_make_room(state, tape)


def _add_sheared(state: FixedPoint, step: Shear, sign: int) -> None:
    if state.exponent is None:
        for one in step.blocks:
            targets, sources = one.split(state.units)
            targets.add_(one.product(sources).round_(), alpha=sign)
        return
    added = state.in_units(step.product(state.values(torch.float64))).round_()
    state.units.add_(added, alpha=sign)


def _floor_divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="floor")
