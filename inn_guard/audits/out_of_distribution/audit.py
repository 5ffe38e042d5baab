"""out_of_distribution: where, outside of the data, the map stops being invertible and its likelihood meaningful."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import ModelError, checked_batch, polite, shares_of
from inn_guard.audits.fault_tolerant import Guarded, patience
from inn_guard.audits.out_of_distribution.input_families import PRIORS, PROBES, InputFamily, Reach
from inn_guard.audits.out_of_distribution.radius_search import Radii, smallest_failing_radius
from inn_guard.audits.round_trip import Trip, trip_from_data, trip_from_latents
from inn_guard.audits.thresholds import max_usable_error, typical
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.tensors import finite_rows, standard_normal
from inn_guard.execution.memory import forward_footprint, linearized_footprint
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.singular_values import ExtremeSingularValues, extreme_singular_values
from inn_guard.report.result import AuditResult, Verdict

__all__ = ["out_of_distribution"]

BITS = 0.1  #: per dimension that the two log-determinants may leave: what published likelihoods differ by
DIRECTIONS = 16  #: of the radius search
SPECTRUM_STEPS = 20
LN10 = math.log(10)
NAME = "out_of_distribution"
ADVICE = "Do not trust scores, samples or memory-saving gradients on such inputs; bound the scales of the layers."


@polite
def out_of_distribution(
    model: Invertible,
    x: Tensor,
    *,
    others: Mapping[str, Tensor] | None = None,
    samples: int = 32,
    spectrum_samples: int = 4,
    seed: int = 0,
) -> AuditResult:
    """Round-trip errors in units of each input's scale, non-finite shares, log-determinants and spectra off the data.

    Inputs: ``others``; noise, constants, blurred, inverted and shuffled data within the range of x; the same data with
    more contrast or scale, beyond it; the latents of x and prior latents at temperatures 0.5 to 2. A family fails if
    some round trip is off by more than ``max_usable_error`` or not finite, or if the forward and the inverse
    log-determinant leave more than 0.1 bits per dimension: then the change of variables means nothing there. The
    verdict is that of ``others``, of what lies within the data's range, and of latents no hotter than the prior, if the
    latents of x follow it; the rest is reported. Whatever the model does on an input - raise, loop, return NaN - is its
    answer.

    The radius search goes from the batch's mean along random directions, in units of the data's distance from it,
    to the first radius where an inverse or a likelihood fails.

    Args:
        model: the map. For one that is injective only, z -> x -> z is measured from the latents of each family.
        x: data, (B, *data).
        others: further inputs by name, shaped like x, with contexts of their own if the model has any left out.
        samples: of x and of each of ``others``, the first so many finite ones.
        spectrum_samples: of each family are linearised for singular values; 0 leaves them out.
        seed: of everything random.

    Returns:
        one row per family in the table ``families``; invertible_radius and likelihood_radius, inf if nothing failed
        up to the largest tried.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse,
        Jacobsen, 2021), section 4.1 and appendix D.
    """
    shares = shares_of(model)
    fits = shares.max_batch(
        lambda within: forward_footprint(model, x, within=within).plus(8 * x[0].numel())
    )
    samples, directions = int(min(samples, fits)), int(min(DIRECTIONS, fits))
    if spectrum_samples:
        fits = shares.max_batch(
            lambda within: linearized_footprint(model, x, within=within, vectors=2 * SPECTRUM_STEPS)
        )
        spectrum_samples = int(min(spectrum_samples, fits))
    rows = finite_rows(x).nonzero()[:, 0][:samples]
    if not len(rows):
        return AuditResult(
            NAME, Verdict.NON_FINITE, "no sample of x is finite: there is no data to be outside of"
        )
    probing = _Probing(
        model.select(rows), x[rows], directions, spectrum_samples=spectrum_samples, seed=seed
    )
    probing.measure("data", x[rows], Reach(within=True))
    for name, other in (others or {}).items():
        probing.measure(
            name, _checked_other(model, name, other, x)[: len(rows)], Reach(within=True)
        )
    probing.families()
    invertible, likelihood = probing.radii()
    verdict, reason = _judged(probing, invertible, likelihood)
    return AuditResult(
        NAME,
        verdict,
        reason,
        values=probing.values(invertible, likelihood),
        units={
            "max_error": "scale of input", "median_error": "scale of input", "log_det_gap": "bits per dimension",
            "invertible_radius": "radii of the data", "likelihood_radius": "radii of the data",
        },
        per_sample={"invertible_radius": invertible.fails}
        | ({} if likelihood is None else {"likelihood_radius": likelihood.fails}),
        tables={"families": tuple(probing.rows)},
        settings={
            "samples": len(rows),
            "usable": probing.usable,
            "bits_per_dimension": BITS,
            "left_out": "; ".join(probing.left_out) or "nothing",
            "directions": directions,
            "largest_radius": invertible.limit,
            "seconds_per_call": probing.guarded.seconds,
            "given_up": str(probing.guarded.outcome) or "none",
            "seed": seed,
        },
        advice=ADVICE if verdict.failed else "",
        images=probing.images,
    )  # fmt: skip


@dataclass
class _Probing:
    """Families measured so far, one row each."""

    model: Invertible
    x: Tensor
    directions: int
    spectrum_samples: int
    seed: int
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    images: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.usable = max_usable_error(self.x.dtype)
        self.guarded = Guarded(self.model, self.x, seconds=patience(self.model, self.x))
        self.has_log_det = self.model.bijective and self._answers_log_det()
        if not self.has_log_det:
            self.left_out.append("log-determinants: the model has none in both directions")

    def families(self) -> None:
        """The built-in families that mean something for this data."""
        z = self.guarded.forward(self.x)
        for name, probe in (PROBES | PRIORS).items():
            start = z if probe.reach.latent else self.x
            if not probe.fits(self.x):
                self.left_out.append(
                    f"{name}: x {tuple(self.x.shape)} holds no images of 4 x 4 pixels or more"
                )
            elif not bool(finite_rows(start).all()):
                self.left_out.append(f"{name}: the latents of the data are not finite")
            else:
                made = probe.make(start, torch.Generator().manual_seed(self.seed))
                self.measure(name, made, self._reach(probe, z))

    def measure(self, name: str, start: Tensor, reach: Reach) -> None:
        """One family: round trips, log-determinants, spectrum, and the first image."""
        trip = self._trip(start, reach)
        finite = trip.error[trip.error.isfinite()]
        row: dict[str, Any] = {
            "family": name,
            "verdict": self._verdict(trip),
            "decides": "yes" if reach.within else "no",
            "samples": len(trip.error),
            "median_error": finite.median().item() if len(finite) else math.nan,
            "max_error": trip.error.max().item(),
            "non_finite": int(trip.error.isinf().sum()),
        }
        if trip.bits is not None and trip.log_det is not None:
            row["log_det_gap"] = trip.bits.max().item()
            known = trip.log_det[trip.log_det.isfinite()]
            row["log_det"] = known.median().item() if len(known) else math.nan
        self.rows.append(row | self._spectrum(trip))
        self._show(name, trip, reach)

    def _reach(self, probe: InputFamily, z: Tensor) -> Reach:
        """The probe's, but draws from a prior that the latents of the data do not follow decide nothing."""
        if probe.from_prior and not typical(
            z, standard_normal(z, torch.Generator().manual_seed(0))
        ):
            return Reach(within=False, latent=True)
        return probe.reach

    def radii(self) -> tuple[Radii, Radii | None]:
        """Where the inverse fails, and where the change of variables does; None if there are no log-determinants."""
        centre = self.x.double().mean(0, keepdim=True)
        radius = (self.x.double() - centre).flatten(1).norm(dim=1).median().item() or 1.0
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(
            self.directions,
            *self.x.shape[1:],
            generator=generator,
            device="cpu",
            dtype=torch.float64,
        )
        length = noise.flatten(1).norm(dim=1).reshape(-1, *[1] * (noise.dim() - 1))
        directions = (radius * noise / length).to(centre)
        contexts = torch.arange(self.directions, device=self.x.device) % len(self.x)
        guarded = self.guarded.select(contexts)

        def trip(radii: Tensor) -> Trip:
            steps = radii.to(centre).reshape(-1, *[1] * (noise.dim() - 1))
            start = (centre + steps * directions).to(self.x)
            return trip_from_data(
                guarded, start, log_det=self.has_log_det, bijective=self.model.bijective
            )

        invertible = smallest_failing_radius(
            lambda radii: trip(radii).error > self.usable, self.directions
        )
        if not self.has_log_det:
            return invertible, None
        return invertible, smallest_failing_radius(
            lambda radii: _bits(trip(radii)) > BITS, self.directions
        )

    def values(self, invertible: Radii, likelihood: Radii | None) -> dict[str, float]:
        """The summary figures."""
        off = [row for row in self.rows if row["family"] != "data" and row["decides"] == "yes"]
        values = {
            "failed_families": float(sum(row["verdict"] != "passes" for row in off)),
            "max_error": max((row["max_error"] for row in off), default=math.nan),
            "data_error": self.rows[0]["max_error"],
            "invertible_radius": invertible.smallest,
        }
        if likelihood is not None:
            values["likelihood_radius"] = likelihood.smallest
            values["log_det_gap"] = max((row["log_det_gap"] for row in off), default=math.nan)
        return values

    def _trip(self, start: Tensor, reach: Reach) -> Trip:
        contexts = torch.arange(len(start), device=start.device) % len(self.x)
        guarded = self.guarded.select(contexts)
        if reach.latent:
            return trip_from_latents(guarded, start, log_det=self.has_log_det)
        return trip_from_data(
            guarded, start, log_det=self.has_log_det, bijective=self.model.bijective
        )

    def _verdict(self, trip: Trip) -> str:
        if bool(trip.error.isinf().any()):
            return "not finite"
        if bool((trip.error > self.usable).any()):
            return "not invertible"
        if trip.bits is not None and bool((trip.bits > BITS).any()):
            return "likelihood meaningless"
        return "passes"

    def _spectrum(self, trip: Trip) -> dict[str, float]:
        if self.spectrum_samples < 1 or not self.model.bijective:
            return {}
        rows = finite_rows(trip.x).nonzero()[: self.spectrum_samples, 0]
        nothing = {"log10_sigma_max": math.nan, "log10_sigma_min": math.nan}
        try:
            with time_limit(self.guarded.seconds):
                ends = self._extremes(trip.x[rows], rows % len(self.x))
        except (NotApplicable, ModelError, TimedOut):
            return nothing
        if ends is None:
            return nothing
        return {
            "log10_sigma_max": ends.log_max.max().item() / LN10,
            "log10_sigma_min": ends.log_min.min().item() / LN10,
        }

    def _extremes(self, x: Tensor, contexts: Tensor) -> ExtremeSingularValues | None:
        """sigma_max and sigma_min at those of x whose latents are finite; None if there are none."""
        with torch.no_grad():
            kept = finite_rows(self.model.select(contexts)(x)) if len(x) else contexts.bool()
        if not bool(kept.any()):
            return None
        linearization = Linearization(self.model.select(contexts[kept]), x[kept])
        generator = torch.Generator().manual_seed(self.seed)
        return extreme_singular_values(
            linearization, generator=generator, tolerance=0.1, max_steps=SPECTRUM_STEPS
        )

    def _answers_log_det(self) -> bool:
        try:
            with torch.no_grad(), time_limit(self.guarded.seconds):
                z, _ = self.model.forward_and_log_det(self.x)
                rows = finite_rows(z).nonzero()[:, 0]
                if len(rows):
                    self.model.select(rows).inverse_and_log_det(z[rows])
        except (NotApplicable, ModelError, TimedOut):
            return False
        return True

    def _show(self, name: str, trip: Trip, reach: Reach) -> None:
        """The worst input of the family beside what came back, if they are images."""
        side = trip.start
        if (
            side.dim() != 4
            or side.shape[1] not in (1, 3)
            or min(side.shape[2:]) < 2
            or not self.model.bijective
        ):
            return
        if reach.latent or not reach.within:  # one grey scale serves all of them
            return
        worst = int(trip.error.argmax())
        for key, image in (("input", trip.start), ("reconstruction", trip.end)):
            shown = image[worst : worst + 1].detach().cpu()
            self.images[key] = torch.cat([self.images[key], shown]) if key in self.images else shown


