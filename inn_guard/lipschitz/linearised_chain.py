"""Runs of layers near a point: one product of their derivatives there, and the distance from it.

Products of norms forget that a layer undoes what another one does, and boxes that go from layer to
layer forget that entries move together. Near a point c neither is necessary. Let |x - c| <= r, C_k
the derivative of layer k at the image of c, P_k = C_k ... C_1, and J_k(x) the derivative of the
first k layers. With ||J(x) - C_k|| <= eps_k for layer k on the states that it gets,

    J_k(x) = P_k (I + N),   1 + ||N|| <= 1 + nu_k = prod_j (1 + ||P_j^-1|| eps_j ||P_{j-1}||),

because J_k = (C_k + E) P_{k-1} (I + N') = P_k (I + P_k^-1 E P_{k-1}) (I + N'). Differences obey the
same with averages of derivatives: x_k(x) = c_k + P_k (d + w) with d = x - c, the states that layer
k + 1 gets. Every c_k is a rounded point, and ||P_k^-1|| times its error goes into w as well.
Telescoping sums give, with ||J_layer^-1 - C_k^-1|| <= eps'_k,

    ||J|| <= ||P_n|| + sum_k ||C_n ... C_{k+1}|| eps_k ||P_{k-1}|| (1 + nu_{k-1}),
    ||J^-1|| <= ||P_n^-1|| + sum_k ||P_{k-1}^-1|| eps'_k ||J_{k+1}^-1 ... J_n^-1||.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inn_guard.execution.deadline import Deadline, spend
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.maps.neighbourhood import Neighbourhood
from inn_guard.lipschitz.networks.conditioner import Directions, SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper, frobenius_norm
from inn_guard.numerics.spectral_norm import singular_range

__all__ = ["Linearised", "LinearisedChain", "linearised"]

FAR = 1e3  #: 1 + nu beyond which derivatives are too far from those at the centre
LARGEST = 4096  #: entries of a sample, of which square matrices are made
CALLS = 1e6  #: operations in the time that the calls for one small layer take
LEAST = SearchBudget(steps=0, width=0)  #: bounds of one layer by products of norms
NORMS = 6.0  #: times n^3 operations, for the singular values of one matrix


@dataclass(frozen=True)
class Step:
    """The chain behind one of its layers.

    Attributes:
        eps: eps_k and eps'_k, of the layer.
        largest: ||P_k||.
        inverse: ||P_k^-1||, times what its rounding errors are at most.
        growth: 1 + nu_k.
        own: bounds of the layer alone.
    """

    eps: Pair
    largest: Upper
    inverse: Upper
    growth: Upper
    own: Pair


@dataclass(frozen=True)
class LinearisedChain:
    """The first layers of a network in the neighbourhood of a box's centre.

    Attributes:
        around: what is known of the states behind them.
        steps: one for every layer, and one before the first.
        exactness: bounds ||C_k ... C_1 P_k^-1|| and its inverse: P_k is rounded.
    """

    around: Neighbourhood
    steps: tuple[Step, ...]
    exactness: Upper

    @classmethod
    def of(cls, box: Interval) -> LinearisedChain:
        """Before the first layer, around the centre of a bounded box."""
        n = box.shape.numel()
        columns = torch.eye(n, dtype=torch.float64).reshape(n, *box.shape)
        directions = Directions(box.radius.flatten(), Upper(0.0))
        around = Neighbourhood(box.centre, columns, directions, box)
        one = Upper(1.0)
        return cls(around, (Step(Pair(0.0, 0.0), one, one, one, Pair(1.0, 1.0)),), one)

    def through(self, described: BoundedMap) -> LinearisedChain:
        """Behind one more layer.

        Raises:
            Unbounded: if the layer is not known to first order, or too far from linear.
        """
        if isinstance(described, Composition):
            chain = self
            for part in described.parts:
                chain = chain.through(part)
            return chain
        states = self.around.range()
        own = described.bounds(states, LEAST).pair
        moved = described.linearised(self.around)
        columns = moved.columns.values
        last = self.steps[-1]
        largest, inverse, exactness = last.largest, last.inverse, self.exactness
        if not moved.is_isometry:
            if columns[0].numel() != len(columns):
                raise Unbounded("a layer that drops or adds entries")
            least, largest = singular_range(columns.flatten(1).T)
            rounded = moved.columns.error / least
            exactness = exactness / (1 - rounded)
            inverse = Upper(1.0) / least
        factor = 1 + inverse * (moved.forward * last.largest + moved.columns.error)
        growth = last.growth * factor
        if not growth < FAR or not math.isfinite(exactness):
            raise Unbounded("the layers are too far from linear in this box")
        directions = self.around.directions
        rounding = inverse * frobenius_norm(moved.centre.radius.reshape(1, -1))
        slack = directions.slack + (factor - 1) * directions.length + rounding
        directions = Directions(directions.radius, slack)
        around = Neighbourhood(moved.centre.centre, columns, directions, described.image(states))
        eps = Pair(moved.forward, moved.inverse)
        step = Step(eps, largest, inverse * exactness, growth, own)
        return LinearisedChain(around, (*self.steps, step), exactness)

    def bounds(self) -> Pair:
        """Bounds of J and J^-1 of all layers together."""
        last, rounded = self.steps[-1], self.exactness
        forward, inverse = last.largest * rounded, last.inverse
        behind, undone = Upper(1.0), Upper(1.0)
        for k in range(len(self.steps) - 1, 0, -1):
            before, own = self.steps[k - 1], self.steps[k]
            # of the layers behind: the product of their norms, or from all of them and the first k
            after = Upper.min(behind, last.largest * rounded * own.inverse)
            forward = forward + after * own.eps.forward * before.largest * before.growth * rounded
            back = Upper.min(undone, own.largest * own.growth * self._inverse())
            inverse = inverse + before.inverse * own.eps.inverse * back
            behind, undone = behind * own.own.forward, undone * own.own.inverse
        return Pair(forward, Upper.min(inverse, self._inverse()))

    def _inverse(self) -> Upper:
        """||P_n^-1|| / (1 - nu_n) bounds J^-1."""
        last = self.steps[-1]
        return last.inverse / (1 - (last.growth - 1))


@dataclass(frozen=True)
class Linearised:
    """What a linearisation says of the states and the Jacobian behind a layer.

    Attributes:
        box: holds the states.
        bounds: of J and J^-1 of all layers up to there.
    """

    box: Interval
    bounds: Pair


def linearised(layers: Sequence[BoundedMap], box: Interval, deadline: Deadline) -> list[Linearised]:
    """The first layers of a network near the centre of a box, as many as are close to linear.

    Args:
        layers: in order.
        box: of the inputs.
        deadline: if there is no time for all layers, there is no result.
    """
    found: list[Linearised] = []
    if not _is_affordable(layers, box, deadline):
        return found
    try:
        chain = LinearisedChain.of(box)
        for layer in layers:
            chain = chain.through(layer)
            found.append(Linearised(chain.around.range(), chain.bounds()))
    except Unbounded:
        pass
    return found


def _is_affordable(layers: Sequence[BoundedMap], box: Interval, deadline: Deadline) -> bool:
    """Whether there is time for all layers; if so, it is spent."""
    n = box.shape.numel()
    if not box.bounded or n > LARGEST:
        return False
    point, operations = Interval.of(box.centre), 0.0
    for layer in layers:
        parameters = sum(p.numel() for net in layer.subnetworks() for p in net.parameters())
        pixels = point.shape[1:].numel()
        operations += n * (2.0 * parameters * pixels + 4.0 * n) + CALLS
        if parameters:
            operations += NORMS * n**3
        # a layer may change the size of images
        point = layer.image(point)
    if not deadline.can_afford(operations):
        return False
    spend(operations)
    return True
