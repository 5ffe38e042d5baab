"""What is true of a specimen, by plain formulas on the library's functions, without inn_guard.

Every quantity is compared with a threshold that is part of the question, not of the answer: an
inverse is usable up to 1 % of a feature, a log-determinant right up to 0.1 nats. What lies within
MARGIN of its threshold is decided by rounding and by which samples are measured: it is counted for
neither side.
"""

from __future__ import annotations

import enum
import functools
import math

import torch
from torch import Tensor

from tests.oracles import transforms as reference
from tests.zoo.specimens import Specimen

USABLE, NATS, MARGIN = 1e-2, 0.1, 2.0
RESOLVED = 1e13  #: condition number up to which a dense determinant in float64 is a reference


class Truth(enum.Enum):
    """What an audit must say."""

    GOOD = "good"
    BAD = "bad"
    EITHER = "either"  #: within MARGIN of the threshold


def of(value: float, threshold: float) -> Truth:
    """NaN is bad."""
    if value <= threshold / MARGIN:
        return Truth.GOOD
    return Truth.EITHER if value <= threshold * MARGIN else Truth.BAD


def worst(truths: list[Truth]) -> Truth:
    return max(truths, key=[Truth.GOOD, Truth.EITHER, Truth.BAD].index)


def by_feature(difference: Tensor, start: Tensor) -> float:
    """Largest error of an entry over its feature's deviation or its own size, if that is larger."""
    scale = torch.maximum(start.double().std(0, correction=0), start.double().abs())
    return float((difference.double().abs() / scale).nan_to_num(math.inf).max())


def reconstruction(specimen: Specimen) -> Truth:
    """The round trip comes back in the audit's dtype."""
    x = specimen.x(specimen.dtype)
    try:
        back = round_trip(specimen, specimen.dtype)
    except (AssertionError, RuntimeError):  # a spline without a root
        return Truth.BAD
    return of(by_feature(back - x, x), USABLE)


def round_trip(specimen: Specimen, dtype: torch.dtype) -> Tensor:
    """F^-1(F(x))."""
    _, encode, decode = specimen.made(dtype)
    with torch.no_grad():
        return decode(encode(specimen.x(dtype))[0])[0]


def log_det(specimen: Specimen) -> Truth | None:
    """The forward one, in float64, against slogdet of the dense Jacobian where z is finite."""
    _, encode, _ = specimen.made(torch.float64)
    with torch.no_grad():
        own = encode(specimen.x(torch.float64))[1]
    if own is None:
        return None
    rows = finite_rows(specimen)
    if not bool(rows.any()):
        return Truth.BAD
    true = reference.log_abs_det(jacobian(specimen)[rows])
    found = of(float((own[rows] - true).abs().nan_to_num(math.inf).max()), NATS)
    # one dense determinant of a whole chain loses digits with its condition
    return Truth.EITHER if condition(specimen) > RESOLVED and found is not Truth.GOOD else found


def spectrum(specimen: Specimen) -> Truth:
    """One rounding in the worst direction, eps times the condition number, against 1 %."""
    return of(torch.finfo(specimen.dtype).eps * condition(specimen), USABLE)


def condition(specimen: Specimen) -> float:
    """Largest condition number of the dense float64 Jacobians where z is finite."""
    J = jacobian(specimen)[finite_rows(specimen)]
    if not len(J) or not bool(J.isfinite().all()):
        return math.inf
    sigma = reference.singular_values(J)
    return float((sigma[:, 0] / sigma[:, -1]).nan_to_num(math.inf).max())


def finite_rows(specimen: Specimen) -> Tensor:
    """Samples with finite latents in the audit's dtype: those that have a Jacobian to speak of."""
    with torch.no_grad():
        return specimen.made(specimen.dtype)[1](specimen.x(specimen.dtype))[0].isfinite().all(1)


@functools.cache
def jacobian(specimen: Specimen) -> Tensor:
    """dz/dx (B, D, D) of the library's own forward in float64, row by row."""
    _, encode, _ = specimen.made(torch.float64)
    return reference.jacobian(lambda x: encode(x)[0], specimen.x(torch.float64))
