"""A linear map as a list of small steps, which can be run, transposed and solved.

A program maps the value numbered ``start`` to the one numbered ``end``. Every step computes one
value from others. The steps of J come from one recorded pass of a map. Those of J^-1 are found by
asking which values are known once the output is known: a coupling's identity part is a part of the
output, so its network's values follow, and then the transformed part.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from inn_guard.jacobian.network_products import Convolution, NetworkJacobian

__all__ = [
    "Assembly",
    "ChannelMixing",
    "Combination",
    "Convolved",
    "LinearProgram",
    "PerSource",
    "Rearrangement",
    "Reshape",
    "Selection",
    "Step",
    "solved",
]

#: a tensor -> a tensor
Map = Callable[[Tensor], Tensor]


@runtime_checkable
class Step(Protocol):
    """One linear step: the value ``target`` from the values ``sources``."""

    @property
    def sources(self) -> tuple[int, ...]:
        """Numbers of the values that are read."""
        ...

    @property
    def target(self) -> int:
        """Number of the value that is computed."""
        ...

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The target from the sources."""
        ...

    def transposed(self, u: Tensor) -> list[Tensor]:
        """What the transposed step adds to each source, from the target's ``u``."""
        ...

    def solved_for(self, k: int) -> Step | None:
        """The step that computes source k from the target and the other sources, if there is one.

        None where it does not exist or is not known.
        """
        ...


@dataclass(frozen=True)
class Combination:
    """Sum over k of c_k v_k, elementwise; a coefficient of None is 1."""

    sources: tuple[int, ...]
    target: int
    coefficients: tuple[Tensor | None, ...]

    def in_dtype(self, dtype: torch.dtype) -> Combination:
        """The sum with its coefficients in another dtype."""
        cast = [None if c is None else c.to(dtype) for c in self.coefficients]
        return Combination(self.sources, self.target, tuple(cast))

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The sum."""
        total = _times(values[0], self.coefficients[0])
        for value, coefficient in zip(values[1:], self.coefficients[1:], strict=True):
            if coefficient is None:
                total = total + value
            else:
                total = torch.addcmul(total, value, coefficient)
        return total

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The products c_k u."""
        return [_times(u, coefficient) for coefficient in self.coefficients]

    @property
    def scales_one(self) -> bool:
        """Whether it multiplies one value."""
        return len(self.sources) == 1 and self.coefficients[0] is not None

    def scale_(self, v: Tensor) -> Tensor:
        """That product in place of v, which must be of no further use: saves new memory."""
        return v.mul_(self.coefficients[0])  # type: ignore[arg-type]

    def solved_for(self, k: int) -> Combination | None:
        """The target minus the other terms, over c_k; None where c_k has a zero."""
        divisor = self.coefficients[k]
        if divisor is not None and not bool(((divisor != 0) & divisor.isfinite()).all()):
            return None
        sources: list[int] = [self.target]
        coefficients: list[Tensor | None] = [None if divisor is None else 1 / divisor]
        for j, source in enumerate(self.sources):
            if j != k:
                sources.append(source)
                coefficients.append(_minus_ratio(self.coefficients[j], divisor))
        return Combination(tuple(sources), self.sources[k], tuple(coefficients))


@dataclass(frozen=True)
class Rearrangement:
    """The same entries in another shape or order, or in another dtype."""

    sources: tuple[int, ...]
    target: int
    there: Map
    back: Map

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The entries in their new places."""
        return self.there(values[0])

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The entries in their old places."""
        return [self.back(u)]

    def solved_for(self, k: int) -> Rearrangement:
        """The way back."""
        return Rearrangement((self.target,), self.sources[0], self.back, self.there)


