from __future__ import annotations

import copy
import inspect
import warnings

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import pytest
import torch

from inn_guard.adapters import wrap
from inn_guard.execution.state import preserve_state
from inn_guard.jacobian.chain import Linearization
from tests.cases import freia_nets as cases_freia_nets
from tests.cases.freia import (
    BATCH,
    CASES,
    CONDITION,
    EXCEPTIONS,
    FEATURES,
    VECTOR,
    as_users_build,
    built,
    contractive,
    data,
    mixture,
    subnet,
)
from tests.cases.freia_nets import condition_list, sequence
from tests.core import test_invertible as contract
from tests.oracles import transforms as reference

FAILURES = [
    *((case, test) for case in CASES for test in case.skips),
    *((exempt.case, test) for exempt in EXCEPTIONS for test in exempt.fails),
]

#: Where the contract is not broken by a number but by a crash: which one.
CRASHES = {
    "freia-GaussianMixtureModel": (
        RuntimeError,
        "Index put requires the source and destination dtypes match",
    ),
    "freia-HouseholderPerm-fixed": (RuntimeError, "does not require grad"),
    "freia-InvertibleModule": (NotImplementedError, "does not provide forward"),
}


@pytest.fixture
def at_home(_float64):
    """The default dtype under which the contract runs."""
    torch.set_default_dtype(torch.float32)


def test_every_module_of_the_library_is_a_case_or_a_listed_exception(at_home):
    cases = [*CASES, *cases_freia_nets.CASES, *(exempt.case for exempt in EXCEPTIONS)]
    models = [case.make()[0] for case in cases]
    seen = {type(module) for model in models for module in model.modules()}
    offered = {
        value
        for library in (Fm, Ff)
        for value in vars(library).values()
        if inspect.isclass(value) and issubclass(value, Fm.InvertibleModule)
    }
    assert offered
    assert not {kind.__name__ for kind in offered - seen}


@pytest.mark.parametrize(("case", "name"), FAILURES, ids=lambda value: getattr(value, "id", value))
def test_every_listed_exception_really_fails(case, name, at_home):
    test = getattr(contract, name)
    directions = (
        [["forward"], ["inverse"]] if "direction" in inspect.signature(test).parameters else [[]]
    )

    def all_directions() -> None:
        for direction in directions:
            test(case, *direction)

    kind, message = CRASHES.get(case.id, (AssertionError, None))
    with pytest.raises(kind, match=message):
        all_directions()


@pytest.mark.parametrize("name", ["InvAutoFC", "InvAutoConv2D"])
def test_inverse_of_the_inverse_autoencoders_is_the_transpose(name, at_home):
    (case,) = (exempt.case for exempt in EXCEPTIONS if exempt.case.id == f"freia-{name}")
    model, x = case.make()
    J = reference.jacobian(model.forward, x)
    assert torch.allclose(reference.jacobian(model.inverse, x), J.mT, atol=1e-12)
    assert (J.mT @ J - torch.eye(J.shape[2])).abs().max() > 0.1
    assert torch.equal(model.forward_and_log_det(x)[1], torch.zeros(BATCH, dtype=torch.float64))


def test_inverse_of_the_orthogonal_transform_is_the_scaled_transpose(at_home):
    (case,) = (
        exempt.case
        for exempt in EXCEPTIONS
        if exempt.case.id == "freia-OrthogonalTransform-trained"
    )
    model, _ = case.make()
    weights = model.module.weights
    off = (weights @ weights.T - torch.eye(FEATURES)).norm()
    x = torch.zeros(1, FEATURES, dtype=torch.float64)
    scale = model.module._log_e(model.module.scaling).exp()
    J, J_inverse = reference.jacobian(model.forward, x)[0], reference.jacobian(model.inverse, x)[0]
    assert torch.allclose(J_inverse, J.T / scale.squeeze(0) ** 2, atol=1e-12)
    assert 1e-4 < off < 0.1, "a thousandth of noise, as of one step of training"


def test_reverse_log_det_of_the_elementwise_scaling_has_the_forward_sign():
    module, _ = built(lambda: (Fm.LearnedElementwiseScaling([VECTOR]), None))
    model, x = wrap(module), data(FEATURES)
    log_det = model.forward_and_log_det(x)[1]
    assert torch.allclose(log_det, reference.log_abs_det(reference.jacobian(model.forward, x)))
    assert torch.equal(model.inverse_and_log_det(x)[1], log_det)


