"""A deadline for a computation: asked in loops, and before a step whose cost can be estimated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Deadline", "now"]

now: Callable[[], float] = time.monotonic  #: seconds; every deadline reads this clock
SPEED = 4e9  #: assumed floating-point operations per second: one slow core
NEGLIGIBLE = 1e6  #: operations that every deadline can afford


@dataclass(frozen=True)
class Deadline:
    """A moment on the clock ``now``. Work that can be interrupted ends at about this moment.

    Attributes:
        end: the moment in seconds; infinite: no deadline.
    """

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline in ``seconds`` from now."""
        return cls(now() + seconds)

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative afterwards."""
        return self.end - now()

    @property
    def passed(self) -> bool:
        """Whether no further step should be started."""
        return self.left <= 0

    def fraction(self, share: float) -> Deadline:
        """The moment at which ``share`` of the remaining time has passed."""
        left = self.left
        if math.isinf(left):
            return self
        return Deadline(self.end - (1 - share) * max(left, 0.0))

    def at_most(self, seconds: float) -> Deadline:
        """The earlier of this deadline and the moment in ``seconds`` from now."""
        return Deadline(min(self.end, now() + seconds))

    def can_afford(self, operations: float) -> bool:
        """Whether this number of floating-point operations is expected to finish in time."""
        return operations <= NEGLIGIBLE or operations <= SPEED * self.left
