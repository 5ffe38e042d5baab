"""Time limits that end what hangs and nothing else, however slow the machine is.

Models of the tests that loop forever call ``hangs`` in their loop. With the fixture
``only_hangs_time_out`` of tests/conftest.py every time limit is over at the first such call after
it began, and never before.
"""

from __future__ import annotations

import threading
import time

_HANGING = threading.Event()


def hangs() -> None:
    _HANGING.set()
    time.sleep(0.001)


def expires(timer, seconds) -> bool:
    """In place of ``_Timer._expires``: waits for ``hangs``, not for seconds."""
    _HANGING.clear()  # what the loop of an earlier call has left
    while not timer._over.is_set():
        if _HANGING.wait(0.001):
            return True
    return False
