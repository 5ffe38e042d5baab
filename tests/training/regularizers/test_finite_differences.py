from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.core.base import BaseDistribution
from inn_guard.training.regularizers import Direction, FiniteDifferences
from tests.cases.trials import first
from tests.oracles.regularizers import (
    Embedding,
    LinearMap,
    Scaling,
    TwoCouplings,
    literal_finite_differences,
    literal_finite_differences_at_prior,
    literal_published_finite_differences,
)

EACH = [Direction.FORWARD, Direction.INVERSE]


def noise(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def matrix(seed=0, size=5):
    return torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def z_score_on_linear_map(weight, direction, samples, **settings):
    """Deviation of the mean over ``samples`` directions from |W|_F^2, or |W^-1|_F^2, in sigma.

    |W v|^2 has mean tr(W^T W) and variance 2 tr((W^T W)^2) for v ~ N(0, I).
    """
    jacobian = weight if direction is Direction.FORWARD else torch.linalg.inv(weight)
    gram = jacobian.T @ jacobian
    deviation = math.sqrt(2 * gram.square().sum().item() / samples)
    regularizer = FiniteDifferences(1.0, direction=direction, **settings)
    x = torch.randn(
        samples, len(weight), generator=torch.Generator().manual_seed(99), dtype=weight.dtype
    )
    return (regularizer(LinearMap(weight), x).item() - jacobian.square().sum().item()) / deviation


@pytest.mark.parametrize("direction", EACH)
@pytest.mark.parametrize("eps", [1e-3, 0.1, 2.0])
def test_expectation_on_a_linear_map_is_the_squared_frobenius_norm(direction, eps):
    assert abs(z_score_on_linear_map(matrix(), direction, 100_000, eps=eps, seed=1)) < 4


@given(seed=st.integers(0, 10_000), size=st.integers(1, 6), direction=st.sampled_from(EACH))
def test_expectation_holds_for_any_linear_map(seed, size, direction):
    weight = matrix(seed, size) + 2 * torch.eye(size, dtype=torch.float64)
    if torch.linalg.cond(weight) < 1e4:
        assert abs(z_score_on_linear_map(weight, direction, 20_000, seed=seed)) < 5


def test_a_wrong_power_of_eps_would_be_seen():
    weight = matrix()
    right = FiniteDifferences(1.0, direction=Direction.FORWARD)(
        LinearMap(weight), torch.zeros(9, 5, dtype=weight.dtype)
    )
    (v,) = noise(0, (9, 5))
    torch.testing.assert_close(right, (v @ weight.T).square().sum(1).mean())


def test_every_sample_has_noise_of_its_own():
    weight = matrix()
    regularizer = FiniteDifferences(1.0, direction=Direction.FORWARD)
    x = torch.zeros(50, 5, dtype=torch.float64)
    draws = torch.stack([regularizer(LinearMap(weight), x).detach() for _ in range(2000)])
    expected = math.sqrt(2 * (weight.T @ weight).square().sum().item() / 50)
    assert abs(draws.std().item() / expected - 1) < 0.1


def test_directions_add_up():
    model, x = TwoCouplings().double(), noise(5, (4, 6))[0]
    v, v_star = noise(0, (4, 6), (4, 6))
    forward, inverse = literal_finite_differences(model, x, v, v_star)
    torch.testing.assert_close(FiniteDifferences(3.0)(model, x), 3 * (forward + inverse))
    torch.testing.assert_close(
        FiniteDifferences(3.0, direction=Direction.FORWARD)(model, x), 3 * forward
    )
    first = noise(0, (4, 6))[0]
    only_inverse = literal_finite_differences(model, x, v, first)[1]
    torch.testing.assert_close(
        FiniteDifferences(3.0, direction=Direction.INVERSE)(model, x), 3 * only_inverse
    )


@pytest.mark.parametrize("given_z", [False, True])
@pytest.mark.parametrize("context_size", [0, 2])
def test_value_and_gradients_equal_the_literal_copy(given_z, context_size):
    x, v, v_star, context = noise(3, (7, 6), (7, 6), (7, 6), (7, 2))
    model = TwoCouplings(context_size=context_size).double()
    model = model.with_context(context) if context_size else model
    x.requires_grad_()
    mine = FiniteDifferences(0.7, seed=11)(model, x, model(x) if given_z else None)
    v, v_star = noise(11, (7, 6), (7, 6))
    forward, inverse = literal_finite_differences(model, x, v, v_star)
    theirs = 0.7 * (forward + inverse)
    wanted = [*model.parameters(), x]
    torch.testing.assert_close(mine, theirs)
    for got, expected in zip(
        torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_gradients_of_the_literal_inverse_term_are_not_those_at_a_constant_z():
    """z moves with the parameters: a detached z gives another gradient, so the copy can tell."""
    model, (x, v) = TwoCouplings().double(), noise(3, (7, 6), (7, 6))
    attached = FiniteDifferences(1.0, direction=Direction.INVERSE)(model, x)
    z = model(x).detach()
    constant = ((model.inverse(z + 0.1 * v) - model.inverse(z)) / 0.1).square().sum(1).mean()
    ours, other = (
        torch.autograd.grad(value, list(model.parameters()))[0] for value in (attached, constant)
    )
    assert (ours - other).norm() > 0.1 * ours.norm()


def test_an_injective_map_is_compared_with_its_projection():
    x, wide = noise(1, (6, 5), (3, 5))
    model = Embedding(wide)
    v, v_star = noise(0, (6, 5), (6, 3))
    forward, inverse = literal_finite_differences(model, x, v, v_star)
    torch.testing.assert_close(FiniteDifferences(1.0)(model, x), forward + inverse)


@pytest.mark.parametrize("given_z", first(1, [False, True]))
def test_a_fraction_is_unbiased_and_selects_contexts(given_z):
    scales = torch.linspace(0.5, 3.0, 10, dtype=torch.float64).reshape(10, 1)
    model, x = Scaling().with_context(scales), noise(1, (10, 3))[0]
    regularizer = FiniteDifferences(1.0, direction=Direction.FORWARD, fraction=0.3)
    z = model(x) if given_z else None
    draws = torch.stack([regularizer(model, x, z) for _ in range(4000)])
    expected = 3 * scales.square().mean()
    assert abs((draws.mean() - expected) / (draws.std() / math.sqrt(len(draws)))) < 4


@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 1), (0.3, 3), (0.31, 4), (1.0, 10)])
def test_a_fraction_costs_only_its_rows(fraction, rows):
    seen = []

    class Counting(Scaling):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    scales, x = torch.ones(10, 1, dtype=torch.float64), noise(1, (10, 3))[0]
    FiniteDifferences(1.0, fraction=fraction)(Counting().with_context(scales), x)
    assert seen == [rows, rows]


