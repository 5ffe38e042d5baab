"""sampling: are draws from the model's own base usable, as the rate of those that are lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inn_guard.audits.audited_model import AuditedModel, ModelError
from inn_guard.audits.context import AuditContext
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.fault_tolerant import Guarded, patience
from inn_guard.audits.level import Level
from inn_guard.audits.operation_count import count_operations
from inn_guard.audits.rates import draws_that_decide, percent, rate_interval
from inn_guard.audits.reach import ALL_REACHED, Reach, RoundTripLimits, measure_reach
from inn_guard.audits.round_trip import draw_error, first_non_finite
from inn_guard.audits.spec import audit_check
from inn_guard.audits.thresholds import feature_deviation
from inn_guard.core.missing import Missing, NotApplicable
from inn_guard.core.tensors import finite_rows, norms
from inn_guard.execution.time_limit import TimedOut, time_limit
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = [
    "BLOCK",
    "BUDGET",
    "DataRange",
    "block_of_draws",
    "context_rows",
    "guarded_model",
    "inverse_cost",
    "sampling",
]

BLOCK = 1024  #: draws of one seed, and the first number at which a verdict is tried
LOOKS = {Level.QUICK: (1024, 4096), Level.STANDARD: (1024, 4096), Level.FULL: (1024, 4096, 16384)}
#: What draws and their round trips may cost together, in forward passes of one row: an
#: autoregressive inverse costs as many as there are dimensions.
BUDGET = {Level.QUICK: 2**19, Level.STANDARD: 2**19, Level.FULL: 2**22}
LEAST_DRAWS = 256  #: however dear
PROBED = 4  #: rows from which the cost of an inverse is counted
FAR = 1e3  #: radii of the data beyond which a draw that comes back is mentioned
EXPLAINED = 64  #: lost draws that a float64 copy repeats
NEAR = 10.0  #: radii of the data within which a lost draw may be right
AGREES = 0.01  #: distance, of the data's radius or the draw's, up to which float64 agrees on a draw


def _cost(task: Task) -> Cost:
    draws = int(task.settings.get("draws") or LOOKS[Level.STANDARD][-1])
    return Cost(Passes(forward=1, inverse=1) * draws, BLOCK, vectors=4)


@audit_check(
    question="Are draws from the model's own base usable?",
    uses=("sampling",),
    level=Level.QUICK,
    cost=_cost,
    shares_samples=True,
)
def sampling(context: AuditContext, *, draws: int | None = None) -> AuditResult:
    """Rate of lost draws from the base, with its 95 % Clopper-Pearson interval.

    Latents z are drawn from the model's own base at temperature 1 (from ``prior`` if the caller
    gives one; from N(0, I) where there is neither, which is said). A draw x = F^-1(z) is lost if it
    is not finite, or if F(x) is off from z by more than ``limits.draw`` (at least what the dtype
    can hold):

        sqrt( mean_j ((F(x)_j - z_j) / deviation_j)^2 ) > 0.01

    Of draws 1,024, then 4,096, at level full then 16,384 are looked at, until the interval excludes
    the limit. Draws come in blocks of 1,024, each with a seed of its own, so that fewer draws are
    the first ones of more. Where an inverse is dear (it is counted in operations, not timed), fewer
    are made, at least 256, and the verdict may stay undecided; the reason then says how many draws
    would decide.

    Of up to 64 lost draws it is found whether a float64 copy sends them to the same place (then the
    model itself does it, and no precision helps), how far from the data they lie, in which layer
    the first one is lost, and whether they lie outside of the values that F takes at the data and
    up to 1,000 times as far away: such a map is not onto. A float64 model has no finer copy to be
    compared with.

    Args:
        context: model and data, which give the shapes and the radius of the data.
        draws: how many at most. Default: what the level and the cost of an inverse allow.

    Returns:
        rate, its bounds, counts of draws that are lost, not finite, far from the data although they
        come back, or whose two log-determinants differ by more than ``limits.density`` nats.

    Raises:
        ValueError: if ``draws`` is not positive.
    """
    if draws is not None and (isinstance(draws, bool) or int(draws) != draws or draws < 1):
        raise ValueError(f"expected a positive number of draws; got {draws!r}")
    if not len(context.finite_rows()):
        reason = "no sample of x is finite: the shape of the latents could not be measured"
        return sampling.without_answer(Verdict.UNDECIDED, reason)
    drawn = _draw(context, draws)
    lost = _explained(context, drawn)
    finding = _finding(context, drawn, lost)
    low, high = drawn.interval(context)
    return AuditResult(
        "sampling",
        finding.verdict,
        finding.reason,
        uses={"sampling": finding},
        headline=("lost_draws", "draws"),
        values={
            "rate": drawn.lost / drawn.seen,
            "rate_low": low,
            "rate_high": high,
            "draws": float(drawn.seen),
            "lost_draws": float(drawn.lost),
            "non_finite_draws": float(drawn.non_finite),
            "far_draws": float(drawn.far),
            "log_det_disagreements": float(drawn.disagreeing),
            "worst_returning_error": drawn.worst,
            **lost.values(),
        },
        units={"worst_returning_error": "of the base's deviation"},
        tables={"looks": tuple(drawn.looks)},
        settings={
            "base": context.base.description,
            "declared": context.base.declared,
            "draws": drawn.seen,
            "at_most": drawn.at_most,
            "why_at_most": drawn.why_at_most,
            "draw_limit": context.limits.returned_draw(context.x.dtype),
            "rate_limit": context.limits.sampling,
            "confidence": context.limits.confidence,
            "seed": context.seed,
            "cause": lost.cause,
            "layer": lost.layer,
            "failures": drawn.failures or "none",
        },
        advice=_ADVICE[lost.cause] if finding.verdict.failed else "",
    )


_ADVICE = {
    "": "",
    "model": (
        "Bound the scales of the layers, or fine-tune the model: ig.stabilize(flow, batches)."
    ),
    "rounding": (
        "Draw with a few layers in float64, where the lost draws were measured to come back: "
        "ig.raise_precision(flow, x)."
    ),
    "unknown": "Bound the scales of the layers.",
    "not onto": (
        "Draw from a base that lies within the range of the map (prior=...), or end the map with "
        "one onto all latents: no training at the data and no precision brings these draws back."
    ),
}


@dataclass
class _Draws:
    """What was counted so far.

    Attributes:
        seen: draws.
        lost: of these, not finite or not coming back.
        non_finite: of these, not finite.
        far: draws that come back, but lie more than FAR radii of the data away from it.
        disagreeing: draws that come back, whose log-determinants do not cancel.
        worst: largest error of a draw that comes back.
        lost_z: latents of the first lost draws, and the rows of the context that they belong to.
        looks: one row for each look.
        at_most: draws that are allowed, and why not more.
        failures: why the model gave no number for some draws.
    """

    at_most: int
    why_at_most: str
    seen: int = 0
    lost: int = 0
    non_finite: int = 0
    far: int = 0
    disagreeing: int = 0
    worst: float = 0.0
    lost_z: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)
    failures: str = ""

    def interval(self, context: AuditContext) -> tuple[float, float]:
        """Of the rate of lost draws."""
        return rate_interval(self.lost, self.seen, confidence=context.limits.confidence)

    def verdict(self, context: AuditContext) -> Verdict:
        """On the rate seen so far."""
        low, high = self.interval(context)
        limits = context.limits
        if low > limits.sampling:
            return Verdict.UNSTABLE
        if high >= limits.sampling:
            return Verdict.UNDECIDED
        # at rate 0 the upper bound is far above a tenth of the limit; only what was seen makes it
        # marginal
        return Verdict.MARGINAL if low > limits.marginal * limits.sampling else Verdict.STABLE


def _draw(context: AuditContext, draws: int | None) -> _Draws:
    drawn = _Draws(*_allowance(context, draws))
    measure = _Measure(context)
    looks = {min(look, drawn.at_most) for look in (*LOOKS[Level.FULL], drawn.at_most)}
    for look in sorted(looks):
        while drawn.seen < look:
            block, done = divmod(drawn.seen, BLOCK)
            measure.add(drawn, block, first=done, last=min(BLOCK, done + look - drawn.seen))
        low, high = drawn.interval(context)
        row = {"draws": drawn.seen, "lost": drawn.lost, "rate_low": low, "rate_high": high}
        drawn.looks.append(row)
        if drawn.verdict(context) is not Verdict.UNDECIDED:
            break
    drawn.failures = measure.failures()
    return drawn


def _allowance(context: AuditContext, draws: int | None) -> tuple[int, str]:
    """How many draws may be made, and what sets that number."""
    if draws is not None:
        return int(draws), "asked for"
    most = LOOKS[context.level][-1]
    affordable = int(BUDGET[context.level] / (1 + inverse_cost(context)))
    if affordable >= most:
        return most, f"level {context.level}"
    return max(LEAST_DRAWS, affordable), "one inverse costs as much as many forward passes"


def inverse_cost(context: AuditContext) -> float:
    """Operations of an inverse over those of a forward pass; 1 where they cannot be counted."""
    return context.once("cost of an inverse", lambda: _inverse_cost(context))


def _inverse_cost(context: AuditContext) -> float:
    rows = context.usable_rows()[:PROBED]
    if not len(rows):
        return 1.0
    model, x = context.at(rows)
    try:
        with torch.no_grad():
            z, forward = count_operations(lambda: model(x))
            _, inverse = count_operations(lambda: model.inverse(z))
    except (ModelError, NotApplicable, RuntimeError):
        return 1.0
    return inverse / max(forward, 1)


class _Measure:
    """Round trips z -> x -> z of draws, counted."""

    def __init__(self, context: AuditContext) -> None:
        self.context = context
        self.guarded = guarded_model(context)
        self.with_log_det = self._has_log_dets()
        self.data = DataRange.of(context)
        self.deviation = context.base.deviation.double()

    def add(self, drawn: _Draws, block: int, *, first: int, last: int) -> None:
        """Count the draws ``first`` to ``last`` of a block."""
        z = block_of_draws(self.context, block, shape=self.guarded.latent_shape)[first:last]
        rows = torch.arange(first, last, device=z.device)
        at_most = min(BLOCK, self.context.max_forward())
        found = self.context.parallel.map(
            rows - first, lambda part: self._round_trips(z[part], rows[part]), at_most=at_most
        )
        off, size, gap = (part.cpu() for part in found)
        limits = self.context.limits
        finite = size.isfinite()
        lost = ~(finite & (off <= limits.returned_draw(z.dtype)))
        kept = ~lost
        drawn.seen += len(z)
        drawn.lost += int(lost.sum())
        drawn.non_finite += int((~finite).sum())
        drawn.far += int((kept & (size > FAR)).sum())
        drawn.disagreeing += int((kept & ~(gap <= limits.density)).sum())
        if bool(kept.any()):
            drawn.worst = max(drawn.worst, off[kept].max().item())
        keep = lost.nonzero()[: EXPLAINED - sum(len(z) for z, _ in drawn.lost_z), 0].to(z.device)
        if len(keep):
            drawn.lost_z.append((z[keep], rows[keep]))

    def failures(self) -> str:
        """Why the model gave no number for some draws, in any process."""
        reasons = self.context.parallel.all_gather(lambda: str(self.guarded.failures))
        return "; ".join(dict.fromkeys(reason for reason in reasons if reason))

    def _round_trips(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Errors in units of the base's deviation, data radii, what log-determinants leave."""
        guarded = self.guarded.select(context_rows(self.context, rows))
        gap = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        if self.with_log_det:
            x, backward = guarded.inverse_and_log_det(z)
            again, forward = guarded.forward_and_log_det(x)
            gap = (forward + backward).abs()
        else:
            x = guarded.inverse(z)
            again = guarded.forward(x)
        return draw_error(z, again, self.deviation), self.data.distances(x), gap

    def _has_log_dets(self) -> bool:
        """Whether both directions answer with a log-determinant."""
        context = self.context
        if not context.model.bijective:
            return False
        rows = context.usable_rows()[:PROBED]
        model, x = context.at(rows)
        try:
            with torch.no_grad(), time_limit(self.guarded.seconds):
                z, _ = model.forward_and_log_det(x)
                model.inverse_and_log_det(z)
        except (ModelError, NotApplicable, TimedOut):
            return False
        return bool(len(rows))


