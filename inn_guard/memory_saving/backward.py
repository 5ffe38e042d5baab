"""The backward pass: from the last step to the first, rebuild its input and differentiate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inn_guard.core.context import map_tensors
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.memory_saving.forward import ForwardPass, Step, Tape
from inn_guard.memory_saving.replay import hooks_suspended

__all__ = ["BackwardPass", "LocalGraph", "leaves_of"]


@dataclass(frozen=True)
class LocalGraph:
    """One step with its graph.

    Attributes:
        state: the step's input, a leaf.
        contexts: id of the leaf that stands for a context -> the context's position among the
            dependencies.
        outputs: the step's results, differentiable.
    """

    state: Tensor
    contexts: dict[int, int]
    outputs: tuple[Tensor, ...]


class BackwardPass:
    """The gradients of a forward pass.

    The input of every step is stored, or rebuilt from its output by the layer's inverse. Where the
    inverse is missing, or the guard refuses what it returns, the inputs since the last checkpoint
    are computed again. So only the checkpoints, the inputs between two of them, and the activations
    of one layer are in memory at a time.

    Args:
        forward: the steps.
        tape: what the forward pass has noted.

    Attributes:
        gradients: one for each dependency of the forward pass; None: it has none.
    """

    def __init__(self, forward: ForwardPass, tape: Tape) -> None:
        self.forward, self.tape = forward, tape
        self.gradients: list[Tensor | None] = [None] * len(forward.dependencies)
        self._exact = dict(tape.checkpoints)

    def run(self, output: Tensor, gradients: Sequence[Tensor | None], first: int) -> Tensor | None:
        """The gradient of the input of step ``first``. Fills in ``self.gradients``.

        Args:
            output: the output of the last step.
            gradients: of the output, and of the log-determinant if there is one.
            first: the last step to be differentiated.
        """
        state = output.detach()
        gradient, *log_det_gradient = gradients
        with self.tape.restored():
            for k in reversed(range(first, len(self.forward.steps))):
                state, gradient = self._differentiate(k, state, [gradient, *log_det_gradient])
        return gradient

    def _differentiate(
        self, k: int, output: Tensor, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Input of step k and its gradient; adds the gradients of the step's dependencies."""
        local = self._rebuild(k, output)
        return local.state.detach(), self._pulled_back(k, local, gradients)

    def _pulled_back(
        self, k: int, local: LocalGraph, gradients: Sequence[Tensor | None]
    ) -> Tensor | None:
        """The gradient of the leaf ``local.state``; adds those of the step's dependencies.

        Args:
            k: number of the step.
            local: its graph.
            gradients: of ``local.outputs``.
        """
        values, value_gradients = [], []
        for value, gradient in zip(local.outputs, gradients, strict=True):
            if gradient is not None and value.requires_grad:
                values.append(value)
                value_gradients.append(gradient)
        leaves = leaves_of(values)
        if not leaves:
            return None
        with hooks_suspended(leaves):
            found = torch.autograd.grad(values, leaves, value_gradients, allow_unused=True)
        state_gradient = None
        for leaf, gradient in zip(leaves, found, strict=True):
            if leaf is local.state:
                state_gradient = gradient
            else:
                self._add(self._position(k, leaf, local), gradient)
        return state_gradient

    def _rebuild(self, k: int, output: Tensor) -> LocalGraph:
        if k not in self._exact:
            local = self._invert(k, output)
            if local is not None:
                return local
            before = [j for j in self._exact if j < k]
            if not before:
                name = self.forward.steps[k].layer.name
                raise NotApplicable(
                    f"the input of layer {k} ({name}) is not stored and its inverse is missing: "
                    'pass keep="input"'
                )
            start = max(before)
            self._exact |= self.forward.rerun(self.tape, start, self._exact[start], k)
        return self._evaluate(k, self._exact.pop(k))

    def _evaluate(self, k: int, state: Tensor) -> LocalGraph:
        """Step k at a known input."""
        step, contexts = self._with_context_leaves(k)
        leaf = state.detach().requires_grad_()
        with torch.enable_grad(), self.tape.records[k].restored():
            return LocalGraph(leaf, contexts, step.apply(leaf))

    def _invert(self, k: int, output: Tensor) -> LocalGraph | None:
        """Step k at the input that its inverse returns; None if there is none or it is refused."""
        record = self.tape.records[k]
        step, contexts = self._with_context_leaves(k)
        with record.restored():
            leaf = None
            if record.fused_inverse:
                leaf = output.to(record.dtype, copy=True).requires_grad_()
                with torch.enable_grad():
                    step = step.through(step.layer.with_cached_conditioner(leaf))
            state = self._undo(k, step, output)
            if state is None:
                return None
            if leaf is None:
                leaf = state.detach().requires_grad_()
            else:
                # the part that the conditioner has read keeps its values, and .data keeps the
                # version that its graph has saved
                leaf.data.copy_(state)
            with torch.enable_grad():
                return LocalGraph(leaf, contexts, step.apply(leaf))

    def _undo(self, k: int, step: Step, output: Tensor) -> Tensor | None:
        guard = self.forward.guard
        failures: type[Exception] = NotApplicable
        if guard is not None:
            failures = Exception  # libraries raise errors of their own outside their domain
        try:
            with torch.no_grad():
                state = step.undo(output).to(self.tape.records[k].dtype)
        except failures:
            return None
        if guard is not None and not guard.accepts(state, self.tape.fingerprints[k]):
            return None
        return state

    def _with_context_leaves(self, k: int) -> tuple[Step, dict[int, int]]:
        """Step k with leaves in place of the contexts that require gradients."""
        step, contexts = self.forward.steps[k], {}

        def leaf_of(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            leaf = tensor.detach().requires_grad_()
            contexts[id(leaf)] = self.forward.position[id(tensor)]
            return leaf

        if step.layer.context is None:
            return step, contexts
        context = map_tensors(step.layer.context, leaf_of)
        return step.through(step.layer.with_context(context)), contexts

    def _position(self, k: int, leaf: Tensor, local: LocalGraph) -> int:
        position = local.contexts.get(id(leaf), self.forward.position.get(id(leaf)))
        if position is None:
            raise RuntimeError(
                f"layer {k} ({self.forward.steps[k].layer.name}) depends on a tensor of shape "
                f"{tuple(leaf.shape)} that requires a gradient but is neither in the model's "
                "parameters() nor in its context, so its gradient would be lost: register it as a "
                "parameter, or pass it as context"
            )
        return position

    def _add(self, position: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        before = self.gradients[position]
        if before is not None:
            gradient = before + gradient
        self.gradients[position] = gradient


def leaves_of(values: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graph of ``values``."""
    found: list[Tensor] = []
    stack: list[Any] = []
    for value in values:
        if value.grad_fn is None:
            found.append(value)
        else:
            stack.append(value.grad_fn)
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
