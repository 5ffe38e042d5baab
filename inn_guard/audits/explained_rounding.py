"""How large an error of the inverse rounding explains, sample by sample, from the linearization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.thresholds import ROUNDING_FACTOR
from inn_guard.core.tensors import log_norm
from inn_guard.jacobian.chain import Linearization, ScaledLinearization
from inn_guard.jacobian.rounding_error import RoundingForecast, rounding_forecast
from inn_guard.jacobian.singular_values import extreme_singular_values

__all__ = ["MAX_STEPS", "Explanation", "explain"]

TOLERANCE = 0.1  #: of the singular values: a threshold needs no more
MAX_STEPS = 20


@dataclass(frozen=True)
class Explanation:
    """What rounding can do to the round trip x -> z -> x of some samples.

    Attributes:
        log_condition: natural logarithm of sigma_max / sigma_min of J S, with the units of x in S,
            (B,) float64 on the CPU.
        log_amplified: ln of (|z| + sigma_max |S^-1 x|) / sigma_min: one relative rounding of x or
            z, seen in S^-1 x; (B,).
        forecast: what rounding every layer's state does.
    """

    log_condition: Tensor
    log_amplified: Tensor
    forecast: RoundingForecast

    def error(self, dtype: torch.dtype) -> Tensor:
        """Largest error by feature that rounding to ``dtype`` explains, (B,) float64 on the CPU.

        ROUNDING_FACTOR times the sum of eps (|z| + sigma_max |S^-1 x|) / sigma_min and of the
        forecast over all layers: a chain can be worse than its condition number where one layer
        undoes what another one does.
        """
        log_eps = math.log(torch.finfo(dtype).eps)
        whole = (self.log_amplified + log_eps).exp()
        layers = (self.forecast.log_error.cpu() + log_eps).exp()
        return (ROUNDING_FACTOR * (whole + layers)).nan_to_num(nan=math.inf)


def explain(linearization: Linearization, *, unit: Tensor, seed: int) -> Explanation:
    """Condition numbers and forecast at the samples of a linearization with finite states.

    Args:
        linearization: at the samples x.
        unit: of every entry of x, S; (B, *data).
        seed: of the random vectors.

    Raises:
        NotApplicable: if a layer's inverse has no correct derivative, or the map is not square.
    """
    generator = torch.Generator().manual_seed(seed)
    scaled = ScaledLinearization(linearization, unit)
    ends = extreme_singular_values(
        scaled, generator=generator, tolerance=TOLERANCE, max_steps=MAX_STEPS
    )
    log_x = log_norm(linearization.states[0].double() / unit)
    log_z = log_norm(linearization.output)
    amplified = torch.logaddexp(log_z, ends.log_max + log_x) - ends.log_min
    forecast = rounding_forecast(linearization, generator=generator, unit=unit)
    return Explanation(ends.log_condition.cpu(), amplified.cpu(), forecast)
