"""normflows: flows and models as Invertibles. Its forward is latent -> data: the inverse here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from normflows.core import (
    ClassCondFlow,
    ConditionalNormalizingFlow,
    MultiscaleFlow,
    NormalizingFlow,
)
from normflows.distributions.base import DiagGaussian, Uniform
from normflows.flows import AffineCoupling, Flow, Merge, Split, Squeeze
from torch import Tensor, nn

from inn_guard.adapters.base import Adapted
from inn_guard.adapters.normflows.layers import (
    NormflowsLayer,
    chain_of,
    chain_of_flows,
    named_errors,
)
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Context, Invertible
from inn_guard.core.missing import MissingContextError, NotApplicable
from inn_guard.core.readable import runs_code_of
from inn_guard.core.tensors import concatenate_flat, split_flat
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.reshape import Flatten, Rearrangement

__all__ = ["NormflowsLayer", "NormflowsModel", "NormflowsMultiscale", "SplitOff", "adapt"]

Shape = tuple[int, ...]


def adapt(model: nn.Module, context: Context = None) -> Invertible:
    """A model or a flow layer of normflows as an Invertible, data -> latent.

    Args:
        model: a NormalizingFlow, ConditionalNormalizingFlow, ClassCondFlow, MultiscaleFlow or any
            Flow.
        context: what the library calls ``context``, or its class labels ``y``.

    Raises:
        TypeError: if the model is none of these, maps lists of tensors, or takes no context and one
            is given.
    """
    if isinstance(model, MultiscaleFlow):
        return NormflowsMultiscale(model, context)
    if isinstance(model, (NormalizingFlow, ClassCondFlow)):
        return NormflowsModel(model, context)
    if isinstance(model, (Split, AffineCoupling)):
        raise TypeError(
            f"expected a flow of one tensor, got {type(model).__name__}, which maps lists; "
            "pass the AffineCouplingBlock or MultiscaleFlow around it"
        )
    if isinstance(model, Flow):
        return NormflowsLayer(model, context)
    raise TypeError(
        "expected a NormalizingFlow, MultiscaleFlow or Flow of normflows, "
        f"got {type(model).__name__}; pass the whole model"
    )


class NormflowsModel(Adapted):
    """A NormalizingFlow or ClassCondFlow with its base distribution.

    The context of a ConditionalNormalizingFlow goes to all of its flows, labels to the base only.
    """

    def __init__(self, module: nn.Module, context: Context = None) -> None:
        super().__init__(module, context)
        conditional = isinstance(module, (ConditionalNormalizingFlow, ClassCondFlow))
        if context is not None and not conditional:
            raise TypeError(
                f"expected no context: a {type(module).__name__} takes none; leave it out"
            )

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            if isinstance(self.module, NormalizingFlow):
                return self.module.inverse_and_log_det(x, *self._condition())
            return _applied([flow.inverse for flow in reversed(self._flows())], x)

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        with named_errors(self.name):
            if isinstance(self.module, NormalizingFlow):
                return self.module.forward_and_log_det(z, *self._condition())
            return _applied(self._flows(), z)

    def _expects_context(self) -> bool:
        return isinstance(self.module, ConditionalNormalizingFlow)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), by the library's own ``log_prob``.

        Raises:
            MissingContextError: if a class-conditional model has no labels.
        """
        model: Any = self.module
        if isinstance(model, ClassCondFlow):
            if self.context is None:
                raise MissingContextError(
                    "expected the class labels y of x, one for each sample; pass context=y"
                )
            return self._call(lambda x: model.log_prob(x, self.context), x)
        return self._call(lambda x: model.log_prob(x, *self._condition()), x)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        q0: Any = self.module.q0
        if isinstance(self.module, ClassCondFlow):
            return q0.log_prob(z, self.context)
        return q0.log_prob(z, *self._condition())

    def base(self) -> BaseDistribution:
        """The model's own base distribution q0, in its own context or classes."""
        q0: Any = self.module.q0

        def sampler(n: int, context: Context) -> Tensor:
            with _at_temperature_one(q0):
                if isinstance(self.module, ConditionalNormalizingFlow):
                    return q0(n, context=context)[0]
                if isinstance(self.module, ClassCondFlow):
                    return q0(n, context)[0]
                return q0(n)[0]

        return BaseDistribution(
            sampler,
            like=self._like(),
            context=self.context,
            exact_deviation=_exact_deviation(q0),
            description=f"{type(q0).__name__} of normflows",
            log_density=self._base_log_prob,
        )

    def layers(self) -> tuple[Invertible, ...]:
        """The flows, flat, from data to latent, in this model's context."""
        kind = NormalizingFlow
        if isinstance(self.module, ConditionalNormalizingFlow):
            kind = ConditionalNormalizingFlow
        directions = ("forward_and_log_det", "inverse_and_log_det")
        is_chain = isinstance(self.module, ClassCondFlow)
        if not is_chain and not runs_code_of(self.module, kind, directions):
            return ()
        layers = chain_of_flows(self.module.flows)
        if not self._condition():
            return layers
        return self._in_context(layers)

    def _condition(self) -> tuple[Any, ...]:
        if isinstance(self.module, ConditionalNormalizingFlow) and self.context is not None:
            return (self.context,)
        return ()

    def _flows(self) -> list[Any]:
        return list(self.module.flows)  # type: ignore[arg-type]


