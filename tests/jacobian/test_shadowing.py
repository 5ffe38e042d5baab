"""Shadowing windows against exact orbits in 60 digits; the block solver against dense algebra."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.core.missing import NotApplicable
from inn_guard.jacobian.shadowing import BlockBidiagonal, ShadowingWindow, shadowing_window
from tests.cases.toys import Embedding

DIGITS = 60


def points(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)


class Coupling(Invertible):
    """(a, b) -> (b exp(s) + t, a) with s = gain tanh(W a) and t = V a."""

    def __init__(self, dimension: int, gain: float, seed: int) -> None:
        super().__init__()
        self.half = dimension // 2
        self.gain = gain
        inner, shift = points(2 * self.half, self.half, seed).split(self.half)
        self.inner = torch.nn.Parameter(inner)
        self.shift = torch.nn.Parameter(shift)

    def conditioned(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return self.gain * torch.tanh(a @ self.inner.T), a @ self.shift.T

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(self.half, dim=1)
        s, t = self.conditioned(a)
        return torch.cat([b * s.exp() + t, a], dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        c, a = z.split(self.half, dim=1)
        s, t = self.conditioned(a)
        return torch.cat([a, (c - t) * (-s).exp()], dim=1)

    def exactly(self, x: list) -> tuple[list, mpmath.matrix]:
        """The image and the Jacobian of one point, in mpmath's precision."""
        half = self.half
        a, b = x[:half], x[half:]
        W, V = self.inner.tolist(), self.shift.tolist()
        bent = [mpmath.tanh(mpmath.fdot(row, a)) for row in W]
        stretch = [mpmath.exp(self.gain * value) for value in bent]
        image = [b[i] * stretch[i] + mpmath.fdot(V[i], a) for i in range(half)]
        J = mpmath.zeros(2 * half, 2 * half)
        for i in range(half):
            slope = b[i] * stretch[i] * self.gain * (1 - bent[i] ** 2)
            for j in range(half):
                J[i, j] = slope * W[i][j] + V[i][j]
            J[i, half + i] = stretch[i]
            J[half + i, i] = 1
        return image + a, J


def chain(dimension: int, depth: int, gain: float) -> list[Coupling]:
    return [Coupling(dimension, gain, seed) for seed in range(depth)]


def forward_orbit(layers: list[Coupling], x: Tensor) -> list[Tensor]:
    states = [x]
    with torch.no_grad():
        for layer in layers:
            states.append(layer(states[-1]))
    return states


def inverse_orbit(layers: list[Coupling], z: Tensor) -> list[Tensor]:
    states = [z]
    with torch.no_grad():
        for layer in reversed(layers):
            states.append(layer.inverse(states[-1]))
    return states[::-1]


def window(layers: list[Coupling], states: list[Tensor], **options) -> ShadowingWindow:
    return shadowing_window([layer.to_dtype(torch.float64) for layer in layers], states, **options)


def distance_of_the_exact_orbit(layers, states, *, relative: bool, steps: int = 4) -> float:
    """max_k |h_k - exact_k| of one sample, by dense Gauss-Newton steps in 60 digits."""
    depth, size = len(layers), states[0].shape[1]
    with mpmath.workdps(DIGITS):
        start = [[mpmath.mpf(value) for value in state[0].tolist()] for state in states]
        scale = [mpmath.mpf(1)] * (depth + 1)
        if relative:
            scale = [mpmath.norm(mpmath.matrix(state)) for state in start]
        orbit = [list(state) for state in start]
        for _ in range(steps):
            A = mpmath.zeros(depth * size, (depth + 1) * size)
            errors = mpmath.zeros(depth * size, 1)
            for k, layer in enumerate(layers):
                image, J = layer.exactly(orbit[k])
                for i in range(size):
                    row = k * size + i
                    errors[row] = (orbit[k + 1][i] - image[i]) / scale[k + 1]
                    A[row, row + size] = 1
                    for j in range(size):
                        A[row, k * size + j] = -J[i, j] * scale[k] / scale[k + 1]
            u = A.T * mpmath.lu_solve(A * A.T, errors)
            for k in range(depth + 1):
                orbit[k] = [orbit[k][i] - scale[k] * u[k * size + i] for i in range(size)]
        left = 0
        for k, layer in enumerate(layers):
            image, _ = layer.exactly(orbit[k])
            left = max(left, *(abs(orbit[k + 1][i] - image[i]) for i in range(size)))
        assert left < 1e-40
        apart = [
            mpmath.norm(mpmath.matrix(orbit[k]) - mpmath.matrix(start[k])) / scale[k]
            for k in range(depth + 1)
        ]
        return float(max(apart))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("dimension", "depth", "gain", "draw"),
    [(2, 16, 0.7, False), (2, 16, 1.0, True), (4, 10, 1.0, False), (4, 10, 1.5, True)],
)
def test_the_window_is_the_distance_of_the_exact_orbit(dimension, depth, gain, draw, relative):
    layers = chain(dimension, depth, gain)
    start = points(1, dimension, depth)
    states = (inverse_orbit if draw else forward_orbit)(layers, start)
    found = window(layers, states, relative=relative)
    truth = distance_of_the_exact_orbit(layers, states, relative=relative)
    assert bool(found.converged.all())
    assert found.window.item() == pytest.approx(truth, rel=0.05)


