"""GradientComparison: the angle between two gradients, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GradientComparison", "Pair"]

Pair = tuple[Tensor, Tensor]  #: one parameter's part of g and of h


@dataclass(frozen=True)
class GradientComparison:
    """Two gradients g and h of the same parameters, in lengths.

    Attributes:
        g: |g|.
        h: |h|.
        apart: | g/|g| - h/|h| |.
        together: | g/|g| + h/|h| |.
        difference: |g - h|.
    """

    g: float
    h: float
    apart: float
    together: float
    difference: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> GradientComparison:
        """Of gradients given as a pair of tensors per parameter."""
        a, b = (_norm(pair[k] for pair in pairs) for k in (0, 1))
        apart = _norm(g.double() / a - h.double() / b for g, h in pairs)
        together = _norm(g.double() / a + h.double() / b for g, h in pairs)
        return cls(a, b, apart, together, _norm(g.double() - h.double() for g, h in pairs))

    def row(self) -> dict[str, float]:
        """Angle in degrees, by the unit vectors' difference and sum, which small angles survive; distance; lengths."""
        if self.g == 0 or self.h == 0:
            angle = 0.0 if self.g == self.h else 90.0
            distance = 0.0 if self.g == self.h else (1.0 if self.h else math.inf)
        else:
            angle, distance = math.degrees(2 * math.atan2(self.apart, self.together)), self.difference / self.h
        return {"angle": angle, "distance": distance, "memory_saving_norm": self.g, "true_norm": self.h}


def _norm(vectors: Iterable[Tensor]) -> float:
    lengths = [torch.linalg.vector_norm(vector, dtype=torch.float64) for vector in vectors if vector.numel()]
    return float(torch.linalg.vector_norm(torch.stack(lengths))) if lengths else 0.0