def _applied(functions: Iterable[Any], value: Tensor) -> tuple[Tensor, Tensor]:
    """One function after the other, and the sum of their log-determinants."""
    total = value.new_zeros(len(value))
    for function in functions:
        value, log_det = function(value)
        total = total + log_det
    return value, total


class NormflowsMultiscale(Adapted):
    """A MultiscaleFlow. z is flat: its latents in the order in which they are finished.

    That is the reversed list of the library; ``unpack(z)`` is the list itself. The context are the
    class labels y, which go to the base distributions only.
    """

    module: MultiscaleFlow

    def unpack(self, z: Tensor) -> list[Tensor]:
        """z (B, D) as the list of latents that the library takes and returns.

        Raises:
            NotApplicable: if the base distributions do not tell their shapes.
        """
        shapes = self._latent_shapes()
        return split_flat(z, shapes[::-1])[::-1]

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        latents, log_det = self.module.inverse_and_log_det(x)
        return _packed(latents), log_det

    def _decode(self, z: Tensor) -> tuple[Tensor, Any]:
        return self.module.forward_and_log_det(self.unpack(z))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,), by the library's own ``log_prob``, in the context's classes."""
        return self._call(lambda x: self.module.log_prob(x, self.context), x)

    def base(self) -> BaseDistribution:
        """The model's own base distributions, packed as z is."""
        bases: Any = self.module.q0

        def sampler(n: int, labels: Context) -> Tensor:
            latents: list[Tensor] = []
            for base in bases:
                with _at_temperature_one(base):
                    if self.module.class_cond:
                        latents.append(base(n, labels)[0])
                    else:
                        latents.append(base(n)[0])
            return _packed(latents)

        shapes_known = all(getattr(base, "shape", None) is not None for base in bases)
        names = ", ".join(type(base).__name__ for base in bases)
        return BaseDistribution(
            sampler,
            like=self._like(),
            context=self.context,
            exact_deviation=self._exact_deviation(),
            description=f"{names} of normflows",
            log_density=self._base_log_prob if shapes_known else None,
        )

    def _base_log_prob(self, z: Tensor) -> Tensor:
        labels: tuple[Any, ...] = ()
        if self.module.class_cond:
            labels = (self.context,)
        total = z.new_zeros(len(z))
        bases: Any = self.module.q0
        for base, latent in zip(bases, self.unpack(z), strict=True):
            total = total + base.log_prob(latent, *labels)
        return total

    def _exact_deviation(self) -> Tensor | None:
        """Standard deviation of each entry of z; None if one of the bases does not tell it."""
        deviations: list[Tensor] = []
        for base in self.module.q0:
            deviation = _exact_deviation(base)
            if deviation is None:
                return None
            deviations.append(deviation[None])
        return _packed(deviations)[0]

    def layers(self) -> tuple[Invertible, ...]:
        """The flows of every level, from data to latent; () if a merge is unknown.

        From the second level on they act on the remaining part of the state.
        """
        if not all(isinstance(merge, Merge) for merge in self.module.merges):
            return ()
        flat: list[Invertible] = []
        if self.module.transform is not None:
            flat += chain_of(self.module.transform)
        levels = self._levels()
        for k, level in enumerate(levels):
            cut: Invertible = Flatten(level.after)
            if k < len(levels) - 1:
                # the library lists its merges from latent to data
                merge = self.module.merges[-1 - k]
                cut = SplitOff(merge, levels[k + 1].before, level.after)
            if k == 0:
                flat += [*level.steps, cut]
            else:
                flat += _on_remaining(level.steps, level.before)
                vector = (math.prod(level.after),)
                flat.append(OnRemaining(cut, shape=level.after, latent_shape=vector))
        return tuple(flat)

    def _levels(self) -> list[_Level]:
        """The levels from data to latent.

        The library knows the shapes of the latents only. From the deepest level on, each level's
        output is the deeper level's input merged with its own latent.
        """
        levels: list[_Level] = []
        before: Shape = ()
        for k, finished in enumerate(self._latent_shapes()):
            after = finished
            if k > 0:
                after = _merged_shape(self.module.merges[k - 1], before, finished)
            steps = chain_of_flows(self.module.flows[k])
            before = after
            for step in reversed(steps):
                before = _shape_before(step, before)
            levels.insert(0, _Level(steps, before, after))
        return levels

    def _latent_shapes(self) -> list[Shape]:
        """Shape of one sample of each latent in the library's order, by its base distribution."""
        shapes: list[Shape] = []
        for base in self.module.q0:
            shape: Any = getattr(base, "shape", None)
            if shape is None:
                raise NotApplicable(
                    "the base distributions have no attribute shape, so the latents' shapes are "
                    "unknown; pass wrap(encode=..., decode=...) with one tensor z"
                )
            shapes.append((shape,) if isinstance(shape, int) else tuple(shape))
        return shapes


