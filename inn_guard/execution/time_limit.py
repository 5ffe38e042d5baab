"""A watchdog for calls of foreign code that may never return."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

__all__ = ["TimedOut", "time_limit"]

AGAIN = 1.0  #: seconds until code that swallowed the interruption is interrupted once more
SOON = 0.05  #: seconds until a thread that was just leaving the block is looked at again


class TimedOut(RuntimeError):
    """A call took longer than it was allowed to, and was interrupted."""


class _Interruption(BaseException):
    """Raised inside the watched code; no Exception, so that ``except Exception`` does not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float | int) -> Iterator[None]:
    """Interrupt what runs inside the block after so many seconds, in whatever thread it runs.

    The interruption arrives between two python instructions. A loop in python (a solver that waits for its step size
    to become positive, a ``while`` on a NaN) is ended; one single call into C that never returns is not, and a long
    one is ended when it returns. Threads that the code started itself go on.

    Args:
        seconds: of wall-clock time.

    Raises:
        TimedOut: after the limit.

    >>> with time_limit(60.0):
    ...     2 + 2
    4
    """
    watcher = _Watcher(seconds)
    try:
        try:
            watcher.start()
            yield
        finally:
            watcher.stop()
    except _Interruption:
        watcher.stop()
        raise TimedOut(f"interrupted after {seconds:g} s") from None


class _Watcher:
    """A thread that raises an interruption in the thread that made it, until it is stopped."""

    def __init__(self, seconds: float | int) -> None:
        self._watched = threading.get_ident()
        self._fired = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(
            target=self._watch, args=(seconds,), daemon=True, name="inn_guard watchdog"
        )

    def start(self) -> None:
        """Begin to count."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch, in the watched thread; an interruption that is on its way does not get out."""
        with self._lock:
            self._over.set()
            fired, self._fired = self._fired, False
        if fired:
            self._absorb()

    def _absorb(self) -> None:
        # CPython's flag for a pending exception goes down only when one arrives, not when it is taken back: left up it
        # slows every instruction, and hangs CPython 3.11 under a debugger. So one is sent and caught.
        try:
            _interrupt(self._watched)
            while True:
                pass
        except _Interruption:
            pass

    def _watch(self, seconds: float | int) -> None:
        while not self._over.wait(seconds):
            with self._lock:
                leaving = self._leaving()
                if not self._over.is_set() and not leaving:
                    self._fired = True
                    _interrupt(self._watched)
            seconds = SOON if leaving else AGAIN

    def _leaving(self) -> bool:
        """Whether the watched thread is on its way out of the block already, where an interruption would get lost."""
        frame = sys._current_frames().get(self._watched)
        if frame is not None and frame.f_code.co_filename == contextlib.__file__:
            return True
        while frame is not None and frame.f_code.co_filename != __file__:
            frame = frame.f_back
        return frame is not None


def _interrupt(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(_Interruption)
    )
