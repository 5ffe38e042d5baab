"""Schedules: at which training steps something is due."""

from __future__ import annotations

import functools
from collections.abc import Callable

__all__ = ["Schedule", "every", "schedule"]

Schedule = Callable[[int], bool]  #: step (0, 1, 2, ...) -> whether something is due


def every(k: int) -> Schedule:
    """The schedule that is due at steps 0, k, 2k, ...

    Raises:
        ValueError: if k is below 1.

    >>> [step for step in range(10) if every(4)(step)]
    [0, 4, 8]
    """
    if k < 1:
        raise ValueError(f"expected a period of at least 1 step; got {k}")
    # unlike a function defined here, this can be pickled together with a hook
    return functools.partial(_is_multiple, k)


def _is_multiple(k: int, step: int) -> bool:
    return step % k == 0


def schedule(period: int | Schedule) -> Schedule:
    """The schedule of a period in steps; a schedule is returned as it is.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(period, int) and not isinstance(period, bool):
        return every(period)
    if callable(period):
        return period
    raise TypeError(
        f"expected every as a number of steps or a function step -> bool; got {period!r}"
    )
