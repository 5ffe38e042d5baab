"""The zuko adapter beyond the contract: laziness, exceptions, NaN in solvers, memory saving."""

from __future__ import annotations

import pytest
import torch
import zuko
from torch import nn
from zuko import transforms as T
from zuko.bayesian import BayesianModel
from zuko.lazy import UnconditionalTransform

from inn_guard.adapters import wrap
from inn_guard.core.missing import MissingContextError
from inn_guard.memory_saving import memory_saving
from tests.cases.zuko import (
    CASES,
    CONTEXT,
    EXCEPTIONS,
    FEATURES,
    SMALL,
    autoregressive,
    coupling,
    flow,
)
from tests.oracles import transforms as reference


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def cnf(**settings) -> nn.Module:
    return zuko.flows.CNF(FEATURES, hidden_features=(8,), **settings).double()


def test_every_class_of_the_library_is_a_case_or_an_exception():
    public = {name for name, value in vars(zuko.flows).items() if isinstance(value, type)} | set(
        T.__all__
    )
    public -= {
        "Flow",
        "LazyDistribution",
        "LazyTransform",
        "UnconditionalDistribution",
    }  # bases; no transformation
    covered = {case.id.removeprefix("zuko-").split("-")[0] for case in CASES} | {
        "UnconditionalTransform"
    }
    excepted = {word.strip(",").split("(")[0] for name in EXCEPTIONS for word in name.split()}
    assert public <= covered | excepted


def test_direction_and_log_prob_are_those_of_the_flow():
    built, x, c = flow("MAF", CONTEXT).double(), normal(4, FEATURES), normal(4, CONTEXT)
    wrapped = wrap(built, context=c)
    torch.testing.assert_close(wrapped(x), built(c).transform(x))
    torch.testing.assert_close(wrapped.inverse(x), built(c).transform.inv(x))
    torch.testing.assert_close(wrapped.log_prob(x), built(c).log_prob(x))
    other = normal(4, CONTEXT)
    torch.testing.assert_close(wrapped.with_context(other).log_prob(x), built(other).log_prob(x))


def test_the_lazy_object_is_held_so_that_training_steps_are_seen():
    built, x = flow("NICE").double(), normal(4, FEATURES)
    wrapped = wrap(built)
    before = wrapped(x)
    with torch.no_grad():
        next(built.parameters()).add_(1.0)
    assert not torch.allclose(before, wrapped(x))
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in built.parameters()}


def test_a_flow_of_one_feature_is_elementwise():
    built = zuko.flows.NICE(1, transforms=2).double()
    layers = wrap(built).layers()
    assert [layer.name for layer in layers] == ["ElementWiseTransform"] * 2
    x = normal(3, 1)
    torch.testing.assert_close(wrap(built).inverse(wrap(built)(x)), x)


def test_transformations_without_networks_can_be_wrapped_as_they_are():
    x = normal(3, 2)
    for transform in (
        T.SoftclipTransform(2.0),
        T.ComposedTransform(T.AdditiveTransform(x[0]), T.SoftclipTransform(3.0)),
    ):
        wrapped = wrap(transform)
        torch.testing.assert_close(wrapped(x), transform(x))
        truth = reference.log_abs_det(reference.jacobian(wrapped.forward, x))
        torch.testing.assert_close(wrapped.forward_and_log_det(x)[1], truth)


# Every entry of EXCEPTIONS fails for its stated reason.


@pytest.mark.parametrize(
    "built",
    [
        lambda: autoregressive()(),
        lambda: coupling()(),
        lambda: cnf().transform(),
        lambda: flow("MAF")(),
        lambda: flow("MAF")().transform,
        lambda: T.DependentTransform(T.MonotonicTransform(lambda x: x**3), 1),
    ],
)
def test_what_was_built_from_a_lazy_object_is_refused(built):
    with pytest.raises(TypeError, match=r"built from a lazy object; call wrap\(flow, context=c\)"):
        wrap(built())


@pytest.mark.parametrize(
    "model", [lambda: zuko.mixtures.GMM(2), lambda: BayesianModel(flow("MAF"))]
)
def test_what_transforms_nothing_is_refused(model):
    with pytest.raises(TypeError, match="which transforms nothing"):
        wrap(model())


def test_a_solvers_sample_depends_on_its_batch():
    torch.manual_seed(0)
    built = cnf()
    for parameter in built.parameters():
        parameter.data.mul_(2.0)
    wrapped, x = wrap(built.eval()), 3 * normal(8, FEATURES)
    assert not torch.equal(wrapped(x)[:1], wrapped(x[:1]))