@dataclass(frozen=True)
class Reshape:
    """The same entries in another shape: from ``before`` to ``after``."""

    sources: tuple[int, ...]
    target: int
    before: torch.Size
    after: torch.Size

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The entries in the shape ``after``."""
        return values[0].reshape(self.after)

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The entries in the shape ``before``."""
        return [u.reshape(self.before)]

    def solved_for(self, k: int) -> Reshape:
        """The way back."""
        return Reshape((self.target,), self.sources[0], self.after, self.before)


@dataclass(frozen=True)
class Selection:
    """Some entries along one dimension: ``index`` of ``size``."""

    sources: tuple[int, ...]
    target: int
    dim: int
    index: range | Tensor
    size: int

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The selected entries."""
        return _taken(values[0], self.dim, self.index)

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The entries in their places, and zeros elsewhere."""
        return [_placed([u], self.dim, [self.index], self.size)]

    def solved_for(self, k: int) -> None:
        """The other entries are not known."""
        return


@dataclass(frozen=True)
class Assembly:
    """Values put side by side along one dimension, each at its ``indexes`` of ``size``."""

    sources: tuple[int, ...]
    target: int
    dim: int
    indexes: tuple[range | Tensor, ...]
    size: int

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The values in their places, and zeros elsewhere."""
        return _placed(values, self.dim, self.indexes, self.size)

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The parts."""
        return [_taken(u, self.dim, index) for index in self.indexes]

    def solved_for(self, k: int) -> Selection:
        """The part that is source k; the other sources are not needed."""
        return Selection((self.target,), self.sources[k], self.dim, self.indexes[k], self.size)


@dataclass(frozen=True)
class ChannelMixing:
    """W v along one dimension, at every position."""

    sources: tuple[int, ...]
    target: int
    weight: Tensor
    dim: int

    def in_dtype(self, dtype: torch.dtype) -> ChannelMixing:
        """The product computed, and returned, in another dtype."""
        return replace(self, weight=self.weight.to(dtype))

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The product with W."""
        return _mixed(values[0].to(self.weight.dtype), self.weight.t(), self.dim)

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The product with W^T."""
        return [_mixed(u.to(self.weight.dtype), self.weight, self.dim)]

    def solved_for(self, k: int) -> ChannelMixing | None:
        """The product with W^-1; None where W is not square."""
        if self.weight.shape[0] != self.weight.shape[1]:
            return None
        inverse = torch.linalg.inv_ex(self.weight).inverse
        return ChannelMixing((self.target,), self.sources[0], inverse, self.dim)


@dataclass(frozen=True)
class Convolved:
    """A convolution of two-dimensional images."""

    sources: tuple[int, ...]
    target: int
    convolution: Convolution

    def in_dtype(self, dtype: torch.dtype) -> Convolved:
        """The convolution computed, and returned, in another dtype."""
        return replace(self, convolution=self.convolution.in_dtype(dtype))

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The convolution without its bias."""
        return self.convolution.jvp(values[0])

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The transposed convolution."""
        return [self.convolution.vjp(u)]

    def solved_for(self, k: int) -> None:
        """It is not known to be invertible."""
        return


