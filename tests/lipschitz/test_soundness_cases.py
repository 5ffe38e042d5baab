"""Bounds of modules that are not what their class says: never below the truth.

Every case is one way in which a rule may read another map than the next call computes. The truth
is sampled from the model's own forward by autograd.
"""

from __future__ import annotations

import copy
import math
import warnings

import memcnn
import pytest
import torch
import torch.nn.functional as F
from FrEIA import framework
from FrEIA import modules as freia
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeTransform,
    LULinear,
    ReversePermutation,
)
from nflows.transforms.nonlinearities import Logit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import inn_guard as ig
from inn_guard.execution import deadline
from inn_guard.jacobian.chain import Linearization
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.ode import FixedStep, NeuralODE, RungeKutta
from inn_guard.lipschitz.bounds import LipschitzBounds
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.elementary import KnownConstants
from inn_guard.lipschitz.transformers.base import softplus, softplus_slope
from inn_guard.numerics.intervals import Box, Interval

ROUNDING = 1 + 1e-9
D = 4


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    # budgets in work, as outside of the tests
    monkeypatch.setattr(deadline, "now", deadline._work_done)


def jacobians(function, x: Tensor) -> Tensor:
    """(B, outputs, inputs), by autograd through the function itself."""
    x = x.clone().requires_grad_()
    z = function(x.clone()).flatten(1)
    rows = []
    for output in z.unbind(1):
        (row,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        rows.append(row.flatten(1))
    return torch.stack(rows, 1).detach()


def assert_sound(model, *, width: float = 1.0, shape=(D,), count: int = 128) -> LipschitzBounds:
    """Bounds on a box, compared with the Jacobians of the model's own forward in it."""
    model = ig.wrap(model)
    box = Box(torch.full(shape, -width), torch.full(shape, width))
    bounds = ig.lipschitz_bounds(model, box, seconds=0.05)
    exact = ig.wrap(model).to_dtype(torch.float64)
    x = width * (2 * torch.rand(count, *shape, dtype=torch.float64) - 1)
    sigma = torch.linalg.svdvals(jacobians(exact, x))
    assert float(sigma[:, 0].max()) <= bounds.forward * ROUNDING
    assert float(1 / sigma[:, -1].min()) <= bounds.inverse * ROUNDING
    assert bounds.lower_forward <= bounds.forward
    assert bounds.lower_inverse <= bounds.inverse
    return bounds


def network(n: int, m: int, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, 8), activation or nn.Tanh(), nn.Linear(8, m))


def additive(net: nn.Module) -> AdditiveCoupling:
    return AdditiveCoupling(net)


def assert_opaque(bounds: LipschitzBounds, said: str) -> None:
    assert bounds.forward == math.inf
    assert said in bounds.reason


# ---------------------------------------------------------------- weights that the next call makes


