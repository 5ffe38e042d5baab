"""memory_saving(model): the same map, with gradients computed from its output."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.core.composition import Composition, compare_inverses, compare_layers
from inn_guard.core.invertible import Invertible, InvertibleWrapper, NotApplicable
from inn_guard.execution.state import preserve_state
from inn_guard.memory_saving.backward import BackwardPass
from inn_guard.memory_saving.drift import Guard
from inn_guard.memory_saving.forward import ForwardPass, Step, Tape
from inn_guard.memory_saving.integers import (
    ExactBackwardPass,
    ExactForwardPass,
    ExactTape,
    Plan,
)
from inn_guard.memory_saving.replay import hooks_suspended

__all__ = ["INPUT", "OUTPUT", "MemorySaving", "memory_saving", "saving_compared_chain"]

INPUT, OUTPUT = "input", "output"  #: what is stored between the two passes


def memory_saving(
    model: nn.Module, *, guard: float | None = None, exact: bool = False, keep: str = INPUT
) -> MemorySaving:
    """The same map with gradients that need no stored activations: the peak memory of one layer.

    Between the forward and the backward pass only x, z and the contexts are stored. The backward
    pass goes from the last layer to the first. It rebuilds a layer's input with the layer's
    inverse, evaluates that layer with a graph, differentiates it and frees it. That costs one more
    evaluation of every layer and one of its inverse. Coupling layers need one evaluation of their
    network for both (``Invertible.with_cached_conditioner``).

    The input of the first layer is x itself, unless ``keep`` says otherwise. The input of some
    layers is stored: layers that are only injective, layers with hooks, and layers that draw random
    numbers or update statistics (dropout, BatchNorm in training mode), unless one evaluation serves
    forward and inverse. Every layer is repeated with the training mode, random numbers, statistics
    and autocast state of the forward pass. Hooks on layers run in both passes. Hooks on ``model``
    itself, or on a container whose layers it lists, do not run. Double backward works, but stores
    the activations.

    At the first call in each direction the layers are compared with the model, at a few samples:
    layers that compose to another map, as with a hook on a container that changes its output, are
    refused with NotApplicable. So are calls with a log-determinant that is not the sum of those of
    the layers.

    The gradient is that of the rebuilt inputs. Where the inverse is wrong it is wrong, too, and
    nothing shows that. With ``guard``, every rebuilt input is compared with a fingerprint of the
    true one (nine numbers per sample and layer). Where it is too far off, or the inverse fails,
    inputs are computed again from the last of about sqrt(L) stored ones, for L layers. In the worst
    case, where no inverse is usable, that costs one more forward pass, and the inputs of 2 sqrt(L)
    layers are stored.

    With ``exact`` the gradient cannot be wrong that way. The states are integers, whose layers are
    those of ``exact(model)``: the backward pass restores every bit of them, also where the inverse
    of the model is lost. z differs from the model's own by rounding of float32, for a model in
    float64 too. Kept between the passes are the last state, 16 bytes an entry, and the bits that
    contractions push out. One evaluation of a coupling's network restores and differentiates.
    Stored, with 5 bytes an entry or so, is the input of layers without an exact rule; of
    autoregressive layers, whose input would take one pass of the network for each entry; and of
    other layers than couplings that draw random numbers or update statistics. ``saving.plan()``
    says which. On the CPU a step takes up to three times as long as with stored activations. The
    first batch of a shape takes longer: every layer is restored at once and compared, and the
    gradient of every coupling with that of autograd.

    Args:
        model: an Invertible with layers(), or anything that ``wrap`` accepts. Parameters are
            shared, nothing in it is changed.
        guard: largest accepted relative error |x' - x| / |x| of a rebuilt layer input, per sample;
            None: rebuilt inputs are not checked.
        exact: restore the inputs of layers bit for bit. There is nothing to guard then.
        keep: "input": x is stored beside z, so that the first layer is differentiated at x itself.
            "output": z alone, as in the published code; x is rebuilt like any other input, with its
            error, and there is no double backward.

    Returns:
        An Invertible to be called like ``model``, in both directions.

    Raises:
        TypeError: if ``model`` is nothing that ``wrap`` accepts.
        NotApplicable: if ``model`` has no layers().
        ValueError: if ``guard`` is not positive, or given together with ``exact``; if ``keep`` is
            neither "input" nor "output", or "output" together with one of them.

    References:
        The Reversible Residual Network: Backpropagation Without Storing Activations (Gomez, Ren,
        Urtasun, Grosse, 2017).
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 4.
    """
    model = wrap(model)
    if isinstance(model, MemorySaving):
        model = model.inner
    with preserve_state(model):  # layers() may embed a context with a net whose statistics move
        _require_layers(model)
    if not isinstance(exact, bool):
        raise TypeError(f"expected exact as True or False; got {exact!r:.60}")
    if exact and guard is not None:
        raise ValueError(
            "expected exact=True or a guard, got both: exactly restored inputs need no guard"
        )
    if keep not in (INPUT, OUTPUT):
        raise ValueError(f'expected keep as "{INPUT}" or "{OUTPUT}"; got {keep!r:.60}')
    if keep == OUTPUT and (exact or guard is not None):
        raise ValueError(
            f'expected keep="{INPUT}" with a guard or exact=True, which start from the stored '
            f'input; got keep="{OUTPUT}"'
        )
    checked = None
    if guard is not None:
        checked = Guard(guard)
    return MemorySaving(model, checked, exact=exact, keep=keep)


def saving_compared_chain(
    model: Invertible, composition: Composition, *, keep: str = INPUT
) -> MemorySaving:
    """``memory_saving(model)`` of a chain whose layers have been compared with it before.

    Args:
        model: the chain.
        composition: how its layers differ from it.
        keep: as in ``memory_saving``.

    Raises:
        NotApplicable: if ``model`` has no layers().
    """
    _require_layers(model)
    saving = MemorySaving(model, None, keep=keep)
    saving._compositions[False] = composition
    return saving


def _require_layers(model: Invertible) -> None:
    if not model.layers():
        raise NotApplicable(
            f"{model.name} has no layers(): memory_saving needs a chain of layers to go back along"
        )


@dataclass(frozen=True)
class _Kind:
    """What batches have in common that share a plan.

    Attributes:
        modes: training modes of the model's modules.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    modes: tuple[bool, ...]
    reverse: bool


