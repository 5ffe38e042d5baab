"""The nflows adapter beyond the contract: errors, exceptions, caches, flows and contexts."""

from __future__ import annotations

import copy

import pytest
import torch
from nflows import distributions, flows, transforms
from nflows.nn.nets import ResidualNet
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.core.invertible import NotApplicable
from inn_guard.execution.state import changed_state
from inn_guard.jacobian.chain import Linearization
from inn_guard.layers.inverted import InverseLayer
from inn_guard.memory_saving import memory_saving
from tests.cases.nflows import (
    CASES,
    EXCEPTIONS,
    FEATURES,
    flow_in_context,
    multiscale,
    nested,
    normal,
)
from tests.oracles import transforms as reference


def in_float32(make):
    """Build as at home: the default dtype is float32 while nflows creates its constants."""
    torch.set_default_dtype(torch.float32)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float64)


@pytest.fixture
def default_float32():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


def test_every_transform_of_the_library_is_a_case_or_an_exception():
    public = {name for name, value in vars(transforms).items() if isinstance(value, type)}
    public |= {"CauchyCDF", "CauchyCDFInverse"}  # public, but not exported
    public -= {"Transform", "InputOutsideDomain", "InverseNotAvailable"}
    covered = {case.id.removeprefix("nflows-").split("-")[0] for case in CASES}
    excepted = {name.split()[0].split("(")[0] for name in EXCEPTIONS}
    assert public - covered - excepted == set()


# Every entry of EXCEPTIONS fails for its stated reason.


def test_naive_linear_has_no_inverse_with_this_torch():
    model = wrap(transforms.NaiveLinear(FEATURES).eval())
    x = normal(3, FEATURES)
    with pytest.raises(RuntimeError, match="solve"):
        model.inverse(model(x))
    assert "torch.solve" in EXCEPTIONS["NaiveLinear"]


def test_naive_linear_is_still_linearised_by_solving_with_its_jacobian():
    module = transforms.NaiveLinear(FEATURES)
    x, u = normal(3, FEATURES), normal(3, FEATURES)
    product = Linearization(wrap(module.eval()), x).inverse_jvp(u).value()
    torch.testing.assert_close(product, torch.linalg.solve(module._weight.detach(), u.T).T)


def test_cached_linear_maps_have_no_inverse_in_float64(default_float32):
    model = wrap(transforms.LULinear(FEATURES, using_cache=True).double().eval())
    with pytest.raises(RuntimeError, match="same dtype"):
        model.inverse(normal(3, FEATURES))
    assert "float32 identity" in EXCEPTIONS["Linear(using_cache=True) in float64"]


def test_batch_norm_in_training_mode_names_itself_and_the_way_out():
    model = wrap(
        transforms.CompositeTransform(
            [transforms.ActNorm(FEATURES), transforms.BatchNorm(FEATURES)]
        )
    )
    with pytest.raises(
        NotApplicable, match=r"CompositeTransform: no inverse of BatchNorm .*eval mode"
    ):
        model.train().inverse(normal(3, FEATURES))
    assert "model.eval()" in EXCEPTIONS["BatchNorm in training mode"]


def test_squeeze_by_three_has_no_inverse():
    model = wrap(transforms.SqueezeTransform(factor=3))
    z = model(normal(3, 1, 6, 6))
    with pytest.raises(ValueError, match="Invalid number of channel"):
        model.inverse(z)
    assert "SqueezeTransform(factor=3)" in EXCEPTIONS


def test_gated_linear_unit_has_a_log_det_per_gate():
    model = wrap(transforms.GatedLinearUnit(), context=normal(3, FEATURES))
    with pytest.raises(ValueError, match=r"expected a log-determinant with 3 entries.*18"):
        model.forward_and_log_det(normal(3, FEATURES))
    shared_gate = wrap(transforms.GatedLinearUnit(), context=normal(3, 1))
    x = normal(3, FEATURES)
    claimed = shared_gate.forward_and_log_det(x)[1]
    true = reference.log_abs_det(reference.jacobian(shared_gate.forward, x))
    torch.testing.assert_close(true, FEATURES * claimed)  # off by the number of features
    assert "GatedLinearUnit with several features" in EXCEPTIONS


# Errors


def test_input_outside_the_domain_names_the_transform():
    model = wrap(transforms.CompositeTransform([transforms.ActNorm(FEATURES), transforms.Tanh()]))
    with pytest.raises(ValueError, match=r"CompositeTransform: input outside the domain of Tanh"):
        model.inverse(2 * torch.ones(3, FEATURES))


def test_a_transform_without_an_inverse_says_so():
    class OneWay(transforms.Transform):
        def forward(self, inputs, context=None):
            return inputs**3, inputs.new_zeros(len(inputs))

    with pytest.raises(NotApplicable, match=r"no inverse of OneWay .*the library has none"):
        wrap(OneWay()).inverse(normal(3, 2))