def block_of_draws(context: AuditContext, block: int, *, shape: torch.Size) -> Tensor:
    """All latents of one block, (1024, *latent), which depend on the seed and the block only.

    Args:
        context: whose base they are drawn from.
        block: its number.
        shape: of a latent, (*latent).

    Raises:
        ValueError: if the base draws another shape.
    """
    base = context.base
    z = base.draw(BLOCK, seed=(context.seed * 1_000_003 + block) % 2**63)
    if z.shape[1:] != shape:
        raise ValueError(
            f"expected latents of shape {tuple(shape)} per draw from the {base.description}; "
            f"got {tuple(z.shape[1:])}: pass prior=lambda n: ..., which returns "
            f"latents ({', '.join(['n', *map(str, shape)])})"
        )
    return z


def guarded_model(context: AuditContext) -> Guarded:
    """The model behind a time limit, which all processes share, tried on the finite samples."""

    def made() -> Guarded:
        model, x = context.at(context.finite_rows())
        seconds = max(context.parallel.all_gather(lambda: patience(model, x)))
        return Guarded(model, x, seconds=seconds).of(context.model)

    return context.once("guarded model", made).fresh_copy()


def context_rows(context: AuditContext, rows: Tensor) -> Tensor:
    """The rows of the batch whose context these draws of a block have, repeated in turn."""
    return rows % len(context.x)


