"""Rules of inn_guard's own layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inn_guard.exact.fixed_point import Entries, NoExactRule
from inn_guard.exact.rules import register, rule_of, steps_of
from inn_guard.exact.rules.families import elementwise_affine, matrix, moves
from inn_guard.exact.steps import Affine, Autoregressive, OnTail, Step, StoredInput
from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.autoregressive import MaskedAutoregressive
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import InvertibleLinear, LULinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.partition import Halves, Leading, Mask
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Flatten, Squeeze

register("permutation", Permutation, Squeeze, Flatten, FactorOut)(moves)
register("elementwise affine", Diagonal)(elementwise_affine)
register("matrix", InvertibleLinear, LULinear)(matrix)


@register("elementwise affine", ActNorm)
def exact_actnorm(layer: Any, x: Tensor) -> list[Step]:
    """A Diagonal, unless the next forward pass initialises it."""
    if layer.training and not layer.initialized:
        raise NoExactRule("its first training batch will initialise it")
    return elementwise_affine(layer.to_dtype(torch.float64).eval(), x)


@register("additive or affine coupling", AdditiveCoupling, AffineCoupling)
def exact_coupling(layer: Any, x: Tensor) -> list[Step]:
    """One coupling; its network is evaluated at the identity part."""
    only_changed = type(layer.partition) is Mask
    if only_changed:
        stays = layer.partition.mask.expand(x.shape[1:]).flatten()
        changed: Entries = (~stays).nonzero().flatten()
    elif type(layer.partition) in (Halves, Leading):
        changed = _transformed_block(layer.partition, x)
    else:
        raise NoExactRule(f"there is no rule for the partition {type(layer.partition).__name__}")

    def parameters(known: Tensor) -> tuple[Tensor | None, Tensor | None]:
        elementwise = layer.parameters_of(layer.split(known)[0])
        both = (elementwise.scale, elementwise.shift)
        if not only_changed:
            return both
        # parameters of a mask have neutral entries in the identity part
        chosen = [None if p is None else p.flatten(1).index_select(1, changed) for p in both]
        return chosen[0], chosen[1]

    return [Affine(parameters, changed, dtype=x.dtype)]


def _transformed_block(partition: Any, x: Tensor) -> slice:
    """The entries of a flat sample that a partition into two blocks of channels transforms."""
    positions, width = x.shape[2:].numel(), x.shape[1:].numel()
    border = partition.first_size(x.shape[1]) * positions
    if partition.swapped:
        return slice(border)
    return slice(border, width)


@register("autoregressive", MaskedAutoregressive)
def exact_autoregressive(layer: Any, x: Tensor) -> list[Step]:
    """Entry by entry in their own order."""

    def parameters(known: Tensor) -> tuple[Tensor, Tensor]:
        shift, h = layer.network(known).chunk(2, dim=1)
        return layer.scale.value(h), shift

    order = torch.arange(x.shape[1], device=x.device)
    return [Autoregressive(parameters, order, dtype=x.dtype)]


@register("inverse", InverseLayer)
def exact_inverse(layer: Any, x: Tensor) -> list[Step]:
    """The inner layer's steps, inverted."""
    if rule_of(layer.inner).steps is moves:
        # the inner layer's input may have another shape than x
        return moves(layer, x)
    steps = steps_of(layer.inner, x)
    return [step.inverted() for step in reversed(steps)]


@register("on what remains", OnRemaining)
def exact_on_remaining(layer: Any, x: Tensor) -> list[Step]:
    """The inner layer's steps on the last entries; its input is stored if it has none."""
    tail = x[:, x.shape[1] - layer.size :].reshape(-1, *layer.shape)
    try:
        steps = steps_of(layer.inner, tail)
    except NoExactRule:
        steps = [StoredInput(layer.inner, dtype=x.dtype)]
    return [OnTail(steps, layer.shape, layer.latent_shape, dtype=x.dtype)]
