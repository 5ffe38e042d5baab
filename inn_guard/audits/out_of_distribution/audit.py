"""out_of_distribution: where, outside of the data, inverse and likelihood stop being right."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.batch import checked_batch
from inn_guard.audits.context import AuditContext, same_up_to_rounding
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.fault_tolerant import Guarded, patience
from inn_guard.audits.level import Level
from inn_guard.audits.out_of_distribution.input_families import (
    BASE_FAMILIES,
    DATA_FAMILIES,
    LATENT_FAMILIES,
    InputFamily,
    Scope,
)
from inn_guard.audits.out_of_distribution.radius_search import (
    BISECTIONS,
    LARGEST,
    SMALLEST,
    Radii,
    smallest_failing_radii,
)
from inn_guard.audits.round_trip import (
    GuardedRoundTrip,
    guarded_from_data,
    guarded_from_latents,
)
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import data_scale, feature_deviation, table_unit
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.core.tensors import finite_rows, norms, per_sample
from inn_guard.execution.memory import forward_footprint
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.singular_values import extreme_singular_values
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["out_of_distribution"]

#: Per dimension that the two log-determinants may leave: what published likelihoods differ by.
BITS = 0.1
DIRECTIONS = 16  #: of the radius search
SPECTRUM_SAMPLES = 4  #: of each family that are linearized at level full
SPECTRUM_STEPS = 20
#: What a sample may differ by in other company, in eps of the largest entry: the order of sums.
SAME = 100.0
LN10 = math.log(10)
NAME = "out_of_distribution"
ADVICE = (
    "Do not use log p(x) or memory-saving gradients on such inputs, or bound the scales of the "
    "layers."
)


def _cost(task: Task) -> Cost:
    families = 1 + len(DATA_FAMILIES) + len(LATENT_FAMILIES) + len(BASE_FAMILIES)
    searched = 2 * (LARGEST - SMALLEST + 1 + BISECTIONS) * DIRECTIONS
    round_trip = Passes(forward=1, inverse=1)
    passes = round_trip * (families * task.chosen + searched + 3 * task.chosen)
    if task.level is Level.FULL:
        extremes = Passes(linearize=1, product=4 * task.steps(SPECTRUM_STEPS))
        passes = passes + extremes * (families * min(task.chosen, SPECTRUM_SAMPLES))
    return Cost(passes, max(task.chosen, DIRECTIONS), vectors=4)


@audit_check(
    question="Does the inverse work outside of the data?",
    uses=("other_inputs",),
    level=Level.STANDARD,
    cost=_cost,
)
def out_of_distribution(
    context: AuditContext, *, others: Mapping[str, Tensor] | None = None, samples: int = 32
) -> AuditResult:
    """Round-trip errors, shares that are not finite, log-determinants and spectra off the data.

    Inputs: ``others``; noise, constants, blurred, inverted and shuffled data within the range of x;
    the same data with more contrast or scale, beyond it; the latents of x, and hot draws from the
    base. Of a table (B, features) every feature has its own range and unit. A family fails if some
    round trip is off by more than ``limits.reconstruction`` of the input's root mean square (of a
    table: of the feature's deviation or the entry's size), or not finite, or if the forward and the
    inverse log-determinant leave more than 0.1 bits per dimension: then the change of variables
    means nothing there. The verdict is that of ``others``, of what lies within the data's range,
    and of the latents of x; the rest is reported. Draws from the base itself are measured by
    ``sampling``. A call that does not return, or returns NaN, counts as a failure. Inputs outside
    of the audit's ``domain`` are left out. So are those for which the model's forward raises: it
    says itself that it does not take them.

    The radius search goes from the batch's mean along random directions, in units of the data's
    distance from it, to the first radius where an inverse or a likelihood fails.

    Args:
        context: model and data. For a map that is injective only, z -> x -> z is measured from the
            latents of each family.
        others: further inputs by name, shaped like x, with contexts of their own if the model has
            any left out.
        samples: of x and of each of ``others``, how many finite ones, the first ones.

    Returns:
        one row per family in the table ``families``; at level full with the extreme singular values
        of 4 samples; invertible_radius and likelihood_radius, inf if nothing failed up to the
        largest tried.

    References:
        Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann,
        Vicol, Wang, Grosse, Jacobsen, 2021), section 4.1 and appendix D.
    """
    size = 8 * context.x[0].numel()
    model, x = context.model, context.x
    fits = context.max_batch(lambda within: forward_footprint(model, x, within=within).plus(size))
    rows = context.finite_rows()[: int(min(samples, fits))]
    if not len(rows):
        reason = "no sample of x is finite: there is no data to be outside of"
        return out_of_distribution.without_answer(Verdict.NON_FINITE, reason)
    spectrum_samples = 0
    if context.level is Level.FULL:
        spectrum_samples = int(min(SPECTRUM_SAMPLES, context.max_linearized(2 * SPECTRUM_STEPS)))
    measured = _Families(context, rows, fits, spectrum_samples)
    measured.measure("data", x[rows], Scope(in_range=True))
    for name, other in (others or {}).items():
        batch = _checked_other(model, name, other, x)[: len(rows)]
        measured.measure(name, batch, Scope(in_range=True))
    measured.measure_built_in()
    measured.measure_spectra()
    invertible, likelihood = measured.radii()
    finding = _finding(measured, invertible, likelihood)
    radii = {"invertible_radius": invertible.fails}
    if likelihood is not None:
        radii["likelihood_radius"] = likelihood.fails
    return AuditResult(
        NAME,
        finding.verdict,
        finding.reason,
        uses={"other_inputs": finding},
        headline=("failed_families", "invertible_radius"),
        values=measured.values(invertible, likelihood),
        units={
            "max_error": measured.unit,
            "median_error": measured.unit,
            "log_det_gap": "bits per dimension",
            "invertible_radius": "radii of the data",
            "likelihood_radius": "radii of the data",
        },
        per_sample=radii,
        tables={"families": tuple(measured.rows)},
        settings={
            "samples": len(rows),
            "of": len(x),
            "limit": measured.limit,
            "bits_per_dimension": BITS,
            "left_out": "; ".join(measured.left_out) or "nothing",
            "directions": measured.directions,
            "largest_radius": invertible.limit,
            "failures": str(measured.guarded.failures) or "none",
            "seed": context.seed,
        },
        advice=ADVICE if finding.verdict.failed else "",
        images=measured.images,
    )


@dataclass(frozen=True)
class _Made:
    """Inputs of one family.

    Attributes:
        name: of it.
        start: data or latents, (n, *).
        scope: where they lie.
        contexts: the rows of the data whose context they have, (n,).
        unit: what their errors are divided by, which broadcasts against ``start``.
    """

    name: str
    start: Tensor
    scope: Scope
    contexts: Tensor
    unit: Tensor

    @classmethod
    def joined(cls, parts: Sequence[_Made]) -> _Made:
        """All in one batch, each in its own unit."""
        return cls(
            "",
            torch.cat([part.start for part in parts]),
            parts[0].scope,
            torch.cat([part.contexts for part in parts]),
            torch.cat([part.unit.expand_as(part.start) for part in parts]),
        )


class _NoiseOfParts:
    """Noise for several groups of samples, each as if it were drawn alone with the same seed."""

    def __init__(self, seed: int, counts: Sequence[int]) -> None:
        self._parts = [(torch.Generator().manual_seed(seed), count) for count in counts]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Numbers of shape (sum of the counts, ...), float64, on the CPU."""
        drawn = [
            torch.randn((count, *shape[1:]), generator=one, device="cpu", dtype=torch.float64)
            for one, count in self._parts
        ]
        return torch.cat(drawn)