@pytest.mark.parametrize("trained", [False, True])
def test_weight_norm_of_the_old_kind_is_evaluated_as_the_next_call_does(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        linear = nn.utils.weight_norm(nn.Linear(2, 8))
    model = additive(nn.Sequential(linear, nn.Tanh(), nn.Linear(8, 2)))
    with torch.set_grad_enabled(trained):
        model(torch.zeros(1, D))
    with torch.no_grad():
        linear.weight_g.mul_(20)
    bounds = assert_sound(model)
    assert math.isfinite(bounds.forward)


def test_spectral_norm_of_the_old_kind_is_evaluated_as_the_next_call_does():
    linear = nn.utils.spectral_norm(nn.Linear(2, 8))
    model = additive(nn.Sequential(linear, nn.Tanh(), nn.Linear(8, 2))).eval()
    with torch.no_grad():
        model(torch.zeros(1, D))
        linear.weight_u.copy_(torch.randn(8))
        linear.weight_orig.mul_(torch.rand(8, 2) * 20)
    assert_sound(model)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_a_power_iteration_at_every_call_has_no_bound(norm):
    net = nn.Sequential(norm(nn.Linear(2, 8)), nn.Tanh(), nn.Linear(8, 2))
    bounds = assert_sound(additive(net))
    assert_opaque(bounds, "SpectralNorm")
    assert math.isfinite(assert_sound(additive(net).eval()).forward)


def test_a_parametrization_that_differs_from_read_to_read_has_no_bound():
    class Jittered(nn.Module):
        def forward(self, weight):
            return weight * torch.rand(())

    linear = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(linear, "weight", Jittered(), unsafe=True)
    box = Box(torch.zeros(D), torch.ones(D))
    assert_opaque(ig.lipschitz_bounds(additive(linear), box, seconds=0.3), "parametrization")


def test_a_parametrization_that_is_a_function_of_the_weight_keeps_its_bound():
    linear = parametrizations.weight_norm(nn.Linear(2, 2))
    assert math.isfinite(assert_sound(additive(linear)).forward)


# ------------------------------------------------------------------------- overridden and patched


class LargeScale(AffineCouplingTransform):
    def _scale_and_shift(self, transform_params):
        scale, shift = super()._scale_and_shift(transform_params)
        return 30 * scale, shift


def nflows_net(n, m):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network(n, m)

        def forward(self, x, context=None):
            return self.layers(x)

    return Net()


def test_a_subclass_with_another_scale_has_no_bound_of_its_parent():
    model = LargeScale(torch.tensor([0, 1, 0, 1]), nflows_net)
    assert_opaque(assert_sound(model), "_scale_and_shift")


def test_an_instance_with_another_scale_has_no_bound_of_its_class():
    model = AffineCouplingTransform(torch.tensor([0, 1, 0, 1]), nflows_net)
    own = model._scale_and_shift
    model._scale_and_shift = lambda theta: (30 * own(theta)[0], own(theta)[1])
    assert_opaque(assert_sound(model), "_scale_and_shift")


class Tenfold(AdditiveCoupling):
    def forward(self, x):
        return 10 * super().forward(x)

    def inverse(self, z):
        return super().inverse(z / 10)


class TenfoldGlow(freia.GLOWCouplingBlock):
    def forward(self, x, c=(), rev=False, jac=True):
        if rev:
            x = [x[0] / 10]
        (z,), log_det = super().forward(x, c, rev, jac)
        if not rev:
            z = 10 * z
        return (z,), log_det


class TenfoldComposite(CompositeTransform):
    def forward(self, inputs, context=None):
        z, log_det = super().forward(inputs, context)
        return 10 * z, log_det

    def inverse(self, inputs, context=None):
        return super().inverse(inputs / 10, context)


class TenfoldSequence(framework.SequenceINN):
    def forward(self, x, c=None, rev=False, jac=True):
        if rev:
            x = x / 10
        z, log_det = super().forward(x, c, rev, jac)
        return (z if rev else 10 * z), log_det


class TenfoldChain(ig.layers.chain.Chain):
    def forward(self, x):
        return 10 * super().forward(x)

    def inverse(self, z):
        return super().inverse(z / 10)


def composite(kind):
    couplings = [
        AffineCouplingTransform(torch.tensor([0, 1, 0, 1]), nflows_net),
        ReversePermutation(D),
    ]
    return kind(couplings)


def sequence(kind):
    model = kind(D)
    model.append(freia.GLOWCouplingBlock, subnet_constructor=network)
    return model


SUBCLASSES = {
    "own coupling": lambda: Tenfold(network(2, 2)),
    "GLOWCouplingBlock": lambda: TenfoldGlow([(D,)], subnet_constructor=network),
    "CompositeTransform": lambda: composite(TenfoldComposite),
    "SequenceINN": lambda: sequence(TenfoldSequence),
    "Chain": lambda: TenfoldChain(additive(network(2, 2))),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_with_its_own_forward_has_no_bound_of_its_parent(name):
    assert assert_sound(SUBCLASSES[name]()).forward == math.inf


def test_a_subclass_that_overrides_only_its_constructor_keeps_the_bound():
    class Small(AdditiveCoupling):
        def __init__(self):
            super().__init__(network(2, 2))

    assert math.isfinite(assert_sound(Small()).forward)


class ScaledTanh(nn.Tanh):
    def forward(self, x):
        return 10 * super().forward(x)


class Tanh(nn.Tanh):
    pass


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)


class ScaledSequential(nn.Sequential):
    def forward(self, x):
        return 10 * super().forward(x)


NETWORKS = {
    "activation": lambda: network(2, 2, ScaledTanh()),
    "linear map": lambda: ScaledLinear(2, 2),
    "sequence": lambda: ScaledSequential(nn.Linear(2, 2)),
    "same": lambda: network(2, 2, Tanh()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_subclass_in_a_network_is_read_by_its_own_forward(name):
    assert math.isfinite(assert_sound(additive(NETWORKS[name]())).forward)


def test_a_forward_method_of_one_instance_is_seen():
    net = network(2, 2)
    net.forward = lambda x: 10 * nn.Sequential.forward(net, x)
    box = Box(torch.zeros(D), torch.ones(D))
    assert_opaque(ig.lipschitz_bounds(additive(net), box, seconds=0.3), "forward")


def test_a_method_that_is_replaced_in_the_class_is_seen(monkeypatch):
    forward = nn.Tanh.forward
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: 10 * forward(self, x))
    assert_opaque(assert_sound(additive(network(2, 2))), "Tanh")


# ------------------------------------------------------------------------------------------ hooks


def tenfold(module, arguments, output):
    return 10 * output


def test_a_hook_on_a_container_inside_is_seen():
    inner = network(2, 2)
    inner.register_forward_hook(tenfold)
    assert_opaque(assert_sound(additive(nn.Sequential(inner))), "hook")


@pytest.mark.parametrize("where", ["container", "nested"])
def test_a_hook_on_a_container_of_layers_is_seen(where):
    inner = composite(CompositeTransform)
    model = CompositeTransform([inner])
    part = model if where == "container" else inner
    part.register_forward_hook(lambda m, a, output: (10 * output[0], output[1]))
    assert_opaque(assert_sound(model), "hook")


def test_a_hook_on_the_wrapper_is_seen():
    model = ig.wrap(composite(CompositeTransform))
    model.register_forward_hook(tenfold)
    assert_opaque(assert_sound(model), "hook")


def test_a_global_hook_is_seen():
    def hook(module, arguments, output):
        if isinstance(module, nn.Tanh):
            return 10 * output
        return None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_opaque(assert_sound(additive(network(2, 2))), "global")
    finally:
        handle.remove()


# ------------------------------------------------------------------------------ in place, aliasing


@pytest.mark.parametrize(
    "first",
    [
        lambda: nn.SELU(inplace=True),
        lambda: nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
        lambda: nn.Sequential(nn.Dropout(0.0), nn.LeakyReLU(0.5, inplace=True)),
        lambda: nn.Sequential(nn.Unflatten(1, (2,)), nn.ReLU(inplace=True)),
    ],
)
def test_a_first_operation_in_place_has_no_bound(first):
    model = additive(nn.Sequential(first(), nn.Linear(2, 2)))
    box = Box(-torch.ones(D), torch.ones(D))
    assert_opaque(ig.lipschitz_bounds(model, box, seconds=0.3), "in place")


class Reshaped(nn.Module):
    """y + relu(y), where the ReLU writes into y through a view."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)

    def forward(self, x):
        y = self.first(x)
        view = y.reshape(-1, 2)
        F.relu(view, inplace=True)
        return 3 * y


def test_an_operation_in_place_on_a_view_is_seen():
    assert_sound(additive(Reshaped()))


# ------------------------------------------------------------------------------------ odd arguments


@pytest.mark.parametrize("alpha", [-100.0, -1.0, 0.0, 3.0])
@pytest.mark.parametrize("kind", [nn.ELU, nn.CELU])
def test_elu_of_any_alpha(kind, alpha):
    if kind is nn.CELU and alpha == 0:
        pytest.skip("CELU divides by alpha")
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    assert_sound(additive(nn.Sequential(first, kind(alpha), nn.Tanh(), last)), width=3.0)


@pytest.mark.parametrize(
    "softplus",
    [nn.Softplus(1.0, 0.1), nn.Softplus(9.0, 1.0), nn.Softplus(-1.0, 20.0), nn.Softplus(1.0, -5.0)],
)
def test_softplus_that_jumps_has_no_bound(softplus):
    box = Box(-torch.ones(D), torch.ones(D))
    net = nn.Sequential(nn.Linear(2, 2), softplus, nn.Linear(2, 2))
    assert_opaque(ig.lipschitz_bounds(additive(net), box, seconds=0.3), "Softplus")


def test_softplus_with_the_usual_threshold_keeps_its_bound():
    assert math.isfinite(assert_sound(additive(network(2, 2, nn.Softplus(3.0)))).forward)


@pytest.mark.parametrize("slope", [-3.0, 0.0, 5.0])
def test_leaky_relu_of_any_slope(slope):
    assert_sound(additive(network(2, 2, nn.LeakyReLU(slope))))


class Repeated(nn.Module):
    """A network on (B, C, *size) that repeats pixels and averages them again."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self.up = nn.Upsample(scale_factor=2)
        self.down = kinds[dims - 1](2, 2, 2, stride=2)

    def forward(self, x):
        return self.down(self.up(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_upsampling_in_any_number_of_dimensions(dims):
    model = additive(Repeated(dims))
    nn.init.ones_(model.network.down.weight)
    assert_sound(model, shape=(4, *[2] * dims), count=4)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2])
def test_padded_convolutions(dims, mode):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    net = nn.Sequential(
        kind(2, 4, 3, padding=1, padding_mode=mode),
        nn.Tanh(),
        kind(4, 2, 3, padding="same", dilation=1, groups=2, padding_mode=mode),
    )
    bounds = assert_sound(additive(net), shape=(4, *[4] * dims), count=4)
    assert math.isfinite(bounds.forward)


# ------------------------------------------------------------------------------------- broadcasting


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.wide(x) + self.narrow(x)


@pytest.mark.thorough
def test_a_sum_that_broadcasts_is_counted_or_refused():
    net = Broadcast()
    with torch.no_grad():
        net.wide.weight.mul_(0.1)
        net.narrow.weight.fill_(1.0)
    assert_sound(additive(net), shape=(16,))


class AlongTheWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2 * 2 * 4, 2 * 2 * 2)

    def forward(self, x):
        y = torch.cat([x, 2 * x], -1)
        return torch.tanh(self.last(y.flatten(1))).reshape(-1, 2, 2, 2)


def test_images_concatenated_along_their_width():
    model = additive(AlongTheWidth())
    with torch.no_grad():
        model.network.last.weight.normal_(0, 3)
        model.network.last.bias.normal_(0, 3)
    assert_sound(model, shape=(4, 2, 2), count=32)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, twice=True, *, thrice=True):
        y = self.linear(x)
        if twice:
            y = 20 * y
        if thrice:
            y = 3 * y
        return y


