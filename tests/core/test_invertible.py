"""The contract: what every Invertible keeps, over the cases of tests/cases.

A test is collected for the cases that have the abilities it needs and that do not declare that they
cannot pass it.

Thresholds: rounding errors grow with the condition number, so every threshold is SLACK * eps(dtype)
* condition times the size of the quantity, plus the floor that the case documents (iterative
inverse, constants kept in float32).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.execution.state import changed_state
from inn_guard.jacobian.chain import Linearization
from tests.cases.all import CASES, Case, one_of_each_kind
from tests.cases.case import trainable
from tests.oracles import transforms as reference

SLACK = 50.0  # rounding errors of a few hundred operations in a row
STEP = 1e-6  # of central differences: their error is about STEP^2 + eps / STEP, relative


class Made(NamedTuple):
    model: Invertible
    x: Tensor
    z: Tensor
    J: Tensor  # (B, dim z, dim x)
    sigma: Tensor  # (B, min), largest first

    @property
    def condition(self) -> Tensor:
        return self.sigma[:, 0] / self.sigma[:, -1]

    def x_error(self, eps: float, floor: float = 0.0) -> Tensor:
        """Rounding error of F^-1(F(x)), per sample: of x, and of z seen through the inverse."""
        size = norms(self.x) + (norms(self.z) + 1) / self.sigma[:, -1]
        return SLACK * eps * size + floor * math.sqrt(self.x[0].numel())

    def z_error(self, eps: float, floor: float = 0.0) -> Tensor:
        """Rounding error expected of F(F^-1(z)), per sample."""
        size = norms(self.z) + (norms(self.x) + 1) * self.sigma[:, 0]
        return SLACK * eps * size + floor * math.sqrt(self.x[0].numel()) * self.sigma[:, 0]

    def log_det_error(self, eps: float, floor: float = 0.0) -> Tensor:
        return SLACK * eps * self.x[0].numel() * self.condition + floor


@pytest.fixture(autouse=True)
def _default_dtype_as_at_home(_float64):
    """As for users: constants that a library creates in a call of a float64 model are float32."""
    torch.set_default_dtype(torch.float32)


def fresh(make: Callable[[], tuple[Invertible, Tensor]]) -> tuple[Invertible, Tensor]:
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def made(case: Case) -> Made:
    return _made(case.make)


@functools.cache
def _made(make: Callable[[], tuple[Invertible, Tensor]]) -> Made:
    model, x = fresh(make)
    J = reference.jacobian(model.forward, x)
    return Made(model, x, model(x).detach(), J, reference.singular_values(J))


def needs(*abilities: str) -> Callable[[Callable], Callable]:
    """Run a test of the contract on cases in which all of these fields (or properties) are true."""

    def remember(test: Callable) -> Callable:
        test.needs = abilities
        return test

    return remember


def pytest_generate_tests(metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [case for case in CASES if applies(metafunc.function, case)]
        metafunc.parametrize("case", one_of_each_kind(cases))


def applies(test: Callable, case: Case) -> bool:
    if test.__name__ in case.skips:
        return False
    return all(getattr(case, ability) for ability in getattr(test, "needs", ()))


def norms(t: Tensor) -> Tensor:
    return t.detach().flatten(1).double().norm(dim=1)


def assert_within(error: Tensor, tolerance: Tensor | float) -> None:
    error = error.detach().reshape(-1)
    tolerance = torch.as_tensor(tolerance).expand(error.shape)
    assert bool((error <= tolerance).all()), (
        f"error {error.max():.2e} above {tolerance[error.argmax()]:.2e}"
    )


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def other_latents(case: Case) -> Tensor:
    """Latents that are nobody's encoding: midpoints of two encodings under the same context."""
    model, x, z, *_ = made(case)
    return (z + model(x.roll(1, 0)).detach()) / 2


def test_case_is_deterministic_and_leaves_the_global_generator_alone(case):
    before = torch.get_rng_state()
    model, x = fresh(case.make)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, made(case).x)
    assert torch.equal(model(x).detach(), made(case).z)
    assert x.dtype == torch.float64
    assert len(x) >= 3
    assert bool(case.float64_floor or case.log_det_floor) == bool(case.floor_reason)


def test_inverse_of_forward_is_the_identity(case):
    m = made(case)
    if not case.bijective:
        projected = m.model.inverse(m.z).detach()
        again = m.model.inverse(m.model(projected))
        assert_within(norms(again - projected), m.x_error(eps(torch.float64), case.float64_floor))
        return
    assert_within(
        reference.round_trip(m.model, m.x), m.x_error(eps(torch.float64), case.float64_floor)
    )


