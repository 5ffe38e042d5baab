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
    fraction_bits_for,
)
from inn_guard.exact.rules import Rule, rule_of
from inn_guard.exact.rules.families import moves
from inn_guard.exact.steps import Affine, StoredInput
from inn_guard.exact.steps import Step as IntegerStep
from inn_guard.exact.steps import run as run_integers
from inn_guard.exact.steps import undo as undo_integers
from inn_guard.exact.tape import Mismatch
from inn_guard.exact.tape import Tape as IntegerTape
from inn_guard.execution.state import preserve_state
from inn_guard.layers.inverted import InverseLayer
from inn_guard.memory_saving.backward import BackwardPass, LocalGraph
from inn_guard.memory_saving.forward import (
    ForwardPass,
    Record,
    Step,
    Tape,
    check_not_cached,
    results,
    with_known_conditioner,
)
from inn_guard.memory_saving.replay import Autocast, Modules, RandomAndBufferState

__all__ = ["ExactBackwardPass", "ExactForwardPass", "ExactTape", "Plan"]


@dataclass
class Plan:
    """What the first batch of a kind has shown of each step, by its number.

    Attributes:
        checked: steps that have been undone at once and compared with the layer's own result.
        stored: steps whose input is stored -> why.
    """

    checked: set[int] = field(default_factory=set)
    stored: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExactRecord(Record):
    """What the forward pass notes of one step in exact mode.

    Attributes:
        shape: of the step's input.
        integers: what its integer arithmetic has left behind.
        rule: of the step's layer; None: its input is stored, that is what ``integers`` hold.
        moves: of a layer that only moves entries: its step on integer states; else None.
    """

    shape: tuple[int, ...]
    integers: IntegerTape
    rule: Rule | None
    moves: list[IntegerStep] | None = None


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
            integers = cast(ExactRecord, record).integers.mapped(function)
            records.append(replace(cast(ExactRecord, record), integers=integers))
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
                before = RandomAndBufferState(step.layer, x, before)
                state, log_det, record = self._advanced(k, state, x.dtype, before)
                tape.records.append(record)
                log_dets += log_det
            tape.final = state
            z = state.values(x.dtype)
        if not bool(z.isfinite().all()):
            raise ValueError(f"z exceeds the range of {dtype_name(x.dtype)}; pass x.double()")
        return results(z, log_dets), tape

    def _advanced(
        self, k: int, state: FixedPoint, dtype: torch.dtype, before: RandomAndBufferState
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        """The state after step k, its log-determinant if it is asked for, and its record."""
        if k not in self.plan.stored:
            try:
                rule = self._rule(k)
                if rule.steps is moves and k in self.plan.checked:
                    return self._moved(k, rule, state, dtype)
                return self._by_rule(k, rule, state, state.values(dtype), before)
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
        return rule_of(step.layer)

    def _by_rule(
        self,
        k: int,
        rule: Rule,
        state: FixedPoint,
        values: Tensor,
        before: RandomAndBufferState,
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        step, shape = self.steps[k], tuple(values.shape)
        evaluated = with_known_conditioner(step, values)
        fused = evaluated.layer is not step.layer
        steps = _integer_steps(rule, evaluated.layer, shape, values, fused=fused)
        tape = IntegerTape()
        # a copy: a step may overwrite its state, and a later one may find that it has no rule
        after = run_integers(steps, state.clone(), tape)
        needed = before if before.changed() else None
        if needed is not None and not fused:
            raise NoExactRule("it draws random numbers or updates statistics")
        record = ExactRecord(values.dtype, fused, needed, shape, tape, rule)
        if k not in self.plan.checked:
            _check(step, state, after, record)
        if not step.with_log_det:
            return after, [], record
        return after, [evaluated.apply(values)[1]], record

    def _moved(
        self, k: int, rule: Rule, state: FixedPoint, dtype: torch.dtype
    ) -> tuple[FixedPoint, list[Tensor], ExactRecord]:
        """Step k, which only moves entries, as the first batch has shown: it is not evaluated."""
        step, shape = self.steps[k], tuple(state.units.shape)
        like = torch.empty(0, dtype=dtype, device=state.units.device)
        steps = _integer_steps(rule, step.layer, shape, like, fused=False)
        record = ExactRecord(
            dtype,
            fused_inverse=False,
            state=None,
            shape=shape,
            integers=IntegerTape(),
            rule=rule,
            moves=steps,
        )
        after = run_integers(steps, state, record.integers)
        log_det = [like.new_zeros(shape[0])] if step.with_log_det else []
        return after, log_det, record

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
        needed = before if before.changed() else None
        shape = tuple(state.units.shape)
        record = ExactRecord(
            dtype, fused_inverse=False, state=needed, shape=shape, integers=tape, rule=None
        )
        return after, log_dets, record


class ExactBackwardPass(BackwardPass):
    """The gradients of a forward pass in exact mode.

    One evaluation of a coupling's network serves to restore the state before it and to
    differentiate it.
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

    def _rebuild(self, k: int, output: Tensor) -> LocalGraph:
        record = cast(ExactRecord, self.tape.records[k])
        step, contexts = self._with_context_leaves(k)
        with record.restored():
            try:
                leaf, step, self._state = _restored(step, self._state, record)
            except Mismatch as error:
                raise Mismatch(
                    f"layer {k} ({step.layer.name}): {error}; the backward pass needs the same "
                    "weights, number of threads and settings as the forward pass"
                ) from error
            with torch.enable_grad():
                return LocalGraph(leaf, contexts, step.apply(leaf))


def _restored(
    step: Step, after: FixedPoint, record: ExactRecord
) -> tuple[Tensor, Step, FixedPoint]:
    """(input as a leaf, the step to be differentiated at it, the state before the step)."""
    tape = record.integers.copy()
    if record.rule is None:
        before = undo_integers([StoredInput(step.layer, dtype=record.dtype)], after, tape)
        return before.values(record.dtype).requires_grad_(), step, before
    leaf = None
    if record.fused_inverse:
        leaf = after.values(record.dtype).requires_grad_()
        with torch.enable_grad():
            step = step.through(step.layer.with_cached_conditioner(leaf))
    with torch.no_grad():
        like = torch.empty(0, dtype=record.dtype, device=after.units.device)
        steps = record.moves
        if steps is None:
            steps = _integer_steps(
                record.rule, step.layer, record.shape, like, fused=record.fused_inverse
            )
        before = undo_integers(steps, after, tape)
        if tape.events:
            raise Mismatch("the tape has more events")
        values = before.values(record.dtype)
    if leaf is None:
        return values.requires_grad_(), step, before
    # the part that the conditioner has read keeps its values, and .data keeps the version that its
    # graph has saved
    leaf.data.copy_(values)
    return leaf, step, before


def _check(step: Step, state: FixedPoint, after: FixedPoint, record: ExactRecord) -> None:
    """Restore the input at once as the backward pass will, and compare with the layer's output.

    Raises:
        NoExactRule: if one of the two differs.
    """
    with preserve_state(step.layer):
        try:
            with record.restored():
                _, _, before = _restored(step, after.clone(), record)
        except Mismatch:
            raise NoExactRule("it does not repeat itself bit for bit") from None
        with record.restored():
            own = step.layer(state.values(record.dtype))
    if not state.equals(before):
        raise NoExactRule("it does not repeat itself bit for bit")
    if not after.shows(own):
        raise NoExactRule("its output differs from the rule's")


def _integer_steps(
    rule: Rule, layer: Invertible, shape: Sequence[int], like: Tensor, *, fused: bool
) -> list[IntegerStep]:
    """The steps of one layer on integer states.

    Args:
        rule: of the layer.
        layer: with its conditioner known, if ``fused``.
        shape: of its input.
        like: a tensor of its dtype, on its device.
        fused: its conditioner is known.

    Raises:
        NoExactRule: if there are none, or going back would evaluate its network many times.
    """
    # an example of one element: rules read its shape, dtype and device
    steps = rule.steps(layer, like.new_zeros(()).expand(tuple(shape)))
    passes = max((one.passes_of_undo() for one in steps), default=1)
    if passes > 1:
        raise NoExactRule(f"restoring its input would take {passes} passes of its network")
    for one in steps:
        if fused and isinstance(one, Affine):
            one.reads_state = False
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
