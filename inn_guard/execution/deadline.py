"""Time that a computation may take: asked for in loops, and before anything whose cost can be foreseen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Deadline", "now"]

now: Callable[[], float] = time.monotonic  #: seconds; every deadline asks this clock
SPEED = 4e9  #: floating-point operations a second that a foreseen cost is divided by: one slow core
NEGLIGIBLE = 1e6  #: operations that are not worth saving


@dataclass(frozen=True)
class Deadline:
    """A moment of wall-clock time, unless ``now`` is another. What begins before it should end before it, roughly.

    Attributes:
        end: the moment; infinite for none.
    """

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """So many seconds from now."""
        return cls(now() + seconds)

    @property
    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self.end - now()

    @property
    def passed(self) -> bool:
        """Whether nothing more should be begun."""
        return self.left <= 0

    def fraction(self, share: float) -> Deadline:
        """The moment at which a share of what is left will be gone."""
        left = self.left
        return Deadline(self.end - (1 - share) * max(left, 0.0)) if math.isfinite(left) else self

    def at_most(self, seconds: float) -> Deadline:
        """This moment, or so many seconds from now if that is earlier."""
        return Deadline(min(self.end, now() + seconds))

    def can_afford(self, operations: float) -> bool:
        """Whether so many floating-point operations are foreseen to fit, or are too few to matter."""
        return operations <= NEGLIGIBLE or operations <= SPEED * self.left