def test_an_orbit_whose_round_trip_is_lost_has_a_small_window():
    layers = chain(4, 40, 1.5)
    z = points(4, 4, 1)
    states = inverse_orbit(layers, z)
    again = forward_orbit(layers, states[0])[-1]
    lost = ~((again - z).norm(dim=1) <= 0.01 * z.norm(dim=1))
    assert bool(lost.any())
    found = window(layers, states, relative=True)
    assert bool((found.window[lost] < 1e-4).all())
    assert bool((found.residual < 1e-6 * found.first_residual).all())


def test_samples_of_a_batch_are_measured_alone():
    layers = chain(2, 8, 0.7)
    states = forward_orbit(layers, points(3, 2, 1))
    together = window(layers, states)
    for row in range(3):
        alone = window(layers, [state[row : row + 1] for state in states])
        torch.testing.assert_close(alone.window, together.window[row : row + 1], rtol=1e-3, atol=0)


def test_the_new_orbit_is_an_orbit():
    layers = chain(4, 12, 1.0)
    states = forward_orbit(layers, points(2, 4, 1))
    found = window(layers, states)
    for k, layer in enumerate(layers):
        image = layer.to_dtype(torch.float64)(found.orbit[k])
        torch.testing.assert_close(image, found.orbit[k + 1], rtol=1e-12, atol=1e-12)


def test_a_state_that_is_not_finite_has_no_window():
    layers = chain(2, 3, 0.7)
    states = forward_orbit(layers, points(2, 2, 1))
    states[1][0] = math.nan
    found = window(layers, states)
    assert found.converged.tolist() == [False, True]


def dense(jacobians: Tensor) -> Tensor:
    """A of one sample, (N D, (N + 1) D)."""
    depth, _, size, _ = jacobians.shape
    A = torch.zeros(depth * size, (depth + 1) * size, dtype=torch.float64)
    for k in range(depth):
        rows = slice(k * size, (k + 1) * size)
        A[rows, k * size : (k + 1) * size] = -jacobians[k, 0]
        A[rows, (k + 1) * size : (k + 2) * size] = torch.eye(size)
    return A


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("stretch", [0.1, 1.0, 100.0])
def test_the_block_solver_is_the_pseudo_inverse(depth, stretch):
    generator = torch.Generator().manual_seed(depth)
    jacobians = stretch * torch.randn(depth, 1, 3, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(depth, 1, 3, generator=generator, dtype=torch.float64)
    system, A = BlockBidiagonal(jacobians), dense(jacobians)
    expected = torch.linalg.pinv(A) @ right.flatten()
    torch.testing.assert_close(system.least_solution(right).flatten(), expected)
    smallest = torch.linalg.svdvals(A)[-1].item()
    assert 0.8 / smallest <= system.inverse_norm().item() <= 1.001 / smallest


def test_wrong_arguments_are_named():
    layers = chain(2, 2, 0.7)
    with pytest.raises(ValueError, match="one state more than layers"):
        shadowing_window(layers, [torch.zeros(1, 2)] * 2)
    with pytest.raises(NotApplicable, match="keep the number of dimensions"):
        shadowing_window([Embedding(4, 2)], [torch.zeros(1, 4), torch.zeros(1, 2)])
