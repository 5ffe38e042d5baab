"""Calls that compute in float64 throughout, and audits of models whose code says float32."""

import pytest
import torch
from torch import nn

import inn_guard as ig
from inn_guard.core.float64 import float64_throughout, is_float64_throughout


def fine(*shape):
    return torch.rand(*shape, dtype=torch.float64)


CONSTANT = torch.rand(3, 3, dtype=torch.float32)  # no buffer: conversions leave it as it is
COARSE = {
    "float": lambda x: x.float(),
    "to a dtype": lambda x: x.to(torch.float32),
    "to a tensor": lambda x: x.to(CONSTANT),
    "type": lambda x: x.type(torch.float32),
    "type as": lambda x: x.type_as(CONSTANT),
    "named dtype": lambda x: torch.softmax(x, 1, dtype=torch.float32),
    "made in the default dtype": lambda x: torch.linspace(0, 1, 3) * x[0],
    "made in a named dtype": lambda x: torch.zeros(3, dtype=torch.float32),
    "product with a constant": lambda x: x.float() @ CONSTANT,
    "buffer written into": lambda x: torch.zeros(2, 3).index_copy_(0, torch.arange(2), x.float()),
    "complex": lambda x: torch.view_as_complex(x[:, :2].float().contiguous()).abs(),
}


@pytest.mark.parametrize("name", COARSE)
def test_what_code_computes_in_float32_is_computed_in_float64(name):
    torch.set_default_dtype(torch.float32)
    call, x = COARSE[name], fine(2, 3)
    assert not is_float64_throughout(lambda: call(x))
    with float64_throughout():
        assert call(x).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).dtype == torch.float32


def raising():
    raise ZeroDivisionError


def test_other_dtypes_tensors_and_errors_stay_as_they_are():
    integers, kept = torch.arange(3), torch.ones(3, dtype=torch.float32)
    with float64_throughout():
        assert integers.to(torch.int32).dtype == torch.int32
        assert fine(3).view(torch.int64).dtype == torch.int64
        kept.add_(fine(3))
    assert kept.dtype == torch.float32
    with pytest.raises(ZeroDivisionError), float64_throughout():
        raising()
    assert torch.get_default_dtype() == torch.float64  # of these tests
    assert not is_float64_throughout(raising)


class Coupling(nn.Module):
    """x2 -> x2 exp(s(x1)): a normalisation in float32, as in transformers for bfloat16."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = nn.LayerNorm(2), nn.Linear(2, 2)

    def scale(self, first):
        return torch.tanh(self.net(self.norm(first.float()).type(first.dtype)))

    def forward(self, x):
        first, second = x.chunk(2, 1)
        scale = self.scale(first)
        return torch.cat([first, second * scale.exp()], 1), scale.sum(1)

    def inverse(self, z):
        first, second = z.chunk(2, 1)
        return torch.cat([first, second * (-self.scale(first)).exp()], 1)


class Cancelling(Coupling):
    """A float32 island that loses digits in any copy: s is rounded to 2e-3, and 300 s is summed."""

    def scale(self, first):
        return (300 * ((first / 300 + 3e4).float() - 3e4)).type(first.dtype)


@pytest.mark.parametrize(("make", "verdict"), [(Coupling, "stable"), (Cancelling, "unstable")])
def test_densities_are_held_against_float64_without_float32_inside(make, verdict):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, x = make(), torch.randn(32, 4)
    with torch.no_grad():
        z, own = model(x)
        own = own - 0.5 * z.square().sum(1)
        precise = make().double()
        precise.load_state_dict(model.state_dict())
        with float64_throughout():
            true_z, true = precise(x.double())
            true = true - 0.5 * true_z.square().sum(1)
    error = (own - true).abs().max().item()
    report = ig.audit(model, x, checks=["density"])
    assert report.uses["density"].verdict == verdict
    assert report["density"].values["max_error"] == pytest.approx(error, rel=1e-3, abs=2e-6)
    assert next(model.parameters()).dtype == torch.float32
