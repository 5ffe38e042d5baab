"""The units that errors are measured in, and the threshold of checks that explain."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from inn_guard.core.tensors import binary_scale, finite_rows, nonzero_or_one, norms
from inn_guard.report.formatting import brief
from inn_guard.report.limits import Limits

__all__ = [
    "ROUNDING_FACTOR",
    "data_scale",
    "feature_deviation",
    "feature_scale",
    "format_log10",
    "max_usable_error",
    "table_unit",
    "worst",
]

#: How far above the first-order estimate, eps times the condition of the inverse's computation,
#: rounding may reach.
ROUNDING_FACTOR = 10.0

#: With fewer values a deviation is too uncertain to be the unit of a feature.
ENOUGH_VALUES = 8


def max_usable_error(dtype: torch.dtype) -> float:
    """Largest usable relative error of a round trip in ``dtype`` with the default limits.

    >>> max_usable_error(torch.float32), max_usable_error(torch.bfloat16)
    (0.01, 0.0625)
    """
    return Limits().round_trip(dtype)


def data_scale(x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch"]:
    """One unit for each sample: its root mean square, at least the batch's median; (B,) float64.

    A sample that is nearly zero is thereby held to the size of its neighbours, and one huge sample
    is not held against the others. Non-finite samples and a batch of zeros have scale 1.

    >>> data_scale(torch.tensor([[3.0, 3.0], [1.0, 1.0], [0.0, 0.0]])).round(decimals=6).tolist()
    [3.0, 1.0, 1.0]
    """
    own = norms(x.detach()) / math.sqrt(x[0].numel())
    usual = own[own.isfinite() & (own > 0)]
    least = usual.median() if len(usual) else own.new_ones(())
    return torch.where(own.isfinite(), own.clamp(min=least), torch.ones_like(own))


def feature_scale(x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch *data"]:
    """One unit for each entry: its feature's deviation or its own size, whichever is larger.

    float64, in the shape of x.

    A feature is a column of a table; in a batch with more than one data dimension (images,
    sequences) it is a channel, that is an index along dimension 1. With fewer than eight values the
    feature's root mean square takes the place of its deviation. A feature that never varies has its
    largest magnitude as its scale, one that is always 0 the median scale of the other features.

    >>> feature_scale(torch.tensor([[1.0, -100.0], [1.0, 100.0]])).tolist()
    [[1.0, 100.0], [1.0, 100.0]]
    """
    values = x.detach().double()
    rows = values[finite_rows(x)]
    if not len(rows):
        return torch.ones_like(values)
    if x.dim() > 2:
        features = rows.movedim(1, 0).flatten(1)
    else:
        features = rows.movedim(1, 0)
    largest = features.abs().amax(1)
    unit = binary_scale(largest)
    in_range = features / unit.unsqueeze(1)
    if features.shape[1] < ENOUGH_VALUES:
        spread = in_range.square().mean(1).sqrt() * unit
    else:
        spread = in_range.std(1, correction=0) * unit
    # a constant feature whose mean is not representable has the deviation of its rounding
    noise = 4 * torch.finfo(x.dtype).eps * largest
    spread = torch.where(spread > noise, spread, largest)
    varying = spread[(spread > 0) & spread.isfinite()]
    usual = varying.median() if len(varying) else spread.new_ones(())
    spread = torch.where((spread > 0) & spread.isfinite(), spread, usual)
    spread = spread.reshape(1, -1, *[1] * (x.dim() - 2))
    own = values.abs().nan_to_num(nan=0.0, posinf=0.0)
    return nonzero_or_one(torch.maximum(spread.expand_as(values), own))


def table_unit(like: Float[Tensor, "batch *data"], x: Tensor) -> Tensor | None:
    """One unit for each entry of x in the features of a table ``like``; None if it is no table.

    The deviation of the feature in ``like``, or the entry's own size, whichever is larger.
    """
    if like.dim() != 2:
        return None
    deviation = feature_deviation(like)
    return torch.maximum(deviation.expand_as(x), x.double().abs().nan_to_num(0.0, 0.0, 0.0))


def feature_deviation(x: Float[Tensor, "batch features"]) -> Tensor:
    """The deviation of each feature of a table, (features,) float64.

    Of a feature that never varies it is the scale of `feature_scale`.
    """
    values = x.detach().double()[finite_rows(x)]
    if not len(values):
        return torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    largest = values.abs().amax(0)
    unit = binary_scale(largest)
    deviation = (values / unit).std(0, correction=0) * unit
    noise = 4 * torch.finfo(x.dtype).eps * largest
    return torch.where(deviation > noise, deviation, feature_scale(values).amin(0))


def worst(values: Tensor) -> float:
    """The largest value, infinite where one of them is not finite; 0 of nothing.

    >>> worst(torch.tensor([1.0, 3.0])), worst(torch.tensor([1.0, math.nan]))
    (3.0, inf)
    """
    if not values.numel():
        return 0.0
    return values.double().nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def format_log10(power: float) -> str:
    """10 to that power with two digits, also where it fits no float.

    >>> format_log10(-6.5), format_log10(1.38), format_log10(412.0), format_log10(math.nan)
    ('3.2e-07', '24', '1.0e+412', 'nan')
    """
    if not math.isfinite(power):
        return str(power) if math.isnan(power) or power > 0 else "0"
    if abs(power) < 5:
        return brief(10**power)
    whole = math.floor(power)
    digits, _, carry = f"{10 ** (power - whole):.1e}".partition("e")
    whole += int(carry)
    sign = "-" if whole < 0 else "+"
    return f"{digits}e{sign}{abs(whole):02d}"
