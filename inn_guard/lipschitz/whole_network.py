"""Whole networks: boxes and bounds of the layers, their product, runs of layers as one chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.lipsdp.chain import Chain
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear, Torus
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget, bound_chain, torus_of
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.reachability import ReachableSet
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import TINY, Upper, enlarged
from inn_guard.numerics.spectral_norm import norm_operations, spectral_norm

__all__ = [
    "Factor",
    "LayerBound",
    "LayerBounds",
    "bound_layers",
    "cheapest",
    "comparison_factors",
    "forward_factors",
    "inverse_factors",
    "product",
]

WIDE = 256  #: channels up to which comparison matrices are multiplied
SHARE = 0.1  #: of the time left that one layer may take, or twice its equal share if that is more


@dataclass(frozen=True)
class Factor:
    """A bound of consecutive layers, first to last; the product of all factors bounds the network.

    Attributes:
        first: index of the first layer.
        last: index after the last layer.
        bound: certified bound of the layers' Jacobian (or inverse Jacobian).
        proof: the chain and its multipliers, where a chain gave the bound.
        compared: whether the bound is the norm of a product of comparison matrices.
    """

    first: int
    last: int
    bound: float
    proof: Proof | None = None
    compared: bool = False


def product(bounds: Sequence[float]) -> Upper:
    """The product, rounded up; inf if one is."""
    total = Upper(1.0)
    for bound in bounds:
        total = total * bound
    return total


def cheapest(count: int, factors: Sequence[Factor]) -> list[Factor]:
    """The factors that lead from layer 0 to ``count`` with the least product: a shortest path.

    Raises:
        ValueError: if no factors lead there.
    """
    costs, paths = {0: 0.0}, dict[int, list[Factor]]({0: []})
    for factor in sorted(factors, key=lambda f: (f.last, f.first)):
        if factor.first not in costs:
            continue
        cost = costs[factor.first] + math.log(max(factor.bound, TINY))
        if cost < costs.get(factor.last, math.inf) or factor.last not in costs:
            costs[factor.last] = cost
            paths[factor.last] = [*paths[factor.first], factor]
    if count not in paths:
        raise ValueError(f"expected factors that lead from layer 0 to layer {count}")
    return paths[count]


def comparison_factors(matrices: Sequence[Tensor | None], deadline: Deadline) -> list[Factor]:
    """Every run of two and more layers with known comparison matrices, as a factor.

    Args:
        matrices: N_k of the layers in the order in which they are applied, nonnegative, (C', C);
            None where unknown.
        deadline: runs that would take longer are left out.

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
            operations = norm_operations(*step.shape)
            if not deadline.can_afford(operations):
                return found
            spend(operations)
            # TINY: zeros may be products that underflowed
            total = enlarged(step @ total, step.shape[1]) + TINY
            bound = spectral_norm(total)
            if not math.isfinite(bound):
                break
            proof = Proof(bound, Chain(total.shape[1], (), total[None]), ())
            found.append(Factor(first, last + 1, bound, proof, compared=True))
    return found


@dataclass(frozen=True)
class LayerBound:
    """One layer with its box and its bounds.

    Attributes:
        name: name of the layer.
        map: the bounded map that it is.
        box: box of its inputs.
        bounds: certified bounds on that box.
        paper_bound: bounds by the formula of Table 3; NaN where time ran out.
    """

    name: str
    map: BoundedMap
    box: Interval
    bounds: BlockBounds
    paper_bound: Pair


LayerBounds = Sequence[LayerBound]


def bound_layers(
    layers: Sequence[tuple[str, BoundedMap]], box: Interval, effort: SearchBudget
) -> LayerBounds:
    """Every layer's bounds on the box that the layers before it make of ``box``.

    Boxes are the intersection of interval bounds and, if ``box`` is bounded, of the reachable set
    of differences from its centre. Table 3's bounds are NaN where time ran out; they are only
    shown.
    """
    result = []
    reach = None
    if box.bounded:
        reach = ReachableSet.around(box)
    for k, (name, described) in enumerate(layers):
        own = effort.fraction(min(1.0, max(SHARE, 2 / (len(layers) - k))))
        following = [m for _, m in layers[k:]]
        moved = _moved(reach, following, box, own.fraction(0.7))
        bounds = described.bounds(box, own.fraction(0.7))
        paper_bound = Pair(math.nan, math.nan)
        if not own.deadline.passed:
            paper_bound = described.paper_formula(box, own)
        result.append(LayerBound(name, described, box, bounds, paper_bound))
        reach = moved or _stretched(reach, result[-1])
        box = described.image(box)
        if reach is not None:
            box = reach.intersect(box)
    return tuple(result)


def _moved(
    reach: ReachableSet | None, following: Sequence[BoundedMap], box: Interval, effort: SearchBudget
) -> ReachableSet | None:
    """The reachable set after the first of the following maps; None where the recursion fails."""
    if reach is None:
        return None
    shape = tuple(reach.centre.shape)
    try:
        if reach.torus is None or reach.torus.size != shape[1:]:
            reach = replace(reach, torus=_common_torus(following, shape))
        return reach.through(following[0], box, effort)
    except Unbounded:
        return None


def _common_torus(maps: Sequence[BoundedMap], shape: tuple[int, ...]) -> Torus | None:
    return torus_of([network for m in maps for network in m.subnetworks()], shape)


def _stretched(reach: ReachableSet | None, layer: LayerBound) -> ReachableSet | None:
    if reach is None:
        return None
    try:
        return reach.stretched(layer.map, layer.bounds.forward)
    except Unbounded:
        return None


def forward_factors(layers: LayerBounds, effort: SearchBudget) -> list[Factor]:
    """Factors of least product that bound the forward map: chains, comparison matrices, layers."""
    return _factors(layers, effort, _Forward())


def inverse_factors(layers: LayerBounds, effort: SearchBudget) -> list[Factor]:
    """The same for the inverse map, whose first layer is the last of the forward map."""
    reversed_factors = _factors(tuple(reversed(layers)), effort, _Inverse())
    n = len(layers)
    return [replace(f, first=n - f.last, last=n - f.first) for f in reversed(reversed_factors)]


class _Forward:
    """The bounds, comparison matrices and chains of J."""

    name = "forward"

    def bound(self, layer: LayerBound) -> float:
        return layer.bounds.forward

    def comparison_matrix(self, layer: LayerBound) -> Tensor:
        return layer.map.comparison_matrices(layer.box, layer.bounds)[0]

    def append(self, layer: LayerBound, builder: ChainBuilder, x: Linear) -> Linear:
        return layer.map.lipsdp_jacobian(builder, x, layer.box)

    def input_shape(self, layer: LayerBound) -> torch.Size:
        return layer.box.shape


class _Inverse(_Forward):
    """Those of J^-1."""

    name = "inverse"

    def bound(self, layer: LayerBound) -> float:
        return layer.bounds.inverse

    def comparison_matrix(self, layer: LayerBound) -> Tensor:
        return layer.map.comparison_matrices(layer.box, layer.bounds)[1]

    def append(self, layer: LayerBound, builder: ChainBuilder, x: Linear) -> Linear:
        return layer.map.lipsdp_inverse(builder, x, layer.box)

    def input_shape(self, layer: LayerBound) -> torch.Size:
        return layer.map.image(layer.box).shape


def _factors(layers: LayerBounds, effort: SearchBudget, direction: _Forward) -> list[Factor]:
    factors = []
    for k, layer in enumerate(layers):
        proof = layer.bounds.proofs.get(direction.name)
        factors.append(Factor(k, k + 1, direction.bound(layer), proof))
    matrices = _comparison_matrices(layers, direction, effort.deadline)
    factors += comparison_factors(matrices, effort.deadline.fraction(0.1))
    start = 0
    while start < len(layers):
        chain, stop = _longest_chain(layers, start, direction, effort)
        if chain is not None and stop - start > 1:
            share = (stop - start) / (len(layers) - start)
            proof = _proved(chain, effort.fraction(share))
            if proof is not None:
                factors.append(Factor(start, stop, proof.bound, proof))
        start = stop
    return cheapest(len(layers), factors)


def _comparison_matrices(
    layers: LayerBounds, direction: _Forward, deadline: Deadline
) -> list[Tensor | None]:
    """The comparison matrices of all layers; None where there is none, or no time."""
    matrices: list[Tensor | None] = [None] * len(layers)
    for k, layer in enumerate(layers):
        if deadline.passed:
            break
        try:
            found = direction.comparison_matrix(layer)
        except Unbounded:
            continue
        if bool(found.isfinite().all()):
            matrices[k] = found
    return matrices


def _proved(chain: Chain, effort: SearchBudget) -> Proof | None:
    if chain.width > effort.width:
        return None
    try:
        return bound_chain(chain, effort)
    except Unbounded:
        return None


def _longest_chain(
    layers: LayerBounds, start: int, direction: _Forward, effort: SearchBudget
) -> tuple[Chain | None, int]:
    """The chain of as many layers from ``start`` as fit into one, and the index after them."""
    shape = tuple(direction.input_shape(layers[start]))
    if shape[0] > effort.width or effort.deadline.passed:
        return None, start + 1
    same = [layer.map for layer in layers[start:] if len(layer.box.shape) == len(shape)]
    try:
        builder = ChainBuilder(shape[0], _common_torus(same, shape))
    except Unbounded:
        return None, start + 1
    x: Linear = builder.start()
    stop = start
    for layer in layers[start:]:
        changes_size = tuple(layer.box.shape[1:]) != shape[1:]
        if changes_size or effort.deadline.passed:
            break
        parts, count = builder.parts, len(builder.layers)
        try:
            x = builder.reset_state(direction.append(layer, builder, x))
        except Unbounded:
            # a layer that fails may have appended a part of its chain
            builder.parts = parts
            del builder.layers[count:]
            break
        stop += 1
    if stop == start:
        return None, start + 1
    return builder.finish(x), stop
