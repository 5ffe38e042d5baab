"""What rules read, compared with the model's own values and derivatives at points of the box.

Agreement at points proves nothing. It finds a rule that is wrong, or that reads another map than
the one that the model computes: then nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.core.missing import Missing
from inn_guard.core.readable import composes, first_reason, why_patched
from inn_guard.core.tensors import finite_rows, norms, unit_vectors
from inn_guard.jacobian.checks import dense_jacobian
from inn_guard.lipschitz.maps.base import BlockBounds, NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.whole_network import LayerBound, LayerBounds
from inn_guard.numerics.intervals import Interval

__all__ = ["contradiction", "cross_checked", "why_no_chain", "why_no_copy", "without_bounds"]

POINTS = 4  #: samples that are compared
NAN = torch.tensor(math.nan, dtype=torch.float64)
DENSE = 8  #: dimensions up to which whole Jacobians are compared
STEPS = 3  #: power iterations per layer
VALUES = 1e-6  #: relative error allowed to values of the model, which round
SLOPES = 1e-6  #: relative error allowed to measured ratios
CONDITION = 1e-12  #: more of it for each unit of the condition number, for directions that shrink
#: what a model may raise at some points
FAILURES = (
    *(NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, LookupError),
    AssertionError,
)


def why_no_chain(model: Invertible, layers: Sequence[Invertible], points: Tensor) -> Missing | None:
    """Why the layers may not stand for the model; None if they may.

    A hook or a replaced method on anything between the model and its layers is a reason, and so is
    a value at one of the points that differs.
    """
    inside: set[int] = set()
    for layer in layers:
        inside.update(map(id, layer.block.modules()))
    between = [part for part in (*model.modules(), *layers) if id(part) not in inside]
    why = first_reason(between, why_patched)
    if why is not None:
        return why
    with suppress(*FAILURES):
        if not composes(model, [model], points):
            known = first_reason(model.modules())
            return known or Missing(f"{model.name} gives other values at every call")
        if layers[0] is not model and not composes(model, layers, points):
            return Missing(f"the layers of {model.name} do not compose to its forward")
    return None


def why_no_copy(model: Invertible) -> Missing | None:
    """Why a float64 copy of a model may be another map than the model; None if it is the same."""
    for tensor in model.state_dict().values():
        if tensor.is_complex():
            return Missing("complex weights: their imaginary parts have no place in float64")
    for part in model.modules():
        # linear maps in the layout of nflows; a copy computes the weight anew
        if part.training or not getattr(part, "using_cache", False):
            continue
        cached: Any = getattr(getattr(part, "cache", None), "weight", None)
        weight: Any = getattr(part, "weight", None)
        if cached is None or not callable(weight):
            continue
        with torch.no_grad():
            is_fresh = torch.allclose(cached, weight(), atol=0.0)
        if not is_fresh:
            return Missing(
                f"{type(part).__name__} calls a weight that it cached before its parameters "
                "changed; call use_cache(False), and on again"
            )
    return None


def cross_checked(found: LayerBounds, layers: Sequence[Invertible], points: Tensor) -> LayerBounds:
    """The bounds, without those of layers whose own values or derivatives contradict them.

    Args:
        found: the layers' bounds.
        layers: the same layers in float64; they may change when they are called.
        points: inputs of the first layer in its box, (B, *shape).
    """
    checked = list(found)
    state = points
    for k, (bound, layer) in enumerate(zip(found, layers, strict=True)):
        if math.isinf(bound.bounds.forward) and math.isinf(bound.bounds.inverse):
            # nothing is claimed, and the boxes of later layers need not hold their inputs
            break
        try:
            following = bound.map.image(bound.box)
            if k + 1 < len(found):
                following = found[k + 1].box
            with torch.no_grad():
                z = layer(state.clone())
        except FAILURES:
            break
        reason = _objection(bound, z, following, _measured(layer, state))
        if reason:
            reason = f"internal error in {_rule_of(layer)}, please report it: {reason}"
            checked[k] = without_bounds(bound, reason, following.shape)
            break
        state = z
    return tuple(checked)


def contradiction(upper: Pair, lower: Pair, methods: Sequence[str]) -> str:
    """What is wrong if a measured ratio exceeds a bound by more than rounding; "" if none does."""
    tolerance = 1 + SLOPES + CONDITION * lower.forward * lower.inverse
    names = ("||J||", "||J^-1||")
    for name, most, least, method in zip(names, upper, lower, methods, strict=True):
        if least > most * tolerance:
            return (
                f"internal error in the bound of {name} by {method}, please report it: it is below "
                "a value that was measured"
            )
    return ""


class _Measured(NamedTuple):
    """Ratios ||J v|| / ||v|| at points, (directions, B); none where there are no derivatives."""

    stretched: Tensor
    shrunk: Tensor


def _measured(layer: Invertible, x: Tensor) -> _Measured:
    """The extreme singular values of small Jacobians, or ratios for some directions of large ones.

    ``shrunk`` is empty where J forgets directions: then no bound of J^-1 speaks of them.
    """
    stretched: list[Tensor] = []
    shrunk: list[Tensor] = []
    with suppress(*FAILURES):
        jacobian = AutogradJacobian(lambda t: layer(t.clone()), layer.inverse, x)
        inputs, outputs = x[0].numel(), jacobian.output[0].numel()
        if inputs == outputs <= DENSE:
            J = dense_jacobian(jacobian, x)
            sigma = torch.linalg.svdvals(J.nan_to_num(0, 0, 0)).where(finite_rows(J)[:, None], NAN)
            stretched.append(sigma[:, 0])
            shrunk.append(sigma[:, -1])
        else:
            _iterate(jacobian, stretched, shrunk)
        if not layer.bijective or outputs < inputs:
            shrunk = []
    return _Measured(_stacked(stretched, x), _stacked(shrunk, x))


def _stacked(ratios: list[Tensor], x: Tensor) -> Tensor:
    if not ratios:
        return torch.zeros(0, len(x), dtype=torch.float64)
    return torch.stack(ratios)


def _iterate(jacobian: AutogradJacobian, stretched: list[Tensor], shrunk: list[Tensor]) -> None:
    """Append the ratios of a few power iterations, (B,) each."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(jacobian.output.shape, generator=generator, dtype=torch.float64)
    for _ in range(STEPS):
        v = jacobian.vjp(unit_vectors(u))
        # the norm of J^T is that of J
        stretched.append(norms(v))
        u = jacobian.jvp(unit_vectors(v))
        stretched.append(norms(u))
        shrunk.append(norms(u))