def test_default_arguments_of_a_network_are_those_of_the_call():
    assert_sound(additive(Doubled()))


# ----------------------------------------------------------------------------------- libraries' own


def test_memcnn_coupling_whose_shift_and_log_scale_are_one_output():
    half = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with torch.no_grad():
        for linear in half:
            linear.weight.mul_(3)
    fm, gm = half
    model = memcnn.AffineCoupling(fm, gm, adapter=memcnn.AffineAdapterNaive)
    assert_sound(model, width=0.01, count=512)


def test_a_clamp_that_equals_tanh_on_an_interval_only():
    def clamp(u):
        return torch.where(u.abs() <= 20, torch.tanh(u), u)

    model = freia.GLOWCouplingBlock(
        [(D,)], subnet_constructor=network, clamp=2.0, clamp_activation=clamp
    )
    box = Box(-torch.ones(D), torch.ones(D))
    assert ig.lipschitz_bounds(model, box, seconds=0.3).forward == math.inf


@pytest.mark.parametrize("clamp", ["ATAN", "TANH", "SIGMOID"])
def test_the_clamps_of_freia_keep_their_bounds(clamp):
    model = freia.GLOWCouplingBlock(
        [(D,)], subnet_constructor=network, clamp=1.0, clamp_activation=clamp
    )
    assert math.isfinite(assert_sound(model).forward)


