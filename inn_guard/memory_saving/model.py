"""memory_saving(model): the same map, its gradients computed from the output instead of stored activations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.core.invertible import Context, Invertible, NotApplicable
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.execution.state import preserve_state
from inn_guard.memory_saving.backward import BackwardPass
from inn_guard.memory_saving.drift import Guard
from inn_guard.memory_saving.forward import ForwardPass, Trace
from inn_guard.memory_saving.replay import hooks_suspended
from inn_guard.memory_saving.steps import (
    Backward,
    Forward,
    Measure,
    Step,
    output_and_log_det,
    output_only,
)

__all__ = ["MemorySaving", "memory_saving"]


def memory_saving(model: nn.Module, *, guard: float | None = None) -> MemorySaving:
    """The same map with gradients that need no stored activations: peak memory of one layer, not of all.

    Between the forward and the backward pass only x, z and the contexts are held. The backward pass walks the layers
    from the last to the first, rebuilds each layer's input with the layer's own inverse, evaluates that one layer with
    a graph, differentiates it, and forgets it. That costs one more evaluation of every layer, and one of its inverse;
    coupling layers do both with one evaluation of their network (``Invertible.with_cached_conditioner``). The first layer's input is x
    itself; layers that are only injective, layers with hooks, and layers that draw randomness or move statistics
    (dropout, BatchNorm in training mode) without a fused inverse, have their input stored, and every layer is repeated
    with the modes, random numbers, statistics and autocast that it had. Hooks on layers run in both passes; hooks on
    ``model`` itself, or on a container whose layers it lists, do not run. Double backward works; it stores the
    activations while it lasts.

    The gradient is that of the rebuilt inputs: wrong, without a sign, where the inverse is. With ``guard`` it is not:
    every rebuilt input is compared with a sketch of the true one (nine numbers per sample and layer), and where it is
    off, or the inverse fails, the inputs are computed once more from the last of about sqrt(L) stored ones. At worst,
    if every layer's inverse is unusable, that is one more forward pass, and the inputs of 2 sqrt(L) layers in memory.

    Args:
        model: an Invertible that is a chain of layers; parameters are shared, nothing in it is changed.
        guard: largest relative error |x' - x| / |x| of a rebuilt layer input, per sample, with which a gradient is
            computed; None: no guard.

    Returns:
        An Invertible to be called like ``model``, in both directions.

    Raises:
        TypeError: if ``model`` is not an Invertible.
        NotApplicable: if ``model`` has no layers().
        ValueError: if ``guard`` is not positive.

    References:
        The Reversible Residual Network: Backpropagation Without Storing Activations (Gomez, Ren, Urtasun, Grosse,
        2017).
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), section 4.
    """
    if not isinstance(model, Invertible):
        raise TypeError(
            f"expected an Invertible, got {type(model).__name__}; type memory_saving(wrap(model)) instead"
        )
    if isinstance(model, MemorySaving):
        model = model.model
    with preserve_state(model):  # a context may be embedded by a net whose statistics move
        is_chain = bool(model.layers())
    if not is_chain:
        raise NotApplicable(f"{model.name} has no layers(): there is nothing to walk back along")
    return MemorySaving(model, None if guard is None else Guard(guard))


class MemorySaving(Invertible):
    """A chain of layers that is differentiated without stored activations; see ``memory_saving``.

    Attributes:
        model: the map itself.
        enabled: set it to False for plain backpropagation through stored activations.
    """

    def __init__(self, model: Invertible, guard: Guard | None) -> None:
        super().__init__()
        self.model = model
        self.enabled = True
        self.bijective = model.bijective
        self.training = model.training
        self._guard = guard

    def forward(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch *latent"]:
        """z = F(x)."""
        walk = self._walk([Forward(layer) for layer in self.layers()], output_only)
        return _walked(walk, x)[0] if self._saves(walk, x) else self.model(x)

    def forward_and_log_det(
        self, x: Float[Tensor, "batch *data"]
    ) -> tuple[Float[Tensor, "batch *latent"], Float[Tensor, "batch"]]:
        """F(x) and log|det dF(x)/dx|, (B,)."""
        walk = self._walk([Forward(layer) for layer in self.layers()], output_and_log_det)
        if not self._saves(walk, x):
            return self.model.forward_and_log_det(x)
        z, log_det = _walked(walk, x)
        return z, log_det

    def inverse(self, z: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *data"]:
        """x = F^-1(z); its gradients walk from x to z."""
        walk = self._walk([Backward(layer) for layer in reversed(self.layers())], output_only)
        return _walked(walk, z)[0] if self._saves(walk, z) else self.model.inverse(z)

    def inverse_and_log_det(
        self, z: Float[Tensor, "batch *latent"]
    ) -> tuple[Float[Tensor, "batch *data"], Float[Tensor, "batch"]]:
        """F^-1(z) and log|det dF^-1(z)/dz|, (B,)."""
        walk = self._walk(
            [Backward(layer) for layer in reversed(self.layers())], output_and_log_det
        )
        if not self._saves(walk, z):
            return self.model.inverse_and_log_det(z)
        x, log_det = _walked(walk, z)
        return x, log_det

    def log_prob(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch"]:
        """The model's own log p(x), with its base, on top of the memory-saving forward pass."""
        twin = copy.copy(self.model)
        vars(twin)["forward_and_log_det"] = self.forward_and_log_det
        return twin.log_prob(x)

    def layers(self) -> tuple[Invertible, ...]:
        """The model's layers."""
        return self.model.layers()

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The model's linear maps at x."""
        return self.model.linearize(x)

    def with_context(self, context: Context) -> MemorySaving:
        """The same map with another context."""
        twin = MemorySaving(self.model.with_context(context), self._guard)
        twin.enabled = self.enabled
        return twin

    @property
    def context(self) -> Context:  # type: ignore[override]
        """The model's context."""
        return self.model.context

    @property
    def block(self) -> nn.Module:
        """What the model wraps."""
        return self.model.block

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def _saves(self, walk: ForwardPass, start: Tensor) -> bool:
        return self.enabled and walk.wants_gradients(start)

    def _walk(self, steps: Sequence[Step], measure: Measure) -> ForwardPass:
        parameters = {
            id(p): p
            for module in (self.model, *(step.layer for step in steps))
            for p in module.parameters()
        }
        return ForwardPass(steps, measure, list(parameters.values()), self._guard)


