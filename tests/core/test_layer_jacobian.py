"""AutogradJacobian against the dense Jacobian; what replaces missing or wrong derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inn_guard.core.layer_jacobian import AutogradJacobian, NotApplicable
from inn_guard.jacobian.checks import FromLU, FromRows, check_inverse, check_jvp
from tests.cases.toys import Detached, Embedding, Linear, ReverseOnly, Warp, WrongTwice
from tests.oracles.transforms import jacobian

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
V = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def applied(matrix: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", matrix, v)


def assert_four_products(products, model, x, tolerance=1e-12):
    J = jacobian(model.forward, x)
    J_inverse = torch.linalg.inv(J)
    torch.testing.assert_close(products.output, model(x).detach())
    for product, matrix in (
        (products.jvp, J),
        (products.vjp, J.mT),
        (products.inverse_jvp, J_inverse),
        (products.inverse_vjp, J_inverse.mT),
    ):
        torch.testing.assert_close(product(V), applied(matrix, V), rtol=tolerance, atol=tolerance)


def test_autograd_jacobian_is_the_jacobian():
    model = Warp(5)
    assert_four_products(model.linearize(X), model, X)


def test_rows_can_be_pulled_back_in_one_call():
    model = Warp(5)
    rows = torch.eye(5).unsqueeze(1).expand(5, 3, 5)
    pulled = model.linearize(X).vjp(rows)
    torch.testing.assert_close(pulled.transpose(0, 1), jacobian(model.forward, X))


def test_an_input_written_in_place_is_a_copy():
    def doubling(x: Tensor) -> Tensor:
        return x.mul_(2)

    x = X.clone()
    jacobian = AutogradJacobian(doubling, lambda z: z.div_(2), x)
    torch.testing.assert_close(jacobian.vjp(V), 2 * V)
    torch.testing.assert_close(jacobian.jvp(V), 2 * V)
    torch.testing.assert_close(jacobian.inverse_jvp(V), V / 2)
    torch.testing.assert_close(jacobian.inverse_vjp(V), V / 2)
    assert torch.equal(x, X)


def test_a_map_outside_autograd_has_no_derivative():
    jacobian = AutogradJacobian(lambda x: x.detach() * 2, lambda z: z / 2, X)
    with pytest.raises(NotApplicable, match="no derivative"):
        jacobian.vjp(V)


def test_a_right_inverse_derivative_is_trusted():
    jacobian = Warp(5).linearize(X)
    assert check_inverse(jacobian, X, "warp") is jacobian


def test_a_wrong_inverse_derivative_is_replaced_by_a_solve():
    model = Detached(5)
    replaced = check_inverse(model.linearize(X), X, "detached")
    assert isinstance(replaced, FromLU)
    assert_four_products(replaced, model, X)


def test_a_wrong_adjoint_is_found_even_where_forward_mode_is_right():
    model = Warp(5)
    honest = model.linearize(X)

    class Lying:
        output, jvp, vjp, inverse_jvp = honest.output, honest.jvp, honest.vjp, honest.inverse_jvp
        inverse_vjp = staticmethod(lambda v: 1.05 * honest.inverse_vjp(v))

    assert isinstance(check_inverse(Lying(), X, "lying"), FromLU)


def test_a_missing_inverse_is_replaced_by_a_solve():
    class NoInverse(Warp):
        def inverse(self, z: Tensor) -> Tensor:
            raise RuntimeError("none")

    model = NoInverse(5)
    assert_four_products(check_inverse(model.linearize(X), X, "no inverse"), model, X)


def test_a_rectangular_layer_with_a_wrong_inverse_has_no_answer():
    with pytest.raises(NotApplicable, match="3 x 5"):
        check_inverse(Embedding(5, 3).linearize(X), X, "embedding")


def test_forward_mode_is_replaced_where_there_is_none():
    model = ReverseOnly()
    jacobian = model.linearize(X)
    with pytest.raises((RuntimeError, NotImplementedError)):
        jacobian.jvp(V)
    replaced = check_jvp(jacobian, X, "reverse only")
    assert isinstance(replaced, FromRows)
    torch.testing.assert_close(replaced.jvp(V), 2 * V)


def test_a_wrong_second_derivative_is_found_and_forward_mode_used():
    jacobian = AutogradJacobian(WrongTwice.apply, lambda z: z / 2, X)
    torch.testing.assert_close(jacobian.vjp(V), 2 * V)
    torch.testing.assert_close(jacobian.jvp(V), 2 * V)


def test_a_wrong_forward_mode_is_found():
    honest = Warp(5).linearize(X)

    class Lying:
        output, vjp = honest.output, honest.vjp
        inverse_jvp, inverse_vjp = honest.inverse_jvp, honest.inverse_vjp
        jvp = staticmethod(lambda v: 1.05 * honest.jvp(v))

    replaced = check_jvp(Lying(), X, "lying")
    torch.testing.assert_close(replaced.jvp(V), honest.jvp(V))


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e9])
def test_ill_conditioned_but_right_layers_are_trusted(condition):
    generator = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    model = Linear(Q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10().item(), 5)))
    for dtype in (torch.float64, torch.float32) if condition < 1e6 else (torch.float64,):
        copied, x = model.to_dtype(dtype), X.to(dtype)
        jacobian = copied.linearize(x)
        assert check_inverse(check_jvp(jacobian, x, "linear"), x, "linear") is jacobian


def test_non_finite_samples_do_not_hide_a_wrong_derivative():
    x = torch.cat([X, torch.full((1, 5), torch.nan)])
    assert isinstance(check_inverse(Detached(5).linearize(x), x, "detached"), FromLU)
    jacobian = Warp(5).linearize(x)
    assert check_inverse(check_jvp(jacobian, x, "warp"), x, "warp") is jacobian
