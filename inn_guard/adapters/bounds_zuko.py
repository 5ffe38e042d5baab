"""The bound rules of zuko: what its transformations are in the terms of inn_guard.lipschitz."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
import zuko.nn
from torch import nn
from zuko import transforms
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.lazy import UnconditionalTransform

from inn_guard.adapters.side_by_side import SideBySide
from inn_guard.lipschitz import flows, maps
from inn_guard.lipschitz.activations import Activation
from inn_guard.lipschitz.couplings import ByChannel, Coupling
from inn_guard.lipschitz.maps import BoundedMap, Unknown, bounded_map
from inn_guard.lipschitz.subnetworks import readable
from inn_guard.lipschitz.transformers import Additive, Affine, LogScale, Transformer


@readable.register
def _(module: zuko.nn.MLP) -> nn.Module:
    """The same network with torch's own linear layers, which share the weights."""
    return nn.Sequential(*[_plain(part) for part in module])


@bounded_map.register
def _(block: GeneralCouplingTransform, layer: Any) -> BoundedMap:
    split = ByChannel(block.mask.nonzero().squeeze(-1).cpu(), (~block.mask).nonzero().squeeze(-1).cpu())
    return _coupling(block, layer, split)


@bounded_map.register
def _(block: MaskedAutoregressiveTransform, layer: Any) -> BoundedMap:
    every = torch.arange(block.hyper.out_features // block.total)
    described = _coupling(block, layer, ByChannel(every, every))
    return flows.Autoregressive(described) if isinstance(described, Coupling) else described


def _coupling(block: Any, layer: Any, split: ByChannel) -> BoundedMap:
    transformer = _transformer(block)
    if transformer is None:
        return Unknown(f"no rule is registered for couplings by {getattr(block.univariate, '__name__', 'this map')}")
    n = len(split.change)
    rows = [torch.arange(n) * transformer.count + p for p in range(transformer.count)]
    return Coupling(split, SideBySide(readable(block.hyper)), transformer, rows, layer.context)


def _transformer(block: Any) -> Transformer | None:
    """Of an affine or additive map of one feature, as its class or a partial of it; None for anything else."""
    univariate: Any = block.univariate
    options: dict[str, Any] = {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        univariate, options = univariate.func, univariate.keywords
    if univariate is transforms.AdditiveTransform and len(block.shapes) == 1:
        return Additive()
    if univariate is not transforms.MonotonicAffineTransform or not set(options) <= {"slope"}:
        return None
    default = inspect.signature(transforms.MonotonicAffineTransform).parameters["slope"].default
    limit = abs(math.log(options.get("slope", default)))
    return Affine(LogScale(softclip(limit)))


def softclip(limit: float) -> Activation:
    """x / (1 + |x / limit|), with slope 1 / (1 + |x / limit|)^2, largest at 0."""
    ends = (-limit * (1 + 1e-14), limit * (1 + 1e-14))
    return Activation(
        lambda x: x / (1 + (x / limit).abs()),
        lambda x: 1 / (1 + (x / limit).abs()).square(),
        {0.0: (1.0, 1.0)},
        ends,
        2 / limit,
    )


@bounded_map.register
def _(block: UnconditionalTransform, layer: Any) -> BoundedMap:
    return _of(block(layer.context))


def _of(transform: Any) -> BoundedMap:
    """A transformation that was built without a context."""
    if isinstance(transform, transforms.PermutationTransform):
        return maps.Rearrangement(lambda x: x[..., transform.order], transform.order.cpu())
    if isinstance(transform, transforms.RotationTransform):
        return maps.LinearMap.computed(transform.R.detach())
    if isinstance(transform, transforms.LULinearTransform):
        return maps.LinearMap.computed((transform.L.double() @ transform.U.double()).detach())
    if isinstance(transform, transforms.MonotonicAffineTransform):
        return maps.Diagonal(transform.scale.detach(), transform.shift.detach())
    if isinstance(transform, transforms.AdditiveTransform):
        return maps.Diagonal(torch.ones_like(transform.shift), transform.shift.detach())
    if isinstance(transform, transforms.SoftclipTransform):
        return maps.Elementwise(softclip(float(transform.bound)))
    return Unknown(f"no rule is registered for {type(transform).__name__}")


def _plain(part: nn.Module) -> nn.Module:
    if not isinstance(part, zuko.nn.Linear) or part.weight.dim() != 2:
        return part
    outputs, inputs = part.weight.shape
    linear = nn.Linear(inputs, outputs, bias=part.bias is not None, device="meta")
    linear.weight, linear.bias = part.weight, part.bias  # type: ignore[assignment]
    return linear