def _bits(trip: Trip) -> Tensor:
    return torch.full_like(trip.error, math.inf) if trip.bits is None else trip.bits


def _checked_other(model: Invertible, name: str, other: Tensor, x: Tensor) -> Tensor:
    other = checked_batch(model, other)
    if other.shape[1:] != x.shape[1:] or other.dtype != x.dtype:
        got, wanted = (f"{tuple(t.shape[1:])} {t.dtype}" for t in (other, x))
        raise ValueError(f"expected samples of {name!r} like those of x, {wanted}; got {got}")
    return other


def _judged(probing: _Probing, invertible: Radii, likelihood: Radii | None) -> tuple[Verdict, str]:
    own, *off = probing.rows
    failed = [row for row in off if row["verdict"] != "passes"]
    deciding = [row for row in failed if row["decides"] == "yes"]
    where = _radius_sentence(invertible, likelihood)
    if own["verdict"] != "passes":
        gave_nan = own["non_finite"] and not str(probing.guarded.outcome)
        verdict = Verdict.NON_FINITE if gave_nan else Verdict.UNSTABLE
        return verdict, f"the data themselves fail already ({own['verdict']}); {where}"
    beyond = [row["family"] for row in failed if row["decides"] == "no"]
    also = f"; beyond the data's range fail {', '.join(beyond)}" if beyond else ""
    if not deciding:
        return (
            Verdict.STABLE,
            f"the data and all {len(off) - len(failed)} other families pass{also}; {where}",
        )
    names = ", ".join(f"{row['family']} ({row['verdict']})" for row in deciding)
    verdict = Verdict.NON_FINITE if any(row["non_finite"] for row in deciding) else Verdict.UNSTABLE
    return verdict, f"the data pass, but these fail: {names}{also}; {where}"


def _radius_sentence(invertible: Radii, likelihood: Radii | None) -> str:
    def phrase(radii: Radii) -> str:
        return (
            f"up to {radii.limit:g}, all that was tried,"
            if math.isinf(radii.smallest)
            else f"to {radii.smallest:.3g}"
        )

    text = f"along random directions it is invertible {phrase(invertible)} radii of the data"
    return text if likelihood is None else f"{text}, and its likelihood holds {phrase(likelihood)}"
