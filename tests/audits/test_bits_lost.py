"""bits_lost: what a layer throws away is what exact mode keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.audits.bits_lost import bits_lost, bits_lost_by_layer
from inn_guard.audits.layer_blame import layer_blame
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.core.invertible import Invertible
from inn_guard.exact import exact
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP
from inn_guard.layers.scales import SigmoidScale

FEATURES = 8


def contracting(layers: int = 8) -> Chain:
    """Couplings whose scales lie between 2^-9 and 1, and a rotation."""
    torch.manual_seed(0)
    steps: list[Invertible] = []
    for k in range(layers):
        coupling = AffineCoupling.on_halves(
            FEATURES,
            lambda identity, out: MLP([identity, 8, out], activation=nn.Tanh),
            swapped=bool(k % 2),
            scale=SigmoidScale(2e-3, 1.0),
        )
        with torch.no_grad():
            coupling.network[-1].bias.fill_(-6.0)
        steps.append(coupling)
    return Chain(*steps, InvertibleLinear(FEATURES)).float()


def test_exact_mode_keeps_the_bits_that_the_layers_lose():
    model, x = contracting(), torch.randn(64, FEATURES, dtype=torch.float32)
    rows = bits_lost_by_layer(model.to_dtype(torch.float64), x.double())
    _, kept = exact(model).encode(x)
    total = sum(row["bits_lost"] for row in rows)
    assert total > 10
    assert kept.bits_per_dimension == pytest.approx(total, rel=0.02)
    for row, layer in zip(rows, kept.layers, strict=True):
        assert row["name"] == layer.name
        if row["bits_lost"] > 1:
            assert layer.bits_per_dimension == pytest.approx(row["bits_lost"], rel=0.02)


def test_they_are_the_logarithms_of_the_singular_values():
    layer, h = contracting(1).to_dtype(torch.float64), torch.randn(3, FEATURES)
    expected = []
    for row in h:
        jacobian = torch.func.jacrev(lambda v: layer(v[None])[0])(row)
        expected.append(-torch.linalg.svdvals(jacobian).log2().sum() / FEATURES)
    found = bits_lost(layer, h, dimension=FEATURES)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-8)


def test_layer_blame_lists_them():
    model, x = contracting(3).to_dtype(torch.float64), torch.randn(4, FEATURES)
    result = layer_blame(model, x)
    expected = [row["bits_lost"] for row in bits_lost_by_layer(model, x)]
    assert [row["bits_lost"] for row in result.per_layer] == pytest.approx(expected)
    assert result.values["bits_lost"] == pytest.approx(sum(expected))


def test_reconstruction_lists_them_where_it_fails():
    x = torch.randn(16, FEATURES, dtype=torch.float32)
    failing = reconstruction(contracting(24), x)
    assert failing.verdict.failed
    assert len(failing.per_layer) == 25
    assert sum(row["bits_lost"] for row in failing.per_layer) > 40
    assert reconstruction(contracting(1), x).per_layer == ()


def test_layers_without_a_log_determinant_are_not_counted():
    class Shift(Invertible):
        def forward(self, x):
            return x + 1

        def inverse(self, z):
            return z - 1

    model, x = Chain(Shift(), InvertibleLinear(FEATURES)), torch.randn(4, FEATURES)
    assert math.isnan(bits_lost_by_layer(model, x)[0]["bits_lost"])
    result = layer_blame(model, x)
    assert "bits_lost" not in result.values
    assert "bits_lost" not in result.per_layer[0]