class _Families:
    """Families measured so far, one row each.

    Args:
        context: of the audit.
        rows: of the data.
        at_once: how many samples memory allows.
        spectrum_samples: of each family that are linearized.
    """

    def __init__(
        self, context: AuditContext, rows: Tensor, at_once: float, spectrum_samples: int
    ) -> None:
        self.model, self.x = context.at(rows)
        self.base, self.domain = context.base, context.domain
        self.seed = context.seed
        self.limit = context.limits.round_trip(self.x.dtype)
        self.allowed_share = context.limits.other_inputs
        self.of = len(context.x)
        self.at_once = at_once
        self.directions = int(min(DIRECTIONS, at_once))
        self.spectrum_samples = spectrum_samples
        self.rows: list[Mapping[str, Any]] = []
        self._trips: list[tuple[GuardedRoundTrip, Tensor]] = []
        self.left_out: list[str] = []
        self.images: dict[str, Tensor] = {}
        self.guarded = Guarded(self.model, self.x, seconds=patience(self.model, self.x))
        self.has_log_det = self.model.bijective and self._answers_log_det()
        if not self.has_log_det:
            self.left_out.append("log-determinants: the model has none in both directions")

    @property
    def unit(self) -> str:
        """What errors are relative to, in words."""
        if self.x.dim() == 2:
            return "of the feature's deviation or size"
        return "of the input's root mean square"

    def measure_built_in(self) -> None:
        """The families that mean something for this data."""
        z = self.guarded.forward(self.x)
        made: list[_Made] = []
        for name, family in DATA_FAMILIES.items():
            if family.fits(self.x):
                made.append(self._made(name, family, self.x))
            else:
                shape = tuple(self.x.shape)
                self.left_out.append(f"{name}: x {shape} holds no images of 4 x 4 pixels or more")
        for name, family in LATENT_FAMILIES.items():
            if bool(finite_rows(z).all()):
                made.append(self._made(name, family, z))
            else:
                self.left_out.append(f"{name}: the latents of the data are not finite")
        try:
            draws = self.base.draw(len(self.x), seed=self.seed)
            made += [self._made(name, family, draws) for name, family in BASE_FAMILIES.items()]
        except NotApplicable as error:
            self.left_out.append(f"hot draws: {error}")
        of_data = [family for family in made if not family.scope.latent]
        trips = self._together(of_data) | self._together(made[len(of_data) :])
        for one in made:
            if one.name in trips:
                self._add(one, trips[one.name])
            else:
                self._alone(one)

    def _made(self, name: str, family: InputFamily, start: Tensor) -> _Made:
        inputs = family.make(start, torch.Generator().manual_seed(self.seed))
        return self._named(name, inputs, family.scope)

    def _named(self, name: str, start: Tensor, scope: Scope) -> _Made:
        contexts = torch.arange(len(start), device=start.device) % len(self.x)
        return _Made(name, start, scope, contexts, self._unit(start, scope))

    def _unit(self, start: Tensor, scope: Scope) -> Tensor:
        unit = None if scope.latent else table_unit(self.x, start)
        return per_sample(data_scale(start), start) if unit is None else unit

    def _together(self, made: Sequence[_Made]) -> dict[str, GuardedRoundTrip]:
        """Round trips of all families in one batch; {} where a sample is lost in company.

        That is, where the model raises, hangs, or lets samples depend on each other.
        """
        rows = sum(len(family.start) for family in made)
        if not made or rows > self.at_once or self.domain is not None or not self.independent:
            return {}
        trial = self.guarded.fresh_copy()
        trip = self._round_trip(_Made.joined(made), trial)
        if trial.failures.counts:
            return {}
        sizes = [len(family.start) for family in made]
        parts = zip(made, trip.split(sizes), strict=True)
        return {family.name: part for family, part in parts}

    def _alone(self, made: _Made) -> None:
        """One family, of which only inputs count where there can be data."""
        if not made.scope.latent:
            kept = self._accepted(made.name, made.start, made.contexts)
            if not bool(kept.any()):
                return
            contexts = made.contexts[kept]
            made = replace(self._named(made.name, made.start[kept], made.scope), contexts=contexts)
        self._add(made, self._round_trip(made, self.guarded))

    def measure(self, name: str, start: Tensor, scope: Scope) -> None:
        """One family of the caller's."""
        made = self._named(name, start, scope)
        self._add(made, self._round_trip(made, self.guarded))

    def _add(self, made: _Made, trip: GuardedRoundTrip) -> None:
        """A row: round trips, log-determinants, spectrum, and the first image."""
        finite = trip.error[trip.error.isfinite()]
        row: dict[str, Any] = {
            "family": made.name,
            "verdict": self._verdict(trip),
            "decides": "yes" if made.scope.in_range else "no",
            "samples": len(trip.error),
            "median_error": finite.median().item() if len(finite) else math.nan,
            "max_error": trip.error.max().item(),
            "non_finite": int(trip.error.isinf().sum()),
        }
        if trip.bits is not None and trip.log_det is not None:
            row["log_det_gap"] = trip.bits.max().item()
            known = trip.log_det[trip.log_det.isfinite()]
            row["log_det"] = known.median().item() if len(known) else math.nan
        self.rows.append(row)
        self._trips.append((trip, made.contexts))
        self._show(trip, made.scope)

    def radii(self) -> tuple[Radii, Radii | None]:
        """Where the inverse fails, and where log p does; None without log-determinants."""
        centre = self.x.double().mean(0, keepdim=True)
        feature = torch.ones_like(centre)
        if self.x.dim() == 2:
            feature = feature_deviation(self.x)[None]
        radius = norms((self.x.double() - centre) / feature).median().item() or 1.0
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.directions, *self.x.shape[1:])
        noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
        directions = feature * (radius * noise / per_sample(norms(noise), noise)).to(centre)

        def at(radii: Tensor) -> _Made:
            """Inputs at these radii, (directions,)."""
            start = (centre + per_sample(radii.double(), directions) * directions).to(self.x)
            return self._named("", start, Scope(in_range=False))

        def fails(radii: Tensor) -> Tensor:
            """For the inverse and for log p, which directions fail there, (2, P, directions)."""
            made = _Made.joined([at(one) for one in radii])
            trip = self._round_trip(made, self.guarded)
            found = torch.stack([trip.error > self.limit, _bits(trip) > BITS])
            if not self.has_log_det:
                found = found[:1]
            rows = found.any(0).nonzero()[:, 0]
            if len(rows):
                # where there are no data the model need not hold
                there = rows.to(made.start.device)
                left = self._left(made.start[there], made.contexts[there]).cpu()
                found[:, rows] &= ~left
            return found.reshape(-1, *radii.shape)

        at_once = 1
        if self.independent:
            most = LARGEST - SMALLEST + 1
            at_once = max(1, int(min(self.at_once / self.directions, most)))
        found = smallest_failing_radii(fails, self.directions, at_once=at_once)
        return found[0], found[1] if self.has_log_det else None

    @functools.cached_property
    def independent(self) -> bool:
        """Whether samples are mapped as they are alone, in company of any others, and return.

        An adaptive solver takes the same steps for a whole batch; a call that hangs or raises takes
        the others with it.
        """
        if not self.model.bijective:
            return False
        alone, trial = self.x[:1], self.guarded.fresh_copy()
        far = self.x + 2.0**LARGEST * (self.x - self.x.mean(0)) + 1
        beyond = Scope(in_range=False)
        parts = [self._named("", start, beyond) for start in (alone, far)]
        with_others = self._round_trip(_Made.joined(parts), trial)
        own = self._round_trip(parts[0], trial)
        if trial.failures.counts:
            return False
        eps = torch.finfo(self.x.dtype).eps
        return same_up_to_rounding(own.end, with_others.end[:1], SAME * eps)

    def values(self, invertible: Radii, likelihood: Radii | None) -> dict[str, float]:
        """The summary figures."""
        off = self.deciding()
        values = {
            "failed_families": float(len(_failing(off))),
            "max_error": max((row["max_error"] for row in off), default=math.nan),
            "data_error": self.rows[0]["max_error"],
            "invertible_radius": invertible.smallest,
        }
        if likelihood is not None:
            values["likelihood_radius"] = likelihood.smallest
            values["log_det_gap"] = max((row["log_det_gap"] for row in off), default=math.nan)
        return values

    def deciding(self) -> list[Mapping[str, Any]]:
        """The rows of the families that decide, apart from the data themselves."""
        return [row for row in self.rows[1:] if row["decides"] == "yes"]

    def _left(self, start: Tensor, contexts: Tensor) -> Tensor:
        """Samples outside of the domain, or that the model refuses, (B,) bool."""
        if self.domain is not None:
            return ~self.domain(start)
        return self.guarded.select(contexts).refuses(start)

    def _accepted(self, name: str, start: Tensor, contexts: Tensor) -> Tensor:
        """The samples of a family that lie where there can be data, (B,) bool."""
        left = self._left(start, contexts)
        if bool(left.any()):
            why = "the model refuses" if self.domain is None else "outside of the domain are"
            self.left_out.append(f"{name}: {why} {int(left.sum())} of {len(start)} samples")
        return ~left

    def _round_trip(self, made: _Made, guarded: Guarded) -> GuardedRoundTrip:
        guarded = guarded.select(made.contexts)
        if made.scope.latent:
            return guarded_from_latents(
                guarded, made.start, log_det=self.has_log_det, unit=made.unit
            )
        return guarded_from_data(
            guarded,
            made.start,
            log_det=self.has_log_det,
            bijective=self.model.bijective,
            unit=made.unit,
        )

    def _verdict(self, trip: GuardedRoundTrip) -> str:
        if bool(trip.error.isinf().any()):
            return "not finite"
        if bool((trip.error > self.limit).any()):
            return "not invertible"
        if trip.bits is not None and bool((trip.bits > BITS).any()):
            return "likelihood meaningless"
        return "passes"

    def measure_spectra(self) -> None:
        """Add the extreme singular values at a few samples of every family to its row."""
        if self.spectrum_samples < 1 or not self.model.bijective:
            return
        points = []
        for trip, contexts in self._trips:
            rows = finite_rows(trip.x).nonzero()[: self.spectrum_samples, 0]
            points.append((trip.x[rows], contexts[rows]))
        found = self._spectra(points) or [(self._spectra([point]) or [None])[0] for point in points]
        for k, ends in enumerate(found):
            named = {"log10_sigma_max": math.nan, "log10_sigma_min": math.nan}
            if ends is not None:
                named["log10_sigma_max"] = ends[0].max().item() / LN10
                named["log10_sigma_min"] = ends[1].min().item() / LN10
            self.rows[k] = {**self.rows[k], **named}

    def _spectra(
        self, points: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor] | None] | None:
        """ln sigma_max and ln sigma_min of each family at those of x whose latents are finite.

        None for a family without any; None at all where they cannot be measured together.
        """
        x = torch.cat([rows for rows, _ in points])
        contexts = torch.cat([rows for _, rows in points])
        sizes = [len(rows) for rows, _ in points]
        if not len(x):
            return [None for _ in sizes]
        if len(points) > 1 and (len(x) > self.at_once or not self.independent):
            return None
        try:
            with time_limit(self.guarded.seconds):
                with torch.no_grad():
                    kept = finite_rows(self.model.select(contexts)(x))
                counts = [int(part.sum()) for part in kept.split(sizes)]
                if not any(counts):
                    return [None for _ in counts]
                linearization = Linearization(self.model.select(contexts[kept]), x[kept])
                ends = extreme_singular_values(
                    linearization,
                    generator=_NoiseOfParts(self.seed, counts),
                    tolerance=0.1,
                    max_steps=SPECTRUM_STEPS,
                )
        except (NotApplicable, ModelError, TimedOut):
            return None
        parts = zip(ends.log_max.split(counts), ends.log_min.split(counts), strict=True)
        return [part if len(part[0]) else None for part in parts]

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

    def _show(self, trip: GuardedRoundTrip, scope: Scope) -> None:
        """Keep the worst input with what came back, if they are images of the data's grey scale."""
        side = trip.start
        images = side.dim() == 4 and side.shape[1] in (1, 3) and min(side.shape[2:]) >= 2
        if not images or not self.model.bijective or scope.latent or not scope.in_range:
            return
        worst = int(trip.error.argmax())
        for key, image in (("input", trip.start), ("reconstruction", trip.end)):
            shown = image[worst : worst + 1].detach().cpu()
            self.images[key] = torch.cat([self.images[key], shown]) if key in self.images else shown


