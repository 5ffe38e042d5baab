"""exact(): an inverse that restores every bit, for any chain of layers."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.core.mismatch import why_rejected
from inn_guard.core.tensors import dtype_name
from inn_guard.exact.fixed_point import (
    SEED,
    FixedPoint,
    NoExactRule,
    check_data,
    close,
    fraction_bits_for,
)
from inn_guard.exact.rules import rule_of, steps_of
from inn_guard.exact.steps import Step, StoredInput, run, undo
from inn_guard.exact.tape import Mismatch, Packed, Tape, digest
from inn_guard.execution.state import preserve_state

__all__ = ["Coder", "Kept", "PlannedLayer", "exact"]

STORED = "stored input"


@dataclass(frozen=True)
class PlannedLayer:
    """What exact mode does with one layer.

    Attributes:
        name: of the layer.
        rule: by which it is inverted; "stored input" where there is none that holds.
        reason: why its input, or a part of it, is stored; "" where it is not.
        bits_per_dimension: that the layer added to ``kept``; negative where it took bits back.
    """

    name: str
    rule: str
    reason: str = ""
    bits_per_dimension: float = math.nan


@dataclass
class Kept:
    """What ``decode`` needs besides z.

    It consists of tensors and plain Python objects: ``save`` and ``Kept.load`` write and read it.

    Attributes:
        layers: what was done with each layer.
        quantization: how x became integers, in words.
        shape: of x.
        dtype: of x and z.
        threads: number of threads of torch.
    """

    layers: list[PlannedLayer]
    quantization: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    threads: int
    _opaque: bool
    _fraction_bits: int
    _latent: bytes
    _tapes: list[Tape]
    _shapes: list[tuple[int, ...]]
    _input: _Quantization
    _pushed: Packed
    _low: Packed
    _exponent: Packed | None

    @property
    def bits_per_dimension(self) -> float:
        """Bits that the layers pushed out or stored, per entry of x.

        Where contraction dominates this is -log2|det J| / D. Not counted: what z itself does not
        show of the final state, the seeds, and the bookkeeping. ``nbytes`` counts everything.
        """
        return sum(layer.bits_per_dimension for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Size of everything that is kept, in bytes, as ``save`` writes it."""
        written = io.BytesIO()
        torch.save(self, written)
        return len(written.getvalue())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file."""
        torch.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Kept:
        """Read what ``save`` has written. It unpickles: load only files that you trust.

        Raises:
            TypeError: if the file holds something else.
        """
        kept = torch.load(path, weights_only=False)
        if not isinstance(kept, Kept):
            raise TypeError(f"expected a file written by Kept.save, got {type(kept).__name__}")
        return kept

    def __str__(self) -> str:
        """The plan with the bits of each layer."""
        total = f"{self.bits_per_dimension:.2f} bits per dimension in {len(self.layers)} layers"
        return f"{_table(self.layers)}\n{total}; {self.quantization}"


def exact(model: Any) -> Coder:
    """A coder whose inverse restores every bit of x, in integer arithmetic.

    Any chain of layers has one. Affine couplings, permutations, elementwise affine maps,
    invertible matrices and affine autoregressive layers are inverted in integers; of every other
    layer the input is kept. ``coder.plan()`` says which is which.

    Args:
        model: an Invertible, or anything that ``wrap`` accepts.

    >>> from inn_guard.layers.permutation import Permutation
    >>> x = torch.tensor([[0.1, 0.2, 0.3]])
    >>> coder = exact(Permutation.reverse(3))
    >>> z, kept = coder.encode(x)
    >>> torch.equal(coder.decode(z, kept), x)
    True
    """
    return Coder(wrap(model))


@dataclass
class Coder:
    """Encoder and decoder of one model.

    z = F(x) up to rounding, and what the rounding and the contractions of F lose is in ``kept``.
    The networks inside the layers are evaluated in both directions and must give the same bits.
    That holds for the same model, dtype, device, batch shape and number of threads; ``decode``
    compares a digest of the parameters of every layer and refuses to return a wrong x.

    Args:
        model: the model. It is not changed.
    """

    model: Invertible
    _last: list[PlannedLayer] | None = None
    #: (shape, dtype, device) of batches -> what the first of them has shown
    _known: dict[Any, _Known] = field(default_factory=dict)

    def encode(self, x: Tensor) -> tuple[Tensor, Kept]:
        """(z, kept) with ``decode(z, kept)`` equal to x bit for bit.

        x is converted to fixed point, with a number of fraction bits from its range. What a value
        has beyond them is kept apart, so that nothing is lost; images and other data on a grid
        have nothing beyond them. ``kept.quantization`` says which.

        The first batch of a shape takes longer: every layer is undone at once, and compared with
        the model's own.

        Args:
            x: (B, *data), floating point.

        Raises:
            TypeError: if x is no floating-point tensor.
            ValueError: if x is empty or not finite, or the model refuses it, or a layer maps it to
                values that are not finite.
        """
        check_data(x)
        x = x.detach()
        key = (tuple(x.shape), x.dtype, x.device)
        with preserve_state(self.model), torch.no_grad():
            if key not in self._known:
                self._known[key] = self._first_seen(x)
            known = self._known[key]
            state, quantization = _Quantization.of(x)
            tapes: list[Tape] = []
            shapes: list[tuple[int, ...]] = []
            plan: list[PlannedLayer] = []
            for number, layer in enumerate(self._layers(opaque=known.opaque)):
                shapes.append(tuple(state.units.shape))
                before = state.pushed_bits()
                tape, reason = Tape(), known.stored.get(number)
                coded = _CodedLayer(layer, number, x.dtype)
                if reason is None:
                    state, reason = coded.by_rule(state, tape, check=number not in known.checked)
                if reason is not None:
                    tape = Tape()
                    state = coded.stored(state, tape)
                    if number not in known.checked:
                        known.stored[number] = reason
                known.checked.add(number)
                tapes.append(tape)
                bits = tape.spilled_bits + tape.stored_bits + state.pushed_bits() - before
                inside = tape.stored_bits > 0
                plan.append(coded.planned(reason, bits / x.numel(), stored_inside=inside))
        z = state.values(x.dtype)
        if not bool(z.isfinite().all()):
            raise ValueError(f"z exceeds the range of {dtype_name(x.dtype)}; pass x.double()")
        self._last = plan
        kept = Kept(
            layers=plan,
            quantization=quantization.description,
            shape=tuple(x.shape),
            dtype=x.dtype,
            threads=torch.get_num_threads(),
            _opaque=known.opaque,
            _fraction_bits=state.fraction_bits,
            _latent=digest(z),
            _tapes=tapes,
            _shapes=shapes,
            _input=quantization,
            _pushed=Packed.of(state.pushed.long()),
            _low=Packed.of((state.units - state.in_units(z.double()).round_()).long()),
            _exponent=None if state.exponent is None else Packed.of(state.exponent),
        )
        return z, kept

    def _first_seen(self, x: Tensor) -> _Known:
        """What the first batch of a shape shows.

        Raises:
            ValueError: if the model refuses it for its shape, dtype or device.
        """
        try:
            return _Known(opaque=_is_another_map(self.model, x))
        except (RuntimeError, ValueError) as error:
            why = why_rejected(self.model, x, self.model.context)
            if not why:
                why = f"expected x that the model accepts, got shape {tuple(x.shape)}"
            raise ValueError(f"{why}: {error}") from error

    def decode(self, z: Tensor, kept: Kept) -> Tensor:
        """The x that ``encode`` turned into (z, kept), bit for bit.

        Args:
            z: exactly as ``encode`` returned it.
            kept: what was returned with it.

        Raises:
            TypeError: if one of them is something else.
            ValueError: if z is another one, or the model has other layers.
            Mismatch: if a layer computes other bits than when x was encoded.
        """
        if not isinstance(kept, Kept) or not isinstance(z, Tensor):
            raise TypeError(
                "expected z and kept as encode returned them, got "
                f"{type(z).__name__} and {type(kept).__name__}: pass decode(*encode(x))"
            )
        z = z.detach()
        if digest(z) != kept._latent:
            raise ValueError(
                "expected the z that encode returned with this kept, bit for bit; "
                f"got another one, {dtype_name(z.dtype)} of shape {tuple(z.shape)}"
            )
        with preserve_state(self.model), torch.no_grad():
            torch.set_num_threads(kept.threads)
            layers = self._layers(opaque=kept._opaque)
            names = [layer.name for layer in layers]
            expected = [layer.name for layer in kept.layers]
            if names != expected:
                raise ValueError(f"expected a model with layers {expected}, got {names}")
            state = _final_state(z, kept)
            for number in reversed(range(len(layers))):
                coded = _CodedLayer(layers[number], number, kept.dtype)
                tape = kept._tapes[number].copy()
                state = coded.undone(
                    state,
                    tape,
                    kept._shapes[number],
                    stored=kept.layers[number].rule == STORED,
                    threads=kept.threads,
                )
        if not bool((state.pushed == SEED).all()):
            raise Mismatch("the decoder did not end in the state in which the encoder began")
        return kept._input.restored(state, kept.dtype)

    def plan(self, x: Tensor | None = None) -> str:
        """A table of the layers: rule, and why an input is stored where it is.

        Args:
            x: a batch to encode. Default: the plan of the last batch; before the first one, what
                the classes of the layers say.

        Returns:
            Lines of text. ``kept.layers`` has the same as objects.
        """
        if x is not None:
            self.encode(x)
        if self._last is not None:
            return _table(self._last)
        planned = []
        for layer in self.model.layers() or (self.model,):
            try:
                planned.append(PlannedLayer(layer.name, rule_of(layer).name))
            except NoExactRule as error:
                planned.append(PlannedLayer(layer.name, STORED, str(error)))
        return _table(planned)

    def _layers(self, *, opaque: bool = False) -> tuple[Invertible, ...]:
        if opaque:
            return (self.model,)
        return self.model.layers() or (self.model,)


@dataclass
class _Known:
    """What the first batch of a shape has shown."""

    opaque: bool  #: the composition of the layers is another map than the model
    stored: dict[int, str] = field(default_factory=dict)
    checked: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _CodedLayer:
    """One layer in integers."""

    layer: Invertible
    number: int
    dtype: torch.dtype

    def by_rule(
        self, state: FixedPoint, tape: Tape, *, check: bool
    ) -> tuple[FixedPoint, str | None]:
        """(the next state, None), or (the same state, why the input must be stored)."""
        try:
            steps = self._steps(state.units.shape, state.units.device)
            # a copy: a step may overwrite its state, and a later one may find that it has no rule
            after = run(steps, state.clone(), tape)
            if check:
                self._check(steps, state, after, tape)
        except NoExactRule as error:
            return state, str(error)
        return after, None

    def stored(self, state: FixedPoint, tape: Tape) -> FixedPoint:
        """The next state, with the input on the tape.

        Raises:
            ValueError: if the output is not finite.
        """
        try:
            return run(self._storing(), state, tape)
        except NoExactRule as error:
            raise ValueError(f"expected data that {self.title} maps to finite values") from error

    def undone(
        self, state: FixedPoint, tape: Tape, shape: Sequence[int], *, stored: bool, threads: int
    ) -> FixedPoint:
        """The state before the layer.

        Raises:
            Mismatch: if the layer computes other bits than when the tape was written.
        """
        steps = self._storing() if stored else self._steps(shape, state.units.device)
        try:
            state = undo(steps, state, tape)
            if tape.events:
                raise Mismatch("the tape has more events")
        except Mismatch as error:
            raise Mismatch(
                f"{self.title}: {error}; decode needs the same weights, dtype, device, library "
                f"versions and settings as encode (which ran with {threads} threads)"
            ) from error
        return state

    def planned(self, reason: str | None, bits: float, *, stored_inside: bool) -> PlannedLayer:
        """The layer's row of the plan.

        Args:
            reason: why its input is stored; None if it is not.
            bits: per dimension.
            stored_inside: the layer acts on a part of the state, whose input is stored.
        """
        name = self.layer.name
        if reason is not None:
            return PlannedLayer(name, STORED, reason, bits)
        why = ""
        if stored_inside:
            why = "the input of the part that it acts on is stored: that has no rule that holds"
        return PlannedLayer(name, rule_of(self.layer).name, why, bits)

    @property
    def title(self) -> str:
        """What messages call the layer."""
        return f"layer {self.number} ({self.layer.name})"

    def _steps(self, shape: Sequence[int], device: torch.device) -> list[Step]:
        example = torch.zeros(tuple(shape), dtype=self.dtype, device=device)
        return steps_of(self.layer, example)

    def _storing(self) -> list[Step]:
        return [StoredInput(self.layer, dtype=self.dtype)]

    def _check(self, steps: list[Step], state: FixedPoint, after: FixedPoint, tape: Tape) -> None:
        """Undo the layer at once, and compare with its own output.

        Raises:
            NoExactRule: if one of the two differs.
        """
        try:
            before = undo(steps, after.clone(), tape.copy())
        except Mismatch:
            raise NoExactRule("it does not repeat itself bit for bit") from None
        if not before.equals(state):
            raise NoExactRule("it does not repeat itself bit for bit")
        if not after.shows(self.layer(state.values(self.dtype))):
            raise NoExactRule("its output differs from the rule's")


@dataclass(frozen=True)
class _Quantization:
    """How x became integers, and what they do not show."""

    description: str
    positions: Packed | None
    rests: Tensor | None

    @classmethod
    def of(cls, x: Tensor) -> tuple[FixedPoint, _Quantization]:
        """The state nearest to x, and the rest."""
        fraction_bits = fraction_bits_for(x)
        state = FixedPoint.of(x, fraction_bits)
        nearest = state.values(x.dtype)
        differs = (nearest != x) | (nearest.signbit() != x.signbit())
        grid = f"fixed point with {fraction_bits} fraction bits"
        count = int(differs.sum())
        if not count:
            on_grid = f"every value of x lies on the grid {_grid(state)}, nothing is lost"
            return state, cls(f"{grid}; {on_grid}", None, None)
        # both are multiples of the last place of x: the difference is exact
        rests = (x.double() - state.values(torch.float64))[differs]
        positions = Packed.of(differs.flatten().nonzero())
        between = f"{count} of {x.numel()} values of x lie between its points; their rests are kept"
        return state, cls(f"{grid}; {between}", positions, rests)

    def restored(self, state: FixedPoint, dtype: torch.dtype) -> Tensor:
        """X, bit for bit."""
        if self.positions is None or self.rests is None:
            return state.values(dtype)
        values = state.values(torch.float64).flatten()
        index = self.positions.unpack().flatten().to(values.device)
        nearest = values[index]
        rests = self.rests.to(values.device)
        # 0.0 + -0.0 would lose the sign
        values[index] = torch.where(nearest == 0, rests, nearest + rests)
        return values.reshape(state.units.shape).to(dtype)


def _grid(state: FixedPoint) -> str:
    """The coarsest power of two of which all values are multiples."""
    if state.exponent is not None or not bool(state.units.any()):
        return f"2^-{state.fraction_bits}"
    units = state.units.long()
    lowest = units & -units
    zeros = int(lowest[lowest > 0].min()).bit_length() - 1
    return f"2^{zeros - state.fraction_bits}"


def _is_another_map(model: Invertible, x: Tensor) -> bool:
    """Whether the composition of the model's layers differs from the model."""
    layers = model.layers()
    if not layers:
        return False
    # in training mode a forward pass may initialise layers or update statistics
    with preserve_state(model):
        expected = model(x)
        if not torch.equal(expected, model(x)):
            # random in every call: layers are checked one by one
            return False
    with preserve_state(model):
        z = x
        for layer in layers:
            z = layer(z)
    return not close(z, expected, resolution=0.0)


def _final_state(z: Tensor, kept: Kept) -> FixedPoint:
    """The state that the encoder ended in."""
    pushed = kept._pushed.unpack().to(z.device).double()
    exponent = None if kept._exponent is None else kept._exponent.unpack().to(z.device)
    state = FixedPoint(torch.zeros_like(pushed), pushed, exponent, kept._fraction_bits)
    units = state.in_units(z.double()).round_() + kept._low.unpack().to(z.device)
    return replace(state, units=units)


def _table(layers: Sequence[PlannedLayer]) -> str:
    rows = [("layer", "rule", "bits per dimension", "why stored")]
    for number, layer in enumerate(layers):
        bits = "" if math.isnan(layer.bits_per_dimension) else f"{layer.bits_per_dimension:.2f}"
        rows.append((f"{number} {layer.name}", layer.rule, bits, layer.reason))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
