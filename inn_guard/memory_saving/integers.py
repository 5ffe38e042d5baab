"""Exact mode: the states are integers, so that the backward pass restores every one bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.tensors import dtype_name
from inn_guard.exact.fixed_point import (
    SEED,
    FixedPoint,
    NoExactRule,
    check_data,
    close,
    fraction_bits_for,
)
from inn_guard.exact.rules import Kinds, Rule, rule_of
from inn_guard.exact.rules.families import moves
from inn_guard.exact.steps import Affine, Moves, StoredInput, flat
from inn_guard.exact.steps import Step as IntegerStep
from inn_guard.exact.steps import run as run_integers
from inn_guard.exact.steps import undo as undo_integers
from inn_guard.exact.tape import Mismatch
from inn_guard.exact.tape import Tape as IntegerTape
from inn_guard.execution.state import preserve_state
from inn_guard.layers.inverted import InverseLayer
from inn_guard.memory_saving.backward import BackwardPass, LocalGraph, leaves_of
from inn_guard.memory_saving.forward import (
    ForwardPass,
    Record,
    Step,
    Tape,
    check_not_cached,
    results,
)
from inn_guard.memory_saving.replay import Autocast, Modules, RandomAndBufferState

__all__ = ["ExactBackwardPass", "ExactForwardPass", "ExactTape", "Plan"]

RANDOM = "it draws random numbers or updates statistics"
UNSTEADY = "it does not repeat itself bit for bit"
LEAST_LOGARITHM = -60.0  #: of a scale, far from where float32 underflows


@dataclass
class Plan:
    """What the first batch of a kind has shown of each step, by its number.

    Attributes:
        checked: steps that have been undone at once and compared with the layer's own result.
        stored: steps whose input is stored -> why.
        moves: steps that only move entries -> their moves.
        couplings: steps whose gradient one evaluation of their network gives.
    """

    checked: set[int] = field(default_factory=set)
    stored: dict[int, str] = field(default_factory=dict)
    moves: dict[int, Moves] = field(default_factory=dict)
    couplings: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class ExactRecord(Record):
    """What the forward pass notes of one step in exact mode.

    Attributes:
        shape: of the step's input.
        integers: what its integer arithmetic has left behind.
        rule: of the step's layer; None: its input is stored, that is what ``integers`` hold.
        steps: on integer states; empty without a rule.
        is_coupling: one evaluation of its network restores and differentiates.
    """

    shape: tuple[int, ...]
    integers: IntegerTape
    rule: Rule | None
    steps: tuple[IntegerStep, ...] = ()
    is_coupling: bool = False

    @property
    def moves(self) -> Moves | None:
        """The moves of a step that does nothing else."""
        only = self.steps[0] if len(self.steps) == 1 else None
        return only if isinstance(only, Moves) else None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> ExactRecord:
        """The record with ``function(tensor)`` in the place of every large tensor."""
        steps = tuple(step.mapped(function) for step in self.steps)
        return replace(self, integers=self.integers.mapped(function), steps=steps)


@dataclass
class ExactTape(Tape):
    """What the backward pass needs in exact mode.

    Attributes:
        final: the state after the last step.
    """

    final: FixedPoint | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> ExactTape:
        """The tape with ``function(tensor)`` in the place of every tensor that it stores."""
        records: list[Record] = []
        for record in self.records:
            records.append(cast(ExactRecord, record).mapped(function))
        final = None if self.final is None else self.final.mapped(function)
        return replace(self, records=records, final=final)


class ExactForwardPass(ForwardPass):
    """A sequence of steps on integer states.

    Args:
        steps: the steps in their order.
        parameters: every parameter that a step may use.
        plan: of batches like the one that ``run`` will get; filled in by the first of them.
    """

    def __init__(self, steps: Sequence[Step], parameters: Sequence[Tensor], plan: Plan) -> None:
        super().__init__([_forward(step) for step in steps], parameters, None)
        self.plan = plan
        self._kinds: Kinds = {}

    def run(self, x: Tensor) -> tuple[tuple[Tensor, ...], ExactTape]:
        """The results without a graph, and the tape for the backward pass.

        Raises:
            RuntimeError: under autocast, or inside ``torch.nn.utils.parametrize.cached()``.
            ValueError: if x or the output of a step is not finite.
        """
        check_data(x)
        modules = Modules(step.layer for step in self.steps)
        check_not_cached(modules)
        tape = ExactTape(Autocast.current(x), modules)
        _check_no_autocast(tape.autocast)
        state, log_dets = FixedPoint.of(x.detach(), fraction_bits_for(x)), []
        before = None
        with torch.no_grad():
            for k, step in enumerate(self.steps):
                moved = self._moved(k, state, x.dtype)
                if moved is not None:
                    state, record = moved
                    if step.with_log_det:
                        log_dets.append(x.new_zeros(len(x)))
                else:
                    before = RandomAndBufferState(step.layer, x, before)
                    state, log_det, record = self._advanced(k, state, x.dtype, before)
                    log_dets += log_det
                tape.records.append(record)
            tape.final = state
            z = state.values(x.dtype)
        if not bool(z.isfinite().all()):
            raise ValueError(f"z exceeds the range of {dtype_name(x.dtype)}; pass x.double()")
        return results(z, log_dets), tape

    def _moved(
        self, k: int, state: FixedPoint, dtype: torch.dtype
    ) -> tuple[FixedPoint, ExactRecord] | None:
        """Step k if it makes the moves that the first batch has shown; else None."""
        known, layer = self.plan.moves.get(k), self.steps[k].layer
        if known is None:
            return None
        try:
            rule = self._rule(k)
        except NoExactRule:
            return None
        if rule.steps is not moves or not known.are_of(layer):
            return None
        tape = IntegerTape()
        return known.run(state, tape), _record(dtype, state, tape, rule, (known,))

    def _advanced(
        self, k: int, state: FixedPoint, dtype: torch.dtype, before: RandomAndBufferState
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        """The state after step k, its log-determinant if it is asked for, and its record."""
        if k not in self.plan.stored:
            try:
                return self._by_rule(k, state, dtype, before)
            except NoExactRule as error:
                if before.changed():
                    # the layer is evaluated once more: it must draw and count only once
                    before.rewind()
                if k not in self.plan.checked:
                    self.plan.stored[k] = str(error)
            finally:
                self.plan.checked.add(k)
        return self._stored(k, state, dtype, before)

    def _rule(self, k: int) -> Rule:
        step = self.steps[k]
        if step.reverse:
            raise NoExactRule("it is the inverse of a layer that is injective only")
        return rule_of(step.layer, self._kinds)

    def _by_rule(
        self, k: int, state: FixedPoint, dtype: torch.dtype, before: RandomAndBufferState
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        step, rule, tape = self.steps[k], self._rule(k), IntegerTape()
        like = torch.empty(0, dtype=dtype, device=state.units.device)
        steps = tuple(_integer_steps(rule, step.layer, tuple(state.units.shape), like))
        record = _record(dtype, state, tape, rule, steps)
        if k not in self.plan.checked:
            self._check(k, state, record, before)
        if k in self.plan.couplings:
            return self._coupled(k, state, record, before)
        log_det = []
        if step.with_log_det:
            log_det.append(step.apply(state.values(dtype))[1])
        if len(steps) > 1 or not steps[0].refuses_in_time:
            # a step may overwrite its state, and a later one may find that it has no rule
            state = state.clone()
        after = run_integers(steps, state, tape)
        if before.changed():
            raise NoExactRule(RANDOM)
        return after, log_det, record

    def _coupled(
        self, k: int, state: FixedPoint, record: ExactRecord, before: RandomAndBufferState
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        """Step k, a coupling: one evaluation of its network gives everything."""
        one = cast(Affine, record.steps[0])
        scale, shift = one.parameters(one.known(state))
        log_det = []
        if self.steps[k].with_log_det:
            log_det.append(_log_det(one, scale, state))
        needed = before if before.changed() else None
        record = replace(record, state=needed, is_coupling=True)
        return one.applied(state, scale, shift, record.integers), log_det, record

    def _check(
        self, k: int, state: FixedPoint, record: ExactRecord, before: RandomAndBufferState
    ) -> None:
        """Go through step k and back, on copies, and compare with the layer's own output.

        Raises:
            NoExactRule: if one of them differs, or the layer is random and no coupling.
        """
        step, tape = self.steps[k], IntegerTape()
        after = run_integers(record.steps, state.clone(), tape)
        random = before.changed()
        if random:
            before.rewind()
        record = replace(record, state=before if random else None, integers=tape)
        with preserve_state(step.layer):
            with record.restored():
                # steps anew, as rules may evaluate layers
                like = torch.empty(0, dtype=record.dtype, device=state.units.device)
                steps = _integer_steps(cast(Rule, record.rule), step.layer, record.shape, like)
                try:
                    restored = undo_integers(steps, after.clone(), tape.copy())
                except Mismatch:
                    raise NoExactRule(UNSTEADY) from None
            with record.restored():
                own = step.layer(state.values(record.dtype))
            if not restored.equals(state):
                raise NoExactRule(UNSTEADY)
            if not after.shows(own):
                raise NoExactRule("its output differs from the rule's")
            moved = record.moves
            if moved is not None and _numbers_are_exact(moved) and step.layer.context is None:
                self.plan.moves[k] = moved
            if _is_coupling(step, state, after, record):
                self.plan.couplings.add(k)
            elif random:
                raise NoExactRule(RANDOM)

    def _stored(
        self, k: int, state: FixedPoint, dtype: torch.dtype, before: RandomAndBufferState
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        """Step k with its input on the tape.

        Raises:
            ValueError: if its output is not finite.
        """
        step, tape = self.steps[k], IntegerTape()
        log_dets: list[Tensor] = []

        def function(values: Tensor) -> Tensor:
            output, *log_det = step.apply(values)
            log_dets.extend(log_det)
            return output

        try:
            after = StoredInput(function, dtype=dtype).run(state, tape)
        except NoExactRule as error:
            raise ValueError(
                f"expected data that layer {k} ({step.layer.name}) maps to finite values"
            ) from error
        record = _record(dtype, state, tape, None, ())
        return after, log_dets, replace(record, state=before if before.changed() else None)


def _record(
    dtype: torch.dtype,
    state: FixedPoint,
    tape: IntegerTape,
    rule: Rule | None,
    steps: tuple[IntegerStep, ...],
) -> ExactRecord:
    return ExactRecord(
        dtype,
        fused_inverse=False,
        state=None,
        shape=tuple(state.units.shape),
        integers=tape,
        rule=rule,
        steps=steps,
    )


class ExactBackwardPass(BackwardPass):
    """The gradients of a forward pass in exact mode.

    One evaluation of a coupling's network serves to restore the state before it and to
    differentiate it. The gradient of moves is moved back.
    """

    def __init__(self, forward: ForwardPass, tape: ExactTape) -> None:
        super().__init__(forward, tape)
        # a copy, as undoing a step may overwrite its state: the graph may be used again
        self._state = cast(FixedPoint, tape.final).clone()

    def run(self, output: Tensor, gradients: Sequence[Tensor | None], first: int) -> Tensor | None:
        """The gradient of the input of step ``first``. Fills in ``self.gradients``.

        Raises:
            Mismatch: if a layer computed other bits than in the forward pass.
        """
        gradient = super().run(output, gradients, first)
        if first == 0 and not bool((self._state.pushed == SEED).all()):
            raise Mismatch("the backward pass did not end in the state of the forward pass's start")
        return gradient

    def _differentiate(
        self, k: int, output: Tensor, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Restore the input of step k; the gradient of that input."""
        record = cast(ExactRecord, self.tape.records[k])
        step, contexts = self._with_context_leaves(k)
        moved = record.moves
        try:
            if moved is not None:
                self._state = moved.undo(self._state, record.integers.copy())
                gradient = gradients[0]
                return output, None if gradient is None else moved.moved_back(gradient)
            if record.is_coupling:
                with record.restored():
                    point = _Point.of(step, self._state, record)
                self._state = point.before
                local = LocalGraph(point.known, contexts, point.outputs)
                through = self._pulled_back(k, local, point.output_gradients(gradients))
                return output, point.gradient(gradients, through)
            with record.restored():
                local = LocalGraph(*self._evaluated(step, record, contexts))
            return output, self._pulled_back(k, local, gradients)
        except Mismatch as error:
            raise Mismatch(
                f"layer {k} ({step.layer.name}): {error}; the backward pass needs the same "
                "weights, number of threads and settings as the forward pass"
            ) from error

    def _evaluated(
        self, step: Step, record: ExactRecord, contexts: dict[int, int]
    ) -> tuple[Tensor, dict[int, int], tuple[Tensor, ...]]:
        """The input of a step, restored, as a leaf, its contexts and its outputs."""
        tape = record.integers.copy()
        steps: Sequence[IntegerStep] = record.steps
        if record.rule is None:
            steps = [StoredInput(step.layer, dtype=record.dtype)]
        with torch.no_grad():
            self._state = undo_integers(steps, self._state, tape)
            if tape.events:
                raise Mismatch("the tape has more events")
            leaf = self._state.values(record.dtype).requires_grad_()
        with torch.enable_grad():
            return leaf, contexts, step.apply(leaf)


