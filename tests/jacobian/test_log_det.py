"""Log-determinants of layers: structure found by probes, dense remainders, bounds of quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import Missing
from inn_guard.jacobian.chain import Linearization
from inn_guard.jacobian.log_det import (
    LayerLogDet,
    layer_log_det,
    stochastic_log_det,
)
from inn_guard.layers.chain import Chain
from tests.cases.toys import Linear, Warp
from tests.oracles import transforms as reference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class Two(Invertible):
    """Two couplings in one layer, mixed before and after: z1 = s1 x1 + t1(x2), z2 = s2 x2 + t2(z1).

    Args:
        dimension: an even number.
        before: matrix or permutation of the input.
        after: of the output.
        leak: how much of everything else is added to the active half.
    """

    def __init__(
        self, dimension: int, *, before: Tensor, after: Tensor, both: bool, leak: float = 0.0
    ) -> None:
        super().__init__()
        half = dimension // 2
        self.weights = [normal(half, half, seed=seed) / half**0.5 for seed in range(4)]
        self.before, self.after, self.both, self.leak = before, after, both, leak

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x @ self.before.T).chunk(2, dim=1)
        s, t = torch.tanh(b @ self.weights[0]), b @ self.weights[1]
        a = a * s.exp() + t + self.leak * torch.tanh(a @ self.weights[2])
        if self.both:
            s, t = torch.tanh(a @ self.weights[2]), a.square() @ self.weights[3]
            b = -b * s.exp() + t
        return torch.cat([a, b], dim=1) @ self.after.T

    def inverse(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def shuffle(dimension: int, seed: int) -> Tensor:
    return torch.eye(dimension, dtype=torch.float64)[
        torch.randperm(dimension, generator=generator(seed))
    ]


@given(seed=st.integers(0, 1000), both=st.booleans(), permuted=st.booleans())
def test_couplings_are_taken_apart_without_a_dense_jacobian(seed, both, permuted):
    dimension = 24
    eye = torch.eye(dimension, dtype=torch.float64)
    # two couplings are cut apart at half of the outputs only
    mix = shuffle(dimension, seed) if permuted and not both else eye
    layer = Two(dimension, before=shuffle(dimension, seed), after=mix, both=both)
    x = normal(5, dimension, seed=seed)
    found = layer_log_det(layer, x, max_dense=0)
    assert isinstance(found, LayerLogDet)
    exact = torch.linalg.slogdet(reference.jacobian(layer.forward, x))
    torch.testing.assert_close(found.log_abs, exact.logabsdet)
    assert len({(a * b).item() for a, b in zip(found.sign, exact.sign, strict=True)}) == 1


@pytest.mark.parametrize("leak", [1e-8, 1e-3, 1.0])
def test_what_is_nearly_a_coupling_is_decomposed(leak):
    dimension = 24
    eye = torch.eye(dimension, dtype=torch.float64)
    layer = Two(dimension, before=eye, after=eye, both=False, leak=leak)
    x = normal(3, dimension)
    assert isinstance(layer_log_det(layer, x, max_dense=0), Missing)
    found = layer_log_det(layer, x, max_dense=dimension)
    exact = reference.log_abs_det(reference.jacobian(layer.forward, x))
    torch.testing.assert_close(found.log_abs, exact)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_channels_that_are_mixed_at_every_position(condition):
    class Mixed(Invertible):
        """A coupling of channels, and a matrix over the channels of every position after it."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.kernel = normal(channels // 2, channels // 2, 3, 3)
            scales = torch.logspace(0, -math.log10(condition), channels, dtype=torch.float64)
            self.mix = normal(channels, channels) @ torch.diag(scales)

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=1)
            s = torch.tanh(torch.nn.functional.conv2d(b, self.kernel, padding=1))
            return torch.einsum("ij,bjhw->bihw", self.mix, torch.cat([a * s.exp() + s, b], 1))

        def inverse(self, z: Tensor) -> Tensor:
            raise NotImplementedError

    layer, x = Mixed(6), normal(3, 6, 4, 4)
    found = layer_log_det(layer, x, max_dense=0)
    exact = torch.linalg.slogdet(reference.jacobian(layer.forward, x))
    torch.testing.assert_close(found.log_abs, exact.logabsdet, rtol=1e-9, atol=0)
    assert len(set((found.sign * exact.sign).tolist())) == 1


