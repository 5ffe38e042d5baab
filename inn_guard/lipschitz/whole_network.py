"""Whole networks: boxes and bounds of the layers, their product, runs of layers as one chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.linearised_chain import Linearised
from inn_guard.lipschitz.lipsdp.chain import Chain
from inn_guard.lipschitz.maps.base import BlockBounds, BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.preimage import is_everywhere
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Linear, Torus
from inn_guard.lipschitz.networks.conditioner import Proof, SearchBudget, bound_chain, torus_of
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.reachability import ReachableSet
from inn_guard.numerics.interval_matrices import interval_norm, matmul
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import TINY, Upper
from inn_guard.numerics.spectral_norm import norm_operations

__all__ = [
    "Factor",
    "LayerBound",
    "LayerBounds",
    "bound_layers",
    "cheapest",
    "forward_factors",
    "inverse_factors",
    "jacobian_factors",
    "product",
]

WIDE = 256  #: entries of a sample up to which Jacobians are enclosed
ENCLOSED = 8.0  #: operations on centres and radii for each parameter of a network and each input
NEAR = "linearisation at the centre"
SHARE = 0.1  #: of the time left that one layer may take, or twice its equal share if that is more


@dataclass(frozen=True)
class Factor:
    """A bound of consecutive layers, first to last; the product of all factors bounds the network.

    Attributes:
        first: index of the first layer.
        last: index after the last layer.
        bound: certified bound of the layers' Jacobian (or inverse Jacobian).
        proof: the chain and its multipliers, where a chain gave the bound.
        method: what gave the bound, if that was no chain of several layers.
    """

    first: int
    last: int
    bound: float
    proof: Proof | None = None
    method: str = ""


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


def jacobian_factors(jacobians: Sequence[Interval | None], deadline: Deadline) -> list[Factor]:
    """Every run of two and more layers with enclosed Jacobians, as a factor.

    What products of norms lose where one Jacobian undoes another is kept.

    Args:
        jacobians: of the layers in the order in which they are applied, (m, n); None where unknown.
        deadline: runs that would take longer are left out.

    Returns:
        Factors whose proofs are the products, as chains without layers.
    """
    found: list[Factor] = []
    for first, start in enumerate(jacobians):
        total = start
        for last in range(first + 1, len(jacobians)):
            step = jacobians[last]
            if total is None or step is None:
                break
            operations = 2 * norm_operations(*step.shape)
            if not deadline.can_afford(operations):
                return found
            spend(operations)
            total = matmul(step, total)
            bound, matrix, error = interval_norm(total)
            if not math.isfinite(bound):
                break
            proof = Proof(bound, Chain(total.shape[1], (), matrix[None], error), ())
            found.append(Factor(first, last + 1, bound, proof, "enclosed Jacobians"))
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
        jacobians: enclosures of J and of J^-1, of few entries; None where there are none.
        so_far: bounds of all layers from the first to this one together; None where there are none.
    """

    name: str
    map: BoundedMap
    box: Interval
    bounds: BlockBounds
    paper_bound: Pair
    jacobians: tuple[Interval, Interval] | None = None
    so_far: Pair | None = None


LayerBounds = Sequence[LayerBound]


def bound_layers(
    layers: Sequence[tuple[str, BoundedMap]],
    box: Interval,
    effort: SearchBudget,
    near: Sequence[Linearised] = (),
) -> LayerBounds:
    """Every layer's bounds on the box that the layers before it make of ``box``.

    Boxes are the intersection of interval bounds and, if ``box`` is bounded, of the reachable set
    of differences from its centre, and of what the mean-value theorem says of few entries. Table
    3's bounds are NaN where time ran out; they are only shown.

    Args:
        layers: names and maps.
        box: of the inputs.
        effort: budget of all layers together.
        near: what a linearisation says of the first layers.
    """
    result = []
    reach = moved_by_mean = None
    if box.bounded:
        reach, moved_by_mean = ReachableSet.around(box), _MeanValue.of(box)
    for k, (name, described) in enumerate(layers):
        own = effort.fraction(min(1.0, max(SHARE, 2 / (len(layers) - k))))
        following = [m for _, m in layers[k:]]
        moved = _moved(reach, following, box, own.fraction(0.7))
        bounds = described.bounds(box, own.fraction(0.7))
        jacobians = _jacobians(described, box, own.deadline)
        if jacobians is not None:
            bounds = bounds.meet(_of_enclosed(jacobians, box))
        paper_bound = Pair(math.nan, math.nan)
        if not own.deadline.passed:
            paper_bound = described.paper_formula(box, own)
        result.append(LayerBound(name, described, box, bounds, paper_bound, jacobians))
        reach = moved or _stretched(reach, result[-1])
        box = described.image(box)
        if reach is not None:
            box = reach.intersect(box)
        if moved_by_mean is not None:
            moved_by_mean = moved_by_mean.after(described, jacobians)
        if moved_by_mean is not None:
            box = moved_by_mean.intersect(box)
        if k < len(near):
            box = box.meet(near[k].box)
            result[-1] = replace(result[-1], so_far=near[k].bounds)
    return tuple(result)


