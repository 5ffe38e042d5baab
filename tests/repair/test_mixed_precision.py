"""raise_precision: which layers it raises, and what it returns."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.core.missing import NotApplicable
from inn_guard.layers.chain import Chain
from inn_guard.layers.permutation import Permutation
from inn_guard.repair.mixed_precision import MixedPrecision
from inn_guard.repair.sensitivity import needed_layers, sensitive_first
from tests.audits.test_units import PLAIN, in_gauge

FLOAT32, FLOAT64 = torch.float32, torch.float64


class Scale(ig.Invertible):
    """z = factor x + shift."""

    def __init__(self, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=FLOAT32))
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift

    def inverse(self, z: Tensor) -> Tensor:
        return (z - self.shift) / self.factor

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), x[0].numel() * self.factor.abs().log().expand(len(x))

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(z), -z[0].numel() * self.factor.abs().log().expand(len(z))


def squeezed() -> Chain:
    """Layers 1 and 3 undo each other; between them, and only there, float32 loses the data."""
    swap = Permutation(torch.tensor([2, 0, 1, 3]))
    return Chain(Scale(0.5), Scale(1e-6, 1.0), swap, Scale(1e6, -1e6), Scale(2.0))


def data(batch: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, generator=generator, dtype=FLOAT32)


@pytest.fixture(autouse=True)
def _float32(_float64):
    torch.set_default_dtype(FLOAT32)


def test_raises_the_layers_that_need_it_and_no_other():
    model, x = squeezed(), data()
    mixed = ig.raise_precision(model, x, uses=["reconstruction", "sampling"])
    assert mixed.plan == (FLOAT32, FLOAT64, FLOAT64, FLOAT64, FLOAT32)
    summary = mixed.summary
    assert summary.raised == ("layer 1 (Scale)", "layer 3 (Scale)")
    assert summary.layers == 4
    assert summary.passed
    assert summary.comparison["before"].verdict.failed
    assert "2 of 4 layers in float64" in str(summary)
    assert summary.weight_bytes == 88 / 80  # four factors, and a permutation of int64
    assert {p.dtype for p in model.parameters()} == {FLOAT32}
    assert ig.audit(mixed, x, uses=["reconstruction", "sampling", "gradients"]).verdict.passed


@pytest.mark.parametrize("use", ["reconstruction", "sampling", "density"])
def test_each_forecast_puts_the_squeezing_layers_first(use):
    shares = sensitive_first(squeezed(), data(), limits=ig.Limits(), uses=[use], prior=None, seed=0)
    sensitive = {1} if use == "density" else {1, 3}
    others = max(shares[0], shares[4])  # layer 2 only moves entries: it is never raised
    assert min(shares[k] for k in sensitive) > 1e3 * others


@pytest.mark.parametrize("use", ["reconstruction", "sampling"])
def test_the_order_of_layers_is_the_same_in_any_units_of_every_state(use):
    powers = [[-10, 0, 3, 10], [0, 7, 0, -7], [2, 2, -9, 4], [10, -10, 0, 1]]
    found = []
    for each in (PLAIN, powers):
        model, x = in_gauge(2.0, each)
        options = {"limits": ig.Limits(), "uses": [use], "prior": None, "seed": 0}
        found.append(sensitive_first(model, x, **options))
    assert found[0] == pytest.approx(found[1])


def test_nothing_is_raised_where_everything_passes():
    x = data()
    mixed = ig.raise_precision(Chain(Scale(2.0), Scale(0.5)), x, uses=["reconstruction"])
    assert mixed.plan == (FLOAT32, FLOAT32)
    assert mixed.summary.raised == ()
    assert "No layer" in mixed.summary.reason
    assert mixed.summary.passed


@pytest.mark.thorough
def test_says_where_no_dtype_helps():
    class Wrong(Scale):
        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z) * 1.5

    x = data()
    mixed = ig.raise_precision(Chain(Wrong(2.0), Scale(1.0)), x, uses=["reconstruction"])
    assert not mixed.summary.passed
    assert "no dtype helps" in mixed.summary.reason
    assert any("ig.exact(flow)" in text for text in mixed.summary.advice)
    assert not any("raise_precision" in text for text in mixed.summary.advice)
    assert mixed.plan == (FLOAT32, FLOAT32)
    finest = ig.raise_precision(
        Chain(Wrong(2.0), Scale(1.0)).double(), x.double(), uses=["reconstruction"]
    )
    assert "no dtype finer" in finest.summary.reason


@pytest.mark.thorough
def test_the_rest_in_bfloat16_when_asked():
    x = data()
    mixed = ig.raise_precision(squeezed(), x, uses=["reconstruction"], rest=torch.bfloat16)
    assert mixed.plan[1] == mixed.plan[3] == FLOAT64
    assert mixed.plan[0] == mixed.plan[4] == torch.bfloat16
    assert mixed.summary.passed
    sound = ig.raise_precision(
        Chain(Scale(2.0), Scale(0.5)), x, uses=["reconstruction"], rest=torch.bfloat16
    )
    assert sound.plan == (torch.bfloat16, torch.bfloat16)
    assert sound.summary.weight_bytes == 0.5


@pytest.mark.thorough
def test_rounded_weights_are_another_density():
    """1.0059 in bfloat16 is 1.0078: the log det of 16 layers in 4 dimensions moves by 0.12 nats."""
    model = Chain(*(Scale(1.0 + 2.0**-8 + 2.0**-9) for _ in range(16)))
    mixed = ig.raise_precision(model, data(), uses=["density"], rest=torch.bfloat16)
    true = ig.wrap(model.to_dtype(FLOAT64)).log_prob(data().double())
    assert ((mixed.log_prob(data()).double() - true).abs() <= 0.1).all()
    assert FLOAT32 in mixed.plan


def test_the_ends_are_as_fine_as_their_layers():
    x = data()
    mixed = MixedPrecision(Chain(Scale(2.0), Scale(3.0)), (FLOAT64, FLOAT32), dtype=FLOAT32)
    assert mixed(x).dtype == FLOAT32
    assert mixed.inverse(x).dtype == FLOAT64
    other = MixedPrecision(Chain(Scale(2.0), Scale(3.0)), (FLOAT32, FLOAT64), dtype=FLOAT32)
    assert other(x).dtype == FLOAT64
    assert other.inverse(x).dtype == FLOAT32


def test_it_is_a_module_like_the_model():
    model, x = squeezed().eval(), data()
    mixed = ig.raise_precision(model, x, uses=["reconstruction"])
    assert not mixed.training
    assert mixed.train().model.training
    assert mixed.eval().model.training is False
    assert mixed.model.state_dict().keys() == model.state_dict().keys()
    mixed.model.load_state_dict(model.state_dict())
    again = copy.deepcopy(mixed)
    again.load_state_dict(mixed.state_dict())
    assert torch.equal(again(x), mixed(x))
    mixed.log_prob(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in mixed.parameters())
    assert again.double().plan == (FLOAT64,) * 5
    assert again(x).dtype == FLOAT64
    assert again.float().plan == (FLOAT32,) * 5
    assert again(x).dtype == FLOAT32
    assert again.to("cpu").plan == (FLOAT32,) * 5
    with pytest.raises(NotApplicable, match="no base"):
        mixed.sample(3)


@pytest.mark.thorough
def test_the_float64_copy_is_that_of_the_model():
    x = data()
    mixed = ig.raise_precision(squeezed(), x, uses=["reconstruction"])
    precise = mixed.to_dtype(FLOAT64)
    assert torch.equal(precise(x.double()), squeezed().to_dtype(FLOAT64)(x.double()))


@pytest.mark.thorough
def test_layers_that_share_weights_are_raised_together():
    shared = Scale(1e-6, 1.0)

    class Undo(Scale):
        def __init__(self, other: Scale) -> None:
            super().__init__(1.0)
            self.factor = other.factor

        def forward(self, x: Tensor) -> Tensor:
            return (x - 1.0) / self.factor

        def inverse(self, z: Tensor) -> Tensor:
            return z * self.factor + 1.0

    model = Chain(Scale(0.5), shared, Undo(shared))
    mixed = ig.raise_precision(model, data(), uses=["reconstruction"])
    assert mixed.plan == (FLOAT32, FLOAT64, FLOAT64)
    assert mixed.summary.passed


def test_an_opaque_model_is_one_layer():
    class Opaque(Scale):
        pass

    model = Opaque(1e-7, 1.0)
    mixed = ig.raise_precision(model, data(), uses=["reconstruction"])
    assert mixed.plan == (FLOAT64,)
    assert mixed(data()).dtype == FLOAT64
    assert mixed.summary.passed
    assert "The only layer" in mixed.summary.reason


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.thorough)])
def test_weights_that_are_not_finite(value):
    model = squeezed()
    with torch.no_grad():
        model.steps[0].factor.fill_(value)
    mixed = ig.raise_precision(model, data(), uses=["reconstruction"])
    assert not mixed.summary.passed


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ig.raise_precision(lambda x: x, data())
    with pytest.raises(ValueError, match=r"pass x\.to"):
        ig.raise_precision(squeezed(), data().double())
    with pytest.raises(ValueError, match=r"pass torch\.bfloat16"):
        ig.raise_precision(squeezed(), data(), rest=FLOAT64)
    with pytest.raises(ValueError, match="uses"):
        ig.raise_precision(squeezed(), data(), uses=["speed"])


@pytest.mark.thorough
def test_random_numbers_and_weights_stay():
    model, x = squeezed(), data()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ig.raise_precision(model, x, uses=["reconstruction"])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


@given(st.lists(st.floats(0, 1e12), max_size=6), st.floats(1e-9, 1.0))
def test_the_forecast_leaves_out_no_layer_that_is_too_much(shares, roundoff):
    ordered = sorted(shares, reverse=True)
    count = needed_layers(ordered, roundoff=roundoff)
    assert 5 * roundoff * math.hypot(*ordered[count:]) <= 1
    assert count == 0 or 5 * roundoff * math.hypot(*ordered[count - 1 :]) > 1


@pytest.mark.parametrize(
    "library",
    [
        "nflows",
        pytest.param("normflows", marks=pytest.mark.thorough),
        pytest.param("zuko", marks=pytest.mark.thorough),
    ],
)
def test_flows_of_the_libraries_keep_their_base(library):
    pytest.importorskip(library)
    flow = LIBRARY[library]()
    x = data()
    plan = (FLOAT64, *[FLOAT32] * (len(ig.wrap(flow).layers()) - 1))
    mixed = MixedPrecision(copy.deepcopy(flow), plan, dtype=FLOAT32)
    assert (mixed.log_prob(x) - ig.wrap(flow).log_prob(x)).abs().max() < 1e-4
    torch.manual_seed(5)
    drawn = mixed.sample(7)
    torch.manual_seed(5)
    z = ig.wrap(flow).base().sampler(7, None)
    assert drawn.shape == (7, 4)
    assert (drawn - ig.wrap(flow).inverse(z)).abs().max() < 1e-4
    assert pickle.dumps(mixed.state_dict())
    assert ig.audit(mixed, x, uses=["density", "sampling"], level="quick").verdict.passed


def _nflows() -> nn.Module:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    def coupling() -> nn.Module:
        mask = torch.arange(4) % 2
        return transforms.AffineCouplingTransform(mask, lambda n, m: ResidualNet(n, m, 8))

    chain = transforms.CompositeTransform([coupling(), coupling()])
    return flows.Flow(chain, distributions.StandardNormal([4])).eval()


def _normflows() -> nn.Module:
    import normflows

    net = normflows.nets.MLP([2, 8, 4], init_zeros=True)
    other = normflows.nets.MLP([2, 8, 4], init_zeros=True)
    steps = [normflows.flows.AffineCouplingBlock(one) for one in (net, other)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), steps)


def _zuko() -> nn.Module:
    import zuko

    return zuko.flows.MAF(4, transforms=2, hidden_features=(8,))


LIBRARY = {"nflows": _nflows, "normflows": _normflows, "zuko": _zuko}


def test_a_model_whose_layers_are_all_in_float64_takes_data_of_its_own_dtype():
    chain, x = Chain(Scale(2.0), Scale(0.5)), torch.randn(16, 3)
    mixed = MixedPrecision(chain, [FLOAT64, FLOAT64], dtype=FLOAT32)
    report = ig.audit(mixed, x, uses=["reconstruction"], level="quick")
    assert report.settings["dtype"] == "float32"
    assert report["reconstruction"].verdict == "stable"
