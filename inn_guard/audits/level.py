"""Level: how much an audit measures."""

from __future__ import annotations

import enum

__all__ = ["Level"]


class Level(str, enum.Enum):
    """How much is measured; each level runs what the ones before it run.

    >>> Level("quick") == "quick", Level.QUICK.includes("standard"), Level.FULL.includes("quick")
    (True, False, True)
    """

    #: decides density, sampling, reconstruction and memory-saving gradients
    QUICK = "quick"
    #: adds other inputs, extreme singular values, the layer at fault, other precisions
    STANDARD = "standard"
    #: adds more draws, full spectra, certified bounds and attacks
    FULL = "full"

    def includes(self, other: Level | str) -> bool:
        """Whether what runs at ``other`` runs at this level, too."""
        order = list(Level)
        return order.index(Level(other)) <= order.index(self)

    def __str__(self) -> str:
        return self.value
