"""Conventions of other code bases through wrap(encode=..., decode=...)."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from tests.cases.functions import FEATURES, Coupling
from tests.oracles import transforms as reference


class GlowStyle(nn.Module):
    """One method and a flag, as in ports of Glow: (z, log_det) ahead, x alone back."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList([Coupling(), Coupling()])

    def forward(self, x: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor] | Tensor:
        if reverse:
            for coupling in reversed(self.couplings):
                x, _ = coupling.inverse(x)
            return x
        total = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, log_det = coupling(x)
            total = total + log_det
        return x, total


class ResidualFlowStyle(nn.Module):
    """residual-flows' chain: every layer subtracts its log-determinant from a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.ModuleList([Coupling(), Coupling()])

    def forward(self, x: Tensor, logpx: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        for layer in self.chain:
            x, log_det = layer(x)
            logpx = None if logpx is None else logpx - log_det.unsqueeze(1)
        return x if logpx is None else (x, logpx)

    def inverse(self, y: Tensor, logpy: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        for layer in reversed(self.chain):
            y, log_det = layer.inverse(y)
            logpy = None if logpy is None else logpy - log_det.unsqueeze(1)
        return y if logpy is None else (y, logpy)


def glow_style() -> ig.Invertible:
    net = GlowStyle()
    return ig.wrap(encode=net, decode=functools.partial(net, reverse=True))


def residual_flow_style() -> ig.Invertible:
    net, zero = ResidualFlowStyle(), torch.zeros(1)
    return ig.wrap(encode=net, decode=net.inverse, log_det=lambda x: -net(x, zero)[1])


@pytest.mark.parametrize("make", [glow_style, residual_flow_style])
def test_directions_and_log_determinant_are_right(make):
    model, x = make(), torch.randn(5, FEATURES)
    torch.testing.assert_close(model.inverse(model(x)), x)
    log_det = model.forward_and_log_det(x)[1]
    torch.testing.assert_close(log_det, reference.log_abs_det(reference.jacobian(model.forward, x)))


@pytest.mark.parametrize("make", [glow_style, residual_flow_style])
def test_an_audit_is_a_report(make):
    report = ig.audit(make(), torch.randn(16, FEATURES), level="quick")
    assert report.verdict is ig.Verdict.STABLE
    assert report["log_det"].verdict is ig.Verdict.STABLE


def test_a_log_determinant_taken_with_the_wrong_sign_is_found():
    net, zero = ResidualFlowStyle(), torch.zeros(1)
    model = ig.wrap(encode=net, decode=net.inverse, log_det=lambda x: net(x, zero)[1])
    assert (
        ig.audit(model, torch.randn(16, FEATURES), level="quick")["log_det"].verdict
        is ig.Verdict.UNSTABLE
    )
