"""What is true of a specimen, by plain formulas on the library's functions, without inn_guard.

Every quantity is compared with a threshold that is part of the question, not of the answer: an
inverse is usable up to 1 % of the data's scale, a log-determinant right up to 1e-3 nats per
dimension. What lies within MARGIN of its threshold is decided by rounding and by which samples are
looked at: it is counted for neither side.
"""

from __future__ import annotations

import enum
import functools
import math

import torch
from torch import Tensor

from tests.oracles import transforms as reference
from tests.zoo.specimens import Specimen

USABLE, WRONG, NATS, MARGIN = 1e-2, 1e-4, 1e-3, 2.0


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


def relative(difference: Tensor, start: Tensor) -> float:
    """Largest RMS error over the sample's own RMS, or over the batch's median if that is larger."""
    size = start.double().square().mean(1).sqrt()
    error = difference.double().square().mean(1).sqrt() / torch.maximum(size, size.median())
    return float(error.nan_to_num(math.inf).max())


def reconstruction(specimen: Specimen) -> Truth:
    """Both round trips come back in the audit's dtype, and to 1e-4 in float64."""
    x = specimen.x(specimen.dtype)
    try:
        back, z, again = round_trips(specimen, specimen.dtype)
        exactly = round_trips(specimen, torch.float64)[0] - specimen.x(torch.float64)
    except (AssertionError, RuntimeError):  # a spline without a root
        return Truth.BAD
    found = [of(relative(back - x, x), USABLE), of(relative(again - z, z), USABLE)]
    rounding = 100 * torch.finfo(torch.float64).eps * condition(specimen)
    return worst([*found, of(relative(exactly, x), WRONG)] if rounding < WRONG else found)


def round_trips(specimen: Specimen, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """F^-1(F(x)), F(x) and F(F^-1(F(x)))."""
    _, encode, decode = specimen.made(dtype)
    with torch.no_grad():
        z = encode(specimen.x(dtype))[0]
        back = decode(z)[0]
        return back, z, encode(back)[0]


def log_det(specimen: Specimen) -> Truth | None:
    """Both directions against slogdet of the dense float64 Jacobian where z is finite, or None."""
    _, encode, decode = specimen.made(specimen.dtype)
    rows = finite_rows(specimen)
    with torch.no_grad():
        z, ahead = encode(specimen.x(specimen.dtype))
        back = decode(z)[1]
    if ahead is None or back is None or not bool(rows.any()):
        return None if ahead is None or back is None else Truth.BAD
    ahead, back, true = (
        ahead.double()[rows],
        back.double()[rows],
        reference.log_abs_det(jacobian(specimen)[rows]),
    )
    allowed = NATS * (z.shape[1] + true.abs())
    errors = torch.stack([(ahead - true).abs() / allowed, (ahead + back).abs() / allowed])
    return of(float(errors.nan_to_num(math.inf).max()), 1.0)


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