@dataclass(frozen=True)
class PerSource:
    """A sum of products with one Jacobian for each source."""

    sources: tuple[int, ...]
    target: int
    jacobians: tuple[NetworkJacobian, ...]

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The sum of J_k v_k."""
        total = self.jacobians[0].jvp(values[0])
        for jacobian, value in zip(self.jacobians[1:], values[1:], strict=True):
            total = total + jacobian.jvp(value)
        return total

    def transposed(self, u: Tensor) -> list[Tensor]:
        """The products J_k^T u."""
        return [jacobian.vjp(u) for jacobian in self.jacobians]

    def solved_for(self, k: int) -> None:
        """It is not known to be invertible."""
        return


#: their products, and those of their transposes, are tensors of their own
_RETURNS_NEW = (ChannelMixing, Convolved)


class LinearProgram:
    """Steps that lead from the value ``start`` to the value ``end``; others are left out.

    Attributes:
        batch: number of samples, if it has been measured that steps keep them apart; else 0.
    """

    def __init__(self, steps: Sequence[Step], start: int, end: int, *, batch: int = 0) -> None:
        self.start, self.end, self.batch = start, end, batch
        needed, kept = {end}, []
        for step in reversed(steps):
            if step.target in needed:
                kept.append(step)
                needed.update(step.sources)
        self.steps = kept[::-1]
        self._last_reader: dict[int, int] = {}
        self._readers: collections.Counter[int] = collections.Counter([end])
        for k, step in enumerate(self.steps):
            self._readers.update(step.sources)
            for source in step.sources:
                self._last_reader[source] = k

    def in_dtype(self, dtype: torch.dtype, *, short: Sequence[int] = ()) -> LinearProgram | None:
        """The program with its large convolutions, and what follows them, in a shorter dtype.

        A value is short between two such steps. What adds it to values of the full dtype, or is
        of another kind, computes in the full dtype again: so states of layers are not rounded.

        Args:
            dtype: the shorter one.
            short: numbers of values that are given in it.

        Returns:
            None where no step is large.
        """
        casting = _Casting(dtype, set(short), 1 + max(step.target for step in self.steps))
        for step in self.steps:
            casting.add(step)
        if not casting.short - set(short):
            return None
        return LinearProgram(casting.steps, self.start, self.end, batch=self.batch)

    def select(self, rows: Tensor) -> LinearProgram | None:
        """The program for these rows of the batch (indices or a mask); None where it has no such.

        Every step has to keep the samples apart along its first dimension.
        """
        if not self.batch:
            return None
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        samples = _Samples(rows, self.batch)
        chosen = []
        for step in self.steps:
            part = samples.of_step(step)
            if part is None:
                return None
            chosen.append(part)
        return LinearProgram(chosen, self.start, self.end, batch=len(rows))

    def run(self, v: Tensor) -> Tensor:
        """The product with v."""
        values = {self.start: v}
        owned: set[int] = set()  # new tensors that one step reads, which it may overwrite
        for k, step in enumerate(self.steps):
            read = [values[source] for source in step.sources]
            if isinstance(step, Combination) and step.scales_one and step.sources[0] in owned:
                values[step.target] = step.scale_(read[0])
            else:
                values[step.target] = step.apply(read)
            if isinstance(step, _RETURNS_NEW) and self._readers[step.target] == 1:
                owned.add(step.target)
            for source in set(step.sources):
                if self._last_reader[source] == k and source != self.end:
                    del values[source]
        return values[self.end]

    def run_transposed(self, u: Tensor) -> Tensor:
        """The product of the transpose with u."""
        sums = {self.end: u}
        owned: set[int] = set()
        for step in reversed(self.steps):
            if step.target not in sums:
                continue
            # a value's readers come after it, so its sum is complete
            total = sums.pop(step.target)
            if isinstance(step, Combination) and step.scales_one and step.target in owned:
                parts = [step.scale_(total)]
            else:
                parts = step.transposed(total)
            for source, part in zip(step.sources, parts, strict=True):
                if source in sums:
                    sums[source] = sums[source] + part
                    owned.add(source)
                else:
                    sums[source] = part
                    if isinstance(step, _RETURNS_NEW):
                        owned.add(source)
        return sums[self.start]


@dataclass(frozen=True)
class _Samples:
    """Rows of a batch; tensors may hold several rows for each sample, one sample after another."""

    rows: Tensor
    batch: int

    def of_step(self, step: Step) -> Step | None:
        """The step for these rows; None where that is not known."""
        if isinstance(step, Combination):
            return self._of_combination(step)
        if isinstance(step, Reshape):
            before, after = self._of_shape(step.before), self._of_shape(step.after)
            if before is None or after is None:
                return None
            return replace(step, before=before, after=after)
        if isinstance(step, Convolved):
            output = step.convolution.output
            if len(output) != self.batch:
                return None
            return replace(step, convolution=step.convolution.select(self.rows))
        if isinstance(step, (Selection, Assembly)):
            return step if step.dim > 0 else None
        if isinstance(step, ChannelMixing):
            return step if step.dim > 0 else None
        if isinstance(step, Rearrangement):
            return step
        return None

    def _of_combination(self, step: Combination) -> Combination | None:
        coefficients: list[Tensor | None] = []
        for coefficient in step.coefficients:
            if coefficient is None or coefficient.dim() == 0 or len(coefficient) == 1:
                coefficients.append(coefficient)
                continue
            several, left = divmod(len(coefficient), self.batch)
            if left:
                return None
            if several == 1:
                coefficients.append(coefficient[self.rows])
            else:
                by_sample = coefficient.unflatten(0, (self.batch, several))
                coefficients.append(by_sample[self.rows].flatten(0, 1))
        return Combination(step.sources, step.target, tuple(coefficients))

    def _of_shape(self, shape: torch.Size) -> torch.Size | None:
        """The shape for these rows; None where its first dimension does not count samples."""
        if not shape:
            return None
        several, left = divmod(shape[0], self.batch)
        return None if left else torch.Size([several * len(self.rows), *shape[1:]])


class _Casting:
    """Steps of which some compute in a shorter dtype.

    Attributes:
        steps: those so far.
        short: numbers of the values that are in the shorter dtype.
    """

    def __init__(self, dtype: torch.dtype, short: set[int], unused: int) -> None:
        self.steps: list[Step] = []
        self.short = short
        self._dtype, self._unused = dtype, unused

    def add(self, step: Step) -> None:
        """Append the step, in the shorter dtype where that is faster and rounds no state."""
        all_short = self.short.issuperset(step.sources)
        large = isinstance(step, Convolved) and step.convolution.has_many_rows
        if isinstance(step, (Combination, ChannelMixing, Convolved)) and (all_short or large):
            self.steps.append(step.in_dtype(self._dtype))
            self.short.add(step.target)
        elif isinstance(step, (Rearrangement, Reshape, Selection)) and all_short:
            self.steps.append(step)
            self.short.add(step.target)
        elif isinstance(step, Combination):
            self.steps.append(step)  # adds the short values to the others, in the dtype of these
        else:
            sources = tuple(map(self._in_full, step.sources))
            self.steps.append(replace(step, sources=sources))  # type: ignore[type-var]

    def _in_full(self, value: int) -> int:
        """The number of the value in the full dtype."""
        if value not in self.short:
            return value
        number, self._unused = self._unused, self._unused + 1
        there, back = _to(torch.float32), _to(self._dtype)
        self.steps.append(Rearrangement((value,), number, there, back))
        return number


def _to(dtype: torch.dtype) -> Map:
    return lambda v: v.to(dtype)


def solved(program: LinearProgram) -> LinearProgram | None:
    """The inverse of a program as one; None where the known values do not lead to its start."""
    solving = _Solving(program)
    while solving.waiting and program.start not in solving.known:
        solving.look_around(solving.waiting.popleft())
    if program.start not in solving.known:
        return None
    return LinearProgram(solving.steps, program.end, program.start)


class _Solving:
    """The values that follow from the end of a program, and the steps by which they do.

    Attributes:
        known: numbers of these values.
        steps: what computes them, in order.
        waiting: known values whose neighbours have not been looked at.
    """

    def __init__(self, program: LinearProgram) -> None:
        self.known = {program.end}
        self.steps: list[Step] = []
        self.waiting = collections.deque([program.end])
        self._producers = {step.target: step for step in program.steps}
        self._readers: dict[int, list[Step]] = collections.defaultdict(list)
        for step in program.steps:
            for source in set(step.sources):
                self._readers[source].append(step)

    def look_around(self, value: int) -> None:
        """Compute what has become known with ``value``."""
        producer = self._producers.get(value)
        if producer is not None:
            self._solve(producer)
        for reader in self._readers[value]:
            self._solve(reader)
        if isinstance(producer, Selection):
            (whole,) = producer.sources
            self._learn(_from_selections(whole, self._readers[whole], self.known))

    def _solve(self, step: Step) -> None:
        """Compute the step's target, or the sources that follow from it."""
        unknown = [k for k, source in enumerate(step.sources) if source not in self.known]
        if step.target not in self.known:
            if not unknown:
                self._learn(step)
        elif isinstance(step, Assembly) or len(unknown) == 1:
            for k in unknown:
                self._learn(step.solved_for(k))

    def _learn(self, step: Step | None) -> None:
        if step is not None and step.target not in self.known:
            self.known.add(step.target)
            self.steps.append(step)
            self.waiting.append(step.target)