def test_a_failing_assertion_inside_the_library_is_quoted():
    class Careful(transforms.IdentityTransform):
        def inverse(self, inputs, context=None):
            raise AssertionError

    with pytest.raises(ValueError, match=r"failed inside Careful: `raise AssertionError`"):
        wrap(Careful()).inverse(torch.ones(1, 1))


def test_other_objects_of_nflows_are_refused():
    with pytest.raises(
        TypeError, match=r"expected a Flow or a Transform of nflows, got ResidualNet"
    ):
        wrap(ResidualNet(2, 2, hidden_features=2))
    with pytest.raises(TypeError, match="got StandardNormal"):
        wrap(distributions.StandardNormal([2]))


# Layers


def test_nesting_is_opened_down_to_single_transforms():
    model = wrap(nested())
    names = [layer.name for layer in model.layers()]
    assert names == [
        "RandomPermutation",
        "inverse AffineCouplingTransform",
        "inverse LULinear",
        "ActNorm",
        "inverse BatchNorm",
    ]


def test_private_transforms_inside_a_transform_are_no_layers():
    assert wrap(transforms.OneByOneConvolution(4)).layers() == ()
    assert wrap(transforms.SVDLinear(4, num_householder=2)).layers() == ()


def test_a_shared_squashing_module_appears_at_both_its_places():
    squash = transforms.Sigmoid()
    first, _, last = wrap(
        transforms.CompositeCDFTransform(squash, transforms.PiecewiseLinearCDF([FEATURES]))
    ).layers()
    assert first.block is squash
    assert isinstance(last, InverseLayer)
    assert last.inner.block is squash


def test_scales_are_finished_first_and_the_rest_comes_last():
    module = multiscale((4, 4, 4))
    x = normal(3, 4, 4, 4)
    layers = wrap(module.eval()).layers()
    assert [layer.name for layer in layers] == [
        "OneByOneConvolution",
        "Chunk",
        "SqueezeTransform",
        "ActNorm",
        "Chunk",
        "ActNorm",
        "Flatten",
    ]
    finished_first = module._transforms[0](x)[0].chunk(2, 1)[0].flatten(1)
    state = layers[1](layers[0](x))
    assert torch.equal(state[:, : finished_first.shape[1]], finished_first)
    assert torch.equal(module(x)[0][:, : finished_first.shape[1]], finished_first)


def test_a_scale_whose_shapes_cannot_be_told_stays_one_layer():
    module = transforms.MultiscaleCompositeTransform(2)
    rest = module.add_transform(transforms.ActNorm(4), (4, 4, 4))
    unsqueeze = transforms.InverseTransform(transforms.SqueezeTransform())
    inner = transforms.CompositeTransform([transforms.SqueezeTransform(), unsqueeze])
    module.add_transform(inner, rest)
    model, x = wrap(module), normal(3, 4, 4, 4)
    z = x
    for layer in model.layers():
        z = layer(z)
    assert [layer.name for layer in model.layers()] == [
        "ActNorm",
        "Chunk",
        "CompositeTransform",
        "Flatten",
    ]
    assert torch.equal(z, model(x))


# Flows and contexts


def test_log_prob_is_that_of_the_flow_in_its_context():
    flow, x, context = flow_in_context().double(), normal(4, FEATURES), normal(4, 2)
    model = wrap(flow, context=context)
    assert torch.equal(model.log_prob(x), flow.log_prob(x, context))
    assert torch.equal(model(x), flow.transform_to_noise(x, context))
    other = normal(4, 2)
    assert torch.equal(model.with_context(other).log_prob(x), flow.log_prob(x, other))
    base = flow._distribution.log_prob(model(x), flow._embedding_net(context))
    torch.testing.assert_close(model.log_prob(x), base + model.forward_and_log_det(x)[1])


def test_gradients_reach_the_embedding_net_through_the_layers():
    flow = flow_in_context().double()
    z = normal(4, FEATURES)
    for layer in wrap(flow, context=normal(4, 2)).layers():
        z = layer(z)
    z.square().sum().backward()
    assert flow._embedding_net.weight.grad.abs().sum() > 0


def test_layers_of_a_flow_can_be_converted_one_by_one():
    model = wrap(flow_in_context().double(), context=normal(4, 2))
    x = normal(4, FEATURES)
    layer = model.layers()[0]
    torch.testing.assert_close(
        layer.to_dtype(torch.float32)(x.float()).double(), layer(x), rtol=1e-5, atol=1e-5
    )


def test_a_flow_without_context_calls_its_embedding_net_with_none_as_nflows_does():
    class Constant(nn.Module):
        def forward(self, context):
            assert context is None

    base = distributions.StandardNormal([FEATURES])
    flow = flows.Flow(transforms.ReversePermutation(FEATURES), base, Constant())
    x = normal(3, FEATURES)
    assert torch.equal(wrap(flow)(x), x.flip(1))


# Caches