# ------------------------------------------------------------------------------------ memory saving


@pytest.mark.parametrize("name", SUBCLASSES)
def test_memory_saving_computes_the_map_of_the_subclass(name):
    model = ig.wrap(SUBCLASSES[name]()).to_dtype(torch.float64)
    x = torch.randn(5, D, dtype=torch.float64)
    try:
        saving = ig.memory_saving(model)
    except ig.NotApplicable:
        return
    z = model(x)
    z.square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    actual = saving(x)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, z)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", SUBCLASSES)
def test_the_spectrum_is_that_of_the_subclass(name):
    model = ig.wrap(SUBCLASSES[name]()).to_dtype(torch.float64)
    x = torch.randn(3, D, dtype=torch.float64)
    v = torch.randn(3, D, dtype=torch.float64)
    product = Linearization(model, x).jvp(v).value()
    torch.testing.assert_close(product, torch.einsum("bij,bj->bi", jacobians(model, x), v))


# -------------------------------------------------------------------------------------- witnesses


def test_affine_coupling_stays_bounded_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    model = AffineCoupling(net)
    model(torch.randn(64, D))
    assert_opaque(assert_sound(copy.deepcopy(model)), "BatchNorm")
    assert math.isfinite(assert_sound(model.eval()).forward)


# ------------------------------------------------------------------- steps, caches, own inputs


