"""A time limit for calls of foreign code that may never return."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

__all__ = ["TimedOut", "time_limit"]

RETRY_AFTER = 1.0  #: seconds until code that caught the interruption is interrupted again
EXIT_TIME = 0.05  #: seconds that a thread which is leaving the block gets to leave it


class TimedOut(RuntimeError):
    """A call exceeded its time limit and was interrupted."""


class _Interruption(BaseException):
    """Raised inside the block; not an Exception, so that ``except Exception`` does not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float | int) -> Iterator[None]:
    """Interrupt the block after ``seconds``. Works in every thread.

    The interruption arrives between two Python instructions. It ends a loop in Python, such as a
    solver that waits for its step size to become positive or a ``while`` on a NaN. A call into C
    is interrupted when it returns, so one that never returns is not interrupted. Threads that the
    block has started continue.

    Args:
        seconds: the limit, wall-clock time.

    Raises:
        TimedOut: if the block takes longer.

    >>> with time_limit(60.0):
    ...     2 + 2
    4
    """
    timer = _Timer(seconds)
    try:
        try:
            timer.start()
            yield
        finally:
            timer.stop()
    except _Interruption:
        timer.stop()
        raise TimedOut(f"interrupted after {seconds:g} s") from None


class _Timer:
    """A thread that raises an interruption in the thread that made it, until it is stopped."""

    def __init__(self, seconds: float | int) -> None:
        self._target = threading.get_ident()
        self._fired = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, args=(seconds,), daemon=True, name="inn_guard watchdog"
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop, called in the target thread. A pending interruption does not leave this call."""
        with self._lock:
            self._over.set()
            fired, self._fired = self._fired, False
        if fired:
            self._absorb()

    def _absorb(self) -> None:
        # CPython clears its flag for a pending exception when one arrives, not when it is revoked.
        # A flag that stays set slows every instruction, and hangs CPython 3.11 under a debugger.
        # So one more interruption is sent and caught.
        try:
            _interrupt(self._target)
            while True:
                pass
        except _Interruption:
            pass

    def _run(self, seconds: float | int) -> None:
        while self._expires(seconds):
            with self._lock:
                leaving = self._leaving()
                if not self._over.is_set() and not leaving:
                    self._fired = True
                    _interrupt(self._target)
            seconds = RETRY_AFTER
            if leaving:
                seconds = EXIT_TIME

    def _expires(self, seconds: float | int) -> bool:
        """Wait for ``seconds``; False as soon as the block is left."""
        return not self._over.wait(seconds)

    def _leaving(self) -> bool:
        """Whether the target thread is leaving the block already, where an interruption is lost."""
        frame = sys._current_frames().get(self._target)
        if frame is not None and frame.f_code.co_filename == contextlib.__file__:
            return True
        while frame is not None and frame.f_code.co_filename != __file__:
            frame = frame.f_back
        return frame is not None


def _interrupt(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(_Interruption)
    )