def test_a_sample_that_is_not_finite_does_not_spoil_the_others():
    eye = torch.eye(24, dtype=torch.float64)
    layer = Two(24, before=eye, after=eye, both=False)
    x = normal(3, 24)
    x[1] = math.nan
    found = layer_log_det(layer, x, max_dense=24)
    assert found.log_abs.isnan().tolist() == [False, True, False]


def test_a_column_of_zeros_is_singular():
    matrix = torch.eye(24, dtype=torch.float64)
    matrix[3, 3] = 0
    found = layer_log_det(Linear(matrix), normal(2, 24), max_dense=24)
    assert found.log_abs.tolist() == [-math.inf, -math.inf]


def sum_over_layers(model: Invertible, x: Tensor) -> Tensor:
    total = torch.zeros(len(x), dtype=torch.float64)
    for layer in model.layers():
        total = total + layer_log_det(layer, x, max_dense=24).log_abs
        x = layer(x)
    return total


def test_the_sum_over_layers_is_that_of_the_product():
    model = Chain(Linear(normal(6, 6)), Warp(6), Linear(normal(6, 6, seed=1)))
    x = normal(3, 6)
    exact = reference.log_abs_det(reference.jacobian(model.forward, x))
    torch.testing.assert_close(sum_over_layers(model, x), exact)


def test_the_sum_over_layers_holds_where_the_product_is_singular_in_float64():
    scales = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)
    rotations = [torch.linalg.qr(normal(3, 3, seed=k)).Q for k in range(4)]
    model = Chain(*(Linear(q @ torch.diag(scales)) for q in rotations))
    x = torch.zeros(1, 3, dtype=torch.float64)
    assert sum_over_layers(model, x).item() == pytest.approx(0, abs=1e-6)


def spread(dimension: int, condition: float) -> Tensor:
    values = torch.logspace(0, -math.log10(condition), dimension, dtype=torch.float64)
    left, right = (torch.linalg.qr(normal(dimension, dimension, seed=k)).Q for k in (1, 2))
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("condition", [3.0, 1e2, 1e4, 1e6])
def test_quadrature_from_every_unit_vector_is_bounded_on_both_sides(condition, monkeypatch):
    """With the unit vectors as probes the mean is the trace itself: no chance is left."""
    matrix = spread(20, condition)
    exact = torch.linalg.slogdet(matrix).logabsdet.item()
    basis = iter(torch.eye(20, dtype=torch.float64))
    monkeypatch.setattr(
        "inn_guard.jacobian.log_det._probe", lambda like, generator: next(basis)[None]
    )
    found = stochastic_log_det(
        Linearization(Linear(matrix), normal(1, 20)),
        0,
        probes=20,
        steps=4,
        generator=generator(),
    )
    assert abs(found.value.item() - exact) <= found.bias.item() + 1e-9
    assert 0 < found.bias.item() < math.inf


def test_quadrature_is_right_within_its_standard_error():
    matrix, x = spread(30, 30.0), normal(4, 30)
    exact = torch.linalg.slogdet(matrix).logabsdet
    within = 0
    for seed in range(5):
        found = stochastic_log_det(
            Linearization(Linear(matrix), x), 0, probes=6, steps=16, generator=generator(seed)
        )
        off = (found.value - exact).abs()
        within += int((off <= 3 * found.standard_error + found.bias).sum())
    assert within >= 17, "of 20; three standard errors from six probes hold about 97 %"


def test_quadrature_of_a_diagonal_map_is_exact():
    model = Linear(torch.diag(torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)))
    x = torch.zeros(1, 3, dtype=torch.float64)
    found = stochastic_log_det(Linearization(model, x), 0, generator=generator())
    assert found.value.item() == pytest.approx(math.log(8))
    assert found.standard_error.item() == pytest.approx(0, abs=1e-12)
    assert found.bias.item() == pytest.approx(0, abs=1e-12)
