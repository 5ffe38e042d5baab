from __future__ import annotations

import pytest
import torch
from torch import nn

import inn_guard as ig
from inn_guard.jacobian import short_dtype, singular_values
from inn_guard.jacobian.chain import Linearization, ScaledLinearization
from inn_guard.jacobian.network_products import AutogradNetwork, network_in_dtype
from inn_guard.jacobian.singular_values import extreme_singular_values, spectrum
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.linear import InvertibleLinear

BFLOAT16 = torch.bfloat16


def network(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.SiLU(),
        nn.Conv2d(16, outputs, 3, padding=1),
    )  # fmt: skip


def glow(blocks=3):
    torch.manual_seed(0)
    layers = []
    for k in range(blocks):
        layers += [
            InvertibleLinear(4),
            AffineCoupling.on_halves(4, network, swapped=bool(k % 2)),
        ]
    return Chain(*layers).float().eval()


def images(batch=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, 4, 4, generator=generator, dtype=torch.float32)


class Opaque(nn.Module):
    """The same kind of layers as two functions of which nothing is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nets = nn.ModuleList([network(2, 2) for _ in range(3)])
        self.eval()

    def encode(self, x):
        for net in self.nets:
            first, second = x.chunk(2, 1)
            x = torch.cat([second + 2 * net(first), first], 1)
        return x

    def decode(self, z):
        for net in reversed(self.nets):
            second, first = z.chunk(2, 1)
            z = torch.cat([first, second - 2 * net(first)], 1)
        return z


def opaque():
    net = Opaque().float()
    return ig.wrap(encode=net.encode, decode=net.decode).eval()


@pytest.fixture(params=[glow, opaque])
def model(request):
    return request.param()


def force(monkeypatch, ratio):
    monkeypatch.setattr(short_dtype, "speedup", lambda device, threads: ratio)


def extremes(line):
    with torch.no_grad():
        return extreme_singular_values(
            line, generator=torch.Generator().manual_seed(2), tolerance=1e-2
        )


def test_the_probe_measures_and_leaves_no_trace():
    state = torch.get_rng_state()
    assert short_dtype.speedup("cpu", torch.get_num_threads()) > 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("ratio", "dtype", "expected"),
    [
        (4.0, torch.float32, BFLOAT16),
        (1.0, torch.float32, None),
        (4.0, torch.float64, None),
        (4.0, BFLOAT16, None),
    ],
)
def test_bfloat16_is_used_where_it_is_faster(monkeypatch, ratio, dtype, expected):
    force(monkeypatch, ratio)
    assert short_dtype.faster_dtype(dtype, torch.device("cpu")) == expected


def test_products_in_bfloat16_are_near_and_in_the_dtype_of_their_vectors(model):
    x = images()
    with torch.no_grad():
        line = Linearization(model, x)
        short = line.in_dtype(BFLOAT16)
        for name in ("jvp", "vjp", "inverse_jvp", "inverse_vjp"):
            exact, rounded = getattr(line, name)(x), getattr(short, name)(x)
            assert rounded.vector.dtype == torch.float32
            gap = (exact.vector - rounded.vector).flatten(1).norm(dim=1)
            assert 0 < gap.max() < 1e-2
    assert line.jvp(x).vector.equal(Linearization(model, x).jvp(x).vector)  # is left as it was


def test_few_positions_and_unknown_networks_have_no_short_products():
    assert Linearization(glow(), images(4)).in_dtype(BFLOAT16) is None
    net = network(4, 4).float()
    assert network_in_dtype(AutogradNetwork(net, images()), BFLOAT16) is None


def test_values_are_witnessed_and_those_of_float32(monkeypatch, model):
    x = images()
    force(monkeypatch, 1.0)
    plain = extremes(Linearization(model, x))
    force(monkeypatch, 4.0)
    short = extremes(Linearization(model, x))
    assert not short.log_max.equal(plain.log_max)  # it did run in bfloat16
    torch.testing.assert_close(short.log_max, plain.log_max, rtol=0, atol=1e-2)
    torch.testing.assert_close(short.log_min, plain.log_min, rtol=0, atol=1e-2)
    wide = model.to_dtype(torch.float64)
    rows = torch.autograd.functional.jacobian(wide, x[:3].double())
    J = torch.stack([rows[b, :, :, :, b].reshape(64, 64) for b in range(3)])
    true = spectrum(J).values.log()
    assert (short.log_max[:3] <= true[:, 0] + 1e-5).all()
    assert (short.log_min[:3] >= true[:, -1] - 1e-5).all()
    assert (short.log_max[:3] >= true[:, 0] - 1e-2).all()
    assert (short.log_min[:3] <= true[:, -1] + 1e-2).all()


def test_samples_with_wrong_short_products_are_done_again(monkeypatch):
    model, x = glow(), images()
    other = x.clone()
    other[5] = 7.0  # the search has the Jacobian of another sample there
    force(monkeypatch, 4.0)
    found = extremes(Wrong(model, x, other))
    force(monkeypatch, 1.0)
    again = extremes(Linearization(model, x))
    assert found.log_max[5] == pytest.approx(again.log_max[5].item(), abs=1e-6)
    assert found.log_min[5] == pytest.approx(again.log_min[5].item(), abs=1e-6)
    assert not found.log_max[:5].equal(again.log_max[:5])


class Wrong(Linearization):
    def __init__(self, model, x, other):
        super().__init__(model, x)
        self.other = Linearization(model, other)

    def in_dtype(self, dtype):
        return self.other.in_dtype(dtype)


def test_a_finer_tolerance_stays_in_float32(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for a shorter dtype")

    monkeypatch.setattr(singular_values, "faster_dtype", refuse)
    line = Linearization(glow(1), images(2))
    extreme_singular_values(line, generator=torch.Generator().manual_seed(0), tolerance=1e-3)


def test_other_units_multiply_in_bfloat16_too():
    x = images()
    line = ScaledLinearization(Linearization(glow(), x), torch.rand(4, 4, 4) + 1)
    with torch.no_grad():
        exact, rounded = line.jvp(x), line.in_dtype(BFLOAT16).jvp(x)
    torch.testing.assert_close(exact.log_scale, rounded.log_scale, rtol=0, atol=1e-2)
