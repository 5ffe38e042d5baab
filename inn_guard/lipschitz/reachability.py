"""Where layers take a box: an ellipsoid around the image of one point, by the recursion on differences from it.

x_k - c_k = F u with |u| <= 1. F F^H goes through a layer as J J^H does in the recursion, with differences in the place
of derivatives: z(x) - z(c) = dh/dx (x - c) + dh/dtheta(c) (theta(x) - theta(c)), where the centre c alone, not the
whole box, multiplies what the network does. An entry moves by no more than the norm of its row of F; on a torus, whose
frequencies F is known at, by the root of the mean of their squares. Intervals alone forget that entries move together,
and grow from layer to layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inn_guard.lipschitz.lipsdp.multipliers import ROWS
from inn_guard.lipschitz.lipsdp.recursion import covering
from inn_guard.lipschitz.maps.base import BoundedMap
from inn_guard.lipschitz.maps.composition import Composition
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder, Torus
from inn_guard.lipschitz.networks.conditioner import SearchBudget, searched_multipliers
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.networks.interpreters import over_channels
from inn_guard.numerics.convolution_norm import multiplicities
from inn_guard.numerics.intervals import Interval, up_tensor
from inn_guard.numerics.rounding import gamma, up
from inn_guard.numerics.spectral_norm import spectral_norm

__all__ = ["Reach"]

STRETCH = 1e-6  #: by which an ellipsoid is widened to take in the rounding of its centre


@dataclass(frozen=True)
class Reach:
    """All x with x - centre = factor u + w, |u| <= 1, |w| <= ball.

    Attributes:
        centre: (C, *size), float64.
        ball: in the norm of all entries together.
        factor: (1 or frequencies, C, m), or None for zero.
        torus: on which the frequencies are, or None.
    """

    centre: Tensor
    ball: float
    factor: Tensor | None = None
    torus: Torus | None = None

    @classmethod
    def around(cls, box: Interval) -> Reach:
        """The ball around a bounded box."""
        return cls(box.centre, _length(box.radius))

    def box(self) -> Interval:
        """The smallest box around it."""
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
        return (squares[0] * (1 + gamma(16 * factor.numel()))).sqrt() * (1 + 1e-15)

    def through(self, described: BoundedMap, box: Interval, effort: SearchBudget) -> Reach:
        """What a map makes of it, by the recursion.

        Args:
            described: the map.
            box: a convex set that holds the centre and everything else that can be there.
            effort: how hard multipliers are looked for.

        Returns:
            The ellipsoid around the centre's image.

        Raises:
            Unbounded: if the map is no chain, or too large for the time.
        """
        if isinstance(described, Composition):
            return self._opened(described, box, effort)
        landed = self._landed(described)
        return Reach(
            landed.centre,
            _length(landed.radius),
            self._differences(described, box, effort),
            self.torus,
        )

    def stretched(self, described: BoundedMap, lipschitz: float) -> Reach:
        """What any map makes of it whose derivative is at most ``lipschitz`` on a convex set that holds all of it.

        Raises:
            Unbounded: if that is infinite.
        """
        landed = self._landed(described)
        size = self.ball if self.factor is None else up(self.ball + spectral_norm(self.factor))
        radius = up(up(lipschitz * size) + _length(landed.radius))
        if not math.isfinite(radius):
            raise Unbounded("the image is unbounded")
        return Reach(landed.centre, radius)

    def _landed(self, described: BoundedMap) -> Interval:
        landed = described.image(Interval.of(self.centre))
        if not landed.bounded:
            raise Unbounded("the image of the centre is unbounded")
        return landed

    def _opened(self, described: Composition, box: Interval, effort: SearchBudget) -> Reach:
        reach = self
        for k, part in enumerate(described.parts):
            own, held = effort.within(1 / (len(described.parts) - k)), reach.within(box)
            try:
                reach = reach.through(part, held, own)
            except Unbounded:
                reach = reach.stretched(part, part.bounds(held, replace(own, steps=0)).forward)
            box = part.image(held)
        return reach

    def within(self, box: Interval) -> Interval:
        """What is in it and in another box, and the centre."""
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
        chain = builder.finish(builder.masked(described.secant_chain(builder, x, box, self.centre)))
        if max((len(layer.lower) for layer in chain.layers), default=0) > effort.width:
            raise Unbounded("too many neurons")
        factor = covering(chain, searched_multipliers(chain, effort, ROWS))
        if factor is None:
            raise Unbounded("no multipliers prove anything")
        return factor

    def _joined(self) -> Tensor:
        """One factor of both parts: (F u + w) is G v, |v| <= 1, for G G^H = (1 + t) F F^H + (1 + 1/t) ball^2 I."""
        eye = torch.eye(len(self.centre), dtype=torch.float64)[None]
        if self.factor is None:
            return self.ball * eye
        rest = up(self.ball * math.sqrt(1 + 1 / STRETCH) * (1 + 1e-9)) * eye.to(self.factor.dtype)
        return torch.cat([self.factor * (1 + STRETCH), rest.expand(len(self.factor), -1, -1)], 2)


def _length(radius: Tensor) -> float:
    """||radius||_2, rounded up."""
    return up(math.sqrt(float(radius.square().sum()) * (1 + gamma(radius.numel() + 4))), 2)