def _bits(trip: GuardedRoundTrip) -> Tensor:
    return torch.full_like(trip.error, math.inf) if trip.bits is None else trip.bits


def _failing(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["verdict"] != "passes"]


def _checked_other(model: AuditedModel, name: str, other: Tensor, x: Tensor) -> Tensor:
    other = checked_batch(model, other)
    if other.shape[1:] != x.shape[1:] or other.dtype != x.dtype:
        got, wanted = (f"{tuple(t.shape[1:])} {t.dtype}" for t in (other, x))
        raise ValueError(f"expected samples of {name!r} like those of x, {wanted}; got {got}")
    return other


def _finding(measured: _Families, invertible: Radii, likelihood: Radii | None) -> Finding:
    own = measured.rows[0]
    deciding = measured.deciding()
    failing = _failing(deciding)
    share = len(failing) / max(len(deciding), 1)
    where = _radius_sentence(invertible, likelihood)
    beyond = [row["family"] for row in _failing(measured.rows[1:]) if row["decides"] == "no"]
    also = f"; beyond the data's range these fail: {'; '.join(beyond)}" if beyond else ""
    if own["verdict"] != "passes":
        gave_nan = own["non_finite"] and not str(measured.guarded.failures)
        verdict = Verdict.NON_FINITE if gave_nan else Verdict.UNSTABLE
        reason = f"the data themselves fail already ({own['verdict']}); {where}"
        share = 1.0
    elif share <= measured.allowed_share:
        verdict = Verdict.STABLE
        reason = f"all {len(deciding)} families of other inputs pass{also}; {where}"
        if failing:
            reason = f"{len(failing)} of {len(deciding)} families fail{also}; {where}"
    else:
        gave_nan = any(row["non_finite"] for row in failing)
        verdict = Verdict.NON_FINITE if gave_nan else Verdict.UNSTABLE
        names = "; ".join(f"{row['family']} ({row['verdict']})" for row in failing)
        reason = f"{len(failing)} of {len(deciding)} families fail: {names}{also}; {where}"
    unit = "of the families fail"
    samples = own["samples"]
    return Finding(verdict, share, measured.allowed_share, unit, reason, samples, measured.of)


def _radius_sentence(invertible: Radii, likelihood: Radii | None) -> str:
    text = f"along random directions {_phrase('the inverse', invertible)}"
    return text if likelihood is None else f"{text}, {_phrase('log p(x)', likelihood)}"


def _phrase(what: str, radii: Radii) -> str:
    if math.isinf(radii.smallest):
        return f"{what} holds to {radii.limit:g} data radii, the largest tried"
    return f"{what} holds to {radii.smallest:.3g} data radii"
