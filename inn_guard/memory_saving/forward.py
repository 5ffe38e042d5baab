"""The forward pass along a chain of layers, without a graph, and what the backward pass needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from inn_guard.core.context import Context, map_tensors
from inn_guard.core.invertible import Invertible
from inn_guard.core.readable import first_reason, is_as_written, why_patched
from inn_guard.memory_saving.drift import Guard
from inn_guard.memory_saving.replay import Autocast, Modules, RandomAndBufferState

__all__ = [
    "ForwardPass",
    "Record",
    "Step",
    "Tape",
    "check_not_cached",
    "results",
    "with_known_conditioner",
]


@dataclass(frozen=True)
class Step:
    """One layer, applied from data to latent or the other way.

    Attributes:
        layer: the layer.
        reverse: whether the step applies the layer's inverse, z -> x.
        with_log_det: whether the step also computes the log-determinant.
    """

    layer: Invertible
    reverse: bool = False
    with_log_det: bool = False

    @property
    def invertible(self) -> bool:
        """Whether ``undo`` returns the input. The inverse of an injective layer projects it."""
        return self.reverse or self.layer.bijective

    def apply(self, state: Tensor) -> tuple[Tensor, ...]:
        """(output,), or (output, log_det) with log_det = log|det d output/d state|, (B,)."""
        if self.with_log_det and self.reverse:
            return self.layer.inverse_and_log_det(state)
        if self.with_log_det:
            return self.layer.forward_and_log_det(state)
        if self.reverse:
            return (self.layer.inverse(state),)
        return (self.layer(state),)

    def undo(self, output: Tensor) -> Tensor:
        """The input that gives this output."""
        if self.reverse:
            return self.layer(output)
        return self.layer.inverse(output)

    def through(self, layer: Invertible) -> Step:
        """The same step through another layer."""
        return replace(self, layer=layer)


@dataclass(frozen=True)
class Record:
    """What the forward pass notes of one step.

    Attributes:
        dtype: dtype of the step's input.
        fused_inverse: whether one evaluation of the layer's network serves both its inverse and its
            derivative.
        state: random numbers and buffers to be restored when the step is repeated; None where the
            step depends on its input only.
    """

    dtype: torch.dtype
    fused_inverse: bool
    state: RandomAndBufferState | None

    def restored(self) -> AbstractContextManager[None]:
        """A block in which the step finds the random numbers and buffers of the forward pass."""
        if self.state is None:
            return nullcontext()
        return self.state.restored()


@dataclass
class Tape:
    """What the backward pass needs in addition to the output.

    Attributes:
        autocast: the autocast state of the forward pass.
        modules: the modules' modes and parameters.
        records: one for each step.
        checkpoints: number of a step -> its input, stored.
        fingerprints: with a guard, one for each step's input; without one, empty.
    """

    autocast: Autocast
    modules: Modules
    records: list[Record] = field(default_factory=list)
    checkpoints: dict[int, Tensor] = field(default_factory=dict)
    fingerprints: list[Tensor] = field(default_factory=list)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Tape:
        """The tape with ``function(tensor)`` in the place of every tensor that it stores."""
        checkpoints = {k: function(state) for k, state in self.checkpoints.items()}
        return replace(
            self, checkpoints=checkpoints, fingerprints=list(map(function, self.fingerprints))
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A block with the training modes and the autocast state of the forward pass."""
        with self.modules.restored_modes(), self.autocast.restored():
            yield


