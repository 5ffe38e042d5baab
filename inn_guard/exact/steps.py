"""The steps that layers are made of in exact mode: moves, affine maps, matrices, stored inputs.

A step maps a FixedPoint state to the next one and logs on a Tape what ``undo`` needs. Parameters of
a step are computed from the part of the state that the step leaves as it is. ``undo`` computes them
again, and a digest tells whether it got the same bits.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from inn_guard.exact.bijections import Block, Shear, affine, shear, undo_affine, undo_shear
from inn_guard.exact.fixed_point import Entries, FixedPoint, NoExactRule, as_slice
from inn_guard.exact.tape import Packed, Tape, checksum

__all__ = [
    "Affine",
    "Autoregressive",
    "Constants",
    "Matrix",
    "Moves",
    "OnTail",
    "Parameters",
    "Step",
    "StoredInput",
    "run",
    "undo",
]

Self = TypeVar("Self", bound="Step")

#: x (B, *data), with zeros where the step changes it -> (scale, shift) of what it changes, each of
#: its shape, or broadcasting to it, or None
Parameters = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Constants:
    """Parameters that depend on nothing."""

    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, known: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The same for every x."""
        return self.scale, self.shift

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Constants:
        """The constants with ``function(tensor)`` in the place of every tensor."""
        scale, shift = (None if t is None else function(t) for t in (self.scale, self.shift))
        return Constants(scale, shift)


