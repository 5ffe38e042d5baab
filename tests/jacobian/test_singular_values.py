"""Lanczos, dense Jacobians, gains and log-determinants against references and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.core.layer_jacobian import NotApplicable
from inn_guard.jacobian.chain import Linearization, LogScaledVector, ScaledLinearization
from inn_guard.jacobian.inverse_gains import inverse_gains, layer_extremes
from inn_guard.jacobian.lanczos import gap_free_error, largest_singular_value
from inn_guard.jacobian.singular_values import extreme_singular_values, full_jacobian, spectrum
from inn_guard.layers.chain import Chain
from tests.cases.case import seeded
from tests.cases.toys import Embedding, Linear, Warp, random_chain
from tests.oracles import jacobian as reference_jacobian
from tests.oracles import transforms as reference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest(A: torch.Tensor, **limits):
    """Of a stack of matrices (B, m, n)."""
    start = torch.randn(len(A), A.shape[2], generator=generator(), dtype=torch.float64).to(A.dtype)
    return largest_singular_value(
        lambda v: LogScaledVector.from_vector(torch.einsum("bij,bj->bi", A, v)),
        lambda u: LogScaledVector.from_vector(torch.einsum("bij,bi->bj", A, u)),
        start,
        **limits,
    )


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 3, 3), (4, 60, 60), (3, 40, 25), (3, 25, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_is_the_svd(shape, dtype):
    A = torch.randn(shape, generator=generator(), dtype=torch.float64).to(dtype)
    found = largest(A, tolerance=1e-6)
    exact = torch.linalg.svdvals(A.double())[:, 0]
    assert (found.log_value.exp() / exact - 1).abs().max() < 1e-5
    image = torch.einsum("bij,bj->bi", A.double(), found.right.double()).norm(dim=1)
    assert (image / exact - 1).abs().max() < 1e-5


@given(
    st.integers(min_value=2, max_value=40),
    st.floats(min_value=0, max_value=12),
    st.integers(min_value=0, max_value=10**6),
    st.sampled_from([1e-1, 1e-2, 1e-3]),
)
def test_tolerance_is_kept_and_the_truth_never_exceeded(dimension, decades, seed, tolerance):
    """Of 40 random starts at least 32 (expected: 36) end within the tolerance."""
    starts = 40
    Q = torch.linalg.qr(
        torch.randn(2, dimension, dimension, generator=generator(seed), dtype=torch.float64)
    ).Q
    A = Q[:1] @ torch.diag(torch.logspace(0, -decades, dimension, dtype=torch.float64)) @ Q[1:]
    ratio = largest(A.expand(starts, -1, -1), tolerance=tolerance).log_value.exp()
    assert ratio.max() < 1 + 1e-10
    assert (1 - ratio <= tolerance).double().mean() >= 0.8


def decaying(count: int, dimension: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Random matrices with singular values from 1 to 0.01, and their right singular vectors."""
    noise = torch.randn(2, count, dimension, dimension, generator=generator(), dtype=torch.float64)
    left, right = torch.linalg.qr(noise).Q
    values = torch.logspace(0, -2, dimension, dtype=torch.float64)
    return left * values @ right.mT, right


def from_guess(A: torch.Tensor, guess: torch.Tensor, seed: int):
    def times(v):
        return LogScaledVector.from_vector(torch.einsum("bij,bj->bi", A, v))

    def transposed(u):
        return LogScaledVector.from_vector(torch.einsum("bij,bi->bj", A, u))

    start = torch.randn(guess.shape, generator=generator(seed), dtype=torch.float64)
    return largest_singular_value(times, transposed, start, tolerance=1e-2, guess=guess)


def test_a_guess_near_the_largest_direction_takes_two_steps():
    A, _ = decaying(8)
    before = largest(A, tolerance=1e-2)
    assert before.steps.min() > 4
    moved = A + 1e-3 * torch.randn(A.shape, generator=generator(1), dtype=torch.float64)
    found = from_guess(moved, before.right, seed=2)
    exact = torch.linalg.svdvals(moved)[:, 0]
    assert found.steps.max() == 2
    assert ((1 - found.log_value.exp() / exact).abs() <= 1e-2).all()


def test_a_new_largest_direction_is_found_at_once_or_covered_by_the_error():
    A, right = decaying(64)
    guess, new = right[:, :, 0], right[:, :, 100]
    image = torch.einsum("bij,bj->bi", A, new)
    length = image.norm(dim=1)[:, None, None]
    for factor in (4.0, 30.0):
        changed = A + (factor / length - 1) * image[:, :, None] * new[:, None, :]
        found = from_guess(changed, guess, seed=3)
        error = 1 - found.log_value.exp() / factor
        assert (error <= 1e-2).double().mean() >= 0.9
        assert (found.log_value.exp() * (1 + found.relative_error) >= factor).double().mean() >= 0.9


