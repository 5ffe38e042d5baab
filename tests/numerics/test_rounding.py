"""Upper rounds outwards: every operation against exact fractions, for any two numbers."""

from __future__ import annotations

import json
import math
import pickle
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from inn_guard.numerics.rounding import UNIT, Upper, enlarged, frobenius_norm, gamma

numbers = st.floats(min_value=0, max_value=1e150)
positive = st.floats(min_value=1e-150, max_value=1e150)
signed = st.floats(min_value=-1e150, max_value=1e150)


def above(bound: float, truth: Fraction) -> bool:
    return math.isinf(bound) or Fraction(bound) >= truth


@given(signed, signed)
def test_sums_and_differences_are_upper_bounds(a, b):
    assert above(Upper(a) + b, Fraction(a) + Fraction(b))
    assert above(b + Upper(a), Fraction(a) + Fraction(b))
    assert above(Upper(a) - b, Fraction(a) - Fraction(b))
    assert Fraction(b - Upper(a)) <= Fraction(b) - Fraction(a)


@given(numbers, numbers)
def test_products_are_upper_bounds(a, b):
    assert above(Upper(a) * b, Fraction(a) * Fraction(b))
    assert above(b * Upper(a), Fraction(a) * Fraction(b))
    assert above(Upper(a) * Upper(b), Fraction(a) * Fraction(b))


@given(numbers, positive)
def test_quotients_are_upper_bounds_and_quotients_by_an_upper_bound_are_lower_ones(a, b):
    assert above(Upper(a) / b, Fraction(a) / Fraction(b))
    assert Fraction(a / Upper(b)) <= Fraction(a) / Fraction(b)


@given(numbers)
def test_roots_are_upper_bounds(a):
    assert Fraction(Upper(a).sqrt()) ** 2 >= Fraction(a)


@given(st.lists(positive, min_size=1, max_size=6))
def test_a_whole_expression_is_an_upper_bound_and_close(values):
    bound, truth = Upper(0.0), Fraction(0)
    for value in values:
        bound, truth = bound * 0.3 + value, truth * Fraction(0.3) + Fraction(value)
    assert Fraction(bound) >= truth
    assert Fraction(bound) <= truth * (1 + Fraction(1, 10**13))


@given(st.lists(numbers, min_size=1, max_size=4))
def test_sum_prod_max_and_min_keep_the_type(values):
    uppers = [Upper(value) for value in values]
    results = sum(uppers), math.prod(uppers), Upper.max(*values), Upper.min(*values)
    assert all(isinstance(result, Upper) for result in results)
    assert results[2:] == (max(values), min(values))


@given(numbers)
def test_zero_and_one_change_nothing(a):
    assert Upper(a) + 0 == a
    assert Upper(a) * 1 == a


def test_what_is_not_known_is_infinite():
    assert Upper(math.nan) == math.inf
    assert Upper(0.0) * math.inf == math.inf
    assert Upper(math.inf) - math.inf == math.inf
    assert Upper(1.0) / 0.0 == math.inf
    assert Upper(1.0) / (1 - Upper(1.0)) == math.inf


def test_what_would_not_be_a_bound_is_refused():
    for operation in (lambda u: 1.0 / (u - u), lambda u: u / u, lambda u: u**2, lambda u: 2**u):
        with pytest.raises(TypeError, match="expected"):
            operation(Upper(2.0))
    with pytest.raises(ValueError, match="not negative"):
        Upper(-1.0) * 2
    with pytest.raises(ValueError, match="not negative"):
        Upper(-1.0) / 2


def test_an_upper_is_a_float_for_everybody_else():
    u = Upper(1.5)
    assert json.dumps(u) == "1.5"
    assert pickle.loads(pickle.dumps(u)) == u
    assert isinstance(pickle.loads(pickle.dumps(u)), Upper)
    assert torch.equal(u * torch.ones(2), torch.full((2,), 1.5))
    assert torch.equal(torch.ones(2) * u, torch.full((2,), 1.5))


@given(st.integers(min_value=1, max_value=2**52))
def test_gamma_is_an_upper_bound(k):
    unit = Fraction(UNIT)
    assume(k * unit < 1)
    assert Fraction(gamma(k)) >= k * unit / (1 - k * unit)


def test_enlarged_sums_are_never_below_40_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 300, generator=generator, dtype=torch.float64)
    bounds = enlarged(x.sum(1), 300)
    with mpmath.workdps(40):
        for row, bound in zip(x.tolist(), bounds.tolist(), strict=True):
            assert mpmath.fsum(row) <= bound <= mpmath.fsum(row) * (1 + mpmath.mpf(10) ** -12)
    assert float(enlarged(torch.zeros(()), 3)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_frobenius_norms_are_never_below_40_digits(dtype):
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        A = torch.randn(3, 4, 5, generator=generator, dtype=dtype)
        bound = frobenius_norm(A)
        with mpmath.workdps(40):
            squares = [
                mpmath.fsum(abs(mpmath.mpmathify(z)) ** 2 for z in matrix)
                for matrix in A.flatten(1).tolist()
            ]
            truth = mpmath.sqrt(max(squares))
            assert truth <= bound <= truth * (1 + mpmath.mpf(10) ** -12)
    assert frobenius_norm(torch.zeros(2, 0, 3)) == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e150])
def test_frobenius_norms_of_any_scale(scale):
    A = scale * torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert 5 * scale <= frobenius_norm(A) <= 5 * scale * (1 + 1e-12)
