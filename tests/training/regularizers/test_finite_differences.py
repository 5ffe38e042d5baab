from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.training.regularizers import Direction, FiniteDifferences
from tests.oracles.regularizers import (
    Embedding,
    LinearMap,
    Scaling,
    TwoCouplings,
    literal_finite_differences,
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
    """Deviation of the mean over ``samples`` directions from |W|_F^2 (or |W^-1|_F^2) in its standard deviations.

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
def test_value_and_gradients_equal_the_literal_twin(given_z, context_size):
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
    """z moves with the parameters: leaving that out (a detached z) is another gradient, so the twin can tell."""
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


@pytest.mark.parametrize("given_z", [False, True])
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
    """Why the passes leave autocast: per-sample errors of several percent, where float32 has 1e-5."""
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
        return (
            self.strength * torch.randn(x.shape, dtype=x.dtype)
            if self.training
            else torch.zeros_like(x)
        )


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name)
def test_a_map_that_changes_from_pass_to_pass_is_refused(direction):
    x, regularizer = noise(1, (4, 6))[0], FiniteDifferences(1.0, direction=direction)
    model = Noisy(0.1).double().train()
    for z in (None, model(x)):
        with pytest.raises(ValueError, match=r"type model\.eval\(\) before"):
            regularizer(model, x, z)
    twin, plain = (FiniteDifferences(1.0, direction=direction, seed=5) for _ in range(2))
    assert torch.equal(twin(model.eval(), x), plain(copy.deepcopy(model).eval(), x))


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
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        FiniteDifferences(**{"coefficient": 1.0, **settings})


def test_copies_continue_on_their_own():
    model, x = TwoCouplings().double(), noise(1, (4, 6))[0]
    regularizer = FiniteDifferences(1.0)
    regularizer(model, x)
    for twin in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        assert twin == regularizer
        state = regularizer.generator.get_state()
        twin_value = twin(model, x)
        assert torch.equal(regularizer.generator.get_state(), state)
        assert torch.equal(regularizer(model, x), twin_value)
        regularizer.generator.set_state(state)