def _objection(bound: LayerBound, z: Tensor, image: Interval, measured: _Measured) -> str:
    rows = finite_rows(z)
    margin = VALUES * (1 + z.abs())
    inside = (image.lo <= z + margin) & (z - margin <= image.hi)
    if not bool(inside[rows].all()):
        return "a value of the layer lies outside the box of its values"
    stretched, shrunk = (ratios[:, rows] for ratios in measured)
    most, least = 0.0, math.inf
    if stretched.numel():
        most = float(stretched.nan_to_num(0, 0).max())
    if most > bound.bounds.forward * (1 + SLOPES):
        return "the layer stretches a direction by more than the bound of ||J||"
    if shrunk.numel():
        least = float(shrunk.nan_to_num(math.inf).min())
    # a direction that is shrunk much is known up to the rounding of the largest entries
    if (least + CONDITION * most) * (1 + SLOPES) * bound.bounds.inverse < 1:
        return "the layer shrinks a direction by more than the bound of ||J^-1||"
    return ""


def _rule_of(layer: Invertible) -> str:
    rule = bounded_map.find(layer.block)
    name = "no rule"
    if not isinstance(rule, Missing):
        name = getattr(rule, "__name__", "a rule")
    return f"{name} of {layer.name}"


def without_bounds(bound: LayerBound, reason: str, shape: torch.Size) -> LayerBound:
    """The layer with nothing claimed about it, and why."""
    nothing = NoRule(reason, lambda _: shape)
    infinite = Pair(math.inf, math.inf)
    bounds = BlockBounds.none(reason)
    return replace(bound, map=nothing, bounds=bounds, paper_bound=infinite, jacobians=None)
