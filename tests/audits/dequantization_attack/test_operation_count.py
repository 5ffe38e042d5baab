"""What the searches for the worst sample cost, counted in forward-equivalents."""

from __future__ import annotations

import pytest
import torch

from inn_guard.audits.dequantization_attack import ProjectedGradient
from inn_guard.audits.operation_count import count_operations
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from tests.audits.dequantization_attack.test_audit import STRATEGIES, attacked, couplings, images


def test_a_step_of_the_paper_costs_two_passes_and_two_products():
    model = Chain(*(AffineCoupling(MLP([32, 64, 64, 64])) for _ in range(4))).eval()
    search, _ = attacked(model, images(2, 64), ProjectedGradient(steps=5))
    assert search.price["error"] == pytest.approx(2, rel=0.05)
    assert search.price["gradient"] == pytest.approx(4, rel=0.05)
    assert search.spent == pytest.approx(search.price["error"] * 2 + search.price["gradient"] * 5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_calls_are_counted_and_the_budget_holds(name):
    calls = {"forward": 0, "inverse": 0}

    class Counted(Chain):
        def forward(self, x):
            calls["forward"] += 1
            return super().forward(x)

        def inverse(self, z):
            calls["inverse"] += 1
            return super().inverse(z)

    model = Counted(*couplings().layers())
    search, _ = attacked(model, images(), STRATEGIES[name])
    assert search.spent <= STRATEGIES[name].budget
    # one forward tells the latents' shape, one is the unit; every call that is paid for runs the
    # inverse once
    if name != "implicit":
        assert calls["forward"] == calls["inverse"] + 2
        assert search.spent >= 1.9 * calls["inverse"]


def test_operations_of_a_product_and_its_backward():
    weight = torch.randn(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    _, forward = count_operations(lambda: x.detach() @ weight)
    _, both = count_operations(lambda: torch.autograd.grad((x @ weight).sum(), x))
    assert forward == 2 * 3 * 5 * 7
    assert 2 * forward <= both <= 2 * forward + 100