def test_log_det_of_the_sigmoid_of_an_image_sums_over_channels_only():
    module, x = Fm.InvertibleSigmoid([(4, 2, 3)]), data(4, 2, 3)
    assert module([x])[1].shape == (BATCH, 2, 3)
    exact = reference.log_abs_det(reference.jacobian(wrap(module).forward, x))
    assert torch.allclose(wrap(module).forward_and_log_det(x)[1], exact)


@pytest.mark.parametrize(
    "container", [lambda c: c, lambda c: [c], lambda c: (c,)], ids=["tensor", "list", "tuple"]
)
def test_one_condition_may_be_a_tensor_or_a_sequence(container):
    graph, condition = built(
        lambda: (
            Fm.GLOWCouplingBlock([VECTOR], dims_c=[(CONDITION,)], subnet_constructor=subnet),
            None,
        )
    )
    condition, x = data(CONDITION), data(FEATURES)
    assert torch.equal(
        wrap(graph, context=container(condition))(x), graph([x], c=[condition])[0][0]
    )


class Reversed(Fm.InvertibleModule):
    """What later releases call Inverse: another module with its directions exchanged."""

    def __init__(self, module: Fm.InvertibleModule, dims) -> None:
        super().__init__(dims, module.dims_c)
        self.module = module

    def forward(self, *args, rev=False, **kwargs):
        return self.module(*args, rev=not rev, **kwargs)


def test_module_with_its_directions_exchanged():
    net, conditions = built(lambda: (sequence(*VECTOR), condition_list()))
    straight, exchanged = (
        wrap(net, context=conditions),
        wrap(Reversed(net, [VECTOR]), context=conditions),
    )
    x = data(FEATURES)
    assert torch.equal(exchanged(x), straight.inverse(x))
    assert torch.equal(exchanged.inverse_and_log_det(x)[1], straight.forward_and_log_det(x)[1])


def residual_layer(*shape: int):
    with as_users_build():
        return contractive(shape).double().eval()


