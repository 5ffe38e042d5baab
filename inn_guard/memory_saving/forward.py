"""The walk along a chain of layers: forwards without a graph, and what has to be noted for the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible, map_tensors
from inn_guard.jacobian.network import is_unpatched
from inn_guard.memory_saving.drift import Guard
from inn_guard.memory_saving.replay import Autocast, Modules, RandomAndBufferState
from inn_guard.memory_saving.steps import Measure, Step

__all__ = ["ForwardPass", "Record", "Trace"]


@dataclass(frozen=True)
class Record:
    """What is noted of one step on the way forwards.

    Attributes:
        dtype: of the step's input.
        primes: whether one evaluation serves inversion and differentiation.
        surroundings: to be restored for a repetition; None if nothing but the input mattered.
    """

    dtype: torch.dtype
    primes: bool
    surroundings: RandomAndBufferState | None

    def restored(self) -> AbstractContextManager[None]:
        """A block in which the step finds what it found on the way forwards."""
        return nullcontext() if self.surroundings is None else self.surroundings.restored()


@dataclass
class Trace:
    """What the way back starts from, besides the output.

    Attributes:
        autocast: how the way forwards casted.
        modules: their modes and parameters.
        records: one per step.
        kept: inputs of steps that are stored, by the number of the step; that of the first always.
        sketches: one per step under a guard; else none.
    """

    autocast: Autocast
    modules: Modules
    records: list[Record] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    sketches: list[Tensor] = field(default_factory=list)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block in which modules are in the modes, and autocast is as it was, on the way forwards."""
        with self.modules.in_their_modes(), self.autocast.restored():
            yield


class ForwardPass:
    """Steps to be walked, and the tensors other than the input on which their results depend.

    Args:
        steps: in the order of the walk.
        measure: what is computed of every step.
        parameters: every parameter that a step may use.
        guard: compares rebuilt states with those of the way forwards, if given.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        measure: Measure,
        parameters: Sequence[Tensor],
        guard: Guard | None,
    ) -> None:
        self.steps, self.measure, self.guard = steps, measure, guard
        sources = {id(tensor): tensor for tensor in [*parameters, *self._contexts()]}
        self.sources = list(sources.values())
        self.position = {key: k for k, key in enumerate(sources)}

    def wants_gradients(self, x: Tensor) -> bool:
        """Whether anything at all is to be differentiated."""
        return torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *self.sources)
        )

    def run(self, x: Tensor) -> tuple[tuple[Tensor, ...], Trace]:
        """The outputs without a graph, and what the way back needs.

        Raises:
            RuntimeError: inside ``torch.nn.utils.parametrize.cached()``.
        """
        trace, state = (
            Trace(Autocast.current(x), _uncached(Modules(step.layer for step in self.steps))),
            x,
        )
        log_dets: list[Tensor] = []
        surroundings = None
        with torch.no_grad(), trace.autocast.restored():
            for k, step in enumerate(self.steps):
                surroundings = RandomAndBufferState(step.layer, state, surroundings)
                hooked = _hooked(step.layer)
                with_cached_conditioner = (
                    step if hooked else step.of(step.layer.with_cached_conditioner(state))
                )
                output, *log_det = self.measure(with_cached_conditioner, state)
                self._note(
                    trace,
                    k,
                    state,
                    (surroundings, with_cached_conditioner.layer is not step.layer, hooked),
                )
                state = output
                log_dets += log_det
        return self._results(state, log_dets), trace

    def repeat(self, x: Tensor, trace: Trace) -> tuple[Tensor, ...]:
        """The outputs once more, with the graph that autograd records."""
        state = x
        log_dets: list[Tensor] = []
        with torch.enable_grad(), trace.restored():
            for step, record in zip(self.steps, trace.records, strict=True):
                with record.restored():
                    state, *log_det = self.measure(step, state)
                log_dets += log_det
        return self._results(state, log_dets)

    def rerun(self, trace: Trace, start: int, state: Tensor, stop: int) -> dict[int, Tensor]:
        """Inputs of the steps start + 1, ..., stop, without a graph, from the one of ``start``."""
        states: dict[int, Tensor] = {}
        with torch.no_grad():
            for k in range(start, stop):
                with trace.records[k].restored():
                    state = states[k + 1] = self.measure(self.steps[k], state)[0]
        return states

    def first_differentiable(self, x: Tensor) -> int:
        """Number of the first step with anything to differentiate at or before it."""
        wanted = {id(tensor) for tensor in self.sources if tensor.requires_grad}
        if x.requires_grad or len(wanted) == len(self.sources):
            return 0
        per_step = [
            wanted & {id(tensor) for tensor in self._sources_of(step)} for step in self.steps
        ]
        everything_found = set().union(*per_step) == wanted
        return next((k for k, found in enumerate(per_step) if found), 0) if everything_found else 0

    def _note(
        self, trace: Trace, k: int, state: Tensor, made: tuple[RandomAndBufferState, bool, bool]
    ) -> None:
        surroundings, primes, hooked = made
        changed = surroundings.changed()
        trace.records.append(Record(state.dtype, primes, surroundings if changed else None))
        stride = len(self.steps) if self.guard is None else math.isqrt(len(self.steps) - 1) + 1
        step = self.steps[k]
        # the inverse of a layer that draws randomness or moves statistics need not do so as its forward did
        if k % stride == 0 or not step.invertible or (changed and not primes) or hooked:
            trace.kept[k] = state
        if self.guard is not None:
            trace.sketches.append(self.guard.sketch(state))

    def _results(self, state: Tensor, log_dets: list[Tensor]) -> tuple[Tensor, ...]:
        return (state, torch.stack(log_dets).sum(0)) if log_dets else (state,)

    def _contexts(self) -> list[Tensor]:
        return [tensor for step in self.steps for tensor in _tensors(step.layer.context)]

    def _sources_of(self, step: Step) -> list[Tensor]:
        return [*step.layer.parameters(), *_tensors(step.layer.context)]


def _uncached(modules: Modules) -> Modules:
    if modules.parametrized:
        raise RuntimeError(
            "expected a call outside torch.nn.utils.parametrize.cached(), which would keep weights without a graph "
            "from this pass, so that they got no gradient: leave cached() out, or use the model itself inside"
        )
    return modules


def _hooked(layer: Invertible) -> bool:
    """Whether hooks or methods of one instance make more of a call than the class, which its inverse does not undo."""
    modules = (layer, layer.block)
    return any(not is_unpatched(m) or m._backward_hooks or m._backward_pre_hooks for m in modules)


def _tensors(context: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(context, found.append)
    return found