@dataclass(frozen=True)
class DataRange:
    """Where the data lie, to tell how far away a draw is.

    Attributes:
        centre: of the data, which broadcasts against x; of images 0.
        unit: of each feature of a table, its deviation; of images 1.
        radius: the largest distance of the data from the centre, in these units.
    """

    centre: Tensor
    unit: Tensor
    radius: float

    @classmethod
    def of(cls, context: AuditContext) -> DataRange:
        """Of the finite samples."""
        x = context.x[context.finite_rows()].double()
        centre, unit = x.new_zeros(()), x.new_ones(())
        if x.dim() == 2 and len(x):
            centre, unit = x.mean(0), feature_deviation(x)
        largest = norms((x - centre) / unit).max().item() if len(x) else 1.0
        return cls(centre, unit, largest or 1.0)

    def distances(self, x: Tensor) -> Tensor:
        """Of the centre, in data radii, (B,) float64; infinite where x is not finite."""
        distance = norms((x.double() - self.centre) / self.unit) / self.radius
        return torch.where(finite_rows(x), distance, torch.full_like(distance, math.inf))

    def apart(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance of x and y, in data radii, (B,) float64."""
        return norms((x.double() - y.double()) / self.unit) / self.radius


@dataclass(frozen=True)
class _Lost:
    """What lost draws are.

    Attributes:
        repeated: how many of them a float64 copy repeated.
        agreeing: of these, how many it sends to the same place, or nowhere finite.
        returning: of these, how many come back in float64.
        radii: median distance of the finite ones, in radii of the data; NaN if none is finite.
        layer: where the first one that is not finite is lost; "" if none.
        reach: which of them the map does not reach.
        cause: "model", "rounding", "not onto", "unknown", or "" where nothing was lost.
    """

    repeated: int = 0
    agreeing: int = 0
    returning: int = 0
    radii: float = math.nan
    layer: str = ""
    reach: Reach = ALL_REACHED
    cause: str = ""

    def values(self) -> dict[str, float]:
        if not self.cause:
            return {}
        return {
            "unreached": float(self.reach.unreached),
            "cut_off": float(self.reach.cut_off),
            "repeated_in_float64": float(self.repeated),
            "float64_agrees": float(self.agreeing),
            "float64_returns": float(self.returning),
            "lost_radii": self.radii,
        }

    def sentence(self) -> str:
        text = ""
        if self.cause == "not onto":
            return self.reach.sentence()
        if self.cause == "model" and 2 * self.returning >= self.repeated:
            text = (
                f"; float64 agrees on {self.agreeing} of {self.repeated}: the model sends them "
                f"there, and only float64 brings {self.returning} back"
            )
        elif self.cause == "model":
            text = (
                f"; float64 agrees on {self.agreeing} of {self.repeated}: the model is at fault, "
                "not rounding"
            )
        elif self.cause == "rounding":
            text = f"; in float64 {self.returning} of {self.repeated} come back"
        if math.isfinite(self.radii) and self.radii > NEAR:
            text += f"; their median lies {self.radii:.1g} data radii away"
        if self.layer:
            text += f"; first lost in {self.layer}"
        return text


def _explained(context: AuditContext, drawn: _Draws) -> _Lost:
    if not drawn.lost_z:
        return _Lost()
    z = torch.cat([latents for latents, _ in drawn.lost_z])
    rows = torch.cat([rows for _, rows in drawn.lost_z])
    model = context.model.select(context_rows(context, rows))
    guarded = guarded_model(context)
    x = guarded.select(context_rows(context, rows)).inverse(z)
    data = DataRange.of(context)
    distances = data.distances(x)
    finite = distances[distances.isfinite()]
    radii = finite.median().item() if len(finite) else math.nan
    layer = _layer(model, z)
    precise = _float64_copy(context, guarded.seconds)
    if isinstance(precise, Missing):
        reach = _reach(context, guarded, z, rows)
        cause = "not onto" if _explains(reach, z) else "unknown"
        return _Lost(radii=radii, layer=layer, reach=reach, cause=cause)
    reach = _reach(context, precise, z.double(), rows)
    repeated = precise.select(context_rows(context, rows))
    there = repeated.inverse(z.double())
    error = draw_error(z, repeated.forward(there), context.base.deviation.double())
    far = data.distances(there)
    same = data.apart(there, x) <= AGREES * far.clamp(min=1.0)
    nowhere = ~finite_rows(there)
    beyond = (far > FAR) & (distances > FAR)
    agreeing = int((same | nowhere | beyond).sum())
    returning = int((error <= context.limits.returned_draw(context.x.dtype)).sum())
    cause = "unknown"
    # near the data a draw that both copies agree on is right; only its way back is rounded
    near = radii <= NEAR
    if _explains(reach, z):
        cause = "not onto"
    elif 2 * agreeing >= len(z) and not (near and 2 * returning >= len(z)):
        cause = "model"
    elif 2 * returning >= len(z):
        cause = "rounding"
    return _Lost(len(z), agreeing, returning, radii, layer, reach, cause)


def _explains(reach: Reach, z: Tensor) -> bool:
    return 2 * (reach.unreached + reach.cut_off) >= len(z)


def _reach(context: AuditContext, guarded: Guarded, z: Tensor, rows: Tensor) -> Reach:
    some = context.finite_rows()[:EXPLAINED]
    limits = RoundTripLimits(
        draw=context.limits.returned_draw(context.x.dtype),
        data=context.limits.round_trip(context.x.dtype),
        deviation=context.base.deviation.double(),
    )
    at_draws = guarded.select(context_rows(context, rows))
    return measure_reach(at_draws, z, guarded.select(some), context.x[some].to(z.dtype), limits)


def _float64_copy(context: AuditContext, seconds: float) -> Guarded | Missing:
    """A float64 copy of the model at the whole batch."""
    if context.x.dtype == torch.float64:
        return Missing("the model is in float64 itself")
    some = context.finite_rows()
    try:
        copy = context.in_float64()
        # float64 takes longer: at most ten times as long on any device in use
        guarded = Guarded(copy.select(some), context.x[some].double(), seconds=10 * seconds)
    except (ModelError, NotApplicable) as error:
        return Missing(str(error))
    return guarded.of(copy)


def _layer(model: AuditedModel, z: Tensor) -> str:
    try:
        return first_non_finite(model, z, latent=True) or ""
    except (ModelError, NotApplicable):
        return ""


def _finding(context: AuditContext, drawn: _Draws, lost: _Lost) -> Finding:
    limit = context.limits.sampling
    verdict = drawn.verdict(context)
    low, high = drawn.interval(context)
    confidence = f"{100 * context.limits.confidence:g} %"
    if drawn.lost:
        are = "is" if drawn.lost == 1 else "are"
        reason = (
            f"{drawn.lost:,} of {drawn.seen:,} draws {are} lost: "
            f"{percent(low)} to {percent(high)} % ({confidence}), limit {100 * limit:g} %"
            f"{lost.sentence()}"
        )
    else:
        reason = (
            f"none of {drawn.seen:,} draws is lost: at most {percent(high)} % ({confidence}), "
            f"limit {100 * limit:g} %"
        )
    if verdict is Verdict.UNDECIDED:
        reason += _undecided(context, drawn)
    if drawn.far:
        draws = f"{drawn.far:,} draws come back but lie"
        if drawn.far == 1:
            draws = "1 draw comes back but lies"
        reason += f"; {draws} beyond {FAR:g} data radii"
    if not context.base.declared:
        reason += "; drawn from N(0, I), since the model has no base"
    return Finding(
        verdict, drawn.lost / drawn.seen, limit, "of the draws", reason, drawn.seen, drawn.seen
    )


def _undecided(context: AuditContext, drawn: _Draws) -> str:
    limits = context.limits
    needed = draws_that_decide(
        drawn.lost, drawn.seen, limits.sampling, confidence=limits.confidence
    )
    if needed is None:
        return "; more than a million draws would be needed to decide"
    return f"; about {needed:,} draws would decide: sampling(draws={needed})"
