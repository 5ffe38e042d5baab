"""The verdict on round trips: unusable, wrong, inexact beyond its condition, or as good as rounding allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.reconstruction.rounding import Explanation
from inn_guard.audits.round_trip import RoundTrip, first_non_finite
from inn_guard.audits.thresholds import (
    FLOOR,
    data_scale,
    format_log10,
    latent_size,
    max_usable_error,
    typical,
)
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.report.result import Verdict

__all__ = ["ExplainedError", "Measured", "Trips", "judged"]

STABILIZE = "Bound the layers that amplify most (layer_blame names them), train with a RegularizerHook, or run in float64."

LINEAR = 0.1  #: explained errors beyond this share of the data's scale are more than a first-order estimate can tell

OTHER_PRIOR = "If the model's prior is not N(0, I): functools.partial(reconstruction, prior=...)."


@dataclass(frozen=True)
class Trips:
    """The round trips of one audit, and whether x -> z -> x ought to be the identity."""

    data: RoundTrip
    encoded: RoundTrip
    prior: RoundTrip | str  #: or why there is none
    bijective: bool

    @property
    def main(self) -> RoundTrip:
        """The trip that decides: x -> z -> x, or z -> x -> z where x -> z -> x is a projection."""
        return self.data if self.bijective else self.encoded

    def judged(self) -> dict[str, RoundTrip]:
        """Round trips that ought to be the identity, by what they start from."""
        trips = {"data": self.data} if self.bijective else {}
        trips["encoded latents"] = self.encoded
        if not isinstance(self.prior, str) and self.prior_is_typical:
            trips["prior latents"] = self.prior
        return trips

    @property
    def prior_is_typical(self) -> bool:
        """Whether the encoded latents are of the prior's size; what its draws show is reported in any case."""
        return not isinstance(self.prior, str) and typical(self.encoded.start, self.prior.start)

    @property
    def latent_size(self) -> float:
        """Mean square of the finite encoded latents over that of the prior's draws; nan if there is none."""
        return (
            math.nan
            if isinstance(self.prior, str)
            else latent_size(self.encoded.start, self.prior.start)
        )


@dataclass(frozen=True)
class ExplainedError:
    """What rounding explains, for some rows of the main trip."""

    rows: Tensor
    what: Explanation


@dataclass(frozen=True)
class Measured:
    """All that the verdict is made from."""

    trips: Trips
    precise: (
        Tensor | str
    )  #: the main trip's relative error in a float64 copy, or why it could not be had
    explained: ExplainedError | None
    dtype: torch.dtype

    @property
    def usable(self) -> float:
        """Largest usable relative error in this dtype."""
        return max_usable_error(self.dtype)

    def rounding(self, dtype: torch.dtype) -> Tensor:
        """Relative error that rounding explains, per sample; nan where it was not measured."""
        allowed = torch.full((len(self.trips.main.start),), math.nan, dtype=torch.float64)
        if self.explained is not None:
            rows = self.explained.rows
            allowed[rows] = (
                self.explained.what.error(dtype) / data_scale(self.trips.main.start).cpu()[rows]
            )
        return allowed

    def allowed(self, dtype: torch.dtype) -> Tensor:
        """The same, and inf where rounding moves a sample so far that the derivative there no longer tells how far."""
        explained = self.rounding(dtype)
        return torch.where(explained > LINEAR, torch.inf, explained)

    @property
    def floor(self) -> float:
        """Largest error of the float64 copy that rounding does not explain, relative; nan if not measured."""
        if isinstance(self.precise, str) or self.explained is None:
            return math.nan
        beyond = torch.where(
            self.precise > self.allowed(torch.float64), self.precise, torch.zeros_like(self.precise)
        )
        return beyond[self.explained.rows].max().item()

    @property
    def wrong(self) -> bool:
        """Whether more precision does not help: the float64 copy is off, too, beyond rounding and beyond FLOOR."""
        if isinstance(self.precise, str):
            return bool((self._beyond_rounding > FLOOR).any())
        return self.floor > FLOOR

    @property
    def inexact(self) -> float:
        """Largest error that neither rounding nor the floor explains, relative; 0 if they explain all of it."""
        floor = self.floor if math.isfinite(self.floor) else 0.0
        return max(self._beyond_rounding.max().item() - floor, 0.0)

    @property
    def _beyond_rounding(self) -> Tensor:
        error = self.trips.main.relative
        return torch.where(error > self.allowed(self.dtype), error, torch.zeros_like(error))


