"""Whole networks: boxes and bounds layer by layer, their product, and runs of layers bounded as one chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from inn_guard.execution.deadline import Deadline
from inn_guard.lipschitz.lipsdp.chain import Chain
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget, bound_chain, torus_of
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.reachability import Reach
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import gamma, up
from inn_guard.numerics.spectral_norm import norm_operations, spectral_norm

__all__ = ["Factor", "cheapest", "product"]


@dataclass(frozen=True)
class Factor:
    """A bound of consecutive layers, first to last; the product of all factors bounds the network.

    Attributes:
        first: index of the first layer.
        last: index after the last layer.
        bound: certified.
        proof: the chain and its multipliers, where a chain gave the bound.
        compared: whether it is the norm of a product of comparison matrices.
    """

    first: int
    last: int
    bound: float
    proof: Proof | None = None
    compared: bool = False


def product(bounds: Sequence[float]) -> float:
    """The product, rounded up; inf if one is."""
    total = 1.0
    for bound in bounds:
        total = up(total * bound)
    return math.inf if math.isnan(total) else total


def cheapest(count: int, factors: Sequence[Factor]) -> list[Factor]:
    """The factors, one after the other from layer 0 to ``count``, whose product is least: a shortest path.

    Raises:
        ValueError: if no factors lead there.
    """
    costs, paths = {0: 0.0}, dict[int, list[Factor]]({0: []})
    for factor in sorted(factors, key=lambda f: (f.last, f.first)):
        if factor.first not in costs:
            continue
        cost = costs[factor.first] + math.log(max(factor.bound, 1e-300))
        if factor.last not in costs or cost < costs[factor.last]:
            costs[factor.last], paths[factor.last] = cost, [*paths[factor.first], factor]
    if count not in paths:
        raise ValueError(f"expected factors that lead from layer 0 to layer {count}")
    return paths[count]


__all__ = ["comparison_factors"]

UNDERFLOW = 1e-300  #: more than what products of a row lose by underflow
WIDE = 256  #: channels up to which matrices are multiplied


def comparison_factors(matrices: Sequence[Tensor | None], deadline: Deadline) -> list[Factor]:
    """Every run of two and more layers whose comparison matrices are known, as a factor, as long as time lasts.

    Args:
        matrices: N_k of the layers in the order in which they are applied, nonnegative, (C', C); None where unknown.
        deadline: after which no run is begun.

    Returns:
        Factors whose proofs are the products, as chains without layers.
    """
    found: list[Factor] = []
    for first, start in enumerate(matrices):
        total = start
        for last in range(first + 1, len(matrices)):
            step = matrices[last]
            if total is None or step is None or max(*step.shape, *total.shape) > WIDE:
                break
            if not deadline.can_afford(norm_operations(*step.shape)):
                return found
            total = (step @ total) * (1 + 2 * gamma(step.shape[1] + 2)) + UNDERFLOW
            bound = spectral_norm(total)
            if not math.isfinite(bound):
                break
            found.append(
                Factor(
                    first,
                    last + 1,
                    bound,
                    Proof(bound, Chain(total.shape[1], (), total[None]), ()),
                    compared=True,
                )
            )
    return found


__all__ = ["Factor", "LayerBound", "Stack", "product", "stack", "whole_forward", "whole_inverse"]


@dataclass(frozen=True)
class LayerBound:
    """One layer with its box.

    Attributes:
        name: the layer's.
        map: what it is.
        box: of its inputs.
        bounds: certified.
        printed: what Table 3 prints; NaN where there was no time to compute it.
    """

    name: str
    map: BoundedMap
    box: Interval
    bounds: BlockBounds
    printed: Pair


Stack = Sequence[LayerBound]
SHARE = 0.1  #: of the time left that one layer may take, or twice what is its own if that is more


def stack(layers: Sequence[tuple[str, BoundedMap]], box: Interval, effort: SearchBudget) -> Stack:
    """Every layer's bounds on the box that the layers before it make of ``box``.

    Boxes are what intervals leave and, from a bounded box on, the reach of differences from its centre. Table 3's
    bounds are NaN where time ran out: they are shown, never needed.
    """
    result = []
    reach = Reach.around(box) if box.bounded else None
    for k, (name, described) in enumerate(layers):
        own = effort.within(min(1.0, max(SHARE, 2 / (len(layers) - k))))
        moved = _moved(reach, [m for _, m in layers[k:]], box, own.within(0.7))
        bounds = described.bounds(box, own.within(0.7))
        printed = (
            Pair(math.nan, math.nan) if own.deadline.passed else described.paper_formula(box, own)
        )
        result.append(LayerBound(name, described, box, bounds, printed))
        reach = moved or _stretched(reach, result[-1])
        box = described.image(box)
        box = box if reach is None else reach.within(box)
    return tuple(result)


def _moved(
    reach: Reach | None, following: Sequence[BoundedMap], box: Interval, effort: SearchBudget
) -> Reach | None:
    """The reach behind the first of the following maps; None where the recursion does not say."""
    if reach is None:
        return None
    shape = tuple(reach.centre.shape)
    try:
        if reach.torus is None or reach.torus.size != shape[1:]:
            reach = replace(
                reach, torus=torus_of([net for m in following for net in m.subnetworks()], shape)
            )
        return reach.through(following[0], box, effort)
    except Unbounded:
        return None


def _stretched(reach: Reach | None, layer: LayerBound) -> Reach | None:
    try:
        return None if reach is None else reach.stretched(layer.map, layer.bounds.forward)
    except Unbounded:
        return None


def whole_forward(layers: Stack, effort: SearchBudget) -> list[Factor]:
    """Factors of a bound of the forward map: among chains, comparison matrices and single layers the least product."""
    return _factors(
        layers,
        effort,
        _Direction("forward", lambda m, *args: m.lipsdp_jacobian(*args), lambda b: b.forward, 0),
    )


def whole_inverse(layers: Stack, effort: SearchBudget) -> list[Factor]:
    """The same for the inverse map; the last layer comes first."""
    backward = _Direction(
        "inverse", lambda m, *args: m.lipsdp_inverse(*args), lambda b: b.inverse, 1
    )
    turned = _factors(tuple(reversed(layers)), effort, backward)
    n = len(layers)
    return [replace(f, first=n - f.last, last=n - f.first) for f in reversed(turned)]


@dataclass(frozen=True)
class _Direction:
    name: str
    trace: Any
    bound: Any
    compared: int


def _factors(layers: Stack, effort: SearchBudget, way: _Direction) -> list[Factor]:
    factors, start = _single(layers, way), 0
    factors += comparison_factors(
        _matrices(layers, way, effort.deadline), effort.deadline.fraction(0.1)
    )
    while start < len(layers):
        chain, stop = _longest(layers, start, way, effort)
        own = effort.within((stop - start) / (len(layers) - start))
        proof = _proved(chain, own) if chain is not None and stop - start > 1 else None
        if proof is not None:
            factors.append(Factor(start, stop, proof.bound, proof))
        start = stop
    return cheapest(len(layers), factors)


def _matrices(layers: Stack, way: _Direction, deadline: Deadline) -> list[Tensor | None]:
    """The comparison matrices of all layers; None where there is none, or no time."""
    matrices: list[Tensor | None] = []
    for layer in layers:
        try:
            if deadline.passed:
                raise Unbounded("time ran out")
            found = layer.map.comparison_matrices(layer.box, layer.bounds)[way.compared]
            matrices.append(found if bool(found.isfinite().all()) else None)
        except Unbounded:
            matrices.append(None)
    return matrices


def _proved(chain: Chain, effort: SearchBudget) -> Proof | None:
    if max((len(layer.lower) for layer in chain.layers), default=0) > effort.width:
        return None
    try:
        return bound_chain(chain, effort)
    except Unbounded:
        return None


def _single(layers: Stack, way: _Direction) -> list[Factor]:
    return [
        Factor(k, k + 1, way.bound(layer.bounds), layer.bounds.proofs.get(way.name))
        for k, layer in enumerate(layers)
    ]


def _longest(
    layers: Stack, start: int, way: _Direction, effort: SearchBudget
) -> tuple[Chain | None, int]:
    """The chain of as many layers from ``start`` as can be traced in one state, and the index after them."""
    shape = tuple(
        (layers[start].box if way.name == "forward" else _output_box(layers[start])).shape
    )
    same = [layer.map for layer in layers[start:] if len(layer.box.shape) == len(shape)]
    try:
        if shape[0] > effort.width or effort.deadline.passed:
            return None, start + 1
        builder = ChainBuilder(
            shape[0], torus_of([net for m in same for net in m.subnetworks()], shape)
        )
    except Unbounded:
        return None, start + 1
    x: Linear = builder.start()
    stop = start
    for layer in layers[start:]:
        parts, count = builder.parts, len(builder.layers)
        try:
            if tuple(layer.box.shape[1:]) != shape[1:] or effort.deadline.passed:
                raise Unbounded("the image size changes, or time ran out")
            x = builder.reset_state(way.trace(layer.map, builder, x, layer.box))
        except Unbounded:
            builder.parts = parts
            del builder.layers[count:]
            break
        stop += 1
    return (builder.finish(x), stop) if stop > start else (None, start + 1)


def _output_box(layer: LayerBound) -> Interval:
    return layer.map.image(layer.box)
