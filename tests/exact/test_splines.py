"""Monotone splines in integer cells: restored, and the library's own map."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.exact import exact
from inn_guard.layers.inverted import InverseLayer
from inn_guard.memory_saving import memory_saving
from tests.cases.trials import first

FEATURES = 5


KINDS = ("RationalQuadratic", "Cubic", "Quadratic", "Linear")


def splines(
    *,
    kind: str = "RationalQuadratic",
    layers: int = 2,
    gain: float = 1.0,
    tails: str | None = "linear",
) -> Invertible:
    from nflows import transforms
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import CompositeTransform, ReversePermutation

    torch.manual_seed(0)
    if kind == "Linear":
        gain = min(gain, 2.0)  # their bins have no least height: that of narrow ones is stored
    make = getattr(transforms, f"Piecewise{kind}CouplingTransform")
    steps = []
    for _ in range(layers):
        coupling = make(
            torch.arange(FEATURES) % 2,
            lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=8),
            num_bins=4,
            tails=tails,
            tail_bound=3.0,
        )
        with torch.no_grad():
            coupling.transform_net.final_layer.weight.mul_(gain)
            coupling.transform_net.final_layer.bias.mul_(gain)
        steps += [ReversePermutation(FEATURES), coupling]
    return wrap(CompositeTransform(steps).float().eval())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gain", first(1, [10.0, 1.0, 30.0]))
def test_splines_are_restored_and_keep_the_bits_of_their_contraction(gain, kind):
    model, x = splines(gain=gain, kind=kind), 1.5 * torch.randn(512, FEATURES, dtype=torch.float32)
    coder = exact(model)
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)
    assert [layer.rule for layer in kept.layers] == ["permutation", "spline coupling"] * 2
    with torch.no_grad():
        own, log_det = model.to_dtype(torch.float64).forward_and_log_det(x.double())
    assert (z - own).abs().median() < 1e-5
    expected = -float(log_det.mean()) / math.log(2) / FEATURES
    assert kept.bits_per_dimension == pytest.approx(expected, rel=0.02, abs=0.05)


def test_inverse_splines_are_restored():
    model = InverseLayer(splines())
    x = 2 * torch.randn(64, FEATURES, dtype=torch.float32)
    coder = exact(model)
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)
    assert {layer.rule for layer in kept.layers if "spline" in layer.rule} == {
        "spline coupling, inverted"
    }


@given(st.lists(st.floats(-4, 4, width=32), min_size=FEATURES, max_size=FEATURES))
def test_any_values_are_restored(values):
    model, x = splines(layers=1), torch.tensor([values], dtype=torch.float32)
    coder = exact(model)
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)


def test_knots_themselves_are_restored():
    edges = torch.tensor([-3.0, 3.0, 0.0, -3.0000002, 2.9999998], dtype=torch.float32)
    x = torch.stack([edges.roll(k) for k in range(FEATURES)])
    coder = exact(splines(layers=1))
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)


@pytest.mark.parametrize("kind", KINDS)
def test_splines_on_an_interval_are_restored(kind):
    model, x = splines(kind=kind, tails=None, gain=5.0), torch.rand(64, FEATURES)
    x = x.float()
    x[0, :2] = torch.tensor([0.0, 1 - 2**-24])
    coder = exact(model)
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)
    assert {layer.rule for layer in kept.layers} == {"permutation", "spline coupling"}
    with torch.no_grad():
        own = model.to_dtype(torch.float64)(x.double())
    assert (z - own).abs().median() < 1e-5


@pytest.mark.parametrize("context", [0, 2])
def test_splines_of_zuko_are_restored(context):
    from functools import partial

    import zuko
    from zuko.transforms import MonotonicRQSTransform

    torch.manual_seed(0)
    shapes = [(8,), (8,), (7,)]
    univariate = partial(MonotonicRQSTransform, slope=1e-2)
    settings = {"context": context, "univariate": univariate, "shapes": shapes}
    layers = [
        zuko.flows.coupling.GeneralCouplingTransform(FEATURES, hidden_features=(8,), **settings),
        zuko.flows.gaussianization.ElementWiseTransform(FEATURES, **settings),
    ]
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(FEATURES), torch.ones(FEATURES), buffer=True
    )
    flow = zuko.flows.Flow(zuko.lazy.LazyComposedTransform(*layers), base).float()
    given = torch.randn(64, context, dtype=torch.float32) if context else None
    model = wrap(flow) if given is None else wrap(flow, context=given)
    x = 4 * torch.randn(64, FEATURES, dtype=torch.float32)
    z, kept = (coder := exact(model)).encode(x)
    assert torch.equal(coder.decode(z, kept), x)
    assert all("spline" in layer.rule for layer in kept.layers)
    with torch.no_grad():
        assert (z - model(x)).abs().median() < 1e-5


def test_a_value_outside_of_the_interval_is_refused_as_by_the_library():
    model, x = splines(tails=None), torch.rand(8, FEATURES, dtype=torch.float32)
    coder = exact(model)
    coder.encode(x)
    with pytest.raises(ValueError, match="outside the domain"):
        coder.encode(x + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_keeps_fewer_bits_than_the_stored_input(kind):
    x = torch.randn(64, FEATURES, dtype=torch.float32)
    _, by_rule = exact(splines(layers=4, gain=10.0, kind=kind)).encode(x)
    stored = exact(splines(layers=4, gain=10.0, kind=kind))
    for layer in stored.model.layers():
        layer.block.register_forward_hook(lambda module, arguments, output: None)
    _, kept = stored.encode(x)
    assert {layer.rule for layer in kept.layers} == {"stored input"}
    assert by_rule.bits_per_dimension < kept.bits_per_dimension / 4


def test_gradients_from_restored_splines_are_those_of_stored_activations():
    model, x = splines(layers=4, gain=3.0), torch.randn(64, FEATURES, dtype=torch.float32)
    saving = memory_saving(model, exact=True)

    def gradient(f: Invertible, of: Invertible, x: torch.Tensor) -> torch.Tensor:
        z, log_det = f.forward_and_log_det(x)
        loss = (0.5 * z.square().sum(1) - log_det).mean()
        found = torch.autograd.grad(loss, list(of.parameters()))
        return torch.cat([one.flatten().double() for one in found])

    double = model.to_dtype(torch.float64)
    true = gradient(double, double, x.double())
    stored = (gradient(model, model, x) - true).norm()
    for _ in range(2):
        assert (gradient(saving, model, x) - true).norm() <= 3 * stored
    assert "8 of 8 layers restored in integers" in saving.plan()
