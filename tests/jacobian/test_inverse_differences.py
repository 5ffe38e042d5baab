"""J^-1 u by differences: closed forms, the linearization as slow twin, and inverses that lie."""

from __future__ import annotations

import math

import pytest
import torch

from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.inverse_differences import InverseDifferences
from inn_guard.jacobian.rounding_error import rounding_forecast
from inn_guard.layers.chain import Chain
from tests.jacobian.test_rounding_error import Diagonal, couplings


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_a_linear_layer_in_closed_form(scale):
    """z = d x: J^-1 u = u / d, at any size of x and of u."""
    factors = torch.tensor([7.0, 1e-6, -3.0], dtype=torch.float64)
    x, u = scale * torch.randn(5, 3), torch.randn(5, 3) / scale
    got = InverseDifferences(Diagonal(factors), x).inverse_product(0)(u)
    assert torch.allclose(
        got * scale, u / factors * scale, rtol=1e-6, atol=1e-6 * (u / factors * scale).abs().max()
    )


def test_a_curved_layer_in_closed_form():
    """z = sinh x: J^-1 u = u / cosh x."""

    class Sinh(Invertible):
        def forward(self, x):
            return x.sinh()

        def inverse(self, z):
            return z.asinh()

    x, u = torch.randn(6, 4), torch.randn(6, 4)
    got = InverseDifferences(Sinh(), x).inverse_product(0)(u)
    torch.testing.assert_close(got, u / x.cosh(), rtol=1e-6, atol=1e-6)


def test_every_layer_agrees_with_its_linearization():
    model, x = couplings(6, 4, gain=3.0), torch.randn(40, 6)
    fast, slow = InverseDifferences(model, x), Linearization(model, x)
    for k, state in enumerate(slow.states[1:]):
        torch.testing.assert_close(fast.states[k + 1], state)
        u = torch.randn_like(state)
        torch.testing.assert_close(
            fast.inverse_product(k)(u), slow.inverse_product(k)(u), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_the_forecast_is_that_of_the_linearization(gain):
    model, x = couplings(8, 12, gain), torch.randn(64, 8)
    fast = rounding_forecast(InverseDifferences(model, x), probes=2, generator=generator())
    slow = rounding_forecast(Linearization(model, x), probes=2, generator=generator())
    torch.testing.assert_close(fast.log_error, slow.log_error, rtol=0, atol=1e-2)


def scattered_errors(states, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(state.shape, generator=draw) * state.abs() for state in reversed(states)]


def test_errors_carried_at_once_are_the_sum_of_products():
    """sum_k A_k e_k against products of dense-checked layer derivatives, one error at a time."""
    model, x = couplings(6, 4, gain=3.0), torch.randn(40, 6)
    slow, fast = Linearization(model, x), InverseDifferences(model, x)
    errors = scattered_errors(fast.states)
    expected = torch.zeros_like(x)
    for k, error in enumerate(reversed(errors)):
        for j in reversed(range(k)):
            error = slow.inverse_product(j)(error)
        expected = expected + error
    difference = fast.propagate_errors(errors) - expected
    assert (difference.norm(dim=1) < 2e-3 * expected.norm(dim=1)).all()


@pytest.mark.parametrize(("factor", "off"), [(1e-10, 0.0), (2.0, 1e-14)])
def test_errors_are_not_carried_at_once_through_what_explodes_or_is_off(factor, off):
    class Off(Diagonal):
        def inverse(self, z):
            return super().inverse(z) + off

    fast = InverseDifferences(Chain(Off([factor] * 3), Shifted()), torch.randn(4, 3))
    assert fast.propagate_errors(scattered_errors(fast.states)) is None


def test_errors_carried_at_once_leave_out_samples_that_are_not_finite():
    x = torch.randn(4, 3)
    x[1, 2] = math.nan
    fast = InverseDifferences(Diagonal([2.0, 2.0, 2.0]), x)
    errors = scattered_errors(fast.states)
    got, expected = fast.propagate_errors(errors), errors[0] / 2 + errors[1]
    torch.testing.assert_close(got[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-3, atol=1e-3)


def test_errors_beyond_the_range_of_floats():
    layers = [layer for _ in range(20) for layer in (Diagonal([1e-30]), Shifted())]
    got = rounding_forecast(
        InverseDifferences(Chain(*layers).double(), torch.ones(1, 1)), generator=generator()
    )
    assert got.log_error.item() == pytest.approx(20 * 30 * math.log(10), rel=0.01)


class Shifted(Invertible):
    def forward(self, x):
        return x + 1

    def inverse(self, z):
        return z - 1


def test_a_condition_stays_with_its_sample():
    class ByContext(Invertible):
        def forward(self, x):
            return x * self.context

        def inverse(self, z):
            return z / self.context

    factors = torch.tensor([[1.0], [100.0], [1e4]])
    x, u = torch.randn(3, 5), torch.randn(3, 5)
    got = InverseDifferences(ByContext().with_context(factors), x).inverse_product(0)(u)
    torch.testing.assert_close(got, u / factors, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("off", [1e-3, 1e-9])
def test_an_inverse_that_is_off_is_refused(off):
    """The step is 1.5e-8 of the state: an iterative inverse that stops at 1e-9 is off by 7 %."""

    class Off(Shifted):
        def inverse(self, z):
            return z - 1 + off

    with pytest.raises(NotApplicable, match="too far off"):
        InverseDifferences(Off(), torch.randn(4, 3)).inverse_product(0)(torch.randn(4, 3))


def test_samples_that_are_not_finite_say_nothing_about_the_others():
    x, u = torch.randn(4, 3), torch.randn(4, 3)
    x[1, 2] = math.nan
    got = InverseDifferences(Diagonal([2.0, 2.0, 2.0]).double(), x).inverse_product(0)(u)
    torch.testing.assert_close(got[[0, 2, 3]], u[[0, 2, 3]] / 2, rtol=1e-6, atol=1e-9)


def test_float32_is_refused():
    with pytest.raises(ValueError, match="float64"):
        InverseDifferences(Shifted(), torch.ones(2, 2, dtype=torch.float32))