def test_spectral_norm_that_would_be_read_stale_is_evaluated_anew():
    """The weight kept from the last call is several times smaller than that of the next one."""
    linear = nn.utils.spectral_norm(nn.Linear(2, 8))
    model = additive(nn.Sequential(linear, nn.Tanh(), nn.Linear(8, 2))).eval()
    with torch.no_grad():
        model(torch.zeros(1, D))
        stale = torch.linalg.matrix_norm(linear.weight, 2)
        left = torch.linalg.svd(linear.weight_orig).U
        # a vector that is nearly orthogonal to the range: the quotient explodes
        linear.weight_u.copy_(left[:, -1] + 0.05 * left[:, 0])
        copied = copy.deepcopy(linear)
        copied(torch.zeros(1, 2))
        assert torch.linalg.matrix_norm(copied.weight, 2) > 3 * stale
    bounds = assert_sound(model, width=0.1)
    assert math.isfinite(bounds.forward)


class Called(nn.Tanh):
    def __call__(self, x):
        return 10 * super().__call__(x)


class CalledNetwork(nn.Sequential):
    def __call__(self, x):
        return 10 * super().__call__(x)


@pytest.mark.parametrize(
    "net", [lambda: network(2, 2, Called()), lambda: CalledNetwork(nn.Linear(2, 2))]
)
def test_a_class_that_changes_what_a_call_means_has_no_bound(net):
    assert_opaque(assert_sound(additive(net())), "__call__")


@pytest.mark.parametrize("raw", [19.0, 20.0, 21.0])
def test_the_step_of_softplus_to_the_identity_is_counted(raw):
    """torch switches at 20: there the slope is one, not sigmoid(20) = 1 - 2e-9."""
    x = Interval(torch.full((1,), raw - 2), torch.full((1,), raw + 1e-12))
    s = torch.linspace(raw - 2, raw, 1001).requires_grad_()
    value = F.softplus(s)
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert bool((softplus(x).lo <= value).all() and (value <= softplus(x).hi).all())
    assert bool((softplus_slope(x).lo <= slope).all() and (slope <= softplus_slope(x).hi).all())


def test_a_cached_weight_that_is_called_has_no_bound():
    model = LULinear(D, using_cache=True).eval()
    with torch.no_grad():
        model(torch.zeros(1, D))
        model.upper_entries.mul_(30).add_(5)
    box = Box(-torch.ones(D), torch.ones(D))
    assert_opaque(ig.lipschitz_bounds(model, box, seconds=0.1), "cached")


def test_what_cancels_in_a_product_of_factors_counts_as_unknown():
    """L U with entries of 1e8 whose product is of size one, in which float64 keeps half."""
    model = LULinear(2, using_cache=False)
    with torch.no_grad():
        model.lower_entries.fill_(1e8)
        model.upper_entries.fill_(1e8)
        model.unconstrained_upper_diag[:] = torch.tensor([-17.0, 1.0])
        lower, upper = model._create_lower_upper()
    found = bounded_map(model, ig.wrap(model)).error
    assert found >= float((lower.abs() @ upper.abs()).max()) * 1e-16


