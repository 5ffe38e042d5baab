"""How large an error of the inverse rounding explains, sample by sample, from the linearisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.thresholds import ROUNDING_FACTOR
from inn_guard.core.invertible import Invertible
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.rounding_error import RoundingForecast, rounding_forecast
from inn_guard.jacobian.singular_values import extreme_singular_values

__all__ = ["MAX_STEPS", "Explanation", "explain"]

TOLERANCE = 0.1  #: of the singular values: a threshold needs no more
MAX_STEPS = 20


@dataclass(frozen=True)
class Explanation:
    """What rounding can do to the round trip x -> z -> x of some samples.

    Attributes:
        log_condition: natural logarithm of sigma_max / sigma_min, (B,) float64 on the CPU.
        log_amplified: ln of (|z| + sigma_max |x|) / sigma_min: one relative rounding of x or z, seen in x; (B,).
        forecast: what rounding every layer's state does.
    """

    log_condition: Tensor
    log_amplified: Tensor
    forecast: RoundingForecast

    def error(self, dtype: torch.dtype) -> Tensor:
        """Largest l2 error that rounding to ``dtype`` explains, (B,) float64 on the CPU; inf where it explains any.

        ROUNDING_FACTOR times the sum of eps (|z| + sigma_max |x|) / sigma_min and of the forecast over all layers: a chain
        can be worse than its condition number where one layer undoes what another one does.
        """
        eps = torch.finfo(dtype).eps
        log_eps = math.log(eps)
        bound = ROUNDING_FACTOR * (
            (self.log_amplified + log_eps).exp() + (self.forecast.log_error.cpu() + log_eps).exp()
        )
        return bound.nan_to_num(nan=math.inf)


def explain(model: Invertible, x: Tensor, *, seed: int) -> Explanation:
    """Linearise the model at x, all of whose samples stay finite, and measure condition and forecast.

    Raises:
        NotApplicable: if a layer's inverse has no correct derivative, or the map is not square.
    """
    generator = torch.Generator().manual_seed(seed)
    linearization = Linearization(model, x)
    ends = extreme_singular_values(
        linearization, generator=generator, tolerance=TOLERANCE, max_steps=MAX_STEPS
    )
    log_x, log_z = (_log_norm(t) for t in (x, linearization.output))
    amplified = torch.logaddexp(log_z, ends.log_max + log_x) - ends.log_min
    forecast = rounding_forecast(linearization, generator=generator)
    return Explanation(ends.log_condition.cpu(), amplified.cpu(), forecast)


def _log_norm(t: Tensor) -> Tensor:
    flat = t.flatten(1).double()
    peak = flat.abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    return peak.log() + (flat / peak.unsqueeze(1)).norm(dim=1).log()
