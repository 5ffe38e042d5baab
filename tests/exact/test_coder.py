"""exact(): bit for bit over every model, hostile data, other circumstances, saved files."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.exact import Kept, Mismatch, exact
from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.autoregressive import maf
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.scales import ExpScale, SigmoidScale
from tests.cases.all import A_THIRD, CASES, one_of_each_kind
from tests.cases.trials import first


def bits(t):
    return t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int64)


def wrong_bits(model, x) -> int:
    coder = exact(model)
    z, kept = coder.encode(x)
    return int((bits(coder.decode(z, kept)) != bits(x)).sum())


def network(identity: int, out: int) -> nn.Module:
    return MLP([identity, 16, out], activation=nn.SiLU)


def couplings(features: int, *, layers: int, gain: float = 1.0) -> Invertible:
    steps = []
    for k in range(layers):
        # the floor of nflows: no scale underflows to zero in float32
        scale = SigmoidScale(1e-3, 1.001)
        coupling = AffineCoupling.on_halves(features, network, swapped=bool(k % 2), scale=scale)
        with torch.no_grad():
            for parameter in list(coupling.network.parameters())[-2:]:
                parameter.mul_(gain)
        steps.append(coupling)
    return Chain(*steps).float()


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(torch.float64, id="float64", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("case", one_of_each_kind(CASES, A_THIRD))
def test_every_model_is_restored_bit_for_bit(case, dtype):
    torch.set_default_dtype(torch.float32)
    model, x = case.make()
    model, x = model.to_dtype(dtype), x.to(dtype)
    coder = exact(model)
    z, kept = coder.encode(x)
    with torch.no_grad():
        own = model(x)
        precise = model.to_dtype(torch.float64)(x.double())
    rounding = (own.double() - precise).norm() + torch.finfo(torch.float32).eps * precise.norm()
    # from end to end: no further from the model in float64 than twice its own float32
    assert (z.double() - precise).norm() <= 2 * rounding
    again, _ = coder.encode(x)
    assert torch.equal(z, again)
    assert torch.equal(bits(coder.decode(z, kept)), bits(x))


@pytest.mark.parametrize("features", first(1, [3, 2, 16]))
def test_odd_and_even_sizes(features):
    model = Chain(
        couplings(features, layers=2),
        Permutation.reverse(features),
        InvertibleLinear(features),
        Diagonal(features),
        maf(features, layers=1, hidden=8),
    ).float()
    for batch in (1, 5):
        assert wrong_bits(model, torch.randn(batch, features, dtype=torch.float32)) == 0
        assert wrong_bits(InverseLayer(model), torch.randn(batch, features).float()) == 0


@given(
    st.lists(
        st.floats(
            width=32,
            allow_nan=False,
            allow_infinity=False,
            min_value=-(2.0**100),
            max_value=2.0**100,
        ),
        min_size=8,
        max_size=8,
    )
)
def test_any_finite_values_are_restored(values):
    torch.manual_seed(0)
    model = Chain(couplings(4, layers=3), InvertibleLinear(4).float())
    x = torch.tensor(values, dtype=torch.float32).reshape(2, 4)
    assert wrong_bits(model, x) == 0


def test_denormal_numbers_signed_zeros_and_huge_values_are_restored():
    row = [1e-45, -1e-45, 1e-38, -0.0, 0.0, 1e30, -1e30, 1.0]
    x = torch.tensor([row, row[::-1]], dtype=torch.float32)
    assert wrong_bits(couplings(8, layers=4), x) == 0
    assert wrong_bits(Permutation.reverse(8), x) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = torch.randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="got NaN or Inf in 1 of 3 samples"):
        exact(Permutation.reverse(4)).encode(x)


def test_data_that_a_layer_maps_to_infinity_are_refused_with_its_name():
    class Exponential(Invertible):
        def forward(self, x):
            return x.exp()

        def inverse(self, z):
            return z.log()

    model = Chain(Permutation.reverse(2), Exponential())
    with pytest.raises(ValueError, match=r"layer 1 \(Exponential\) maps to finite values"):
        exact(model).encode(torch.full((1, 2), 1e30))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"got int64; pass x.float\(\)"):
        exact(Permutation.reverse(3)).encode(torch.zeros(2, 3, dtype=torch.long))


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        exact(Permutation.reverse(3)).encode(torch.zeros(0, 3))


def exploding() -> tuple[Invertible, torch.Tensor]:
    torch.manual_seed(1)
    model = couplings(16, layers=32, gain=6.0)
    return model, torch.randn(256, 16, dtype=torch.float32)


def test_couplings_whose_float_inverse_is_not_finite_are_restored():
    model, x = exploding()
    with torch.no_grad():
        back = model.inverse(model(x))
    lost = (~back.isfinite() | ((back - x).abs() > 1)).any(1)
    assert bool(lost.all())
    assert wrong_bits(model, x) == 0


def test_kept_bits_are_the_contraction():
    model, x = exploding()
    _, kept = exact(model).encode(x)
    with torch.no_grad():
        _, log_det = model.to_dtype(torch.float64).forward_and_log_det(x.double())
    expected = -float(log_det.mean()) / math.log(2) / x[0].numel()
    assert expected > 20
    assert kept.bits_per_dimension == pytest.approx(expected, rel=0.02)
    by_layer = sum(layer.bits_per_dimension for layer in kept.layers)
    assert kept.bits_per_dimension == pytest.approx(by_layer)


def test_data_on_a_grid_lose_nothing_and_say_so():
    images = torch.randint(0, 256, (4, 3, 2, 2)).float() / 256
    _, kept = exact(Permutation.reverse(3)).encode(images)
    assert "lies on the grid 2^-" in kept.quantization
    assert "nothing is lost" in kept.quantization
    _, kept = exact(Permutation.reverse(3)).encode(torch.rand(4, 3))
    assert "12 of 12 values of x lie between its points; their rests are kept" in kept.quantization


def test_saved_bits_are_decoded_in_another_process(tmp_path):
    torch.manual_seed(0)
    model, x = couplings(6, layers=4), torch.randn(5, 6, dtype=torch.float32)
    z, kept = exact(model).encode(x)
    kept.save(tmp_path / "kept.pt")
    torch.save((z, x, model), tmp_path / "rest.pt")
    code = (
        "import sys, torch\n"
        "from inn_guard.exact import Kept, exact\n"
        "z, x, model = torch.load(sys.argv[1] + '/rest.pt', weights_only=False)\n"
        "restored = exact(model).decode(z, Kept.load(sys.argv[1] + '/kept.pt'))\n"
        "print(torch.equal(restored, x))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_other_files_are_refused(tmp_path):
    torch.save(torch.zeros(1), tmp_path / "other.pt")
    with pytest.raises(TypeError, match=r"expected a file written by Kept.save, got Tensor"):
        Kept.load(tmp_path / "other.pt")


def test_changed_weights_are_refused_with_the_layers_name():
    model, x = couplings(6, layers=3), torch.randn(4, 6, dtype=torch.float32)
    coder = exact(model)
    z, kept = coder.encode(x)
    with torch.no_grad():
        next(model.steps[1].parameters()).view(-1)[0].mul_(1 + 1e-6)
    with pytest.raises(Mismatch, match=r"layer 1 \(AffineCoupling\): its parameters have other"):
        coder.decode(z, kept)


def test_another_z_and_another_model_are_refused():
    model, x = couplings(6, layers=3), torch.randn(4, 6, dtype=torch.float32)
    z, kept = exact(model).encode(x)
    with pytest.raises(ValueError, match="expected the z that encode returned"):
        exact(model).decode(z.double(), kept)
    with pytest.raises(ValueError, match="expected a model with layers"):
        exact(Permutation.reverse(6)).decode(z, kept)


def test_the_number_of_threads_of_encode_is_used():
    model, x = couplings(64, layers=2), torch.randn(64, 64, dtype=torch.float32)
    z, kept = exact(model).encode(x)
    assert kept.threads == 1
    torch.set_num_threads(2)
    try:
        assert torch.equal(exact(model).decode(z, kept), x)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_layer_that_does_not_repeat_itself_is_stored():
    noisy = AdditiveCoupling(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    model = Chain(Permutation.reverse(4), noisy, Diagonal(4)).train()
    x = torch.randn(16, 4)
    coder = exact(model)
    z, kept = coder.encode(x)
    assert kept.layers[1].rule == "stored input"
    assert kept.layers[1].reason == "it does not repeat itself bit for bit"
    assert torch.equal(coder.decode(z, kept), x)


def test_layers_that_compose_to_another_map_are_not_used():
    class Doubled(Chain):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Doubled(Permutation.reverse(4), Diagonal(4))
    x = torch.randn(3, 4)
    z, kept = exact(model).encode(x)
    assert torch.allclose(z, model(x))
    assert [layer.rule for layer in kept.layers] == ["stored input"]
    assert torch.equal(exact(model).decode(z, kept), x)


def test_hooks_and_overridden_methods_are_stored():
    class Louder(Diagonal):
        def forward(self, x):
            return 3 * super().forward(x)

    hooked = Diagonal(4)
    hooked.register_forward_hook(lambda module, arguments, output: output + 1)
    x = torch.randn(3, 4)
    for layer in (Louder(4), hooked):
        z, kept = exact(layer).encode(x)
        assert kept.layers[0].rule == "stored input"
        with torch.no_grad():
            assert torch.allclose(z, layer(x))
        assert torch.equal(exact(layer).decode(z, kept), x)


def test_actnorm_before_its_first_batch_is_stored_and_not_initialised():
    layer, x = ActNorm(4).train(), torch.randn(8, 4)
    _, kept = exact(layer).encode(x)
    assert kept.layers[0].reason == "its first training batch will initialise it"
    assert not layer.initialized


def test_scales_that_underflow_fall_back_to_the_stored_input():
    coupling = AffineCoupling(nn.Linear(2, 4), scale=ExpScale())
    with torch.no_grad():
        coupling.network.weight.zero_()
        coupling.network.bias.copy_(torch.tensor([0.0, 0.0, -1e4, 1.0]))
    x = torch.randn(3, 4)
    z, kept = exact(coupling).encode(x)
    assert kept.layers[0].reason == "a scale is zero or not finite"
    assert torch.equal(exact(coupling).decode(z, kept), x)


def test_the_plan_tells_rules_before_and_bits_after_a_batch():
    coder = exact(Chain(Logit(0.1), AdditiveCoupling.on_halves(4, network)))
    assert "0 Logit             stored input" in coder.plan()
    assert "1 AdditiveCoupling  additive or affine coupling" in coder.plan()
    assert "0.00" in coder.plan(torch.rand(3, 4))
    assert "bits per dimension" in str(coder.encode(torch.rand(3, 4))[1])


@pytest.mark.parametrize("size", [1.0, 1e9])
def test_later_batches_of_an_inverse_autoregressive_flow_are_decoded(size):
    torch.manual_seed(0)
    model = InverseLayer(maf(4, layers=2, hidden=8).float())
    coder = exact(model)
    coder.encode(torch.randn(5, 4).float())
    x = size * torch.randn(5, 4).float()
    z, kept = coder.encode(x)
    assert torch.equal(coder.decode(z, kept), x)


def test_the_plan_shows_what_is_stored_inside_a_layer():
    layer = OnRemaining(Logit(0.1), shape=(2,))
    coder, x = exact(layer), torch.rand(3, 4)
    z, kept = coder.encode(x)
    assert kept.layers[0].rule == "on what remains"
    assert "is stored" in kept.layers[0].reason
    assert torch.equal(coder.decode(z, kept), x)


def test_the_model_is_left_as_it_is():
    model = Chain(ActNorm(4), nflows_like_batch_norm()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(8, 4)
    z, kept = exact(model).encode(x)
    assert torch.equal(exact(model).decode(z, kept), x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def nflows_like_batch_norm() -> Invertible:
    return AdditiveCoupling(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