class ForwardPass:
    """A sequence of steps, and the tensors other than the input on which its results depend.

    Args:
        steps: the steps in their order.
        parameters: every parameter that a step may use.
        guard: compares rebuilt inputs with those of the forward pass; None: they are not compared.
        keep_input: whether the input of the first step is stored; else its inverse rebuilds it.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        parameters: Sequence[Tensor],
        guard: Guard | None,
        *,
        keep_input: bool = True,
    ) -> None:
        self.steps, self.guard, self.keep_input = steps, guard, keep_input
        contexts = [tensor for step in steps for tensor in tensors_in(step.layer.context)]
        dependencies = {id(tensor): tensor for tensor in (*parameters, *contexts)}
        self.dependencies = list(dependencies.values())
        self.position = {key: k for k, key in enumerate(dependencies)}
        # with a guard, a rebuilt input that is refused is computed again from the last checkpoint
        self._stride = len(steps)
        if guard is not None and steps:
            self._stride = math.isqrt(len(steps) - 1) + 1

    def wants_gradients(self, x: Tensor) -> bool:
        """Whether the results have anything to differentiate."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(tensor.requires_grad for tensor in self.dependencies)

    def run(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tape]:
        """The results without a graph, and the tape for the backward pass.

        Raises:
            RuntimeError: inside ``torch.nn.utils.parametrize.cached()``.
        """
        modules = Modules(step.layer for step in self.steps)
        check_not_cached(modules)
        tape = Tape(Autocast.current(x), modules)
        state, log_dets = x, []
        before = None
        with torch.no_grad(), tape.autocast.restored():
            for k, step in enumerate(self.steps):
                before = RandomAndBufferState(step.layer, state, before)
                hooked = _has_hooks(step.layer)
                evaluated = with_known_conditioner(step, state)
                output, *log_det = evaluated.apply(state)
                fused = evaluated.layer is not step.layer
                needed = None
                if before.changed():
                    needed = before
                tape.records.append(Record(state.dtype, fused, needed))
                # a layer that draws random numbers or updates statistics does so in its forward,
                # which its inverse does not repeat unless one evaluation serves both
                rebuildable = step.invertible and not hooked and (needed is None or fused)
                at_checkpoint = k % self._stride == 0 and self.keep_input
                if at_checkpoint or not rebuildable:
                    tape.checkpoints[k] = state
                if self.guard is not None:
                    tape.fingerprints.append(self.guard.fingerprint(state))
                state = output
                log_dets += log_det
        return results(state, log_dets), tape

    def repeat(self, x: Tensor, tape: Tape) -> tuple[Tensor, ...]:
        """The results once more, with the graph that autograd records."""
        state: Tensor = x
        log_dets: list[Tensor] = []
        with torch.enable_grad(), tape.restored():
            for step, record in zip(self.steps, tape.records, strict=True):
                with record.restored():
                    state, *log_det = step.apply(state)
                log_dets += log_det
        return results(state, log_dets)

    def rerun(self, tape: Tape, start: int, state: Tensor, stop: int) -> dict[int, Tensor]:
        """Inputs of the steps start + 1, ..., stop from that of ``start``, without a graph."""
        states: dict[int, Tensor] = {}
        with torch.no_grad():
            for k in range(start, stop):
                with tape.records[k].restored():
                    state = self.steps[k].apply(state)[0]
                states[k + 1] = state
        return states

    def first_differentiable(self, *, input_wanted: bool) -> int:
        """The number of the first step that has to be differentiated.

        Args:
            input_wanted: whether the gradient of the first step's input is asked for.
        """
        wanted = {id(tensor) for tensor in self.dependencies if tensor.requires_grad}
        if input_wanted or len(wanted) == len(self.dependencies):
            return 0
        first = None
        found: set[int] = set()
        for k, step in enumerate(self.steps):
            used = wanted.intersection(map(id, _dependencies_of(step)))
            if first is None and used:
                first = k
            found |= used
        # a step may use a parameter of another module, which nothing here can tell
        if first is None or found != wanted:
            return 0
        return first


def tensors_in(context: Context) -> list[Tensor]:
    """All tensors of a (nested) context."""
    found: list[Tensor] = []
    map_tensors(context, found.append)
    return found


def with_known_conditioner(step: Step, state: Tensor) -> Step:
    """The step with its conditioner evaluated once, at ``state``; itself if it has none.

    Args:
        step: the step.
        state: its input or its output.
    """
    if _has_hooks(step.layer) or not is_as_written(step.layer, "with_cached_conditioner"):
        return step
    return step.through(step.layer.with_cached_conditioner(state))


def results(state: Tensor, log_dets: list[Tensor]) -> tuple[Tensor, ...]:
    """The last state, and the sum of the log-determinants if there are any."""
    if not log_dets:
        return (state,)
    return state, torch.stack(log_dets).sum(0)


def _dependencies_of(step: Step) -> list[Tensor]:
    return [*step.layer.parameters(), *tensors_in(step.layer.context)]


def check_not_cached(modules: Modules) -> None:
    """Check that no weights are cached.

    Raises:
        RuntimeError: inside ``torch.nn.utils.parametrize.cached()``.
    """
    if modules.cache_parametrizations:
        raise RuntimeError(
            "expected a call outside torch.nn.utils.parametrize.cached(): it would keep weights of "
            "this pass, which have no graph, so that their parameters got no gradient. Leave "
            "cached() out, or call the model itself inside it"
        )


def _has_hooks(layer: Invertible) -> bool:
    """Whether a hook or a method of this instance changes a call: the inverse does not undo it."""
    return first_reason((layer, layer.block), why_patched) is not None