def test_a_slightly_larger_direction_is_found_within_a_few_looks():
    A, right = decaying(32)
    guess, new = right[:, :, 0], right[:, :, 100]
    image = torch.einsum("bij,bj->bi", A, new)
    length = image.norm(dim=1)[:, None, None]
    changed = A + (1.5 / length - 1) * image[:, :, None] * new[:, None, :]
    for look in range(6):
        found = from_guess(changed, guess, seed=look)
        guess = found.right
    assert ((1 - found.log_value.exp() / 1.5).abs() <= 1e-2).all()


def test_a_guess_that_is_not_finite_is_none():
    A, _ = decaying(2)
    found = from_guess(A, torch.full((2, 200), math.nan, dtype=torch.float64), seed=4)
    assert (found.log_value.exp() - 1).abs().max() <= 3e-2


def test_error_estimates_hold_on_flat_spectra():
    A = torch.randn(40, 200, 200, generator=generator(), dtype=torch.float64)
    exact = torch.linalg.svdvals(A)[:, 0]
    for tolerance in (1e-2, 1e-3):
        found = largest(A, tolerance=tolerance)
        error = 1 - found.log_value.exp() / exact
        assert (error <= tolerance).float().mean() >= 0.95
        assert (error <= 3 * found.relative_error + 1e-12).float().mean() >= 0.9
        assert (error <= found.gap_free_error).float().mean() >= 0.99


def test_identity_and_equal_values_break_down_exactly():
    found = largest(torch.stack([3 * torch.eye(7), torch.eye(7)]))
    assert found.log_value.exp().tolist() == pytest.approx([3, 1])
    assert found.relative_error.tolist() == [0, 0]
    assert found.gap_free_error.tolist() == [0, 0]
    assert found.steps.tolist() == [1, 1]


def test_zero_and_non_finite_maps_do_not_spoil_their_neighbours():
    A = torch.stack(
        [
            torch.zeros(4, 4),
            torch.full((4, 4), torch.nan),
            torch.diag(torch.arange(1.0, 5)),
            torch.eye(4),
        ]
    )
    A[3, 0, 0] = torch.inf
    found = largest(A)
    assert found.log_value[0] == -math.inf
    assert found.log_value[[1, 3]].isnan().all()
    assert found.log_value[2].exp() == pytest.approx(4)


def test_gap_free_error_is_the_formula_and_shrinks():
    # 1.648 sqrt(D) exp(-sqrt(e) (2 k - 1)) = 0.01 solved by hand for D = 3072, k = 33
    e = (math.log(1.648 * math.sqrt(3072) / 0.01) / 65) ** 2
    assert gap_free_error(33, 3072) == pytest.approx(1 / math.sqrt(1 - e) - 1)
    bars = [gap_free_error(k, 10**5) for k in range(12, 60)]
    assert all(b > a for a, b in zip(bars[1:], bars, strict=False))


def nflows_chain(depth: int, grown: float):
    """An unmodified nflows chain of affine couplings over 19 dimensions, its weights grown."""
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    with seeded(0, torch.float32):
        steps = []
        for k in range(depth):
            mask = torch.ones(19)
            mask[k % 2 :: 2] = -1
            steps.append(
                AffineCouplingTransform(mask, lambda i, o: ResidualNet(i, o, 24, num_blocks=1))
            )
        flow = CompositeTransform(steps)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(grown)
        return wrap(flow.eval()), torch.randn(2, 19)


@pytest.mark.thorough
def test_chained_at_the_forward_states_float32_beats_a_dense_float64_decomposition():
    model, x = nflows_chain(32, grown=1.75)
    found = extreme_singular_values(Linearization(model, x), generator=generator(), tolerance=1e-4)
    tops, bottoms = reference_jacobian.log_extreme_singular_values(
        reference_jacobian.layer_jacobians(model, x)
    )
    assert (found.log_max - torch.tensor(tops)).abs().max() < 2e-3
    assert (found.log_min - torch.tensor(bottoms)).abs().max() < 2e-3
    # the same Jacobian, formed and decomposed in float64, has lost its smallest value, and says so
    dense = spectrum(full_jacobian(model.to_dtype(torch.float64).forward, x.double()))
    assert (dense.values[:, -1].log() - torch.tensor(bottoms)).min() > math.log(100)
    assert not dense.resolved[:, -1].any()
    # and the library's own round trip is no number any more
    assert not model.inverse(model(x)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_beyond_the_range_of_floats(dtype):
    scales = torch.tensor([1e-8, 1.0, 1e7])
    model = Chain(*(Linear(torch.diag(scales)) for _ in range(60))).to_dtype(dtype)
    found = extreme_singular_values(
        Linearization(model, torch.zeros(2, 3, dtype=dtype)), generator=generator()
    )
    assert found.log_max.div(math.log(10)).tolist() == pytest.approx([420.0] * 2, abs=1e-3)
    assert found.log_min.div(math.log(10)).tolist() == pytest.approx([-480.0] * 2, abs=1e-3)
    assert found.log_condition.div(math.log(10)).tolist() == pytest.approx([900.0] * 2, abs=1e-3)


def test_extremes_of_a_nonlinear_chain_are_those_of_its_dense_jacobian():
    model, x = random_chain(depth=4, spread=0.5), torch.randn(5, 6)
    exact = reference.singular_values(reference.jacobian(model.forward, x))
    found = extreme_singular_values(Linearization(model, x), generator=generator(), tolerance=1e-8)
    torch.testing.assert_close(found.log_max, exact[:, 0].log(), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.log_min, exact[:, -1].log(), atol=1e-6, rtol=0)


def test_extremes_repeat_with_the_same_generator():
    model, x = random_chain(), torch.randn(3, 6)
    first, again = (
        extreme_singular_values(Linearization(model, x), generator=generator(7)) for _ in range(2)
    )
    assert torch.equal(first.log_condition, again.log_condition)


def test_extremes_of_a_rectangular_map_have_no_answer():
    with pytest.raises(NotApplicable):
        extreme_singular_values(
            Linearization(Embedding(5, 3), torch.randn(2, 5)), generator=generator()
        )


@pytest.mark.parametrize("latent", [3, 700])
def test_dense_jacobian_is_the_row_by_row_one(latent):
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, latent))
    x = torch.randn(2, 8)
    torch.testing.assert_close(full_jacobian(net, x), reference.jacobian(net, x))


