"""Reachable sets of a box: an ellipsoid around the image of its centre, by LipSDP on differences.

x_k - c_k = F u with |u| <= 1. F F^H goes through a layer as J J^H does in the recursion, with
differences in the place of derivatives: z(x) - z(c) = dh/dx (x - c) + dh/dtheta(c) (theta(x) -
theta(c)), where the centre c alone, not the whole box, multiplies what the network does. An entry
moves by no more than the norm of its row of F; on a torus, whose frequencies F is known at, by the
root of the mean of their squares. Intervals alone forget that entries move together, and grow from
layer to layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.lipschitz.lipsdp.multipliers import ROWS
from inn_guard.lipschitz.lipsdp.recursion import covering_factor
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Torus
from inn_guard.lipschitz.networks.conditioner import SearchBudget, searched_multipliers
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.networks.interpreters import over_channels
from inn_guard.numerics.convolution_norm import multiplicities
from inn_guard.numerics.intervals import Interval, up_tensor
from inn_guard.numerics.rounding import Upper, enlarged, frobenius_norm
from inn_guard.numerics.spectral_norm import spectral_norm

__all__ = ["ReachableSet"]

STRETCH = 1e-6  #: relative enlargement of an ellipsoid that makes room for a small ball


@dataclass(frozen=True)
class ReachableSet:
    """All x with x - centre = factor u + w, |u| <= 1, |w| <= ball.

    Attributes:
        centre: (C, *size), float64.
        ball: bound of the Euclidean norm of w, over all entries together.
        factor: F, (1 or frequencies, C, m), or None for zero.
        torus: the torus of the frequencies, or None.
    """

    centre: Tensor
    ball: float
    factor: Tensor | None = None
    torus: Torus | None = None

    @classmethod
    def around(cls, box: Interval) -> ReachableSet:
        """The ball around a bounded box."""
        return cls(box.centre, _length(box.radius))

    def box(self) -> Interval:
        """The smallest box around the set."""
        radius = torch.full((len(self.centre),), self.ball, dtype=torch.float64)
        if self.factor is not None:
            radius = up_tensor(radius + self._row_norms(self.factor))
        radius = over_channels(radius, self.centre).expand_as(self.centre)
        return Interval.of(self.centre) + Interval(-radius, radius)

    def _row_norms(self, factor: Tensor) -> Tensor:
        squares = factor.abs().square().sum(2)
        if len(squares) > 1 and self.torus is not None:
            weights = multiplicities(self.torus.grid).double()
            squares = (weights[:, None] * squares).sum(0, keepdim=True) / weights.sum()
        return enlarged(enlarged(squares[0], 8 * factor.numel()).sqrt(), 1)

    def through(self, described: BoundedMap, box: Interval, effort: SearchBudget) -> ReachableSet:
        """The image of the set under a map, by the recursion.

        Args:
            described: the map.
            box: a convex set that holds the centre and every point of interest.
            effort: budget of the search for multipliers.

        Returns:
            An ellipsoid around the image of the centre.

        Raises:
            Unbounded: if the map is no chain, or too large for the time.
        """
        if isinstance(described, Composition):
            return self._through_parts(described, box, effort)
        image = self._centre_image(described)
        factor = self._differences(described, box, effort)
        return ReachableSet(image.centre, _length(image.radius), factor, self.torus)

    def stretched(self, described: BoundedMap, lipschitz: float) -> ReachableSet:
        """The image under a map of derivative at most ``lipschitz`` on a convex set around the set.

        Raises:
            Unbounded: if that is infinite.
        """
        image = self._centre_image(described)
        size = Upper(self.ball)
        if self.factor is not None:
            size = size + spectral_norm(self.factor)
        radius = size * lipschitz + _length(image.radius)
        if not math.isfinite(radius):
            raise Unbounded("the image is unbounded")
        return ReachableSet(image.centre, radius)

    def _centre_image(self, described: BoundedMap) -> Interval:
        image = described.image(Interval.of(self.centre))
        if not image.bounded:
            raise Unbounded("the image of the centre is unbounded")
        return image

    def _through_parts(
        self, described: Composition, box: Interval, effort: SearchBudget
    ) -> ReachableSet:
        reach = self
        for k, part in enumerate(described.parts):
            own = effort.fraction(1 / (len(described.parts) - k))
            held = reach.intersect(box)
            try:
                reach = reach.through(part, held, own)
            except Unbounded:
                reach = reach.stretched(part, part.bounds(held, replace(own, steps=0)).forward)
            box = part.image(held)
        return reach

    def intersect(self, box: Interval) -> Interval:
        """The intersection of the set's box with another one, and the centre."""
        return box.meet(self.box()).hull(Interval.of(self.centre))

    def _differences(self, described: BoundedMap, box: Interval, effort: SearchBudget) -> Tensor:
        """The factor of the map's differences from the centre.

        Raises:
            Unbounded: if the map is no chain, or too large for the time.
        """
        if len(self.centre) > effort.width or effort.deadline.passed:
            raise Unbounded("too many channels, or time ran out")
        start = self._joined()
        builder = ChainBuilder(start.shape[2], self.torus)
        x = builder.reset_state(builder.start().mapped(start))
        difference = described.secant_chain(builder, x, box, self.centre)
        chain = builder.finish(builder.masked(difference))
        if chain.width > effort.width:
            raise Unbounded("too many neurons")
        factor = covering_factor(chain, searched_multipliers(chain, effort, ROWS))
        if factor is None:
            raise Unbounded("no multipliers prove anything")
        return factor

    def _joined(self) -> Tensor:
        """G with F u + w = G v, |v| <= 1: G G^H = (1 + t) F F^H + (1 + 1/t) ball^2 I."""
        eye = torch.eye(len(self.centre), dtype=torch.float64)[None]
        if self.factor is None:
            return self.ball * eye
        rest = eye.to(self.factor.dtype) * ((Upper(1.0) / STRETCH + 1).sqrt() * self.ball)
        return torch.cat([self.factor * (1 + STRETCH), rest.expand(len(self.factor), -1, -1)], 2)


def _length(radius: Tensor) -> Upper:
    """||radius||_2, rounded up."""
    return frobenius_norm(radius.reshape(1, -1))