class MemorySaving(InvertibleWrapper):
    """A chain of layers that is differentiated without stored activations; see ``memory_saving``.

    Args:
        inner: the map.
        guard: compares rebuilt layer inputs with the true ones; None: they are not compared.
        exact: restore layer inputs bit for bit, in integers.
        keep: whether the "input" is stored beside the output, or the "output" alone.

    Attributes:
        enabled: set it to False for plain backpropagation through stored activations.
        exact: whether layer inputs are restored bit for bit.
        keep: "input" or "output".
    """

    def __init__(
        self,
        inner: Invertible,
        guard: Guard | None,
        *,
        exact: bool = False,
        keep: str = INPUT,
    ) -> None:
        super().__init__(inner)
        self.exact = exact
        self.keep = keep
        self._plans: dict[_Kind, Plan] = {}
        self.enabled = True
        self._guard = guard
        self._compositions: dict[bool, Composition] = {}

    def forward(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch *latent"]:
        """z = F(x)."""
        forward = self._pass(x, reverse=False, with_log_det=False)
        if not self._saves(forward, x, reverse=False, with_log_det=False):
            return self.inner(x)
        return _apply(forward, x)[0]

    def forward_and_log_det(
        self, x: Float[Tensor, "batch *data"]
    ) -> tuple[Float[Tensor, "batch *latent"], Float[Tensor, "batch"]]:
        """F(x) and log|det dF(x)/dx|, (B,)."""
        forward = self._pass(x, reverse=False, with_log_det=True)
        if not self._saves(forward, x, reverse=False, with_log_det=True):
            return self.inner.forward_and_log_det(x)
        z, log_det = _apply(forward, x)
        return z, log_det

    def inverse(self, z: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *data"]:
        """x = F^-1(z)."""
        forward = self._pass(z, reverse=True, with_log_det=False)
        if not self._saves(forward, z, reverse=True, with_log_det=False):
            return self.inner.inverse(z)
        return _apply(forward, z)[0]

    def inverse_and_log_det(
        self, z: Float[Tensor, "batch *latent"]
    ) -> tuple[Float[Tensor, "batch *data"], Float[Tensor, "batch"]]:
        """F^-1(z) and log|det dF^-1(z)/dz|, (B,)."""
        forward = self._pass(z, reverse=True, with_log_det=True)
        if not self._saves(forward, z, reverse=True, with_log_det=True):
            return self.inner.inverse_and_log_det(z)
        x, log_det = _apply(forward, z)
        return x, log_det

    def log_prob(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch"]:
        """log p(x) = log p(z) + log|det dF(x)/dx| in nats, (B,), with the model's own base."""
        if not self.enabled:
            return self.inner.log_prob(x)
        base = self.inner.base()
        if base is not None and base.log_density is not None:
            z, log_det = self.forward_and_log_det(x)
            return base.log_prob(z) + log_det
        # the model's own formula with the memory-saving pass in place of its own
        clone = copy.copy(self.inner)
        vars(clone)["forward_and_log_det"] = self.forward_and_log_det
        return clone.log_prob(x)

    def plan(self) -> str:
        """A table of the layers whose input exact mode stores, and why, for the last batch."""
        if not self._plans:
            return "no batch yet: call the model once"
        layers = self.layers()
        kind, plan = list(self._plans.items())[-1]
        if kind.reverse:
            layers = layers[::-1]
        lines = [f"{len(layers) - len(plan.stored)} of {len(layers)} layers restored in integers"]
        for number, reason in sorted(plan.stored.items()):
            lines.append(f"{number} {layers[number].name}  stored input  {reason}")
        return "\n".join(lines)

    def _saves(
        self, forward: ForwardPass, start: Tensor, *, reverse: bool, with_log_det: bool
    ) -> bool:
        """Whether this call saves memory.

        Raises:
            NotApplicable: if the layers compute something else than the map.
        """
        if not self.enabled or not forward.wants_gradients(start):
            return False
        if torch.compiler.is_compiling():
            return True
        found = self._compared(start, reverse=reverse)
        why = found.inverse if reverse else found.forward
        if why:
            raise NotApplicable(
                f"{self.name}: {why}, and memory_saving would replace it by its layers: return () "
                "from its layers(), or override nothing of a chain and register no hooks on it"
            )
        if with_log_det and found.log_det:
            raise NotApplicable(
                f"{self.name}: {found.log_det}, and memory_saving would replace it by their sum: "
                "correct the log-determinant first"
            )
        return True

    def _compared(self, start: Tensor, *, reverse: bool) -> Composition:
        """How the layers differ from the map, measured once at a few samples, in eval mode."""
        if reverse not in self._compositions:
            compare = compare_inverses if reverse else compare_layers
            inner = self.inner
            with preserve_state(inner) as recover:

                def restore() -> None:
                    recover()
                    inner.eval()

                inner.eval()
                self._compositions[reverse] = compare(inner, start.detach(), restore=restore)
        return self._compositions[reverse]

    def _pass(self, start: Tensor, *, reverse: bool, with_log_det: bool) -> ForwardPass:
        steps = [Step(layer, reverse, with_log_det) for layer in self.layers()]
        if reverse:
            steps.reverse()
        parameters = list(self.inner.parameters())
        for step in steps:  # layers may have parameters that the model does not register
            parameters += step.layer.parameters()
        if self.exact:
            return ExactForwardPass(steps, parameters, self._plan_of(start, reverse=reverse))
        return ForwardPass(steps, parameters, self._guard, keep_input=self.keep == INPUT)

    def _plan_of(self, start: Tensor, *, reverse: bool) -> Plan:
        """The plan of batches like this one, in the present training modes."""
        modes = tuple(module.training for module in self.inner.modules())
        kind = _Kind(tuple(start.shape), start.dtype, start.device, modes, reverse=reverse)
        plan = self._plans.pop(kind, None) or Plan()
        self._plans[kind] = plan
        return plan


class _Differentiable(torch.autograd.Function):
    """A forward pass as one node of the graph; its inputs are x and all dependencies."""

    @staticmethod
    def forward(
        ctx: Any, forward_pass: ForwardPass, x: Tensor, *dependencies: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, tape = forward_pass.run(x)
        # a chain that only moves or copies entries may return x itself
        if outputs[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            outputs = (outputs[0].clone(), *outputs[1:])
        stored: list[Tensor] = []

        def taken_out(tensor: Tensor) -> Tensor:
            stored.append(tensor)
            return tensor.new_empty(0)

        ctx.forward_pass, ctx.tape = forward_pass, tape.mapped(taken_out)
        ctx.set_materialize_grads(False)
        # saved by autograd, which notices changes in place and frees all of it after the backward
        constants = [*dependencies, *tape.modules.constants()]
        ctx.count = len(constants)
        kept = x if forward_pass.keep_input else x.new_empty(0)
        ctx.save_for_backward(kept, outputs[0], *constants, *stored)
        return outputs

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotApplicable(
            "memory_saving(model) has no forward-mode derivative: use its .inner, or linearize(x)"
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, output, *rest = ctx.saved_tensors
        ctx.tape.modules.check_parameters()
        stored = iter(rest[ctx.count :])
        tape = ctx.tape.mapped(lambda _: next(stored))
        if torch.is_grad_enabled():
            if not ctx.forward_pass.keep_input:
                raise NotApplicable(
                    f'no double backward without the stored input: pass keep="{INPUT}"'
                )
            return None, *_recorded_gradients(ctx.forward_pass, tape, x, gradients)
        backward_pass = _backward_pass(ctx.forward_pass, tape)
        first = ctx.forward_pass.first_differentiable(input_wanted=ctx.needs_input_grad[1])
        x_gradient = backward_pass.run(output, gradients, first)
        return None, x_gradient, *backward_pass.gradients


def _apply(forward: ForwardPass, x: Tensor) -> tuple[Tensor, ...]:
    return _Differentiable.apply(forward, x, *forward.dependencies)


def _backward_pass(forward: ForwardPass, tape: Tape) -> BackwardPass:
    if isinstance(tape, ExactTape):
        return ExactBackwardPass(forward, tape)
    return BackwardPass(forward, tape)


def _recorded_gradients(
    forward: ForwardPass, tape: Tape, x: Tensor, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of x and the dependencies that can be differentiated again.

    They come from a forward pass with a graph.
    """
    inputs = [x, *forward.dependencies]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    values, value_gradients = [], []
    for value, gradient in zip(forward.repeat(x, tape), gradients, strict=True):
        if gradient is not None and value.requires_grad:
            values.append(value)
            value_gradients.append(gradient)
    if not values:
        return [None] * len(inputs)
    with hooks_suspended(wanted):
        found = torch.autograd.grad(
            values, wanted, value_gradients, create_graph=True, allow_unused=True
        )
    gradient_of = dict(zip(map(id, wanted), found, strict=True))
    return [gradient_of.get(id(tensor)) for tensor in inputs]