def test_a_given_z_saves_one_forward_pass_and_no_pass_inverts_z_itself():
    calls = []

    class Counting(TwoCouplings):
        def forward(self, x):
            calls.append("forward")
            return super().forward(x)

        def inverse(self, z):
            calls.append("inverse")
            return super().inverse(z)

    model, x = Counting().double(), noise(1, (4, 6))[0]
    z = model(x)
    calls.clear()
    FiniteDifferences(1.0)(model, x, z)
    assert calls == ["forward", "inverse"]


def test_the_global_generator_is_left_alone_and_the_noise_is_reproducible():
    model, x = TwoCouplings().double(), noise(1, (4, 6))[0]
    before = torch.get_rng_state()
    first, second = FiniteDifferences(1.0, seed=5), FiniteDifferences(1.0, seed=5)
    sequence = [first(model, x).item() for _ in range(3)]
    torch.manual_seed(123)
    assert [second(model, x).item() for _ in range(3)] == sequence
    assert len(set(sequence)) == 3
    torch.set_rng_state(before)
    first(model, x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generator_is_left_alone_and_noise_is_the_same_as_on_the_cpu():
    model, x = TwoCouplings().double(), noise(1, (4, 6))[0]
    on_cpu = FiniteDifferences(1.0)(model, x)
    before = torch.cuda.get_rng_state()
    on_cuda = FiniteDifferences(1.0)(model.cuda(), x.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.testing.assert_close(on_cuda.cpu(), on_cpu)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_z", [False, True])
def test_autocast_does_not_reach_the_differences(x_dtype, given_z):
    model, x = TwoCouplings().float(), noise(1, (32, 6), dtype=torch.float32)[0].to(x_dtype)
    expected = FiniteDifferences(1.0)(model, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(x) if given_z else None
        got = FiniteDifferences(1.0)(model, x, z)
    assert torch.equal(got, expected)
    assert got.dtype is torch.float32
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (got, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_differences_would_lose_their_digits():
    """Why autocast is off: per-sample errors of several percent, where float32 has 1e-5."""
    model, (x, v) = TwoCouplings().float(), noise(1, (64, 6), (64, 6), dtype=torch.float32)

    def squares(model, x, v):
        return ((model(x + 0.1 * v) - model(x)) / 0.1).float().square().sum(1)

    exact = squares(model.to_dtype(torch.float64), x.double(), v.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = squares(model, x, v)
    assert (rounded / exact - 1).abs().max() > 0.03
    assert (squares(model, x, v) / exact - 1).abs().max() < 1e-4


def test_a_rounded_z_from_an_earlier_autocast_block_is_not_reused():
    model, x = TwoCouplings().float(), noise(1, (32, 6), dtype=torch.float32)[0]
    expected = FiniteDifferences(1.0)(model, x)
    assert torch.equal(FiniteDifferences(1.0)(model, x, model(x).bfloat16()), expected)


def test_large_penalties_in_half_precision_models_do_not_overflow():
    model = LinearMap(300 * torch.eye(4)).half()
    penalty = FiniteDifferences(1.0, direction=Direction.FORWARD)(
        model, torch.zeros(64, 4, dtype=torch.float16)
    )
    assert penalty.dtype is torch.float32
    assert 2e5 < penalty.item() < 6e5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_penalties_are_not_hidden(bad):
    x = noise(1, (4, 6))[0]
    x[2, 1] = bad
    assert not FiniteDifferences(1.0)(TwoCouplings().double(), x).isfinite()


def test_bad_input_is_refused():
    model, x = TwoCouplings().double(), noise(1, (4, 6))[0]
    regularizer = FiniteDifferences(1.0)
    with pytest.raises(ValueError, match="with its graph"):
        regularizer(model, x, model(x).detach())
    with pytest.raises(ValueError, match="4 samples"):
        regularizer(model, x, model(x)[:3])
    with pytest.raises(ValueError, match="at least one sample"):
        regularizer(model, x[:0])
    with torch.no_grad():
        assert regularizer(model, x, model(x)).isfinite()
    for frozen in model.parameters():
        frozen.requires_grad_(False)
    assert regularizer(model, x, model(x)).isfinite()


class Noisy(TwoCouplings):
    """Draws random numbers in training mode, which change its values or do not."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, x):
        return super().forward(x) + self.noise_like(x)

    def inverse(self, z):
        return super().inverse(z - self.noise_like(z))

    def noise_like(self, x):
        if not self.training:
            return torch.zeros_like(x)
        return self.strength * torch.randn(x.shape, dtype=x.dtype)


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name)
def test_a_map_that_changes_from_pass_to_pass_is_refused(direction):
    x, regularizer = noise(1, (4, 6))[0], FiniteDifferences(1.0, direction=direction)
    model = Noisy(0.1).double().train()
    for z in (None, model(x)):
        with pytest.raises(ValueError, match=r"Call model\.eval\(\) before"):
            regularizer(model, x, z)
    one = FiniteDifferences(1.0, direction=direction, seed=5)
    other = FiniteDifferences(1.0, direction=direction, seed=5)
    assert torch.equal(one(model.eval(), x), other(copy.deepcopy(model).eval(), x))


def test_random_numbers_that_leave_the_map_alone_are_no_matter():
    model, x = Noisy(0.0).double().train(), noise(1, (4, 6))[0]
    torch.manual_seed(0)
    found = FiniteDifferences(1.0)(model, x)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    _ = model(x), model(x), model.inverse(x)  # its passes, and no trace of the check
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(found, FiniteDifferences(1.0)(model.eval(), x))


@pytest.mark.parametrize(
    "settings",
    [
        {"coefficient": -1.0},
        {"coefficient": math.nan},
        {"eps": 0.0},
        {"eps": math.inf},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"direction": "sideways"},
        {"direction": Direction(0)},
        {"at": "nowhere"},
        {"form": "cube"},
        {"at": "prior"},
        {"at": "prior", "direction": "both"},
        {"convention": "published", "form": "log"},
        {"convention": "published", "at": "prior", "direction": "inverse"},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        FiniteDifferences(**{"coefficient": 1.0, **settings})


def test_copies_continue_on_their_own():
    model, x = TwoCouplings().double(), noise(1, (4, 6))[0]
    regularizer = FiniteDifferences(1.0)
    regularizer(model, x)
    for copied in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert copied == regularizer
        state = regularizer.generator.get_state()
        value = copied(model, x)
        assert torch.equal(regularizer.generator.get_state(), state)
        assert torch.equal(regularizer(model, x), value)
        regularizer.generator.set_state(state)


def test_directions_may_be_names():
    for name in ("forward", "inverse", "both"):
        assert FiniteDifferences(1.0, direction=name).direction is Direction[name.upper()]
        assert FiniteDifferences(1.0, direction=name) == FiniteDifferences(
            1.0, direction=Direction[name.upper()]
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_the_published_convention_is_that_of_the_published_code(dtype, tolerance, gain):
    """Value and gradient, where the map is curved enough for the step to matter."""
    model, (x,) = TwoCouplings().to(dtype), noise(3, (8, 6), dtype=dtype)
    with torch.no_grad():
        for network in model.networks:
            network[-1].weight.mul_(gain)
    v, v_star = noise(11, (8, 6), (8, 6), dtype=dtype)
    ours = FiniteDifferences.published(0.7, seed=11)(model, x)
    theirs = 0.7 * sum(literal_published_finite_differences(model, x, v, v_star))
    assert abs(ours / theirs - 1) < tolerance
    found, expected = flat_gradient(ours, model), flat_gradient(theirs, model)
    assert (found - expected).norm() < tolerance * expected.norm()
    nominal = 0.7 * 0.1 * sum(literal_finite_differences(model, x, v, v_star))
    other = flat_gradient(nominal, model)
    assert (other - expected).norm() > 100 * tolerance * expected.norm()


def test_the_published_step_is_shorter_by_the_root_of_the_batch_size():
    """With noise of unit root mean square per coordinate the two conventions agree exactly."""
    model, (x, v) = TwoCouplings().double(), noise(0, (9, 6), (9, 6))
    regularizer = FiniteDifferences.published(2.0, direction="forward")
    (drawn,) = noise(0, (9, 6))
    v = drawn / drawn.norm(dim=0) * math.sqrt(9)
    eps = 0.1 / math.sqrt(9)
    expected = 2.0 * 0.1 * literal_finite_differences(model, x, v, v, eps=eps)[0]
    torch.testing.assert_close(regularizer(model, x), expected)


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


class WithBase(LinearMap):
    """A linear map whose library samples z ~ N(0, diag(deviation)^2)."""

    def __init__(self, weight, deviation):
        super().__init__(weight)
        self.deviation = deviation

    def base(self):
        def sample(n, context):
            return self.deviation * torch.randn(n, len(self.deviation), dtype=torch.float64)

        return BaseDistribution(sample, self.weight, exact_deviation=self.deviation)


def test_at_the_prior_of_a_linear_map_the_expectation_is_that_of_the_scaled_inverse():
    """E |W^-1 S v|^2 = |W^-1 S|_F^2 with S = diag(deviation)."""
    weight = matrix() + 2 * torch.eye(5, dtype=torch.float64)
    deviation = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)
    jacobian = torch.linalg.inv(weight) * deviation
    gram = jacobian.T @ jacobian
    samples = 50_000
    regularizer = FiniteDifferences(1.0, direction="inverse", at="prior")
    found = regularizer(WithBase(weight, deviation), torch.zeros(samples, 5, dtype=torch.float64))
    spread = math.sqrt(2 * gram.square().sum().item() / samples)
    assert abs(found.item() - jacobian.square().sum().item()) < 4 * spread


@pytest.mark.parametrize("gain", [0.1, 1.0, 30.0])
def test_the_log_form_of_a_scaling_is_a_gaussian_integral(gain):
    """D = 1, F^-1(z) = gain z: E log(1 + gain^2 v^2) over v ~ N(0, 1)."""
    grid = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = (-(grid**2) / 2).exp() / math.sqrt(2 * math.pi)
    values = (1 + gain**2 * grid**2).log()
    mean = torch.trapezoid(values * density, grid)
    variance = torch.trapezoid((values - mean) ** 2 * density, grid)
    samples = 40_000
    model = LinearMap(torch.tensor([[1 / gain]], dtype=torch.float64))
    regularizer = FiniteDifferences(3.0, direction="inverse", at="prior", form="log")
    found = regularizer(model, torch.zeros(samples, 1, dtype=torch.float64)) / 3.0
    assert abs(found - mean) < 4 * (variance / samples).sqrt()


@pytest.mark.parametrize("form", ["square", "log"])
@pytest.mark.parametrize("context_size", [0, 2])
def test_at_the_prior_value_and_gradients_equal_the_literal_copy(form, context_size):
    x, context = noise(3, (7, 6), (7, 2))
    model = TwoCouplings(context_size=context_size).double()
    if context_size:
        model = model.with_context(context)
    z, v = noise(11, (7, 6), (7, 6))
    ours = FiniteDifferences(0.7, direction="inverse", at="prior", form=form, seed=11)(model, x)
    theirs = 0.7 * literal_finite_differences_at_prior(model, z, v, 1.0, form=form)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(flat_gradient(ours, model), flat_gradient(theirs, model))


def test_draws_come_from_the_models_own_base():
    deviation = torch.tensor([0.5, 2.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    model, seen = WithBase(matrix(), deviation), []

    class Watching(WithBase):
        def inverse(self, z):
            seen.append(z)
            return super().inverse(z)

    model = Watching(matrix(), deviation)
    regularizer = FiniteDifferences(1.0, direction="inverse", at="prior", form="log")
    before = torch.get_rng_state()
    regularizer(model, torch.zeros(4000, 5, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)
    start, moved = seen
    torch.testing.assert_close(start.std(0), deviation, rtol=0.1, atol=0)
    torch.testing.assert_close((moved - start).std(0), 0.1 * deviation, rtol=0.1, atol=0)
    seen.clear()
    regularizer(model, torch.zeros(4000, 5, dtype=torch.float64))
    assert not torch.equal(seen[0], start)


class Overflowing(LinearMap):
    """Its inverse is infinite for latents whose first entry is above 1."""

    def inverse(self, z):
        blown = (z[:, :1] > 1).to(z) * 1e308 * 10
        return super().inverse(z) * (1 + blown)


def test_lost_draws_are_left_out_of_the_log_form_and_of_its_gradient():
    model, x = Overflowing(matrix()), torch.zeros(50, 5, dtype=torch.float64)
    z, v = noise(0, (50, 5), (50, 5))
    lost = ((z[:, 0] > 1) | (z[:, 0] + 0.1 * v[:, 0] > 1)).sum()
    assert 0 < lost < 50
    regularizer = FiniteDifferences(1.0, direction="inverse", at="prior", form="log")
    ours = regularizer(model, x)
    theirs = literal_finite_differences_at_prior(model, z, v, 1.0, form="log")
    torch.testing.assert_close(ours, theirs)
    assert flat_gradient(ours, model).isfinite().all()
    square = FiniteDifferences(1.0, direction="inverse", at="prior")
    assert not square(model, x).isfinite()


def test_a_batch_of_lost_draws_gives_zero():
    model, x = Overflowing(matrix()), torch.zeros(1, 5, dtype=torch.float64)
    regularizer = FiniteDifferences(1.0, direction="inverse", at="prior", form="log")
    values = [regularizer(model, x).item() for _ in range(20)]
    assert 0.0 in values


def test_the_log_form_at_the_data():
    model, (x,) = TwoCouplings().double(), noise(5, (4, 6))
    v, v_star = noise(0, (4, 6), (4, 6))
    z = model(x)
    forward = ((model(x + 0.1 * v) - z) / 0.1).square().sum(1)
    inverse = ((model.inverse(z + 0.1 * v_star) - x) / 0.1).square().sum(1)
    expected = 6 * ((1 + forward / 6).log().mean() + (1 + inverse / 6).log().mean())
    torch.testing.assert_close(FiniteDifferences(1.0, form="log")(model, x), expected)


def test_published_takes_no_group():
    with pytest.raises(ValueError, match="no group"):
        FiniteDifferences(1.0, convention="published", group=object())
