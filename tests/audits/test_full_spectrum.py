"""The full spectrum: composed or row by row, the same singular values; a factor that lies is not
believed.
"""

from __future__ import annotations

import torch

from inn_guard.audits.full_spectrum import full_spectrum
from inn_guard.jacobian.dense import is_composable
from inn_guard.layers import MLP, AffineCoupling, Chain, Diagonal, InvertibleLinear
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Warp
from tests.oracles import transforms as reference


def couplings() -> Chain:
    network = lambda kept, out: MLP([kept, 8, out])  # noqa: E731
    steps = [AffineCoupling.on_halves(4, network, swapped=bool(k % 2)) for k in range(4)]
    return Chain(*steps, InvertibleLinear(4))


class Lying(Diagonal):
    """Its tangent's product with a matrix is wrong, its other products are right."""

    def linearize(self, x):
        tangent = super().linearize(x)
        tangent.multiply = lambda matrix: 2 * matrix
        return tangent


def truth(model, x):
    return torch.linalg.svdvals(reference.jacobian(model.forward, x))


def test_composed_and_row_by_row_agree_with_the_dense_jacobian():
    x = torch.randn(2, 4)
    for model, composable in ((couplings(), True), (Chain(Warp(4, 0), couplings()), False)):
        assert is_composable(model, x[:1]) is composable
        result = full_spectrum(model, x)
        assert result.verdict is Verdict.STABLE
        assert torch.allclose(result.per_sample["singular_values"], truth(model, x), rtol=1e-9)


def test_a_wrong_factor_is_noticed():
    model, x = Chain(couplings(), Lying(4)), torch.randn(2, 4)
    assert is_composable(model, x[:1])
    assert torch.allclose(
        full_spectrum(model, x).per_sample["singular_values"], truth(model, x), rtol=1e-9
    )