class Step(abc.ABC):
    """A bijection on states. It may overwrite the tensors of the state that it gets.

    Args:
        dtype: in which parameters and stored layers are computed.
    """

    #: whether ``run`` raises NoExactRule, if at all, before it has overwritten anything
    refuses_in_time = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abc.abstractmethod
    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The next state."""

    @abc.abstractmethod
    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The state before, bit for bit."""

    @abc.abstractmethod
    def inverted(self: Self) -> Self:
        """The step of the inverse map."""

    def passes_of_undo(self) -> int:
        """How often ``undo`` evaluates the parameters."""
        return 1

    def mapped(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The step with ``function(tensor)`` in the place of every large tensor that it holds."""
        return self


def run(steps: Sequence[Step], state: FixedPoint, tape: Tape) -> FixedPoint:
    """The state after all steps."""
    for step in steps:
        state = step.run(state, tape)
    return state


def undo(steps: Sequence[Step], state: FixedPoint, tape: Tape) -> FixedPoint:
    """The state before all steps."""
    for step in reversed(steps):
        state = step.undo(state, tape)
    # the bounds are those of the state after the steps
    return replace(state, largest=math.inf, fullest=math.inf)


class Moves(Step):
    """A map that only moves values: nothing is pushed out and nothing is logged.

    Args:
        rows: entry i of a flat result is entry rows[i] of a flat sample.
        shape: of one sample before.
        latent_shape: of one sample after.
        dtype: not used by moves.
    """

    def __init__(
        self,
        rows: Tensor,
        shape: Sequence[int],
        latent_shape: Sequence[int],
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(dtype)
        self.rows, self.shape, self.latent_shape = rows, tuple(shape), tuple(latent_shape)
        self.rows_back = rows.argsort()

    @classmethod
    def of(
        cls,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        samples: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Moves:
        """The moves that a function makes on samples like those of x.

        Args:
            function: of a batch of ``dtype``.
            x: a batch.
            samples: how many are passed to the function. Default: as many as in x, as a function
                may expect them.
            dtype: in which the number of every entry is exact.

        Raises:
            NoExactRule: if the function does something else than moving entries.
        """
        numbers = torch.arange(x[0].numel(), device=x.device)
        sample = numbers.to(dtype).reshape(1, *x.shape[1:])
        batch = len(x) if samples is None else samples
        moved = function(sample.expand(batch, *x.shape[1:]).clone())
        rows = moved[0].flatten().round().long()
        whole = torch.equal(rows.to(dtype), moved[0].flatten())
        if not whole or len(rows) != len(numbers) or not torch.equal(rows.sort()[0], numbers):
            raise NoExactRule("it does more than moving entries")
        return cls(rows, x.shape[1:], moved.shape[1:], dtype=x.dtype)

    def are_of(self, function: Callable[[Tensor], Tensor]) -> bool:
        """Whether the function, of one sample, still makes these moves."""
        numbers = torch.arange(len(self.rows), device=self.rows.device).to(self.dtype)
        moved = function(numbers.reshape(1, *self.shape))
        if moved.shape[1:] != self.latent_shape:
            return False
        return torch.equal(moved.flatten(), numbers.take(self.rows))

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The entries in their new order."""
        return _moved(state, self.rows, self.latent_shape)

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The entries in their old order."""
        return _moved(state, self.rows_back, self.shape)

    def moved_back(self, values: Tensor) -> Tensor:
        """Values of a result (B, *latent) at the places they have before: the transposed map."""
        return _at(values, self.rows_back, self.shape)

    def inverted(self) -> Moves:
        """The moves back."""
        return Moves(self.rows_back, self.latent_shape, self.shape, dtype=self.dtype)


def _moved(state: FixedPoint, rows: Tensor, shape: tuple[int, ...]) -> FixedPoint:
    """The values in another order. Pushed bits stay where they are: they belong to no value."""
    exponent = None if state.exponent is None else _at(state.exponent, rows, shape)
    pushed = state.pushed.reshape(-1, *shape)
    return replace(state, units=_at(state.units, rows, shape), pushed=pushed, exponent=exponent)


def _at(t: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = t.flatten(1)
    # half the time of index_select
    return flat.gather(1, rows.expand(flat.shape)).reshape(-1, *shape)


class Affine(Step):
    """Some entries of x become x * scale + shift; the others determine scale and shift.

    An elementwise map changes all entries, and its scale and shift are constants; a coupling
    changes a part.

    Args:
        parameters: see ``Parameters``.
        changed: entries (indices into one flat sample) that are changed; None for all.
        dtype: in which the parameters are computed.
        divide: (x - shift) / scale instead.
    """

    def __init__(
        self,
        parameters: Parameters,
        changed: Entries | None,
        *,
        dtype: torch.dtype,
        divide: bool = False,
    ) -> None:
        super().__init__(dtype)
        self.parameters, self.divide = parameters, divide
        self.changes_all = changed is None
        self.changed: Entries = slice(None)
        if isinstance(changed, Tensor):
            self.changed = as_slice(changed)
        elif changed is not None:
            self.changed = changed

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """Scaled and shifted."""
        return self.applied(state, *self.parameters(self.known(state)), tape)

    def applied(
        self, state: FixedPoint, scale: Tensor | None, shift: Tensor | None, tape: Tape
    ) -> FixedPoint:
        """Scaled and shifted by these values of the parameters."""
        part = state.take(self.changed)
        width = part.units.shape[1]
        part = affine(part, flat(scale, width), flat(shift, width), tape, divide=self.divide)
        tape.push("digest", checksum(scale, shift))
        return state.put(self.changed, part)

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """Shifted and scaled back."""
        return self.undone(state, *self.parameters(self.known(state)), tape)

    def undone(
        self, state: FixedPoint, scale: Tensor | None, shift: Tensor | None, tape: Tape
    ) -> FixedPoint:
        """Shifted and scaled back by these values of the parameters.

        Raises:
            Mismatch: if they are not those of ``applied``.
        """
        tape.compare(checksum(scale, shift))
        part = state.take(self.changed)
        width = part.units.shape[1]
        part = undo_affine(part, flat(scale, width), flat(shift, width), tape, divide=self.divide)
        return state.put(self.changed, part)

    def inverted(self) -> Affine:
        """The other direction, with the same parameters."""
        clone = copy.copy(self)
        clone.divide = not self.divide
        return clone

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Affine:
        """With other constants, if its parameters are constants."""
        if not isinstance(self.parameters, Constants):
            return self
        clone = copy.copy(self)
        clone.parameters = self.parameters.mapped(function)
        return clone

    def known(self, state: FixedPoint) -> Tensor:
        """The values of the entries that stay, and zeros."""
        if self.changes_all:
            zero = torch.zeros((), dtype=self.dtype, device=state.units.device)
            return zero.expand(state.units.shape)
        if not isinstance(self.changed, slice) or state.exponent is not None:
            return without(state.values(self.dtype), self.changed)
        # only the entries that stay need to be converted
        known = torch.zeros(state.units.shape, dtype=self.dtype, device=state.units.device)
        width = known[0].numel()
        start, stop, _ = self.changed.indices(width)
        for stays in (slice(start), slice(stop, width)):
            state.take(stays).write_values(known.flatten(1)[:, stays])
        return known


def without(x: Tensor, entries: Entries) -> Tensor:
    """The values (B, *data) with zeros at some entries, in place."""
    flat = x.flatten(1)
    if isinstance(entries, slice):
        flat[:, entries] = 0
    else:
        flat.index_fill_(1, entries, 0)
    return flat.reshape(x.shape)


def flat(parameter: Tensor | None, width: int) -> Tensor | None:
    """A parameter of the entries of a part as (B, width), or broadcasting to it."""
    if parameter is None:
        return None
    if parameter.dim() > 1 and parameter.shape[1:].numel() == width:
        return parameter.flatten(1)
    return parameter


class Autoregressive(Step):
    """z_i = x_i * scale_i + shift_i, both functions of the entries before i in an order.

    One direction is one evaluation of the parameters. The other one finds one entry after the
    other and evaluates them D times.

    Args:
        parameters: x (B, D) -> (scale, shift), (B, D) each.
        order: the order of the entries.
        dtype: in which the parameters are computed.
        divide: the inverse map: x -> z with x_i = z_i * scale_i(z) + shift_i(z).
    """

    refuses_in_time = False

    def __init__(
        self, parameters: Parameters, order: Tensor, *, dtype: torch.dtype, divide: bool = False
    ) -> None:
        super().__init__(dtype)
        self.parameters, self.order, self.divide = parameters, order, divide

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """Parameters from x, or from the z that is found entry by entry if ``divide``.

        Raises:
            NoExactRule: if the entries that have been found are not those of the next state.
        """
        known = state
        if self.divide:
            # scratch tapes: only the last evaluation, with all entries known, counts
            known = self._entry_by_entry(
                state,
                lambda scale, shift: affine(state.clone(), scale, shift, Tape(), divide=True),
            )
        scale, shift = self._evaluated(known)
        after = affine(state, scale, shift, tape, divide=self.divide)
        logged = checksum(scale, shift)
        # exponents depend on all entries, so that entries found one by one may be others
        if self.divide and checksum(*self._evaluated(after)) != logged:
            raise NoExactRule("its values need exponents, which change its parameters")
        tape.push("digest", logged)
        return after

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """Parameters from the z, or from the x that is found entry by entry."""
        known = state
        expected = tape.pop("digest")
        if not self.divide:
            known = self._entry_by_entry(
                state,
                lambda scale, shift: undo_affine(
                    state.clone(), scale, shift, tape.copy(), divide=False
                ),
            )
        scale, shift = self._evaluated(known)
        tape.push("digest", expected)
        tape.compare(checksum(scale, shift))
        return undo_affine(state, scale, shift, tape, divide=self.divide)

    def inverted(self) -> Autoregressive:
        """The other direction, with the same parameters."""
        clone = copy.copy(self)
        clone.divide = not self.divide
        return clone

    def passes_of_undo(self) -> int:
        """One more than there are entries, unless the parameters depend on the result."""
        return 1 if self.divide else len(self.order) + 1

    def _evaluated(self, state: FixedPoint) -> tuple[Tensor | None, Tensor | None]:
        return self.parameters(state.values(self.dtype))

    def _entry_by_entry(
        self,
        state: FixedPoint,
        solve: Callable[[Tensor | None, Tensor | None], FixedPoint],
    ) -> FixedPoint:
        """The state whose entries the parameters at the entries before them give."""
        known = replace(state.clone(), units=torch.zeros_like(state.units), exponent=None)
        for entry in self.order.reshape(-1, 1):
            scale, shift = self._evaluated(known)
            known = known.put(entry, solve(scale, shift).take(entry))
        return known


class Matrix(Step):
    """z = W x + b over dimension 1 at every position, by W = P L diag(d) U.

    The unit triangles L and U are products of shears x_i <- x_i + round(sum_j m_ij x_j), in which
    no x_j changes that is added to another entry.

    Args:
        weight: W, (C, C); it is factored in float64.
        bias: b, (C,), or None.
        dtype: of the model.
        inverse: x = W^-1 (z - b) instead.

    Raises:
        NoExactRule: if W is singular or not finite.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, inverse: bool = False
    ) -> None:
        super().__init__(dtype)
        self.inverse = inverse
        weight = weight.double()
        if not bool(weight.isfinite().all()):
            raise NoExactRule("its matrix is not finite")
        pivots, lower, upper = torch.linalg.lu(weight)
        diagonal = upper.diagonal().clone()
        if not bool((1 / diagonal).isfinite().all()):
            raise NoExactRule("its matrix is singular")
        # P L U: row i of L U goes to row order.argsort()[i], z = (L U x)[order]
        self.order = pivots.argmax(1)
        self.order_back = self.order.argsort()
        self.scale = None if bool((diagonal == 1).all()) else diagonal[:, None]
        self.shift = None if bias is None else bias.double()[:, None]
        self.upper = _shears(upper / diagonal[:, None], lower=False)
        self.lower = _shears(lower, lower=True)
        self.digest = checksum(weight, bias)

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """z, or x if ``inverse``."""
        shape = state.units.shape
        state = _features_first(state)
        state = self._backward(state, tape) if self.inverse else self._forward(state, tape)
        tape.push("digest", self.digest)
        return _samples_first(state, shape)

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """x, or z if ``inverse``."""
        tape.compare(self.digest)
        shape = state.units.shape
        state = _features_first(state)
        if self.inverse:
            state = self._undo_backward(state, tape)
        else:
            state = self._undo_forward(state, tape)
        return _samples_first(state, shape)

    def inverted(self) -> Matrix:
        """W^-1."""
        clone = copy.copy(self)
        clone.inverse = not self.inverse
        return clone

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        """With other tensors in its shears."""
        clone = copy.copy(self)
        clone.upper = [one.mapped(function) for one in self.upper]
        clone.lower = [one.mapped(function) for one in self.lower]
        return clone

    def _forward(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        for one in self.upper:
            state = shear(state, one, tape, sign=1)
        state = affine(state, self.scale, None, tape, divide=False)
        for one in self.lower:
            state = shear(state, one, tape, sign=1)
        state = _ordered(state, self.order)
        return affine(state, None, self.shift, tape, divide=False)

    def _undo_forward(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        state = undo_affine(state, None, self.shift, tape, divide=False)
        state = _ordered(state, self.order_back)
        for one in reversed(self.lower):
            state = undo_shear(state, one, tape, sign=1)
        state = undo_affine(state, self.scale, None, tape, divide=False)
        for one in reversed(self.upper):
            state = undo_shear(state, one, tape, sign=1)
        return state

    def _backward(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        state = affine(state, None, self.shift, tape, divide=True)
        state = _ordered(state, self.order_back)
        for one in reversed(self.lower):
            state = shear(state, one, tape, sign=-1)
        state = affine(state, self.scale, None, tape, divide=True)
        for one in reversed(self.upper):
            state = shear(state, one, tape, sign=-1)
        return state

    def _undo_backward(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        for one in self.upper:
            state = undo_shear(state, one, tape, sign=-1)
        state = undo_affine(state, self.scale, None, tape, divide=True)
        for one in self.lower:
            state = undo_shear(state, one, tape, sign=-1)
        state = _ordered(state, self.order)
        return undo_affine(state, None, self.shift, tape, divide=True)


def _features_first(state: FixedPoint) -> FixedPoint:
    """The state as (C, N): the values of a feature at all positions of all samples in a row.

    Pushed bits stay where they are in memory: they belong to no value, as long as the way back
    finds them in the same places.
    """
    features = state.units.shape[1]

    def moved(t: Tensor) -> Tensor:
        return t.transpose(0, 1).reshape(features, -1).contiguous()

    exponent = None if state.exponent is None else moved(state.exponent)
    pushed = state.pushed.reshape(features, -1)
    return replace(state, units=moved(state.units), pushed=pushed, exponent=exponent)


def _samples_first(state: FixedPoint, shape: torch.Size) -> FixedPoint:
    """The state as (B, C, *positions) again."""
    batch, features = shape[:2]

    def moved(t: Tensor) -> Tensor:
        return t.reshape(features, batch, *shape[2:]).transpose(0, 1).contiguous()

    exponent = None if state.exponent is None else moved(state.exponent)
    pushed = state.pushed.reshape(shape)
    return replace(state, units=moved(state.units), pushed=pushed, exponent=exponent)


def _ordered(state: FixedPoint, order: Tensor) -> FixedPoint:
    # pushed bits belong to no value
    exponent = state.exponent
    if exponent is not None:
        exponent = exponent.index_select(0, order)
    return replace(state, units=state.units.index_select(0, order), exponent=exponent)


def _shears(triangle: Tensor, *, lower: bool) -> list[Shear]:
    """Shears with triangle = (I + M_n) ... (I + M_1): log2(C) of them.

    T = [[T11, 0], [T21, T22]] is one shear by T21 T11^-1 after both diagonal blocks. The blocks of
    one size are sheared at the same time.
    """
    if not lower:
        # with rows and columns in reverse order it is a lower triangle
        triangle = triangle.flip(0, 1)
    count, half = len(triangle), 1
    shears = []
    while half < count:
        groups = count // (2 * half)
        whole = 2 * half * groups
        blocks = []
        if groups:
            squares = triangle[:whole, :whole].reshape(groups, 2 * half, groups, 2 * half)
            squares = squares.diagonal(dim1=0, dim2=2).movedim(-1, 0)
            blocks.append(_block(squares, half, start=0, features=count, lower=lower))
        if count - whole > half:
            rest = triangle[None, whole:, whole:]
            blocks.append(_block(rest, half, start=whole, features=count, lower=lower))
        found = [one for one in blocks if bool(one.matrices.any())]
        if found:
            shears.append(Shear.of(found))
        half *= 2
    return shears


def _block(squares: Tensor, half: int, *, start: int, features: int, lower: bool) -> Block:
    """The shears by T21 T11^-1 of some triangles T, (n, size, size), with T11 of size ``half``."""
    quotient = torch.linalg.solve_triangular(
        squares[:, :half, :half],
        squares[:, half:, :half],
        upper=False,
        left=False,
        unitriangular=True,
    )
    if lower:
        return Block(start, quotient.contiguous(), sources_first=True)
    # in the order of the features again
    first = features - start - len(squares) * squares.shape[1]
    return Block(first, quotient.flip(0, 1, 2).contiguous(), sources_first=False)


class StoredInput(Step):
    """Any map: its input is kept.

    Args:
        function: x (B, *data) -> z (B, *latent), floats.
        dtype: of x.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.function = function

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The state nearest to the function's value.

        Raises:
            NoExactRule: if that value is not finite.
        """
        z = self.function(state.values(self.dtype))
        if not bool(z.isfinite().all()):
            raise NoExactRule("its output is not finite")
        after = FixedPoint.of(z, state.fraction_bits)
        exponent = None if state.exponent is None else Packed.of(state.exponent)
        stored = [Packed.of(state.units.long()), exponent]
        if after.units.numel() == state.units.numel():
            pushed = state.pushed.reshape(z.shape)
            after = replace(after, pushed=pushed, fullest=state.fullest)
            stored.append(None)
        else:
            # the entries are others: their bits start anew
            stored.append(Packed.of(state.pushed.long()))
        for packed in stored:
            tape.stored_bits += 0 if packed is None else packed.bits
        tape.push("input", tuple(stored))
        return after

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The kept state."""
        units, exponent, pushed = tape.pop("input")
        device = state.units.device
        restored = units.unpack().to(device).double()
        if pushed is None:
            bits = state.pushed.reshape(restored.shape)
        else:
            bits = pushed.unpack().to(device).double()
        if exponent is not None:
            exponent = exponent.unpack().to(device)
        return FixedPoint(restored, bits, exponent, state.fraction_bits)

    def inverted(self) -> StoredInput:
        """Not needed: an inverse layer is stored as a whole.

        Raises:
            NoExactRule: always.
        """
        raise NoExactRule("the inverse of a layer without a rule")


class OnTail(Step):
    """Steps on the last entries of a flat state (B, D); the first ones stay.

    Args:
        steps: on states of shape (B, *shape).
        shape: of the last entries before.
        latent_shape: of the last entries after.
        dtype: of the model.
    """

    refuses_in_time = False

    def __init__(
        self,
        steps: Sequence[Step],
        shape: Sequence[int],
        latent_shape: Sequence[int],
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(dtype)
        self.steps = tuple(steps)
        self.shape, self.latent_shape = tuple(shape), tuple(latent_shape)

    def run(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The steps on the tail."""
        tail, entries = self._tail(state, self.shape)
        return state.put(entries, run(self.steps, tail, tape))

    def undo(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The steps on the tail undone."""
        tail, entries = self._tail(state, self.latent_shape)
        return state.put(entries, undo(self.steps, tail, tape))

    def inverted(self) -> OnTail:
        """The inverse steps on the tail."""
        steps = [step.inverted() for step in reversed(self.steps)]
        return OnTail(steps, self.latent_shape, self.shape, dtype=self.dtype)

    def passes_of_undo(self) -> int:
        """Those of the step with the most."""
        return max((step.passes_of_undo() for step in self.steps), default=1)

    @staticmethod
    def _tail(state: FixedPoint, shape: tuple[int, ...]) -> tuple[FixedPoint, slice]:
        size, width = math.prod(shape), state.units[0].numel()
        entries = slice(width - size, width)
        tail = state.take(entries)
        return tail.mapped(lambda t: t.reshape(-1, *shape)), entries
