"""Which latents a map does not reach: it is not onto, and no precision brings them back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.fault_tolerant import Guarded
from inn_guard.audits.round_trip import RoundTrip, draw_error
from inn_guard.core.tensors import finite_rows, nonzero_or_one

__all__ = ["ALL_REACHED", "Reach", "RoundTripLimits", "measure_reach"]

#: Data are moved away from their centre by these factors, to see how far F goes.
STRETCHES = (1.0, 10.0, 1000.0)
MOST = 0.9  #: share of the data that must come back before anything is said of latents
SLACK = 1e-3  #: of the base's deviation, beyond the range of F in which a latent counts as within


@dataclass(frozen=True)
class Reach:
    """What was found about latents z that are lost.

    Attributes:
        unreached: how many F was not seen to reach, wherever it was looked at.
        cut_off: how many others F^-1 sends to a point whose latent is another one, which itself
            comes back.
        entry: of z, in which most of the unreached ones lie outside of the range of F.
        low: the smallest value of F in this entry.
        high: the largest one.
    """

    unreached: int = 0
    cut_off: int = 0
    entry: int = 0
    low: float = 0.0
    high: float = 0.0

    def sentence(self) -> str:
        """What is told of it; "" if all latents are reached."""
        text = ""
        if self.unreached:
            text += (
                f"; the map does not reach {self.unreached} of them: F(x) stays between "
                f"{self.low:.3g} and {self.high:.3g} in entry {self.entry}, wherever x lies"
            )
        if self.cut_off:
            text += (
                f"; F(F^-1(z)) of {self.cut_off} of them is another latent, which itself comes "
                "back: the map does not reach them, or its inverse cuts them off"
            )
        return text


ALL_REACHED = Reach()


@dataclass(frozen=True)
class RoundTripLimits:
    """Up to which error a round trip comes back.

    Attributes:
        draw: of z -> x -> z, as a root mean square in units of the deviation.
        data: of x -> z -> x, by feature.
        deviation: of the base, (*latent).
    """

    draw: float
    data: float
    deviation: Tensor


def measure_reach(
    guarded: Guarded, z: Tensor, at_data: Guarded, data: Tensor, limits: RoundTripLimits
) -> Reach:
    """Which of the latents z, whose round trips are lost, the map does not reach.

    Nothing is said unless the data come back: else the inverse is another map. A latent is not
    reached if it lies outside of the range of F, at the data and far away from them, and its own
    F(F^-1(z)) is not finite or comes back.

    Args:
        guarded: the map at the context of z.
        z: latents, (N, *latent).
        at_data: the map at the context of the data.
        data: (B, *data), finite.
        limits: of round trips.
    """
    latents = at_data.forward(data)
    trip = RoundTrip(data, latents, at_data.inverse(latents))
    if not (trip.by_feature <= limits.data).double().mean().item() >= MOST:
        return ALL_REACHED
    there = guarded.forward(guarded.inverse(z))
    again = guarded.forward(guarded.inverse(there))
    projected = draw_error(there, again, limits.deviation) <= limits.draw
    projected &= draw_error(z, there, limits.deviation) > limits.draw
    nowhere = ~finite_rows(there)
    bounds = _range(at_data, data, there)
    if bounds is None:
        return Reach(cut_off=int(projected.sum()))
    low, high = bounds
    slack = SLACK * nonzero_or_one(limits.deviation)
    beyond = ((z > high + slack) | (z < low - slack)).flatten(1)
    outside = beyond.any(1)
    unreached = outside & (projected | nowhere)
    cut_off = projected & ~outside
    entry = int(beyond[unreached].sum(0).argmax()) if bool(unreached.any()) else 0
    return Reach(
        int(unreached.sum()),
        int(cut_off.sum()),
        entry,
        low.flatten()[entry].item(),
        high.flatten()[entry].item(),
    )


def _range(at_data: Guarded, data: Tensor, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """The smallest and largest value of F in every entry; None if F is not finite far away."""
    centre = data.mean(0, keepdim=True)
    seen = [latents[finite_rows(latents)]]
    for stretch in STRETCHES:
        values = at_data.forward(centre + stretch * (data - centre))
        finite = finite_rows(values)
        if stretch > 1 and not bool(finite.any()):
            # it overflows, or refuses what lies there: its range is not known
            return None
        seen.append(values[finite])
    together = torch.cat(seen).double()
    return together.amin(0), together.amax(0)