def test_wrong_derivative_of_the_residual_layers_inverse_is_caught_and_solved():
    model, x = wrap(residual_layer(*VECTOR)), data(FEATURES)
    linearization = Linearization(model, x)
    J, u = reference.jacobian(model.forward, x), data(FEATURES)
    naive = reference.jacobian(model.inverse, model(x).detach())
    assert torch.equal(naive, torch.eye(FEATURES).expand_as(naive)), (
        "the library's own derivative is the identity"
    )
    exact = torch.linalg.solve(J, u.unsqueeze(2)).squeeze(2)
    assert torch.allclose(linearization.inverse_jvp(u).value(), exact, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(exact, u, rtol=0.1), "an identity would be far off here"
    exact = torch.linalg.solve(J.mT, u.unsqueeze(2)).squeeze(2)
    assert torch.allclose(linearization.inverse_vjp(u).value(), exact, rtol=1e-10, atol=1e-12)


def test_log_det_of_the_residual_layer_is_an_unbiased_estimate_of_its_series():
    model, x = wrap(residual_layer(*VECTOR)), data(FEATURES)[:1]
    draws = torch.cat([model.forward_and_log_det(x)[1] for _ in range(400)]).detach()
    J = reference.jacobian(model.forward, x)
    powers = J[0] - torch.eye(FEATURES)
    series = sum((-1) ** (k + 1) * torch.matrix_power(powers, k).trace() / k for k in range(1, 21))
    error = draws.std() / len(draws) ** 0.5
    assert draws.std() > 1e-3, "two calls differ"
    assert (draws.mean() - series).abs() < 5 * error
    assert (draws.mean() - reference.log_abs_det(J)).abs() < 5 * error + 1e-3


def test_reverse_log_det_of_the_residual_layer_is_taken_at_the_wrong_point():
    with as_users_build():
        module = Fm.IResNetLayer([(1,)], internal_size=1, n_internal_layers=0).double().eval()
    with (
        torch.no_grad()
    ):  # z = x + (exp(x) - 1) / 2 for x < 0; in one dimension Hutchinson's estimate is exact
        for parameter, value in zip(module.parameters(), (1.0, 0.0, 0.5, 0.0), strict=True):
            parameter.fill_(value)
    model, x = wrap(module), torch.tensor([[-0.5], [-1.0]])
    z, log_det = model.forward_and_log_det(x)
    assert torch.allclose(z, x + x.expm1() / 2)
    assert torch.allclose(log_det, (1 + x.exp() / 2).log().squeeze(1), atol=1e-6)
    x_again, reverse = model.inverse_and_log_det(z.detach())
    assert torch.allclose(x_again, x)
    assert torch.allclose(reverse, -(1 + z.exp() / 2).log().squeeze(1), atol=1e-6)
    assert (reverse + log_det).abs().min() > 1e-2


def test_log_det_made_of_gradients_is_there_without_autograd_and_asks_nothing_of_the_input():
    model, x = wrap(residual_layer(*VECTOR)), data(FEATURES)
    with torch.no_grad():
        z, log_det = model.forward_and_log_det(x)
        back, _ = model.inverse_and_log_det(z)
    assert not z.requires_grad
    assert not log_det.requires_grad
    assert not x.requires_grad
    assert torch.allclose(back, x, atol=1e-10)


def test_act_norm_comes_back_uninitialised_from_an_untouched_call():
    module = Fm.ActNorm([VECTOR]).double()
    model, x = wrap(module), 3 * data(FEATURES) + 1
    with preserve_state(model):
        z = model(x)
        assert not module.init_on_next_batch
    assert z.mean(0).abs().max() < 1e-12
    assert module.init_on_next_batch is True
    assert not module.scale.any()
    assert not module.bias.any()


def test_copies_of_act_norm_keep_whether_it_is_initialised():
    module = Fm.ActNorm([VECTOR]).double()
    model, x = wrap(module), 3 * data(FEATURES) + 1
    fresh = copy.deepcopy(model)
    z = model(x)
    assert fresh.module.init_on_next_batch is True
    single = model.to_dtype(torch.float32)
    assert single.module.init_on_next_batch is False
    shifted = single((x + 5).float())
    assert torch.allclose(shifted.double(), model(x + 5), atol=1e-5)
    assert not torch.allclose(shifted.double(), z, atol=1)


def test_projection_of_the_orthogonal_transform_during_backward_passes_is_undone():
    module, _ = built(lambda: (Fm.OrthogonalTransform([VECTOR], correction_interval=4), None))
    model, x = wrap(module), data(FEATURES).requires_grad_()
    weights, counter = module.weights.detach().clone(), module.back_counter
    with preserve_state(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            torch.autograd.grad(model(x).sum(), x)
        assert not torch.allclose(module.weights, weights, atol=1e-3)
    assert torch.equal(module.weights, weights)
    assert module.back_counter == counter


def test_learned_permutation_can_be_copied_after_a_call(at_home):
    arguments = {"subnet_constructor": subnet, "learned_householder_permutation": 3}
    model = wrap(built(lambda: (Fm.AllInOneBlock([VECTOR], **arguments), None))[0])
    x = data(FEATURES)
    z = model(x)
    assert not model.module.w_perm.is_leaf, (
        "the library keeps the graph of its last call in an attribute"
    )
    assert torch.equal(copy.deepcopy(model)(x), z)
    assert torch.allclose(model.to_dtype(torch.float32)(x.float()).double(), z, atol=1e-5)


def test_what_the_library_says_is_collected_and_not_shown():
    module, _ = built(lambda: (Fm.InvAutoFC([VECTOR]), None))
    model = wrap(module)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        model.forward_and_log_det(data(FEATURES))
        model.forward_and_log_det(data(FEATURES))
    assert not shown
    assert len(model.remarks) == 1
    assert "tractable log-det-Jacobian" in next(iter(model.remarks))


def test_gaussian_mixture_is_exact_in_the_default_dtype():
    module, context = built(mixture)
    model = wrap(module, context=context)
    x = data(FEATURES)
    z, log_det = model.forward_and_log_det(x)
    assert torch.allclose(model.inverse(z), x, atol=1e-12)
    assert torch.allclose(
        log_det, reference.log_abs_det(reference.jacobian(model.forward, x)), atol=1e-12
    )


def test_mixture_of_all_components_at_once_sums_their_log_dets():
    module, (w, mean, factor, _) = built(mixture)
    model = wrap(module, context=[w, mean, factor, None])
    x = data(mean.shape[1], FEATURES)
    z, log_det = model.forward_and_log_det(x)
    assert z.shape == x.shape
    assert torch.allclose(
        log_det, reference.log_abs_det(reference.jacobian(model.forward, x)), atol=1e-12
    )
    assert torch.allclose(model.inverse(z), x, atol=1e-10)