@needs("float64_floor")
def test_the_floor_of_the_inverse_is_a_measured_one(case):
    """A floor is more than rounding explains, and not far more than this case shows."""
    m = made(case)
    z = other_latents(case)
    in_x, in_z = reference.round_trip(m.model, m.x), norms(m.model(m.model.inverse(z).detach()) - z)
    unexplained = (in_x > m.x_error(eps(torch.float64))) | (in_z > m.z_error(eps(torch.float64)))
    assert bool(unexplained.any()), f"{in_x.max():.1e} and {in_z.max():.1e} are rounding"
    assert case.float64_floor <= 100 * max(in_x.max().item(), in_z.max().item())


def test_forward_of_inverse_is_the_identity(case):
    m, z = made(case), other_latents(case)
    x = m.model.inverse(z).detach()
    sigma = reference.singular_values(reference.jacobian(m.model.forward, x))
    there = m._replace(x=x, z=z, sigma=sigma)
    assert_within(norms(m.model(x) - z), there.z_error(eps(torch.float64), case.float64_floor))


@needs("has_log_det", "bijective")
def test_log_det_is_that_of_the_autograd_jacobian(case):
    m = made(case)
    z, log_det = m.model.forward_and_log_det(m.x)
    assert log_det.shape == (len(m.x),)
    assert torch.equal(z.detach(), m.z)
    assert_within(
        (log_det - reference.log_abs_det(m.J)).abs(),
        m.log_det_error(eps(torch.float64), case.log_det_floor),
    )


@needs("has_log_det", "has_inverse_log_det")
def test_log_dets_of_the_two_directions_cancel(case):
    m = made(case)
    x, backward = m.model.inverse_and_log_det(m.z)
    assert backward.shape == (len(m.x),)
    assert torch.equal(x.detach(), m.model.inverse(m.z).detach())
    forward = m.model.forward_and_log_det(m.x)[1]
    assert_within(
        (forward + backward).abs(), m.log_det_error(eps(torch.float64), case.log_det_floor)
    )


@needs("has_log_det")
def test_log_prob_is_one_finite_number_per_sample(case):
    m = made(case)
    log_prob = m.model.log_prob(m.x)
    assert log_prob.shape == (len(m.x),)
    assert bool(log_prob.isfinite().all())


@needs("has_layers")
def test_layers_compose_in_both_directions(case):
    m = made(case)
    layers = m.model.layers()
    assert layers
    assert not any(layer.layers() for layer in layers), "layers() is flat"
    x, z = m.x, m.z
    for layer in layers:
        x = layer(x)
    for layer in reversed(layers):
        z = layer.inverse(z)
    assert_within(norms(x - m.z), m.z_error(eps(torch.float64)))
    direct = m.model.inverse(m.z)
    assert_within(norms(z - direct), m.x_error(eps(torch.float64), case.float64_floor))


@needs("has_layers", "has_log_det")
def test_log_dets_of_layers_add_up_in_both_directions(case):
    m = made(case)
    tolerance = m.log_det_error(eps(torch.float64), case.log_det_floor)
    x, total = m.x, m.x.new_zeros(len(m.x))
    for layer in m.model.layers():
        x, log_det = layer.forward_and_log_det(x)
        total = total + log_det
    assert_within((total - m.model.forward_and_log_det(m.x)[1]).abs(), tolerance)
    if not case.has_inverse_log_det:
        return
    z, total = m.z, m.x.new_zeros(len(m.x))
    for layer in reversed(m.model.layers()):
        z, log_det = layer.inverse_and_log_det(z)
        total = total + log_det
    assert_within((total - m.model.inverse_and_log_det(m.z)[1]).abs(), tolerance)


def test_float32_agrees_with_float64(case):
    m = made(case)
    single = m.model.to_dtype(torch.float32)
    x = m.x.float()
    z = single(x)
    back = single.inverse(z.detach())
    assert z.dtype == back.dtype == torch.float32
    assert_within(norms(z - m.z), m.z_error(eps(torch.float32)))
    reached = m.model.inverse(m.z) if not case.bijective else m.x
    assert_within(norms(back - reached), m.x_error(eps(torch.float32), case.float64_floor))
    if case.has_log_det:
        log_det = single.forward_and_log_det(x)[1]
        assert_within(
            (log_det - m.model.forward_and_log_det(m.x)[1]).abs(),
            m.log_det_error(eps(torch.float32)),
        )


def test_in_dtype_converts_a_copy_and_leaves_the_original_alone(case):
    m = made(case)
    with changed_state(m.model) as changed:
        single = m.model.to_dtype(torch.float32)
    assert changed == []
    assert torch.equal(m.model(m.x).detach(), m.z)
    tensors = [*single.parameters(), *single.buffers()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())
    ours = {
        tensor.data_ptr()
        for tensor in [*m.model.parameters(), *m.model.buffers()]
        if tensor.numel()
    }
    assert not ours & {tensor.data_ptr() for tensor in tensors}


