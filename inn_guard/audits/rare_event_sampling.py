"""rare_event_sampling: a rate of lost draws far below what plain draws can see, as an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.audits.context import AuditContext, same_up_to_rounding
from inn_guard.audits.cost_model import Cost, Passes, Task
from inn_guard.audits.level import Level
from inn_guard.audits.round_trip import draw_error
from inn_guard.audits.sampling import (
    BLOCK,
    BUDGET,
    block_of_draws,
    context_rows,
    guarded_model,
    inverse_cost,
)
from inn_guard.audits.spec import audit_check
from inn_guard.core.context import context_length
from inn_guard.core.missing import NotApplicable
from inn_guard.core.tensors import finite_rows, nonzero_or_one, peak, standard_normal
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict

__all__ = [
    "RareEvent",
    "Splitting",
    "Tempering",
    "rare_event_sampling",
    "subset_simulation",
    "tempered_rate",
]

LEAST_PARTICLES = 20
KEPT = 0.1  #: share of the particles that survive a level
ACCEPTANCE = 0.3  #: to which the length of moves is adapted
FIRST_STEP = 0.6
TEMPERED_DIMENSIONS = 10  #: beyond which weights of tempered draws degenerate, silently
TEMPERATURE = 1.6
WEIGHT_TOLERANCE = 0.1  #: how far the mean weight of tempered draws may be from 1
LEAST_EFFECTIVE = 5.0  #: lost draws, counted by (sum w)^2 / sum w^2, that a tempered rate needs
TRIAL = 0.25  #: of the tempered draws, after which it is seen whether more are worth while
DISAGREEMENT = 3.0  #: factor between two estimates that is mentioned
SHOWN = 10  #: lost draws that the number of plain draws in the reason would show
COMPARED = 4  #: draws at which the layers' inverse is compared with the model's
PILOT = 4096  #: draws that locate the base
PILOT_SEED = 0
MOVES_SEED = 2**40
GAUSSIAN = 0.01  #: nats within which the density of the base is that of a Gaussian
LARGEST = 1e300  #: stands for a state that overflows although the draw comes back


def _cost(task: Task) -> Cost:
    settings = task.settings
    particles = int(settings["particles"])
    each = particles * (1 + int(settings["moves"]) * int(settings["levels"]))
    round_trips = each * int(settings["repeats"])
    if task.dimension <= TEMPERED_DIMENSIONS:
        round_trips *= 2
    return Cost(Passes(forward=1, inverse=1) * round_trips, particles, vectors=16)


@audit_check(
    question="How rare are lost draws that plain draws cannot see?",
    level=Level.FULL,
    cost=_cost,
    shares_samples=True,
)
def rare_event_sampling(
    context: AuditContext,
    *,
    particles: int = 1000,
    moves: int = 5,
    levels: int = 8,
    repeats: int = 2,
) -> AuditResult:
    """Rate of lost draws by subset simulation, down to 1e-8; an estimate, with its standard error.

    A draw is lost as in the check ``sampling``. Its score is

        S(z) = log10 of the largest entry of any state of F^-1(z), infinite where z is lost,

    over the states between the layers, or over z and F^-1(z) where the model is opaque. Level by
    level, the best tenth of the particles survives and is moved within {S >= line}:

        z' = m + sqrt(1 - b^2) (z - m) + b s xi,    xi ~ N(0, I),

    with mean m and deviation s of the base and b such that 30 % of the moves are accepted. These
    moves keep N(m, s^2). If the base is not known to be Gaussian, z' = z + b s xi is accepted with
    probability min(1, p(z') / p(z)) instead, p its density, after Metropolis. That mixes more
    slowly: at a rate of 1e-5, single runs spread by 70 % instead of 25 %. The rate is the product
    of the levels' shares.

    In up to 10 dimensions importance sampling from N(m, (1.6 s)^2) is a second opinion. It is given
    if the mean weight is within 10 % of 1 and the effective number of lost draws is at least 5.

    An estimate has no interval that holds for every map: a score that does not rise towards the
    lost draws hides them. So this check decides no use and is never stable. It is unstable if the
    estimate minus its standard error exceeds ``limits.sampling``, else undecided.

    Args:
        context: model and data, which give the shapes.
        particles: of each level.
        moves: of each particle in a level.
        levels: at most; each one divides the rate by about 10. Fewer are made where an inverse
            costs as much as many forward passes.
        repeats: independent runs, of which the mean is taken. A part of the lost draws that only
            some runs find shows in their spread, not in the standard error of each run.

    Returns:
        rate, its standard error, the second opinion, round trips made; a row for each level.

    Raises:
        NotApplicable: if the base is declared without a density, or differs with the context.
        ValueError: if a setting is not positive, or there are fewer than 20 particles.

    References:
        S.-K. Au, J. L. Beck: Estimation of small failure probabilities in high dimensions by subset
        simulation. Probabilistic Engineering Mechanics 16, 2001.

        S. L. Cotter, G. O. Roberts, A. M. Stuart, D. White: MCMC methods for functions: modifying
        old algorithms to make them faster. Statistical Science 28, 2013.
    """
    for name, value in (("moves", moves), ("levels", levels), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1; got {value!r}")
    if particles < LEAST_PARTICLES:
        raise ValueError(f"expected particles of at least {LEAST_PARTICLES}; got {particles!r}")
    if not len(context.finite_rows()):
        reason = "no sample of x is finite: the shape of the latents could not be measured"
        return rare_event_sampling.without_answer(Verdict.UNDECIDED, reason)
    draws = _Draws(context)
    allowed = _affordable_levels(context, repeats * particles, moves, levels)
    rows = torch.arange(particles)
    # not the seed of the draws: the first moves would repeat their numbers
    generator = torch.Generator().manual_seed((context.seed + MOVES_SEED) % 2**63)
    event = RareEvent(draws.score, draws.log_density)
    runs = []
    for run in range(repeats):
        start = draws.first(particles, run=run)
        runs.append(
            subset_simulation(event, start, rows, generator=generator, moves=moves, levels=allowed)
        )
    splitting = _mean_of_runs(runs)
    tempering = None
    # where plain draws see losses, a second opinion tells nothing
    if draws.dimension <= TEMPERED_DIMENSIONS and splitting.levels:
        blocks = splitting.evaluations // particles
        tempering = tempered_rate(event, start, rows, generator=generator, blocks=blocks)
    return _result(context, draws, splitting, tempering)


@dataclass(frozen=True)
class RareEvent:
    """That the score is infinite, for latents u of a base.

    Attributes:
        score: (latents (n, *latent) in units of the reference N(0, I), rows of the context (n,)) ->
            (n,), infinite where the event happens.
        log_density: latents -> ln of the base's density in these units, (n,). Default: the base is
            the reference.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    log_density: Callable[[Tensor], Tensor] | None = None

    def proposal(self, z: Tensor, *, step: float, generator: torch.Generator) -> Tensor:
        """Where each latent may go next, (n, *latent)."""
        noise = step * standard_normal(z, generator)
        if self.log_density is not None:
            return z + noise  # pulled towards the mean, a heavy tail would freeze
        return math.sqrt(1 - step**2) * z + noise

    def accepted(self, z: Tensor, trial: Tensor, generator: torch.Generator) -> Tensor:
        """Whether each move keeps the base's distribution, (n,)."""
        if self.log_density is None:
            return torch.ones_like(z.flatten(1)[:, 0], dtype=torch.bool)
        uniform = torch.rand(len(z), generator=generator, dtype=torch.float64).to(z)
        return uniform.log() < self.log_density(trial) - self.log_density(z)

    def first_step(self, dimension: int) -> float:
        """From which the length of moves is adapted."""
        if self.log_density is None:
            return FIRST_STEP
        return min(FIRST_STEP, 2.4 / math.sqrt(dimension))  # of a random walk on a Gaussian


@dataclass(frozen=True)
class Splitting:
    """What a subset simulation found.

    Attributes:
        rate: of lost draws; 0 if it found none.
        error: standard error of the rate, by the delta method.
        reached: the rate of the last level, below which nothing was seen.
        evaluations: of the score.
        levels: a row for each level that was passed.
    """

    rate: float
    error: float
    reached: float
    evaluations: int
    levels: tuple[Mapping[str, float | int], ...]


def subset_simulation(
    event: RareEvent,
    start: Tensor,
    rows: Tensor,
    *,
    generator: torch.Generator,
    moves: int = 5,
    levels: int = 8,
) -> Splitting:
    """The probability that the score is infinite, as a product of conditional probabilities.

    The squared relative error is the sum over the levels of those of their shares (Au and Beck
    2001, eq. 28). Descendants of one survivor are correlated. They are therefore counted as one
    cluster: var = sum over clusters of (sum of indicator - share)^2 / n^2.

    Args:
        event: whose probability it is.
        start: independent draws of the base in units of the reference N(0, I), (n, *latent),
            float64.
        rows: of the context that they belong to, (n,).
        generator: on the CPU.
        moves: of each particle in a level.
        levels: at most.
    """
    z = start
    values = event.score(z, rows)
    count = len(z)
    clusters = torch.arange(count)
    step = event.first_step(z[0].numel())
    evaluations, reached, squared = count, 1.0, 0.0
    passed: list[Mapping[str, float | int]] = []
    while True:
        lost = values == math.inf
        share = lost.double().mean().item()
        line = values.topk(max(2, int(KEPT * count))).values[-1].item()
        kept = values >= line
        is_flat = bool(kept.all())
        if share >= KEPT or is_flat or len(passed) == levels:
            break
        kept_share = kept.double().mean().item()
        squared += _relative_variance(kept, clusters)
        reached *= kept_share
        survivors = kept.nonzero()[:, 0]
        clusters = torch.arange(count) % len(survivors)
        chosen = survivors[clusters.to(survivors.device)]
        z, values, rows = z[chosen], values[chosen], rows[chosen.to(rows.device)]
        accepted = 0.0
        for _ in range(moves):
            trial = event.proposal(z, step=step, generator=generator)
            trial_values = event.score(trial, rows)
            yes = (trial_values >= line) & event.accepted(z, trial, generator)
            z = torch.where(yes.reshape(-1, *[1] * (z.dim() - 1)), trial, z)
            values = torch.where(yes, trial_values, values)
            rate = yes.double().mean().item()
            step = min(0.99, max(0.02, step * math.exp(0.3 * (rate - ACCEPTANCE))))
            accepted += rate / moves
        evaluations += moves * count
        passed.append(
            {
                "level": len(passed) + 1,
                "log10_peak": line,
                "share": kept_share,
                "rate": reached,
                "accepted": accepted,
                "step": step,
            }
        )
    if not share:
        return Splitting(0.0, 0.0, reached, evaluations, tuple(passed))
    rate = reached * share
    squared += _relative_variance(lost, clusters)
    return Splitting(rate, rate * math.sqrt(squared), reached, evaluations, tuple(passed))


def _mean_of_runs(runs: Sequence[Splitting]) -> Splitting:
    """Of independent runs; the larger of the two standard errors that they give."""
    rates = torch.tensor([run.rate for run in runs], dtype=torch.float64)
    errors = torch.tensor([run.error for run in runs], dtype=torch.float64)
    error = errors.norm().item() / len(runs)
    if len(runs) > 1:
        error = max(error, rates.std().item() / math.sqrt(len(runs)))
    levels: list[Mapping[str, float | int]] = []
    for number, run in enumerate(runs, 1):
        levels += [{"run": number, **level} for level in run.levels]
    reached = min(run.reached for run in runs)
    evaluations = sum(run.evaluations for run in runs)
    return Splitting(rates.mean().item(), error, reached, evaluations, tuple(levels))


def _relative_variance(inside: Tensor, clusters: Tensor) -> float:
    """Of the share of particles that are inside, those of one cluster being dependent."""
    indicator = inside.double().cpu()
    share = indicator.mean().item()
    number = int(clusters.max()) + 1
    sums = torch.zeros(number, dtype=torch.float64).index_add(0, clusters, indicator - share)
    variance = sums.square().sum().item() / len(indicator) ** 2
    return variance * number / max(number - 1, 1) / share**2


@dataclass(frozen=True)
class Tempering:
    """A rate from tempered draws, weighted by the base's density over theirs.

    Attributes:
        rate: mean of w 1[lost].
        error: its standard error.
        mean_weight: of all draws, which ought to be 1.
        effective_lost: (sum w)^2 / sum w^2 over the lost draws.
        evaluations: of the score.
    """

    rate: float
    error: float
    mean_weight: float
    effective_lost: float
    evaluations: int

    @property
    def is_valid(self) -> bool:
        """Whether both guards hold; where they do not, the rate may be wrong by any factor."""
        near_one = abs(self.mean_weight - 1) <= WEIGHT_TOLERANCE
        return near_one and self.effective_lost >= LEAST_EFFECTIVE


def tempered_rate(
    event: RareEvent,
    like: Tensor,
    rows: Tensor,
    *,
    generator: torch.Generator,
    blocks: int,
    temperature: float = TEMPERATURE,
) -> Tempering:
    """The probability that the score is infinite, by importance sampling from N(0, T^2 I).

    Where a quarter of the blocks holds no lost draw, the rest is not made: it would hardly hold the
    five that an estimate needs.

    Args:
        event: whose probability it is.
        like: gives the shape of a block of draws, (n, *latent), float64.
        rows: of the context that a block belongs to, (n,).
        generator: on the CPU.
        blocks: of draws.
        temperature: T.
    """
    weights: list[Tensor] = []
    lost: list[Tensor] = []
    dimension = like[0].numel()
    for block in range(blocks):
        if block >= max(1, blocks * TRIAL) and not bool(torch.cat(lost).any()):
            break
        z = temperature * standard_normal(like, generator)
        squares = z.flatten(1).square().sum(1)
        normalizer = dimension * math.log(2 * math.pi) / 2
        log_base = -squares / 2 - normalizer
        if event.log_density is not None:
            log_base = event.log_density(z).nan_to_num(-math.inf)
        log_proposal = -squares / (2 * temperature**2) - normalizer
        log_weight = log_base - log_proposal + dimension * math.log(temperature)
        weights.append(log_weight.exp())
        lost.append(event.score(z, rows) == math.inf)
    weight = torch.cat(weights)
    terms = weight * torch.cat(lost)
    squared = terms.square().sum().item()
    effective = 0.0
    if squared:
        effective = terms.sum().item() ** 2 / squared
    return Tempering(
        terms.mean().item(),
        terms.std().item() / math.sqrt(len(terms)),
        weight.mean().item(),
        effective,
        len(terms),
    )


class _Draws:
    """Round trips of latents that are given in units of the base: z = mean + deviation u."""

    def __init__(self, context: AuditContext) -> None:
        self.context = context
        self.guarded = guarded_model(context)
        self.shape = self.guarded.latent_shape
        self.dimension = self.shape.numel()
        self.deviation = context.base.deviation.double()
        self.limit = context.limits.returned_draw(context.x.dtype)
        self._scale = nonzero_or_one(self.deviation).expand(self.shape)
        self._mean = torch.zeros_like(self._scale)
        self.log_density = self._locate_base()
        self._by_layers = self._inverse_is_that_of_the_layers()

    def first(self, count: int, *, run: int = 0) -> Tensor:
        """Independent draws of the base, (count, *latent); of run 0, the first of ``sampling``."""
        each = math.ceil(count / BLOCK)
        blocks = range(run * each, (run + 1) * each)
        drawn = [block_of_draws(self.context, block, shape=self.shape) for block in blocks]
        return (torch.cat(drawn)[:count].double() - self._mean) / self._scale

    def score(self, u: Tensor, rows: Tensor) -> Tensor:
        """log10 of the largest entry of any state, infinite where the draw is lost, (n,)."""
        at_most = min(BLOCK, self.context.max_forward())
        rows = rows.to(u.device)
        positions = torch.arange(len(u), device=u.device)
        (found,) = self.context.parallel.map(
            positions, lambda part: (self._score(u[part], rows[part]),), at_most=at_most
        )
        return found

    def failures(self) -> str:
        """Why the model gave no number for some draws, in any process."""
        reasons = self.context.parallel.all_gather(lambda: str(self.guarded.failures))
        return "; ".join(dict.fromkeys(reason for reason in reasons if reason))

    def _score(self, u: Tensor, rows: Tensor) -> Tensor:
        z = self._latents(u)
        guarded = self.guarded.select(context_rows(self.context, rows))
        if self._by_layers:
            x, largest = guarded.inverse_and_peak(z)
        else:
            x = guarded.inverse(z)
            largest = torch.maximum(peak(z), peak(x)).double()
        off = draw_error(z, guarded.forward(x), self.deviation)
        lost = ~(finite_rows(x) & (off <= self.limit))
        value = largest.nan_to_num(LARGEST).clamp(1 / LARGEST, LARGEST).log10()
        return torch.where(lost, torch.full_like(value, math.inf), value)

    def _latents(self, u: Tensor) -> Tensor:
        return (self._mean + self._scale * u).to(self.context.base.like)

    def _locate_base(self) -> Callable[[Tensor], Tensor] | None:
        """Set the base's mean; return its density where it is not known to be Gaussian."""
        base = self.context.base
        if not base.declared:
            return None  # N(0, I)
        if base.log_density is None:
            raise NotApplicable(
                f"the {base.description} has no density: moves of its draws cannot be weighed"
            )
        rows = 1 if base.context is None else context_length(base.context)
        # whole batches: the density is that of a batch in the model's own context
        pilot = base.draw(rows * max(1, PILOT // rows), PILOT_SEED).double()
        center = pilot.mean(0)
        self._mean = self._mean_of_gaussian(center)
        if self._is_gaussian(pilot):
            return None
        if base.context is not None:
            raise NotApplicable(
                f"the {base.description} depends on the context: its draws cannot be moved"
            )
        self._mean = center
        return self._log_density

    def _mean_of_gaussian(self, center: Tensor) -> Tensor:
        """The mean m, if the base is N(m, s^2): the gradient of ln p at c is (m - c) / s^2."""
        base = self.context.base
        rows = 1 if base.context is None else context_length(base.context)
        point = center.to(base.like).expand(rows, *self.shape).clone().requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(base.log_prob(point).sum(), point)
        except Exception:  # a density without a graph, or not defined here
            return center
        return center + self._scale**2 * gradient[0].double()

    def _is_gaussian(self, z: Tensor) -> bool:
        """Whether the base's density is that of N(mean, s^2) at these draws, in every context."""
        u = (z - self._mean) / self._scale
        squares = u.flatten(1).square().sum(1)
        normal = -(squares + self.dimension * math.log(2 * math.pi)) / 2
        return bool(((self._log_density(u) - normal).abs() <= GAUSSIAN).all())

    def _log_density(self, u: Tensor) -> Tensor:
        """ln of the base's density of u, (n,); with a context, n is a multiple of its rows."""
        base = self.context.base
        rows = len(u) if base.context is None else context_length(base.context)
        try:
            with torch.no_grad():
                parts = [base.log_prob(part) for part in self._latents(u).split(rows)]
        except NotApplicable:
            raise
        except Exception as error:  # some densities raise outside of their support
            raise NotApplicable(
                f"the density of the {base.description} raises {type(error).__name__}"
            ) from error
        return torch.cat(parts).double() + self._scale.log().sum()

    def _inverse_is_that_of_the_layers(self) -> bool:
        """Whether the layers' inverses, last layer first, are the model's on a few draws."""
        z = self._latents(self.first(COMPARED))
        rows = torch.arange(COMPARED, device=z.device)
        few = self.guarded.select(context_rows(self.context, rows))
        try:
            whole, (by_layers, _) = few.inverse(z), few.inverse_and_peak(z)
        except NotApplicable:
            return False
        return same_up_to_rounding(whole, by_layers, torch.finfo(z.dtype).eps ** 0.5)


def _affordable_levels(context: AuditContext, particles: int, moves: int, levels: int) -> int:
    affordable = BUDGET[Level.FULL] / (1 + inverse_cost(context))
    return max(1, min(levels, int((affordable / particles - 1) / moves)))


def _result(
    context: AuditContext, draws: _Draws, splitting: Splitting, tempering: Tempering | None
) -> AuditResult:
    rate, error = splitting.rate, splitting.error
    second = tempering if tempering is not None and tempering.is_valid else None
    if not rate and second is not None:
        rate, error = second.rate, second.error
    limit = context.limits.sampling
    verdict = Verdict.UNDECIDED
    if rate - error > limit:
        verdict = Verdict.UNSTABLE
    values = {
        "rate": rate,
        "standard_error": error,
        "reached_rate": splitting.reached,
        "round_trips": float(splitting.evaluations),
    }
    if tempering is not None:
        values["round_trips"] += tempering.evaluations
        values["tempered_mean_weight"] = tempering.mean_weight
        values["tempered_effective_lost"] = tempering.effective_lost
    if second is not None:
        values["tempered_rate"] = second.rate
        values["tempered_standard_error"] = second.error
    return AuditResult(
        "rare_event_sampling",
        verdict,
        _reason(splitting, second),
        headline=("rate", "standard_error"),
        values=values,
        tables={"levels": splitting.levels},
        settings={
            "base": context.base.description,
            "gaussian": draws.log_density is None,
            "rate_limit": limit,
            "draw_limit": context.limits.returned_draw(context.x.dtype),
            "temperature": TEMPERATURE,
            "seed": context.seed,
            "failures": draws.failures() or "none",
        },
    )


def _reason(splitting: Splitting, second: Tempering | None) -> str:
    made = f"{splitting.evaluations:,} round trips of subset simulation"
    if not splitting.rate:
        reason = (
            f"no lost draw was found by {made}, down to a rate of {splitting.reached:.1g}; "
            "that nothing was found proves nothing"
        )
        if second is not None:
            reason += (
                f"; tempered draws find a rate of {second.rate:.2g} (standard error "
                f"{second.error:.1g}): the estimates disagree, and the score hides lost draws"
            )
        return reason
    reason = (
        f"about {splitting.rate:.2g} of the draws are lost (standard error "
        f"{splitting.error:.1g}), an estimate by {made}"
    )
    if second is not None:
        reason += f"; tempered draws find {second.rate:.2g} (standard error {second.error:.1g})"
        factor = max(splitting.rate / second.rate, second.rate / splitting.rate)
        if factor > DISAGREEMENT:
            reason += ": the estimates disagree by more than a factor of 3"
    plain = SHOWN / splitting.rate
    return reason + f"; about {plain:,.0f} plain draws would show {SHOWN} of them"