@dataclass(frozen=True)
class _MeanValue:
    """x_k of a sample in a box: x_k(c) + J (x - c), J over the box.

    Attributes:
        centre: encloses x_k(c), c the centre of the box.
        jacobian: encloses the Jacobian of x_k in x, (m, n); None for the identity.
        radius: of the box, (n,).
    """

    centre: Interval
    jacobian: Interval | None
    radius: Tensor

    @classmethod
    def of(cls, box: Interval) -> _MeanValue | None:
        """Before the first layer; None for many entries."""
        if box.shape.numel() > WIDE:
            return None
        return cls(Interval.of(box.centre), None, box.radius.flatten())

    def after(
        self, described: BoundedMap, jacobians: tuple[Interval, Interval] | None
    ) -> _MeanValue | None:
        """Behind a layer; None where its Jacobian is not known."""
        if jacobians is None:
            return None
        total = jacobians[0]
        if self.jacobian is not None:
            total = matmul(total, self.jacobian)
        centre = described.image(self.centre)
        if not centre.bounded or not total.bounded:
            return None
        return _MeanValue(centre, total, self.radius)

    def intersect(self, box: Interval) -> Interval:
        """What is left of another box that holds x_k."""
        if self.jacobian is None:
            return box
        offset = Interval(-self.radius, self.radius)[:, None]
        moved = matmul(self.jacobian, offset)[:, 0].map(lambda t: t.reshape(box.shape))
        return box.meet(self.centre + moved)


def _jacobians(
    described: BoundedMap, box: Interval, deadline: Deadline
) -> tuple[Interval, Interval] | None:
    """Enclosures of J and of J^-1; None where there are none, of many entries, or without time."""
    entries, pixels = box.shape.numel(), box.shape[1:].numel()
    parameters = entries
    for network in described.subnetworks():
        parameters += sum(p.numel() for p in network.parameters())
    operations = ENCLOSED * parameters * pixels * entries
    if entries > WIDE or not deadline.can_afford(operations):
        return None
    spend(operations)
    try:
        found = described.jacobians(box)
    except Unbounded:
        return None
    if not found[0].bounded or not found[1].bounded:
        return None
    return found


def _of_enclosed(jacobians: tuple[Interval, Interval], box: Interval) -> BlockBounds:
    """The bounds of enclosed Jacobians over a box, with their proofs."""
    proofs = {}
    for name, enclosed in zip(("forward", "inverse"), jacobians, strict=True):
        bound, matrix, error = interval_norm(enclosed)
        proofs[name] = Proof(bound, Chain(enclosed.shape[1], (), matrix[None], error), ())
    return BlockBounds(
        proofs["forward"].bound,
        proofs["inverse"].bound,
        is_everywhere(box),
        method="enclosed Jacobian",
        proofs=proofs,
    )


def _moved(
    reach: ReachableSet | None, following: Sequence[BoundedMap], box: Interval, effort: SearchBudget
) -> ReachableSet | None:
    """The reachable set after the first of the following maps; None where the recursion fails."""
    if reach is None or effort.deadline.passed:
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
    """Factors of least product that bound the forward map.

    There are chains, products of enclosed Jacobians, linearisations, and single layers.
    """
    near = [Factor(0, k, pair.forward, method=NEAR) for k, pair in _from_first(layers)]
    return _factors(layers, effort, _Forward(), near)


def inverse_factors(layers: LayerBounds, effort: SearchBudget) -> list[Factor]:
    """The same for the inverse map, whose first layer is the last of the forward map."""
    n = len(layers)
    near = [Factor(n - k, n, pair.inverse, method=NEAR) for k, pair in _from_first(layers)]
    reversed_factors = _factors(tuple(reversed(layers)), effort, _Inverse(), near)
    return [replace(f, first=n - f.last, last=n - f.first) for f in reversed(reversed_factors)]


def _from_first(layers: LayerBounds) -> list[tuple[int, Pair]]:
    """Bounds of the first k layers together, with k, up to a layer about which nothing is known."""
    found: list[tuple[int, Pair]] = []
    for k, layer in enumerate(layers, 1):
        if layer.so_far is None or layer.bounds.forward == layer.bounds.inverse == math.inf:
            break
        found.append((k, layer.so_far))
    return found


class _Forward:
    """The bounds, enclosures and chains of J."""

    name = "forward"

    def bound(self, layer: LayerBound) -> float:
        return layer.bounds.forward

    def jacobian(self, layer: LayerBound) -> Interval | None:
        return layer.jacobians and layer.jacobians[0]

    def append(self, layer: LayerBound, builder: ChainBuilder, x: Linear) -> Linear:
        return layer.map.lipsdp_jacobian(builder, x, layer.box)

    def input_shape(self, layer: LayerBound) -> torch.Size:
        return layer.box.shape


class _Inverse(_Forward):
    """Those of J^-1."""

    name = "inverse"

    def bound(self, layer: LayerBound) -> float:
        return layer.bounds.inverse

    def jacobian(self, layer: LayerBound) -> Interval | None:
        return layer.jacobians and layer.jacobians[1]

    def append(self, layer: LayerBound, builder: ChainBuilder, x: Linear) -> Linear:
        return layer.map.lipsdp_inverse(builder, x, layer.box)

    def input_shape(self, layer: LayerBound) -> torch.Size:
        return layer.map.image(layer.box).shape


def _factors(
    layers: LayerBounds, effort: SearchBudget, direction: _Forward, near: list[Factor]
) -> list[Factor]:
    factors = [factor for factor in near if math.isfinite(factor.bound)]
    for k, layer in enumerate(layers):
        proof = layer.bounds.proofs.get(direction.name)
        factors.append(Factor(k, k + 1, direction.bound(layer), proof))
    jacobians = [direction.jacobian(layer) for layer in layers]
    factors += jacobian_factors(jacobians, effort.deadline.fraction(0.1))
    start = 0
    while start < len(layers):
        chain, stop = _longest_chain(layers, start, direction, effort)
        if chain is not None:
            share = (stop - start) / (len(layers) - start)
            proof = _proved(chain, effort.fraction(share))
            if proof is not None:
                factors.append(Factor(start, stop, proof.bound, proof))
        start = stop
    return cheapest(len(layers), factors)


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
