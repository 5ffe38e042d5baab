"""Rules of zuko."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from zuko import transforms
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.lazy import UnconditionalTransform

from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.rules import families, register
from inn_guard.exact.splines import Knots, Spline, rational_quadratic
from inn_guard.exact.steps import Affine, Autoregressive, Step


@register("additive, affine or spline coupling", GeneralCouplingTransform)
def exact_coupling(layer: Any, x: Tensor) -> list[Step]:
    """One coupling; features where the mask is true stay."""
    module, context = layer.module, layer.context
    _needs_vectors(x)

    def parameters(identity: Tensor) -> tuple[Tensor | None, Tensor]:
        return _scale_and_shift(module.meta(context, identity))

    identity = module.mask.nonzero().flatten()
    changed = (~module.mask).nonzero().flatten()
    if _is_spline(module.meta(context, x[:, identity])):

        def knots(known: Tensor) -> Knots:
            return _knots(module.meta(context, known.index_select(1, identity)))

        return [Spline(knots, changed, dtype=x.dtype)]
    parameters(x[:, identity])
    return [families.coupling(x, identity, changed, parameters)]


@register("autoregressive", MaskedAutoregressiveTransform)
def exact_autoregressive(layer: Any, x: Tensor) -> list[Step]:
    """Entry by entry in the order of the transformation."""
    module, context = layer.module, layer.context
    _needs_vectors(x)
    if module.order is None:
        raise NoExactRule("its order is given by an adjacency matrix")

    def parameters(known: Tensor) -> tuple[Tensor | None, Tensor]:
        return _scale_and_shift(module.meta(context, known))

    parameters(x)
    return [Autoregressive(parameters, torch.argsort(module.order), dtype=x.dtype)]


@register("elementwise affine or spline", ElementWiseTransform)
def exact_elementwise(layer: Any, x: Tensor) -> list[Step]:
    """Constants, or functions of the context."""
    _needs_vectors(x)
    if _is_spline(layer.module(layer.context)):

        def knots(known: Tensor) -> Knots:
            one = _knots(layer.module(layer.context))
            shape = (len(known), known.shape[1], -1)
            x, y = one.x.expand(shape), one.y.expand(shape)
            return Knots(x, y, one.left.expand(shape), one.right.expand(shape), one.form)

        return [Spline(knots, torch.arange(x.shape[1], device=x.device), dtype=x.dtype)]
    scale, shift = _scale_and_shift(layer.module(layer.context))
    return [Affine(lambda known: (scale, shift), None, dtype=x.dtype)]


@register("permutation, matrix or elementwise affine", UnconditionalTransform)
def exact_unconditional(layer: Any, x: Tensor) -> list[Step]:
    """By the class of the transformation that it builds."""
    _needs_vectors(x)
    transform = layer.module(layer.context)
    while type(transform) is transforms.DependentTransform:
        transform = transform.base
    if type(transform) in (transforms.PermutationTransform, transforms.IdentityTransform):
        return families.moves(layer, x)
    if type(transform) in (transforms.RotationTransform, transforms.LULinearTransform):
        return families.matrix(layer, x)
    if type(transform) in (transforms.AdditiveTransform, transforms.MonotonicAffineTransform):
        return families.elementwise_affine(layer.to_dtype(torch.float64).eval(), x)
    raise NoExactRule(f"there is no rule for {type(transform).__name__}")


def _scale_and_shift(transform: Any) -> tuple[Tensor | None, Tensor]:
    """The parameters of an affine or additive univariate transformation.

    Raises:
        NoExactRule: if it is another one.
    """
    base = transform.base
    if type(base) is transforms.AdditiveTransform:
        return None, base.shift
    if type(base) is transforms.MonotonicAffineTransform:
        return base.scale, base.shift
    raise NoExactRule(f"there is no rule for {type(base).__name__}")


def _is_spline(transform: Any) -> bool:
    return type(transform.base) is transforms.MonotonicRQSTransform


def _knots(transform: Any) -> Knots:
    """Of rational-quadratic univariate transformations."""
    splines = transform.base
    x, y, slopes = (t.double() for t in (splines.horizontal, splines.vertical, splines.derivatives))
    # the last knots are the bound up to rounding; the identity begins where both end
    y = torch.cat([x[..., :1], y[..., 1:-1], x[..., -1:]], -1)
    return Knots(x, y, slopes[..., :-1], slopes[..., 1:], rational_quadratic)


def _needs_vectors(x: Tensor) -> None:
    if x.dim() != 2:
        raise NoExactRule("there is a rule for vectors only")
