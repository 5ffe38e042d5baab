"""Clocks of the tests: nothing depends on how fast the machine is or what else runs on it."""

from __future__ import annotations

import threading
import time


class CountedClock:
    """A clock that advances by ``tick`` seconds whenever it is read.

    Loops with a time budget read it once a round, so that the budget becomes a number of rounds.
    """

    def __init__(self, tick: float) -> None:
        self.tick = tick
        self.reads = 0
        self.now = 0.0

    def __call__(self) -> float:
        self.reads += 1
        self.now += self.tick
        return self.now


_HANGING = threading.Event()


def hangs() -> None:
    """Called by models of the tests in a loop that never ends.

    With the fixture ``only_hangs_time_out`` of tests/conftest.py a time limit is over at the first
    such call after it began, and never before.
    """
    _HANGING.set()
    time.sleep(0.001)


def expires(timer, seconds) -> bool:
    """In place of ``_Timer._expires``: waits for ``hangs``, not for seconds."""
    _HANGING.clear()  # what the loop of an earlier call has left
    while not timer._over.is_set():
        if _HANGING.wait(0.001):
            return True
    return False