def _from_selections(whole: int, readers: Sequence[Step], known: set[int]) -> Assembly | None:
    """A value from those of its selections that are known, if they cover it without overlap."""
    parts = [step for step in readers if isinstance(step, Selection) and step.target in known]
    by_dim = collections.defaultdict(list)
    for part in parts:
        by_dim[part.dim].append(part)
    for dim, selections in by_dim.items():
        size, chosen = selections[0].size, []
        found: set[int] = set()
        for selection in selections:
            index = _numbers(selection.index)
            if found.isdisjoint(index):
                found.update(index)
                chosen.append(selection)
        if len(found) == size:
            sources = tuple(selection.target for selection in chosen)
            indexes = tuple(selection.index for selection in chosen)
            return Assembly(sources, whole, dim, indexes, size)
    return None


def _numbers(index: range | Tensor) -> list[int]:
    return index.tolist() if isinstance(index, Tensor) else list(index)


def _times(v: Tensor, coefficient: Tensor | None) -> Tensor:
    return v if coefficient is None else v * coefficient


def _minus_ratio(coefficient: Tensor | None, divisor: Tensor | None) -> Tensor:
    """-c / d, where None is 1."""
    if coefficient is None and divisor is None:
        return torch.tensor(-1.0)
    if divisor is None:
        return -coefficient  # type: ignore[operator]
    return -1 / divisor if coefficient is None else -coefficient / divisor


