"""Rates and their intervals."""

from __future__ import annotations

import math

__all__ = ["MOST_DRAWS", "draws_that_decide", "percent", "rate_interval"]

MOST_DRAWS = 2**20  #: beyond which no number of draws is recommended


def rate_interval(count: int, of: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a rate of which ``count`` in ``of`` were seen.

    It holds the true rate with at least this probability, whatever the rate is.

    References:
        C. J. Clopper, E. S. Pearson: The use of confidence or fiducial limits illustrated in the
        case of the binomial. Biometrika 26, 1934.

    >>> low, high = rate_interval(0, 3688)
    >>> low, round(high, 6)
    (0.0, 0.001)
    """
    from scipy.special import betaincinv  # takes longer to import than the rest of the package

    tail = (1 - confidence) / 2
    low = float(betaincinv(count, of - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, of - count, 1 - tail)) if count < of else 1.0
    return low, high


def percent(rate: float) -> str:
    """A rate in per cent, with two digits, or as many as it takes to tell it from 0 and 100.

    >>> percent(0.0005), percent(0.996), percent(1.0), percent(0.0)
    ('0.05', '99.6', '100', '0')
    """
    share = 100 * rate
    if share > 90:
        return f"{share:.4g}"
    return f"{share:.2g}"


def draws_that_decide(count: int, of: int, limit: float, *, confidence: float = 0.95) -> int | None:
    """How many draws would put the limit outside of the interval, if the rate stays as seen so far.

    The rate is estimated as (count + 1/2) / (of + 1), or 0 where nothing was counted.

    Returns:
        the smallest number of draws; None if that is more than MOST_DRAWS.
    """
    rate = (count + 0.5) / (of + 1)
    if count == 0:
        rate = 0.0
    low, high = of, MOST_DRAWS
    if not _decides(rate, high, limit, confidence):
        return None
    while low < high:  # the smallest number, by bisection: more draws decide no worse
        middle = (low + high) // 2
        if _decides(rate, middle, limit, confidence):
            high = middle
        else:
            low = middle + 1
    return low


def _decides(rate: float, draws: int, limit: float, confidence: float) -> bool:
    """Whether the limit lies outside, the count rounded towards the limit."""
    if rate < limit:
        return rate_interval(math.ceil(rate * draws), draws, confidence=confidence)[1] < limit
    return rate_interval(math.floor(rate * draws), draws, confidence=confidence)[0] > limit