@dataclass(frozen=True)
class _Point:
    """A coupling between two states, z_c = x_c * scale + shift, with the graph of its parameters.

    Attributes:
        coupling: its step on integer states.
        before: the state x.
        transformed: (B, n), x_c; or z_c of a coupling that divides, z_c = (x_c - shift) / scale.
        known: the values that determine the parameters, a leaf of their graph.
        scale: (B, n), or broadcasting to it; None where it is one.
        shift: the same; None where it is zero.
    """

    coupling: Affine
    before: FixedPoint
    transformed: Tensor
    known: Tensor
    scale: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, step: Step, after: FixedPoint, record: ExactRecord) -> _Point:
        """The point whose state after the coupling is this one. It is overwritten.

        Raises:
            Mismatch: if the parameters are others than in the forward pass.
        """
        steps, dtype = record.steps, record.dtype
        if step.layer.context is not None:
            # its leaves are others now
            like = torch.empty(0, dtype=dtype, device=after.units.device)
            rule = cast(Rule, record.rule)
            steps = tuple(_integer_steps(rule, step.layer, record.shape, like))
        coupling = cast(Affine, steps[0])
        with torch.no_grad():
            known = coupling.known(after).requires_grad_()
        with torch.enable_grad():
            scale, shift = coupling.parameters(known)
        with torch.no_grad():
            transformed = None
            if coupling.divide:
                transformed = after.take(coupling.changed).values(dtype)
            before = coupling.undone(
                after,
                None if scale is None else scale.detach(),
                None if shift is None else shift.detach(),
                record.integers.copy(),
            )
            if transformed is None:
                transformed = before.take(coupling.changed).values(dtype)
        width = transformed.shape[1]
        with torch.enable_grad():
            scale, shift = flat(scale, width), flat(shift, width)
        return cls(coupling, before, transformed, known, scale, shift)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The parameters that there are."""
        return tuple(t for t in (self.scale, self.shift) if t is not None)

    def output_gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those of the parameters, from those of z and of the log-determinant."""
        found: list[Tensor | None] = []
        gradient, log_det = self._changed(gradients[0]), None
        if len(gradients) > 1 and gradients[1] is not None:
            log_det = gradients[1][:, None]
        if self.coupling.divide:
            gradient = -self._scaled(gradient)
            log_det = None if log_det is None else -log_det
        if self.scale is not None:
            inside = gradient * self.transformed
            if log_det is not None:
                inside = torch.addcdiv(inside, log_det, self.scale.detach())
            found.append(inside.sum_to_size(self.scale.shape))
        if self.shift is not None:
            found.append(gradient.sum_to_size(self.shift.shape))
        return found

    def gradient(self, gradients: Sequence[Tensor | None], through: Tensor | None) -> Tensor:
        """Of x: the direct one, and what goes through the parameters."""
        given = gradients[0]
        total = torch.zeros_like(self.known) if given is None else given
        # parameters have not read the entries that are changed, so that nothing goes through there
        total = total.clone() if through is None else total + through
        entries, values = total.flatten(1), self._scaled(self._changed(given))
        if isinstance(self.coupling.changed, slice):
            entries[:, self.coupling.changed] = values
        else:
            entries.index_copy_(1, self.coupling.changed, values)
        return entries.reshape(total.shape)

    def _changed(self, gradient: Tensor | None) -> Tensor:
        """The part of a gradient of z that belongs to the transformed entries, (B, n)."""
        if gradient is None:
            return torch.zeros_like(self.transformed)
        flat_gradient = gradient.flatten(1)
        if isinstance(self.coupling.changed, slice):
            return flat_gradient[:, self.coupling.changed]
        return flat_gradient.index_select(1, self.coupling.changed)

    def _scaled(self, gradient: Tensor) -> Tensor:
        """Times the derivative of z_c with respect to x_c."""
        if self.scale is None:
            return gradient
        scale = self.scale.detach()
        return gradient / scale if self.coupling.divide else gradient * scale


