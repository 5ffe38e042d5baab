"""rare_event_sampling on maps with a known rate of lost draws, and what it may say of it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal, Uniform

import inn_guard as ig
from inn_guard.audits.rare_event_sampling import (
    LEAST_EFFECTIVE,
    RareEvent,
    Splitting,
    Tempering,
    _mean_of_runs,
    rare_event_sampling,
    subset_simulation,
    tempered_rate,
)
from inn_guard.core.base import BaseDistribution
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from tests.cases.toys import Linear

Face = tuple[int, int, float]
GROWTH = 44.0  #: ln of the factor at the edge of the lost draws
COUNTED: list[int] = []  # not in the model: a check restores whatever a model counts


class Faces(Invertible):
    """(a, b) <-> (a, b exp(s)), s = GROWTH max_i(sign_i a_i / t_i); lost beyond any face.

    Args:
        faces: (entry, sign, threshold) of each face; z is lost where sign z_entry > threshold.
        grows: the faces towards which s grows. Default: those beyond which z is lost.
    """

    def __init__(self, *faces: Face, grows: tuple[Face, ...] = ()) -> None:
        super().__init__()
        self.faces = faces
        self.grows = grows or faces

    def inverse(self, z: Tensor) -> Tensor:
        COUNTED.append(len(z))
        a, b = z.tensor_split(2, dim=1)
        lost = nearness(a, self.faces) > 1
        return torch.cat([a, torch.where(lost, math.inf, b * self.stretch(a))], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.tensor_split(2, dim=1)
        return torch.cat([a, b / self.stretch(a)], dim=1)

    def stretch(self, a: Tensor) -> Tensor:
        return (GROWTH * nearness(a, self.grows).clamp(min=0)).exp()


def nearness(a: Tensor, faces: tuple[Face, ...]) -> Tensor:
    """1 at the nearest face, (n, 1)."""
    each = [sign * a[:, entry] / threshold for entry, sign, threshold in faces]
    return torch.stack(each).amax(0)[:, None]


class Turned(Chain):
    """Faces in turned coordinates, as a chain of two layers."""

    def __init__(self, dimension: int, *faces: Face) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(dimension, dimension, generator=generator)
        super().__init__(Faces(*faces), Linear(torch.linalg.qr(noise).Q))


def half_space(rate: float) -> Faces:
    return Faces((0, 1, norm.isf(rate)))


THREE = ((0, 1, norm.isf(4e-7)), (0, -1, norm.isf(3e-7)), (1, 1, norm.isf(3e-7)))


def data(dimension: int = 8) -> Tensor:
    return 0.1 * torch.randn(16, dimension, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "dimension"),
    [
        (half_space(1e-6), 8),
        (half_space(1e-6), 64),
        (Faces(*THREE), 8),
        (Turned(8, (0, 1, norm.isf(1e-6))).double(), 8),
    ],
    ids=["half-space, D 8", "half-space, D 64", "three faces", "turned half-space"],
)
def test_a_rate_of_one_in_a_million_is_found_within_a_factor_of_two(model, dimension):
    result = rare_event_sampling(model, data(dimension))
    assert 0.5e-6 < result["rate"] < 2e-6
    assert 0.05 < result["standard_error"] / result["rate"] < 0.6
    assert result.verdict == "undecided"
    assert result.reason.startswith("about ")
    assert 50_000 < result["round_trips"] < 130_000
    assert ("tempered_mean_weight" in result.values) == (dimension == 8)


@pytest.mark.parametrize(("rate", "faces"), [(1e-6, THREE), (1e-4, ((0, 1, norm.isf(1e-4)),))])
def test_the_mean_of_runs_is_the_rate_and_their_spread_is_the_standard_error(rate, faces):
    event = RareEvent(score_of(Faces(*faces)))
    runs = [simulated(event, seed) for seed in range(12)]
    rates = torch.tensor([run.rate for run in runs]) / rate
    errors = torch.tensor([run.error for run in runs]) / rate
    assert 0.75 < rates.mean() < 1.25
    assert 0.5 < rates.std() / errors.mean() < 2


def score_of(model: Invertible):
    def score(z: Tensor, rows: Tensor) -> Tensor:
        return model.inverse(z).abs().amax(1).log10()

    return score


def simulated(event: RareEvent, seed: int, dimension: int = 8, **settings) -> Splitting:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(1000, dimension, generator=generator)
    rows = torch.arange(1000)
    return subset_simulation(event, start, rows, generator=generator, **settings)


def tempered(event: RareEvent, dimension: int, blocks: int = 30) -> Tempering:
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(1000, dimension)
    return tempered_rate(event, like, torch.arange(1000), generator=generator, blocks=blocks)


def test_tempered_draws_agree_in_few_dimensions_and_are_refused_in_many():
    event = RareEvent(score_of(half_space(1e-5)))
    few, many = tempered(event, 8), tempered(event, 64)
    assert few.is_valid
    assert abs(few.rate - 1e-5) < 4 * few.error
    assert not many.is_valid
    assert few.effective_lost > LEAST_EFFECTIVE


def test_runs_that_disagree_widen_the_standard_error():
    runs = [Splitting(rate, 1e-7, 1e-6, 1000, ()) for rate in (3e-6, 1e-7)]
    mean = _mean_of_runs(runs)
    assert mean.rate == pytest.approx(1.55e-6)
    assert mean.error == pytest.approx(1.45e-6)
    assert mean.evaluations == 2000
    assert _mean_of_runs(runs[:1]).error == pytest.approx(1e-7)


def test_that_nothing_was_found_proves_nothing():
    result = rare_event_sampling(Faces((0, 1, math.inf)), data())
    assert result.verdict == "undecided"
    assert result["rate"] == 0
    assert "proves nothing" in result.reason
    assert result["reached_rate"] > 0


def test_a_flat_score_ends_the_search():
    result = rare_event_sampling(Linear(torch.zeros(4, 4)), data(4), particles=100)
    assert result["rate"] == 1
    assert result["round_trips"] == 2 * 100


def test_tempered_draws_end_early_where_nothing_is_lost():
    def score(z, rows):
        return z.new_zeros(len(z))

    found = tempered(RareEvent(score), 4, blocks=40)
    assert found.rate == 0
    assert found.evaluations == 10 * 1000


def test_losses_that_the_score_hides_are_found_by_tempered_draws_and_said():
    threshold = norm.isf(1e-5)
    deceptive = Faces((0, 1, threshold), grows=((1, 1, 4 * threshold),))
    result = rare_event_sampling(deceptive, data(4))
    assert "the estimates disagree" in result.reason
    assert 0.2e-5 < result["tempered_rate"] < 5e-5
    assert result.verdict == "undecided"


@pytest.mark.parametrize(("rate", "verdict"), [(0.02, "unstable"), (5e-4, "undecided")])
def test_only_an_estimate_above_the_limit_is_a_finding(rate, verdict):
    result = rare_event_sampling(half_space(rate), data())
    assert result.verdict == verdict
    assert not result.uses
    estimate, error = result["rate"], result["standard_error"]
    assert (estimate - error > ig.Limits().sampling) == (verdict == "unstable")


def test_no_more_round_trips_are_made_than_declared():
    settings = {"particles": 100, "moves": 3, "levels": 4}
    check = rare_event_sampling.with_settings(**settings)
    report = ig.audit(half_space(1e-12), data(), checks=[check], dry_run=True)
    (row,) = [r for r in report["dry_run"].tables["cost"] if r["check"] == check.name]
    COUNTED.clear()
    result = check(half_space(1e-12), data())
    simulated_ones = 2 * 100 * (1 + 3 * 4)
    assert row["inverse"] == 2 * simulated_ones
    # nothing is lost, so that tempered draws end after a quarter
    assert result["round_trips"] == pytest.approx(1.25 * simulated_ones, abs=100)
    # on top of these: the trial of the model, its cost, and the comparison with its layers
    assert sum(COUNTED) <= result["round_trips"] + 64


def test_the_answer_depends_on_the_seed_only():
    first, again, other = (
        rare_event_sampling(half_space(1e-3), data(), seed=seed, particles=200)
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first["rate"] != other["rate"]


def based(base: Distribution, **changes) -> BaseDistribution:
    given = {"log_density": lambda z: base.log_prob(z).sum(1), **changes}
    return BaseDistribution(
        lambda n, context: base.sample((n, 8)), torch.zeros(1), description="base", **given
    )


@pytest.mark.parametrize(
    ("prior", "threshold", "gaussian"),
    [
        (based(Normal(0.0, 1.0), exact_deviation=torch.ones(8)), norm.isf(1e-5), True),
        (
            based(Normal(2.0, 3.0), exact_deviation=torch.full((8,), 3.0)),
            norm(2, 3).isf(1e-5),
            True,
        ),
        (based(Normal(2.0, 3.0)), norm(2, 3).isf(1e-5), False),
        (based(Laplace(0.0, 1.0)), -math.log(2e-5), False),
    ],
    ids=["standard", "shifted", "deviation unknown", "Laplace"],
)
def test_draws_of_a_declared_base_keep_its_distribution(prior, threshold, gaussian):
    result = rare_event_sampling(Faces((0, 1, threshold)), data(), prior=prior)
    assert result.settings["gaussian"] == gaussian
    assert 1e-5 / 4 < result["rate"] < 4e-5


def test_a_base_whose_draws_cannot_be_moved_is_not_applicable():
    base = Uniform(torch.tensor(0.0), torch.tensor(1.0), validate_args=True)
    silent = rare_event_sampling(half_space(1e-2), data(), prior=based(base, log_density=None))
    assert silent.verdict == "not_applicable"
    assert "has no density" in silent.reason
    bounded = rare_event_sampling(half_space(1e-2), data(), prior=based(base))
    assert bounded.verdict == "not_applicable"
    assert "raises ValueError" in bounded.reason
    conditional = rare_event_sampling(half_space(1e-2), data(), prior=conditional_base(shift=1.0))
    assert conditional.verdict == "not_applicable"
    assert "depends on the context" in conditional.reason


def conditional_base(shift: float) -> BaseDistribution:
    """N(shift c, I) in a context c of 16 rows, whose density takes these rows only."""
    context = torch.linspace(-1, 1, 16)[:, None]

    def log_density(z: Tensor) -> Tensor:
        assert len(z) == 16
        return Normal(shift * context, 1.0).log_prob(z).sum(1)

    return BaseDistribution(
        lambda n, rows: shift * rows + torch.randn(n, 8),
        torch.zeros(1),
        context=context,
        exact_deviation=torch.ones(8),
        log_density=log_density,
    )


def test_a_gaussian_base_that_is_the_same_in_every_context_is_moved():
    prior = conditional_base(shift=0.0)
    result = rare_event_sampling(half_space(1e-4), data(), prior=prior)
    assert result.settings["gaussian"]
    assert 0.5e-4 < result["rate"] < 2e-4


@pytest.mark.parametrize("name", ["particles", "moves", "levels", "repeats"])
def test_wrong_settings_are_named(name):
    with pytest.raises(ValueError, match=f"expected {name} of at least"):
        rare_event_sampling(half_space(1e-2), data(), **{name: 0})