def test_a_solver_that_estimates_its_log_det_disagrees_with_itself():
    wrapped, x = wrap(cnf(exact=False).eval()), normal(4, FEATURES)
    first, second = (wrapped.forward_and_log_det(x)[1] for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_parameters_behind_a_bisection_get_gradients_in_training_mode_only():
    built = flow("UNAF", signal=4, network={"hidden_features": (8,)}).double()
    wrapped, x = wrap(built), normal(4, FEATURES)
    integrand = next(
        parameter for name, parameter in built.named_parameters() if "integrand" in name
    )

    def gradient():
        (g,) = torch.autograd.grad(wrapped(x).sum(), integrand, allow_unused=True)
        return g

    built.eval()
    assert gradient() is None
    built.train()
    assert gradient().abs().sum() > 0


def test_a_bisection_answers_with_its_bound():
    transform = UnconditionalTransform(
        T.GaussianizationTransform, normal(FEATURES, 4), normal(FEATURES, 4)
    )
    wrapped = wrap(transform.double())
    assert wrapped.inverse(torch.full((2, FEATURES), 1e6)).max() <= 10


def test_a_circular_shift_beyond_its_bound_forgets_where_it_was():
    wrapped = wrap(UnconditionalTransform(T.CircularShiftTransform, bound=1.0))
    x = torch.tensor([[2.5]])
    assert not torch.allclose(wrapped.inverse(wrapped(x)), x)


def test_a_signed_power_is_flat_or_steep_at_zero():
    wrapped = wrap(UnconditionalTransform(T.SignedPowerTransform, torch.tensor([0.7])))
    assert wrapped.forward_and_log_det(torch.zeros(1, 1))[1] == -torch.inf


# Solvers that never return


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("direction", ["forward", "inverse", "forward_and_log_det", "log_prob"])
def test_samples_that_are_not_finite_come_back_as_nan_and_leave_the_others_alone(bad, direction):
    wrapped, x = (
        wrap(zuko.flows.CNF(2, CONTEXT, hidden_features=(8,)).double().eval()),
        normal(4, 2),
    )
    wrapped = wrapped.with_context(normal(4, CONTEXT))
    x[1, 0] = bad
    result = getattr(wrapped, direction)(x)
    for part in result if isinstance(result, tuple) else (result,):
        assert (
            part.flatten(1).isnan().all(1).tolist() == [False, True, False, False]
            if part.dim() > 1
            else True
        )
        assert part.reshape(4, -1).isfinite().all(1).tolist() == [True, False, True, True]


def test_a_field_that_is_not_finite_makes_nan_and_no_endless_loop():
    built = cnf()
    built.transform.ode[0].weight.data.fill_(torch.nan)
    assert wrap(built)(normal(2, FEATURES)).isnan().all()


# Memory saving


@pytest.mark.parametrize("context", [0, CONTEXT])
def test_a_primed_coupling_is_the_same_map(context):
    layer, x = wrap(coupling(context).double()), normal(4, FEATURES)
    layer = layer.with_context(normal(4, CONTEXT)) if context else layer
    z, log_det = layer.forward_and_log_det(x)
    with_cached_conditioner = layer.with_cached_conditioner(z.detach())
    assert with_cached_conditioner is not layer
    torch.testing.assert_close(with_cached_conditioner.inverse(z), layer.inverse(z), rtol=0, atol=0)
    torch.testing.assert_close(
        with_cached_conditioner.forward_and_log_det(x)[1], log_det, rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ["NICE", "MAF", "NSF"])
def test_memory_saving_gradients_are_the_true_ones(kind):
    torch.manual_seed(0)
    wrapped, x = wrap(flow(kind, CONTEXT).double(), context=normal(4, CONTEXT)), normal(4, FEATURES)

    def gradients(model):
        z, log_det = model.forward_and_log_det(x)
        return torch.autograd.grad((z.square().sum(1) - log_det).mean(), list(wrapped.parameters()))

    for saved, true in zip(gradients(memory_saving(wrapped)), gradients(wrapped), strict=True):
        torch.testing.assert_close(saved, true, rtol=1e-6, atol=1e-8)


def test_a_flow_without_the_context_it_was_built_for_says_so():
    with pytest.raises(MissingContextError, match="NICE is conditional and has no context"):
        wrap(flow("NICE", CONTEXT, **SMALL).double())(normal(4, FEATURES))