def test_an_index_that_is_no_permutation_has_no_bound():
    model = ReversePermutation(D)
    model._permutation.copy_(torch.tensor([0, 0, 1, 2]))
    box = Box(-torch.ones(D), torch.ones(D))
    assert_opaque(ig.lipschitz_bounds(model, box, seconds=0.1), "permutation")


def test_a_logit_that_clamps_has_no_bound_beyond():
    model = Logit(eps=0.2)
    inside = Box(torch.full((D,), 0.3), torch.full((D,), 0.7))
    beyond = Box(torch.full((D,), 0.1), torch.full((D,), 0.7))
    assert math.isfinite(ig.lipschitz_bounds(model, inside, seconds=0.1).inverse)
    assert_opaque(ig.lipschitz_bounds(model, beyond, seconds=0.1), "clamps")


def test_a_network_that_returns_its_input_is_not_changed_in_place_unseen():
    model = freia.AllInOneBlock([(3,)], subnet_constructor=lambda n, m: nn.Identity())
    box = Box(-torch.ones(3), torch.ones(3))
    assert_opaque(ig.lipschitz_bounds(model, box, seconds=0.1), "own input")


class LinearField(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight.data = rate * torch.eye(2)

    def forward(self, t, x):
        return self.linear(x)


def test_the_inverse_of_euler_steps_is_bounded_by_what_they_compute():
    """x - 0.9 x: the inverse stretches by 10, that of the equation by e^0.9 = 2.5."""
    model = NeuralODE(LinearField(-0.9), solver=FixedStep(1, RungeKutta.EULER))
    bounds = ig.lipschitz_bounds(model, Box(-torch.ones(2), torch.ones(2)), seconds=0.1)
    assert 10 <= bounds.inverse < 10.01
    adaptive = NeuralODE(LinearField(-0.9))
    assert_opaque(
        ig.lipschitz_bounds(adaptive, Box(-torch.ones(2), torch.ones(2)), seconds=0.1), "adaptive"
    )


def test_complex_weights_and_compiled_code_have_no_bound():
    box = Box(-torch.ones(D), torch.ones(D))
    net = nn.Sequential(nn.Linear(2, 2).to(torch.complex64))
    assert_opaque(ig.lipschitz_bounds(additive(net), box, seconds=0.1), "complex")
    scripted = torch.jit.script(network(2, 2))
    assert_opaque(ig.lipschitz_bounds(additive(scripted), box, seconds=0.1), "no Python code")


@pytest.mark.parametrize("shape", [(), (0,)])
def test_a_domain_without_entries_is_an_error(shape):
    with pytest.raises(ValueError, match="expected a domain of the shape of one sample"):
        ig.lipschitz_bounds(additive(network(2, 2)), Box(torch.zeros(shape), torch.zeros(shape)))


def test_a_bound_of_the_inverse_below_what_is_measured_is_an_internal_error():
    def wrong(block, layer):
        return KnownConstants(Pair(10.0, 0.5))

    bounded_map.register(Doubling, wrong)
    box = Box(-torch.ones(D), torch.ones(D))
    bounds = ig.lipschitz_bounds(Doubling(), box, seconds=0.1)
    assert_opaque(bounds, "internal error in wrong of Doubling")
    assert bounds.inverse == math.inf
    assert bounds.certificate.bounds == (math.inf, math.inf)


class Doubling(ig.Invertible):
    def forward(self, x):
        return x * torch.tensor([2.0, 2.0, 2.0, 1.0])

    def inverse(self, z):
        return z / torch.tensor([2.0, 2.0, 2.0, 1.0])


# ------------------------------------------------------------------------------ enclosed Jacobians


@pytest.mark.parametrize("width", [1e-3, 0.1, 1.0])
def test_jacobians_enclosed_over_a_box_of_eight_dimensions(width):
    """Tight on narrow boxes, where a product of two couplings loses twice."""
    model = freia.GLOWCouplingBlock([(8,)], subnet_constructor=network)
    bounds = assert_sound(model, shape=(8,), width=width, count=512)
    if width == 1e-3:
        assert max(bounds.looseness) < 1.02
        assert bounds.per_layer[0].bounds.method == "enclosed Jacobian"