@dataclass(frozen=True)
class _Level:
    """A level of a MultiscaleFlow: its layers, and the shapes of one sample around them."""

    steps: tuple[Invertible, ...]
    before: Shape
    after: Shape


class SplitOff(Rearrangement):
    """x (B, *shape) -> [finished, remaining], flat, as a Merge of normflows takes it apart.

    Args:
        merge: puts [remaining, finished] together.
        remaining: shape of one sample of what remains.
        shape: of x.
    """

    def __init__(self, merge: Any, remaining: Shape, shape: Shape) -> None:
        super().__init__()
        self.merge, self.remaining = merge, remaining
        self.finished = _finished_shape(merge, shape, remaining)

    def forward(self, x: Tensor) -> Tensor:
        """The flat vector [finished, remaining], (B, D)."""
        latents, _ = self.merge.inverse(x)
        return _packed(latents)

    def inverse(self, z: Tensor) -> Tensor:
        """x, (B, *shape), with both parts in their place."""
        finished, remaining = split_flat(z, [self.finished, self.remaining])
        return self.merge([remaining, finished])[0]


def _packed(latents: list[Tensor]) -> Tensor:
    """The library's list of latents as one flat tensor, (B, D)."""
    return concatenate_flat(latents[::-1])


def _merge_dim(merge: Any, shape: Shape) -> int:
    """Dimension of one sample along which a merge joins its two parts."""
    return len(shape) - 1 if "checkerboard" in merge.mode else 0


def _merged_shape(merge: Any, remaining: Shape, finished: Shape) -> Shape:
    """Shape of one sample of what a merge makes of its two parts."""
    dim = _merge_dim(merge, remaining)
    return (*remaining[:dim], remaining[dim] + finished[dim], *remaining[dim + 1 :])


def _finished_shape(merge: Any, shape: Shape, remaining: Shape) -> Shape:
    """Shape of one sample of the part that a merge joins with what remains."""
    dim = _merge_dim(merge, remaining)
    return (*shape[:dim], shape[dim] - remaining[dim], *shape[dim + 1 :])


def _on_remaining(steps: tuple[Invertible, ...], shape: Shape) -> list[Invertible]:
    """The steps acting on the remaining part of a flat state, which has this shape."""
    lifted: list[Invertible] = []
    for step in steps:
        latent = _shape_after(step, shape)
        lifted.append(OnRemaining(step, shape=shape, latent_shape=latent))
        shape = latent
    return lifted


def _shape_after(step: Invertible, shape: Shape) -> Shape:
    """The shape after a step from data to latents: a Squeeze makes channels of blocks of pixels."""
    if isinstance(step, InverseLayer):
        return _shape_before(step.inner, shape)
    if isinstance(step.block, Squeeze):
        return (4 * shape[0], shape[1] // 2, shape[2] // 2)
    return shape


def _shape_before(step: Invertible, shape: Shape) -> Shape:
    """The shape before a step from data to latents."""
    if isinstance(step, InverseLayer):
        return _shape_after(step.inner, shape)
    if isinstance(step.block, Squeeze):
        return (shape[0] // 4, 2 * shape[1], 2 * shape[2])
    return shape


@contextmanager
def _at_temperature_one(base: nn.Module) -> Iterator[None]:
    """Switch off the temperatures of a base distribution; restore them afterwards."""
    temperatures: dict[Any, Any] = {}
    for part in base.modules():
        if hasattr(part, "temperature"):
            temperatures[part] = part.temperature
            part.temperature = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, temperature in temperatures.items():
            part.temperature = temperature


def _exact_deviation(base: Any) -> Tensor | None:
    """Standard deviation of each entry, (*latent), if the parameters tell it, else None."""
    if type(base) is DiagGaussian:
        return base.log_scale.detach()[0].exp()
    if type(base) is Uniform:
        width = (base.high - base.low) / math.sqrt(12)
        return torch.as_tensor(width).expand(base.shape)
    return None