class _Differentiable(torch.autograd.Function):
    """A walk as one node of the graph, whose inputs are x and every parameter and context."""

    @staticmethod
    def forward(ctx: Any, walk: ForwardPass, x: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        outputs, trace = walk.run(x)
        if outputs[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            outputs = (outputs[0].clone(), *outputs[1:])
        ctx.walk, ctx.kept, ctx.noted = walk, list(trace.kept), replace(trace, kept={}, sketches=[])
        ctx.set_materialize_grads(False)
        # through autograd, which notices changes in place and frees all of it after the backward pass
        unchanging = [*sources, *trace.modules.constants()]
        ctx.count = len(unchanging)
        ctx.save_for_backward(x, outputs[0], *unchanging, *trace.kept.values(), *trace.sketches)
        return outputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotApplicable(
            "no forward-mode derivative of memory_saving(model): use its .model, or linearize(x)"
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, output, *rest = ctx.saved_tensors
        ctx.noted.modules.check_parameters()
        stored = iter(rest[ctx.count :])
        kept = {k: next(stored) for k in ctx.kept}
        trace = replace(ctx.noted, kept=kept, sketches=list(stored))
        if torch.is_grad_enabled():
            return None, *_recorded_gradients(ctx.walk, trace, x, gradients)
        way_back = BackwardPass(ctx.walk, trace)
        x_gradient = way_back.run(output, gradients, ctx.walk.first_differentiable(x))
        return None, x_gradient, *way_back.gradients


def _walked(walk: ForwardPass, x: Tensor) -> tuple[Tensor, ...]:
    return _Differentiable.apply(walk, x, *walk.sources)


def _recorded_gradients(
    walk: ForwardPass, trace: Trace, x: Tensor, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of x and of the sources that can themselves be differentiated, from a forward pass with a graph."""
    inputs = [x, *walk.sources]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    pairs = [
        (value, gradient)
        for value, gradient in zip(walk.repeat(x, trace), gradients, strict=True)
        if gradient is not None and value.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    values, gradients = zip(*pairs, strict=True)
    with hooks_suspended(wanted):
        found = iter(
            torch.autograd.grad(values, wanted, gradients, create_graph=True, allow_unused=True)
        )
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