def _mixed(v: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Every row along ``dim`` times the matrix."""
    if v.dim() == 2 and dim == 1:
        return v @ matrix
    rows = v.movedim(dim, -1)
    # one product of two matrices: of more dimensions, torch makes many small ones
    flat = rows.reshape(-1, rows.shape[-1]) @ matrix
    return flat.view(*rows.shape[:-1], -1).movedim(-1, dim)


def _taken(v: Tensor, dim: int, index: range | Tensor) -> Tensor:
    """The entries at ``index``; a view where they are next to each other."""
    if isinstance(index, Tensor):
        return v.index_select(dim, index)
    if index.step == 1:
        return v.narrow(dim, index.start, len(index))
    return v[(slice(None),) * dim + (slice(index.start, index.stop, index.step),)]


def _placed(
    parts: Sequence[Tensor], dim: int, indexes: Sequence[range | Tensor], size: int
) -> Tensor:
    """The parts at their places along ``dim``, and zeros elsewhere."""
    in_order, end = [], 0
    for index, part in zip(indexes, parts, strict=True):
        if isinstance(index, range) and index.step == 1 and index.start == end:
            in_order.append(part)
            end = index.stop
    if end == size and len(in_order) == len(parts):
        return torch.cat(in_order, dim) if len(parts) > 1 else parts[0]
    shape = list(parts[0].shape)
    shape[dim] = size
    whole = parts[0].new_zeros(shape)
    for index, part in zip(indexes, parts, strict=True):
        if isinstance(index, Tensor):
            whole.index_copy_(dim, index, part)
        else:
            whole[(slice(None),) * dim + (slice(index.start, index.stop, index.step),)] = part
    return whole
