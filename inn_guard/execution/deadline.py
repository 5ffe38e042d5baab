"""A deadline for a computation: asked in loops, and before a step whose cost can be estimated.

Deadlines are moments on a clock of work, not on the wall: what a computation does moves the clock
on by the operations that it is known to take. So a budget gives the same result on every machine
and under every load. One second is that of a slow core.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Deadline", "now", "spend"]

SPEED = 4e9  #: floating-point operations in one second of the clock: one slow core
NEGLIGIBLE = 1e6  #: operations that every deadline can afford


class _Work(threading.local):
    """The seconds of work that this thread has done."""

    seconds = 0.0


_work = _Work()


def _work_done() -> float:
    return _work.seconds


now: Callable[[], float] = _work_done  #: seconds of work; every deadline reads this clock


def spend(operations: float) -> None:
    """Move the clock of this thread on by some floating-point operations."""
    _work.seconds += operations / SPEED


@dataclass(frozen=True)
class Deadline:
    """A moment on the clock ``now``. Work that can be interrupted ends at about this moment.

    Attributes:
        end: the moment in seconds of work; infinite: no deadline.
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
