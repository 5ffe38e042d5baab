"""reconstruction: does the inverse invert, and if not, is it rounding or is the inverse wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError, polite, shares_of, shares_samples
from inn_guard.audits.reconstruction.rounding import MAX_STEPS, explain
from inn_guard.audits.reconstruction.verdict import ExplainedError, Measured, Trips, judged
from inn_guard.audits.round_trip import RoundTrip, latent_trip, round_trip, unconverged
from inn_guard.audits.thresholds import FLOOR
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.tensors import finite_rows, standard_normal
from inn_guard.execution.memory import forward_footprint, linearized_footprint
from inn_guard.report.result import AuditResult, Verdict, to_full_batch

__all__ = ["reconstruction"]

EXPLAINED_SAMPLES = 8  #: the worst ones, whose condition number is measured
SHOWN = 8  #: images kept for the report, the worst ones
Prior = Callable[[Tensor, torch.Generator], Tensor]


@polite
@shares_samples
def reconstruction(
    model: Invertible,
    x: Tensor,
    *,
    prior: Prior | None = standard_normal,
    batch_size: int = 128,
    seed: int = 0,
) -> AuditResult:
    """Error of x -> z -> x and of z -> x -> z per sample, in units of the data and relative to their scale.

    Round trips are run on the data, on their latents and on latents from the prior, in the model's dtype and in a
    float64 copy. The largest entry of each sample's error, over that sample's scale (`data_scale`), is judged twice:

    * unusable: above `max_usable_error`. The inverse is of no use, whatever the reason.
    * wrong: the float64 copy is off too, by more than FLOOR and more than rounding explains (eps times the condition
      of the inverse's computation, `explain`). More precision does not help: the inverse is another map. Below FLOOR,
      such an error is the floor of an inexact inverse (bisection, fixed point), and is reported.

    A map that is injective only is judged by its latents; x -> z -> x is a projection there.

    Args:
        model: the map.
        x: data, (B, *data).
        prior: (tensor like z, generator) -> latents; None leaves them out.
        batch_size: samples per call.
        seed: of the prior latents and of the probes.

    Returns:
        max_error, l2_error, relative_error, latent_error and prior_error per sample; the floor; the verdict.
    """
    kept = finite_rows(x)
    if not bool(kept.any()):
        reason = "every sample of x contains NaN or Inf already: there is nothing to reconstruct"
        return AuditResult(
            "reconstruction", Verdict.NON_FINITE, reason, advice="Clean the data, then audit again."
        )
    chosen, chosen_x = model.select(kept.nonzero()[:, 0]), x[kept]
    batch_size = _fitting(chosen, chosen_x, batch_size)
    trips = _trips(chosen, chosen_x, prior, batch_size, seed)
    measured = Measured(
        trips, _precise(chosen, trips, batch_size), _explained(chosen, trips.main, seed), x.dtype
    )
    verdict, reason, advice = judged(measured, chosen)
    open_ended = unconverged(
        chosen.select(torch.arange(len(chosen_x[:batch_size]), device=x.device)),
        chosen_x[:batch_size],
    )
    for layer, how in open_ended.items():
        reason += f"; the inverse of {layer} did not converge: {how}"
    if not bool(kept.all()):
        reason += (
            f"; {int((~kept).sum())} samples of x contain NaN or Inf themselves and are left out"
        )
    return AuditResult(
        "reconstruction",
        verdict,
        reason,
        values=_values(measured),
        units={name: "units of x" for name in ("max_error", "l2_error")},
        **_scattered(measured, kept.cpu()),
        settings={
            "usable": measured.usable,
            "floor_limit": FLOOR,
            "batch_size": batch_size,
            "seed": seed,
            "explained_samples": 0 if measured.explained is None else len(measured.explained.rows),
            "float64": measured.precise if isinstance(measured.precise, str) else "measured",
            "prior": trips.prior
            if isinstance(trips.prior, str)
            else getattr(prior, "__name__", "none"),
        },
        advice=advice,
        images=_images(trips.data),
    )


def _fitting(model: Invertible, x: Tensor, batch_size: int) -> int:
    """``batch_size``, or what memory allows."""
    fits = shares_of(model).max_batch(lambda within: forward_footprint(model, x, within=within))
    # the float64 copy takes twice as much
    return max(1, int(min(batch_size, fits if x.dtype == torch.float64 else fits / 2)))


def _trips(model: Invertible, x: Tensor, prior: Prior | None, batch_size: int, seed: int) -> Trips:
    data = round_trip(model, x, batch_size=batch_size)
    encoded = latent_trip(model, data.middle, x=data.end, batch_size=batch_size)
    drawn: RoundTrip | str = "none"
    if prior is not None:
        try:
            z = prior(data.middle, torch.Generator().manual_seed(seed))
            drawn = latent_trip(model, z, batch_size=batch_size)
        except (ModelError, NotApplicable) as error:
            drawn = str(error)
    return Trips(data, encoded, drawn, model.bijective)


def _precise(model: Invertible, trips: Trips, batch_size: int) -> Tensor | str:
    start = trips.main.start
    if start.dtype == torch.float64:
        return trips.main.relative
    try:
        copy = model.to_dtype(torch.float64)
        trip = round_trip if trips.bijective else latent_trip
        return trip(copy, start.double(), batch_size=batch_size).relative
    except (ModelError, NotApplicable) as error:
        return str(error)


def _explained(model: Invertible, main: RoundTrip, seed: int) -> ExplainedError | None:
    """The explanation for the worst of the samples whose latents are finite."""
    if not model.bijective:
        return None
    usable = finite_rows(main.middle).cpu().nonzero()[:, 0]
    rows = usable[main.relative[usable].nan_to_num(math.inf).argsort(descending=True)]
    vectors = 2 * MAX_STEPS + len(model.layers())
    fits = shares_of(model).max_batch(
        lambda within: linearized_footprint(model, main.start, within=within, vectors=vectors)
    )
    rows = rows[: int(min(EXPLAINED_SAMPLES, fits))]
    if not len(rows):
        return None
    there = rows.to(main.start.device)
    try:
        return ExplainedError(rows, explain(model.select(there), main.start[there], seed=seed))
    except (ModelError, NotApplicable):
        return None


def _values(measured: Measured) -> dict[str, float]:
    trips = measured.trips
    values = {
        "max_error": trips.data.largest.max().item(),
        "relative_error": trips.data.relative.max().item(),
        "l2_error": trips.data.l2.max().item(),
        "latent_error": trips.encoded.relative.max().item(),
        "non_finite_samples": float((~trips.data.finite).sum()),
    }
    if not isinstance(trips.prior, str):
        values["prior_error"] = trips.prior.relative.max().item()
    if not isinstance(measured.precise, str):
        values["float64_error"] = measured.precise.max().item()
    if measured.explained is not None:
        condition = measured.explained.what.log_condition.max().item() / math.log(10)
        values["log10_condition_number"] = condition
        values["floor"] = measured.floor
        values["explained_error"] = (
            measured.rounding(measured.dtype)[measured.explained.rows].max().item()
        )
    return values


def _per_sample(measured: Measured) -> dict[str, Tensor]:
    trips = measured.trips
    named = {
        "max_error": trips.data.largest,
        "l2_error": trips.data.l2,
        "relative_error": trips.data.relative,
        "latent_error": trips.encoded.relative,
    }
    if not isinstance(trips.prior, str):
        named["prior_error"] = trips.prior.relative
    if not isinstance(measured.precise, str):
        named["float64_error"] = measured.precise
    return named


def _scattered(measured: Measured, kept: Tensor) -> dict[str, Any]:
    """Of the samples that were kept, and the explanation of the worst of these."""
    rows = kept.nonzero()[:, 0]
    parts = to_full_batch(_per_sample(measured), rows, len(kept))
    if measured.explained is None:
        return parts
    explained = {"explained_error": measured.rounding(measured.dtype)[measured.explained.rows]}
    few = to_full_batch(explained, rows[measured.explained.rows], len(kept))
    return {part: parts[part] | few[part] for part in parts}


def _images(trip: RoundTrip) -> dict[str, Tensor]:
    """The worst samples beside their reconstructions, if they look like images."""
    if trip.start.dim() != 4 or trip.start.shape[1] not in (1, 3) or min(trip.start.shape[2:]) < 2:
        return {}
    rows = trip.largest.nan_to_num(math.inf).argsort(descending=True)[:SHOWN].to(trip.start.device)
    original, returned = (t[rows].detach().cpu() for t in (trip.start, trip.end))
    return {"original": original, "reconstruction": returned, "difference": returned - original}