def _log_det(coupling: Affine, scale: Tensor | None, state: FixedPoint) -> Tensor:
    """The log-determinant of a coupling with this scale, (B,).

    Raises:
        NoExactRule: if a scale is too small for its logarithm.
    """
    batch, width = len(state.units), state.take(coupling.changed).units.shape[1]
    if scale is None:
        return torch.zeros(batch, dtype=coupling.dtype, device=state.units.device)
    logarithm = cast(Tensor, flat(scale, width)).expand(batch, width).abs().log()
    if not bool(logarithm.min() > LEAST_LOGARITHM):
        raise NoExactRule("a scale is too close to zero")
    total = logarithm.sum(1)
    return -total if coupling.divide else total


def _is_coupling(step: Step, state: FixedPoint, after: FixedPoint, record: ExactRecord) -> bool:
    """Whether the gradient of a step is that of its parameters, as autograd finds it itself.

    The parameters of a rule may be copies of the layer's, without their graph.
    """
    only = record.steps[0] if len(record.steps) == 1 else None
    if not isinstance(only, Affine) or only.changes_all:
        return False
    with record.restored():
        point = _Point.of(step, after.clone(), record)
    if not any(output.requires_grad for output in point.outputs):
        return False
    leaf = state.values(record.dtype).requires_grad_()
    with record.restored(), torch.enable_grad():
        own = step.apply(leaf)
    # some numbers between -1 and 1 in the place of the gradients that are to come
    gradients = [_some_numbers(output) for output in own]
    if step.with_log_det:
        try:
            log_det = _log_det(only, point.scale, state)
        except NoExactRule:
            return False
        if not close(log_det[:, None], own[1].detach()[:, None], resolution=1e-5):
            return False
    wanted = [tensor for tensor in leaves_of(own) if tensor is not leaf]
    if {id(t) for t in wanted} != {id(t) for t in leaves_of(point.outputs) if t is not point.known}:
        return False
    # both graphs may end in that of a context, which the caller still needs
    expected = torch.autograd.grad(
        own, [leaf, *wanted], gradients, allow_unused=True, retain_graph=True
    )
    inside = point.output_gradients(gradients)
    found = torch.autograd.grad(
        point.outputs, [point.known, *wanted], inside, allow_unused=True, retain_graph=True
    )
    found = (point.gradient(gradients, found[0]), *found[1:])
    for a, b in zip(found, expected, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and not close(a[None], b[None], resolution=1e-6):
            return False
    return True


def _some_numbers(like: Tensor) -> Tensor:
    numbers = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return numbers.sin().to(like.dtype).reshape(like.shape)


def _numbers_are_exact(moved: Moves) -> bool:
    """Whether its dtype holds the number of every entry."""
    return len(moved.rows) < 1 / torch.finfo(moved.dtype).eps


def _integer_steps(
    rule: Rule, layer: Invertible, shape: Sequence[int], like: Tensor
) -> list[IntegerStep]:
    """The steps of one layer on integer states.

    Args:
        rule: of the layer.
        layer: the layer.
        shape: of its input.
        like: a tensor of its dtype, on its device.

    Raises:
        NoExactRule: if there are none, or going back would evaluate its network many times.
    """
    # an example of one element: rules read its shape, dtype and device
    steps = rule.steps(layer, like.new_zeros(()).expand(tuple(shape)))
    passes = max((one.passes_of_undo() for one in steps), default=1)
    if passes > 1:
        raise NoExactRule(f"restoring its input would take {passes} passes of its network")
    return steps


def _forward(step: Step) -> Step:
    """The step as the forward pass of a layer, where its inverse is one."""
    if not step.reverse or not step.layer.bijective:
        return step
    return Step(InverseLayer(step.layer), with_log_det=step.with_log_det)


def _check_no_autocast(autocast: Autocast) -> None:
    for device, dtype in autocast.dtypes.items():
        if dtype is not None:
            raise RuntimeError(
                f"expected a call outside torch.autocast, got {dtype_name(dtype)} on {device}: "
                "exact mode restores states of float32. Call the model inside "
                f"torch.autocast({device!r}, enabled=False), or pass exact=False"
            )