@pytest.mark.parametrize(
    "linear", [transforms.LULinear, transforms.NaiveLinear, transforms.QRLinear]
)
def test_filled_caches_do_not_follow_a_copy(linear, default_float32):
    arguments = {"num_householder": 2} if linear is transforms.QRLinear else {}
    module = linear(FEATURES, using_cache=True, **arguments).eval()
    model, x = wrap(transforms.CompositeTransform([module])), torch.randn(3, FEATURES)
    z = model(x)
    assert module.cache.weight is not None
    double = model.to_dtype(torch.float64)
    torch.testing.assert_close(double(x.double()), z.double(), rtol=1e-5, atol=1e-5)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), z)
    assert module.using_cache
    assert module.cache.weight is not None


def test_a_copy_in_float64_has_an_inverse_where_the_cached_original_has_none(default_float32):
    module = transforms.LULinear(FEATURES, using_cache=True, identity_init=False).eval()
    model, x = wrap(transforms.InverseTransform(module)), torch.randn(3, FEATURES)
    model.inverse(model(x))
    double = model.to_dtype(torch.float64)
    back = double.inverse(double(x.double()))
    torch.testing.assert_close(back, x.double(), rtol=1e-12, atol=1e-12)


# Manners


def test_wrapping_and_calling_change_nothing_in_the_module():
    module = nested()
    module.train()
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    modes = {name: part.training for name, part in module.named_modules()}
    with changed_state(module) as changed:
        model = wrap(module)
    assert changed == []
    assert modes == {name: part.training for name, part in module.named_modules()}
    assert list(module.state_dict()) == [
        name.removeprefix("module.") for name in model.state_dict()
    ]
    assert {id(p) for p in model.parameters()} == {id(p) for p in module.parameters()}
    model.eval()(normal(3, FEATURES))
    assert calls == [1]
    handle.remove()


def test_a_transform_that_writes_into_its_input_leaves_ours_alone():
    class InPlace(transforms.Transform):
        def forward(self, inputs, context=None):
            return inputs.mul_(2), inputs.new_zeros(len(inputs))

        def inverse(self, inputs, context=None):
            return inputs.div_(2), inputs.new_zeros(len(inputs))

    x = normal(3, 2)
    before = x.clone()
    assert torch.equal(wrap(InPlace()).inverse(wrap(InPlace())(x)), before)
    assert torch.equal(x, before)


def test_the_scale_activation_of_newer_versions_is_used_as_it_is():
    """Newer versions take a scale_activation; the adapter asks the module itself."""

    class Exponential(transforms.AffineCouplingTransform):
        def _scale_and_shift(self, transform_params):
            raw, shift = transform_params.chunk(2, 1)
            return raw.exp(), shift

    module = Exponential(
        torch.tensor([0, 1]),
        lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=4),
    )
    model, x = wrap(module.eval()), normal(3, 2)
    log_det = model.forward_and_log_det(x)[1]
    torch.testing.assert_close(log_det, reference.log_abs_det(reference.jacobian(model.forward, x)))


SPLINES = {
    "quadratic": transforms.PiecewiseQuadraticCouplingTransform,
    "cubic": transforms.PiecewiseCubicCouplingTransform,
    "rational quadratic": transforms.PiecewiseRationalQuadraticCouplingTransform,
}


def spline_coupling(kind):
    """A coupling whose network has ``hidden_features``, by which splines scale its output."""
    torch.manual_seed(0)
    options = {"tails": "linear", "tail_bound": 3.0}
    coupling = SPLINES[kind](
        torch.tensor([1, 0, 1, 0]), lambda i, o: ResidualNet(i, o, 16, num_blocks=1), **options
    )
    with torch.no_grad():
        for parameter in coupling.transform_net.final_layer.parameters():
            parameter.mul_(4.0)
    return coupling


@pytest.mark.parametrize("kind", SPLINES)
def test_a_primed_coupling_is_the_same_map_however_often_it_is_called(kind):
    layer, x = wrap(spline_coupling(kind)), normal((8, 4))
    z, log_det = layer.forward_and_log_det(x)
    with_cached_conditioner = layer.with_cached_conditioner(z.detach())
    for _ in range(2):
        torch.testing.assert_close(
            with_cached_conditioner.inverse(z), layer.inverse(z), rtol=0, atol=0
        )
        again, log_det_again = with_cached_conditioner.forward_and_log_det(x)
        torch.testing.assert_close(again, z, rtol=0, atol=0)
        torch.testing.assert_close(log_det_again, log_det, rtol=0, atol=0)


@pytest.mark.parametrize("kind", SPLINES)
def test_memory_saving_gradients_of_spline_couplings_are_the_true_ones(kind):
    coupling = spline_coupling(kind)
    flow = wrap(
        transforms.CompositeTransform([coupling, transforms.ReversePermutation(4), coupling])
    )
    x = normal((8, 4))

    def gradients(model):
        z, log_det = model.forward_and_log_det(x)
        return torch.autograd.grad(
            (z.square().sum(1) - log_det).mean(), list(coupling.parameters())
        )

    for saved, true in zip(gradients(memory_saving(flow)), gradients(flow), strict=True):
        torch.testing.assert_close(saved, true, rtol=1e-6, atol=1e-8)
