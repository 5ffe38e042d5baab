"""Schedules: at which training steps something is due."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

__all__ = ["Schedule", "checked_step", "every", "schedule"]

Schedule = Callable[[int], bool]  #: step (0, 1, 2, ...) -> whether something is due


def every(k: int) -> Schedule:
    """The schedule that is due at steps 0, k, 2k, ...

    Raises:
        ValueError: if k is below 1.

    >>> [step for step in range(10) if every(4)(step)]
    [0, 4, 8]
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"expected a period as a number of steps; got {k!r:.60}")
    if k < 1:
        raise ValueError(f"expected a period of at least 1 step; got {k}")
    # unlike a function defined here, this can be pickled together with a hook
    return functools.partial(_is_multiple, k)


def checked_step(step: int) -> int:
    """The number of a step.

    Raises:
        TypeError: if it is none.
    """
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"expected step as a whole number; got {step!r:.60}")
    return step


def _is_multiple(k: int, step: int) -> bool:
    return step % k == 0


def schedule(period: int | Schedule) -> Schedule:
    """The schedule of a period in steps; a schedule is returned as it is.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(period, int) and not isinstance(period, bool):
        return every(period)
    if callable(period) and not isinstance(period, (type, nn.Module)):
        return period
    raise TypeError(
        f"expected every as a number of steps or a function step -> bool; got {period!r}"
    )