def test_dense_jacobian_without_batching_rule_goes_row_by_row():
    class Awkward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            if float(gradient.sum()) > 1e9:  # a data-dependent branch cannot be batched
                return gradient
            return 2 * x * gradient

    x = torch.randn(2, 4)
    torch.testing.assert_close(full_jacobian(Awkward.apply, x), torch.diag_embed(2 * x))


def test_spectrum_labels_what_is_not_resolved():
    values = torch.tensor([[1.0, 1e-3, 1e-13, 1e-16], [1.0, 1.0, 1.0, float("nan")]])
    found = spectrum(torch.diag_embed(values))
    assert found.resolved.tolist() == [[True, True, True, False], [False] * 4]
    assert found.values[1].isnan().all()
    assert spectrum(torch.diag_embed(values[:1]).float()).resolved.tolist() == [
        [True, True, False, False]
    ]


@pytest.mark.parametrize("probes", [6, 50])
def test_gains_with_all_probes_are_exact(probes):
    model, x = random_chain(depth=3), torch.randn(2, 6)
    unit = torch.logspace(-3, 3, 6)
    errors = [torch.rand(2, 6) for _ in range(7)]
    expected = reference_jacobian.sizes_of_errors(model, x, errors, unit=unit)
    found = inverse_gains(Linearization(model, x), unit=unit, probes=probes, generator=generator())
    assert found.exact
    for k, error in enumerate(errors):
        torch.testing.assert_close(found.log_size(k, error).exp(), expected[k])


def test_gains_with_few_probes_are_unbiased():
    model, x = random_chain(depth=3, dimension=20), torch.randn(1, 20)
    unit = torch.logspace(-1, 1, 20)
    errors = [torch.rand(1, 20) for _ in range(7)]
    expected = reference_jacobian.sizes_of_errors(model, x, errors, unit=unit)
    linearization = Linearization(model, x)
    squares = []
    for seed in range(30):
        found = inverse_gains(linearization, unit=unit, probes=4, generator=generator(seed))
        sizes = [found.log_size(k, error).exp() for k, error in enumerate(errors)]
        squares.append(torch.stack(sizes).square())
    mean, standard_error = torch.stack(squares).mean(0), torch.stack(squares).std(0) / 30**0.5
    assert ((mean - expected.square()).abs() <= 4 * standard_error + 1e-12).all()


@pytest.mark.parametrize("dimension", [6, 20])  # formed, and by an iteration
def test_layer_extremes_are_the_svd_of_the_layer(dimension):
    model, x = Warp(dimension), torch.randn(3, dimension)
    exact = reference.singular_values(reference.jacobian(model.forward, x))
    forward, backward = layer_extremes(model.linearize(x), x, generator=generator(), tolerance=1e-6)
    torch.testing.assert_close(forward.exp(), exact[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(backward.exp(), 1 / exact[:, -1], rtol=1e-5, atol=0)


def test_units_of_each_sample_stay_with_it():
    """With samples that converge at different steps, of which the others are selected."""
    model, x = random_chain(depth=3, dimension=20), torch.randn(8, 20)
    unit = torch.rand(8, 20) + torch.logspace(-2, 2, 8)[:, None]
    scaled = ScaledLinearization(Linearization(model, x), unit)
    found = extreme_singular_values(scaled, generator=generator(), tolerance=1e-8, max_steps=60)
    jacobian = reference.jacobian(model.forward, x) * unit[:, None]
    exact = reference.singular_values(jacobian)
    torch.testing.assert_close(found.log_max.exp(), exact[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.log_min.exp(), exact[:, -1], rtol=1e-4, atol=0)
