"""When something is due."""

from __future__ import annotations

import functools
from collections.abc import Callable

Schedule = Callable[[int], bool]  #: step (0, 1, 2, ...) -> whether something is due


def every(k: int) -> Schedule:
    """Due at steps 0, k, 2k, ...

    Raises:
        ValueError: if k is below 1.

    >>> [step for step in range(10) if every(4)(step)]
    [0, 4, 8]
    """
    if k < 1:
        raise ValueError(f"expected a period of at least 1 step; got {k}")
    return functools.partial(_is_multiple, k)


def _is_multiple(k: int, step: int) -> bool:
    return step % k == 0


def schedule(period: int | Schedule) -> Schedule:
    """A period in steps as the schedule that it means; a schedule is returned as it is.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(period, bool) or not (isinstance(period, int) or callable(period)):
        raise TypeError(
            f"expected every as a number of steps or a function step -> bool; got {period!r}"
        )
    return every(period) if isinstance(period, int) else period
