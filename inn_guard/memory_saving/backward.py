"""The way back along a chain: rebuild one layer's input, differentiate that layer, forget it, go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.invertible import map_tensors
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.memory_saving.forward import ForwardPass, Trace
from inn_guard.memory_saving.replay import hooks_suspended
from inn_guard.memory_saving.steps import Step

__all__ = ["BackwardPass"]


@dataclass(frozen=True)
class Local:
    """One step with its graph.

    Attributes:
        state: its input, a leaf.
        contexts: id of a leaf that stands for a context -> that context's position among the walk's sources.
        outputs: what was measured, differentiable.
    """

    state: Tensor
    contexts: dict[int, int]
    outputs: tuple[Tensor, ...]


class BackwardPass:
    """Gradients of a walk's outputs by walking from the last step to the first.

    Every step's input is rebuilt from its output by the inverse, unless it was stored; where the inverse does not
    exist, or the guard does not accept what it gives, the inputs since the last stored one are computed once more
    from there. So no more than the stored inputs, one segment of inputs and one layer's activations are held at a time.

    Args:
        walk: the steps.
        trace: what the way forwards noted.
    """

    def __init__(self, walk: ForwardPass, trace: Trace) -> None:
        self.walk, self.trace = walk, trace
        self.gradients: list[Tensor | None] = [None] * len(walk.sources)
        self._exact = dict(trace.kept)

    def run(self, output: Tensor, gradients: Sequence[Tensor | None], first: int) -> Tensor | None:
        """The gradient of the input of step ``first``; those of the walk's sources are in ``self.gradients``."""
        state, (gradient, *log_det_gradient) = output.detach(), gradients
        with self.trace.restored():
            for k in reversed(range(first, len(self.walk.steps))):
                state, gradient = self._differentiate(k, state, [gradient, *log_det_gradient])
        return gradient

    def _differentiate(
        self, k: int, output: Tensor, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Input of step k and its gradient; adds the gradients of the sources that the step uses."""
        local = self._rebuilt(k, output)
        pairs = [
            (value, gradient)
            for value, gradient in zip(local.outputs, gradients, strict=True)
            if gradient is not None and value.requires_grad
        ]
        state = local.state.detach()
        if not pairs:
            return state, None
        values, gradients = zip(*pairs, strict=True)
        leaves = _leaves(values)
        with hooks_suspended(leaves):
            found = (
                torch.autograd.grad(values, leaves, gradients, allow_unused=True) if leaves else ()
            )
        state_gradient = None
        for leaf, gradient in zip(leaves, found, strict=True):
            if leaf is local.state:
                state_gradient = gradient
            else:
                self._add(self._position(k, leaf, local), gradient)
        return state, state_gradient

    def _rebuilt(self, k: int, output: Tensor) -> Local:
        local = None if k in self._exact else self._inverted(k, output)
        if local is not None:
            return local
        if k not in self._exact:
            start = max(j for j in self._exact if j < k)
            self._exact |= self.walk.rerun(self.trace, start, self._exact[start], k)
        return self._evaluated(k, self._exact.pop(k))

    def _evaluated(self, k: int, state: Tensor) -> Local:
        """Step k at a known input."""
        step, contexts = self._localized(k)
        leaf = state.detach().requires_grad_()
        with torch.enable_grad(), self.trace.records[k].restored():
            return Local(leaf, contexts, self.walk.measure(step, leaf))

    def _inverted(self, k: int, output: Tensor) -> Local | None:
        """Step k at the input that its inverse gives; None if that cannot be had or is refused."""
        record = self.trace.records[k]
        step, contexts = self._localized(k)
        with record.restored():
            leaf = output.to(record.dtype, copy=True).requires_grad_() if record.primes else None
            if leaf is not None:
                with torch.enable_grad():
                    step = step.of(step.layer.with_cached_conditioner(leaf))
            state = self._undone(k, step, output)
            if state is None:
                return None
            if leaf is None:
                leaf = state.detach().requires_grad_()
            else:
                leaf.data.copy_(
                    state
                )  # what priming used keeps its values; the version that its graph saw stays
            with torch.enable_grad():
                return Local(leaf, contexts, self.walk.measure(step, leaf))

    def _undone(self, k: int, step: Step, output: Tensor) -> Tensor | None:
        guard = self.walk.guard
        refused = (
            NotApplicable if guard is None else Exception
        )  # libraries leave their domain with errors of their own
        try:
            with torch.no_grad():
                state = step.undo(output).to(self.trace.records[k].dtype)
        except refused:
            return None
        return state if guard is None or guard.accepts(state, self.trace.sketches[k]) else None

    def _localized(self, k: int) -> tuple[Step, dict[int, int]]:
        """Step k with leaves in place of the contexts that have gradients."""
        step, contexts = self.walk.steps[k], {}

        def leaf_of(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            leaf = tensor.detach().requires_grad_()
            contexts[id(leaf)] = self.walk.position[id(tensor)]
            return leaf

        if step.layer.context is None:
            return step, contexts
        return step.of(step.layer.with_context(map_tensors(step.layer.context, leaf_of))), contexts

    def _position(self, k: int, leaf: Tensor, local: Local) -> int:
        position = local.contexts.get(id(leaf), self.walk.position.get(id(leaf)))
        if position is None:
            raise RuntimeError(
                f"layer {k} ({self.walk.steps[k].layer.name}) depends on a tensor of shape {tuple(leaf.shape)} that "
                "requires grad but is neither among the model's parameters() nor in its context, so its gradient "
                "would be lost: register it as a parameter, or hand it in as context"
            )
        return position

    def _add(self, position: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            before = self.gradients[position]
            self.gradients[position] = gradient if before is None else before + gradient


def _leaves(values: Sequence[Tensor]) -> list[Tensor]:
    """The tensors at which the graph of ``values`` begins."""
    found: list[Tensor] = []
    stack: list[Any] = []
    for value in values:
        stack += [value.grad_fn] if value.grad_fn is not None else []
        found += [value] if value.grad_fn is None else []
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        else:
            stack += [parent for parent, _ in node.next_functions]
    return found
