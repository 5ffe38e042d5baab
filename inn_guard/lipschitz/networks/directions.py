"""Directions in which inputs move from a point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inn_guard.numerics.rounding import Upper, enlarged, frobenius_norm

__all__ = ["Directions", "chunks"]


@dataclass(frozen=True)
class Directions:
    """All d = e + w with |e_i| <= radius_i and ||w|| <= slack, of flattened inputs.

    Attributes:
        radius: (n,).
        slack: of the Euclidean norm of w.
    """

    radius: Tensor
    slack: Upper

    @property
    def length(self) -> Upper:
        """A bound of ||d||."""
        return frobenius_norm(self.radius[None]) + self.slack

    def spread(self, sums: Tensor, squares: Tensor, error: Upper) -> Tensor:
        """How far sum_i d_i column_i moves each entry.

        Args:
            sums: sum_i radius_i |column_i|, as computed.
            squares: sum_i column_i^2.
            error: bounds the Frobenius norm of the columns' rounding error.
        """
        terms = len(self.radius) + 4
        moved = sums + self.slack * squares.sqrt() + self.length * error
        return enlarged(moved, 2 * terms)


def chunks(columns: Tensor, count: int = 128) -> list[slice]:
    """Slices of a few columns each: those inside a network take much memory."""
    return [slice(k, k + count) for k in range(0, len(columns), count)]
