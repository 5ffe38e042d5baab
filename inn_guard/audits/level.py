"""Level: how much an audit measures."""

from __future__ import annotations

import enum

__all__ = ["Level"]


class Level(str, enum.Enum):
    """How much is measured; each level runs what the ones before it run.

    >>> Level("quick") == "quick", Level.QUICK.includes(Level.STANDARD), Level.FULL.includes(Level.QUICK)
    (True, False, True)
    """

    QUICK = "quick"  #: is the model fit for density, sampling, reconstruction and memory-saving gradients
    STANDARD = "standard"  #: adds other inputs, Jacobian extremes, the layer at fault, forecasts for other precisions
    FULL = "full"  #: adds more draws, full spectra, certified bounds and attacks

    def includes(self, other: Level) -> bool:
        """Whether what runs at ``other`` runs at this level, too."""
        order = list(Level)
        return order.index(other) <= order.index(self)

    def __str__(self) -> str:
        return self.value