def judged(measured: Measured, model: Invertible) -> tuple[Verdict, str, str]:
    """Verdict, reason and advice."""
    for start, trip in measured.trips.judged().items():
        if not bool(trip.finite.all()):
            return _non_finite(model, start, trip)
    if measured.wrong:
        return _wrong(measured)
    worst = {start: trip.relative.max().item() for start, trip in measured.trips.judged().items()}
    start = max(worst, key=worst.__getitem__)
    if worst[start] > measured.usable:
        reason = (
            f"from {start} the round trip is off by {worst[start]:.1e} of the scale of its start"
        )
        return Verdict.UNSTABLE, f"{reason}{_because(measured)}", STABILIZE
    reason = f"every round trip comes back to {worst[start]:.1e} of the scale of its start{_because(measured)}"
    reason += _about_prior(measured)
    if math.isfinite(measured.floor) and measured.floor > 0:
        reason += f"; the inverse itself is exact to {measured.floor:.1e} only, in float64 too"
    return Verdict.STABLE, reason, ""


def _about_prior(measured: Measured) -> str:
    """What was found from the prior's latents, where the verdict does not count it."""
    trips = measured.trips
    if isinstance(trips.prior, str) or trips.prior_is_typical:
        return ""
    lost, worst = (
        int((~trips.prior.finite).sum()),
        trips.prior.relative.nan_to_num(math.inf).max().item(),
    )
    if not lost and worst <= measured.usable:
        return ""
    found = (
        f"{lost} of {len(trips.prior.start)} return NaN or Inf"
        if lost
        else f"errors reach {worst:.1e}"
    )
    return (
        f"; from N(0, I) {found}, which is not counted: the latents of the data do not follow it "
        f"(mean square {trips.latent_size:.2g} of the prior's)"
    )


def _wrong(measured: Measured) -> tuple[Verdict, str, str]:
    error = measured.trips.main.relative.max().item()
    if isinstance(measured.precise, str):
        reason = (
            f"the round trip is off by {error:.1e}, more than rounding explains; {measured.precise}"
        )
    else:
        explained = measured.rounding(torch.float64).nan_to_num(0).max().item()
        reason = f"the inverse is wrong, not inexact: in float64 it is off by {measured.floor:.1e} of the data's scale"
        reason += f", where rounding explains {explained:.1e} at most"
    return (
        Verdict.UNSTABLE,
        reason,
        "Compare the inverse with the forward formula; raise the iterations of an iterative one.",
    )


def _non_finite(model: Invertible, start: str, trip: RoundTrip) -> tuple[Verdict, str, str]:
    lost = ~trip.finite
    rows = lost.nonzero()[:1, 0].to(trip.start.device)
    reason = f"{int(lost.sum())} of {len(lost)} round trips from {start} return NaN or Inf"
    try:
        place = first_non_finite(model.select(rows), trip.start[rows], latent=start != "data")
    except (ModelError, NotApplicable) as error:
        place = str(error)
    advice = f"{STABILIZE} {OTHER_PRIOR}" if start == "prior latents" else STABILIZE
    return Verdict.NON_FINITE, reason + (f", first in {place}" if place else ""), advice


def _because(measured: Measured) -> str:
    if measured.explained is None:
        return ""
    worst = measured.explained.what.log_condition.nan_to_num(math.inf).max().item() / math.log(10)
    because = f"; rounding is amplified by a condition number of up to {format_log10(worst)}"
    if measured.inexact > FLOOR:
        because += f", which does not explain {measured.inexact:.1e}: the inverse's own arithmetic loses digits"
    return because