@needs("has_parameters")
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_reach_the_parameters(case, direction):
    model, x = fresh(case.make)
    point = x if direction == "forward" else made(case).z
    function = getattr(model, direction)
    parameters = trainable(model)
    assert parameters
    generator = torch.Generator().manual_seed(1)
    shifts = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    weight = torch.randn(function(point).shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((function(point) * weight).sum(), parameters, allow_unused=True)
    by_autograd = sum(
        (g * s).sum() for g, s in zip(gradients, shifts, strict=True) if g is not None
    )

    def at(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, shift in zip(parameters, shifts, strict=True):
                parameter.add_(step * shift)
            value = (function(point) * weight).sum()
            for parameter, shift in zip(parameters, shifts, strict=True):
                parameter.sub_(step * shift)
        return value

    by_differences = (at(STEP) - at(-STEP)) / (2 * STEP)
    size = (function(point) * weight).abs().sum().item() + abs(by_differences.item())
    noise = SLACK * eps(torch.float64) * made(case).condition.max().item() / STEP + STEP
    floor = 0.0 if direction == "forward" else case.float64_floor / STEP * weight.norm().item()
    assert_within((torch.as_tensor(by_autograd) - by_differences).abs(), noise * size + floor)


@needs("bijective")
def test_gradients_reach_the_input_of_the_inverse(case):
    m = made(case)
    J_inverse = reference.jacobian(m.model.inverse, m.z)
    deviation = (
        (J_inverse @ m.J - torch.eye(m.J.shape[2], dtype=torch.float64)).flatten(1).norm(dim=1)
    )
    assert_within(
        deviation, SLACK * (eps(torch.float64) + case.float64_floor) * m.condition * m.J.shape[2]
    )


def test_deep_copy_is_equal_and_independent(case):
    m = made(case)
    copied = copy.deepcopy(m.model)
    assert torch.equal(copied(m.x).detach(), m.z)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    assert torch.equal(m.model(m.x).detach(), m.z)


def test_samples_do_not_depend_on_the_batch(case):
    m = made(case)
    direct = m.model.inverse(m.z).detach()
    for b in range(len(m.x)):
        alone = m.model.select(torch.tensor([b]))
        row = m._replace(x=m.x[b : b + 1], z=m.z[b : b + 1], sigma=m.sigma[b : b + 1])
        assert_within(norms(alone(row.x) - row.z), row.z_error(eps(torch.float64)))
        back = alone.inverse(row.z)
        assert_within(
            norms(back - direct[b : b + 1]), row.x_error(eps(torch.float64), case.float64_floor)
        )
        if case.has_log_det:
            assert alone.forward_and_log_det(row.x)[1].shape == (1,)


def test_a_call_changes_neither_input_nor_model(case):
    model, x = fresh(case.make)
    z = made(case).z.clone()
    x_before, z_before = x.clone(), z.clone()
    modes = [module.training for module in model.modules()]
    with changed_state(model) as changed, torch.no_grad():
        model(x)
        model.inverse(z)
        if case.has_log_det:
            model.forward_and_log_det(x)
    assert changed == []
    assert torch.equal(x, x_before)
    assert torch.equal(z, z_before)
    assert modes == [module.training for module in model.modules()]


def test_linearization_has_the_products_of_the_dense_jacobian(case):
    m = made(case)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(m.x.shape, generator=generator, dtype=torch.float64)
    u = torch.randn(m.z.shape, generator=generator, dtype=torch.float64)
    linearization = Linearization(m.model, m.x)
    assert_within(norms(linearization.output - m.z), m.z_error(eps(torch.float64)))
    relative = SLACK * eps(torch.float64) * m.condition * math.sqrt(v[0].numel())

    def assert_product(product, matrix: Tensor, vector: Tensor, tolerance: Tensor) -> None:
        expected = (matrix @ vector.flatten(1).unsqueeze(2)).squeeze(2)
        assert_within(norms(product.value().flatten(1) - expected), tolerance * norms(expected))

    assert_product(linearization.jvp(v), m.J, v, relative)
    assert_product(linearization.vjp(u), m.J.mT, u, relative)
    rows = torch.arange(len(m.x)).flip(0)[:2]
    part = linearization.select(rows)
    if part is not None:
        assert_product(part.jvp(v[rows]), m.J[rows], v[rows], relative[rows])
        assert_product(part.vjp(u[rows]), m.J[rows].mT, u[rows], relative[rows])
    if not case.bijective:
        return
    inverse = torch.linalg.inv(m.J)
    relative = relative + SLACK * case.float64_floor * m.condition
    assert_product(linearization.inverse_jvp(u), inverse, u, relative)
    assert_product(linearization.inverse_vjp(v), inverse.mT, v, relative)
    if part is not None:
        assert_product(part.inverse_jvp(u[rows]), inverse[rows], u[rows], relative[rows])
        assert_product(part.inverse_vjp(v[rows]), inverse[rows].mT, v[rows], relative[rows])
