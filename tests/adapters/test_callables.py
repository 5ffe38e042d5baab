"""Callables: modules found, copies, accepted results; and transforms of torch.distributions."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.distributions import transforms as T

from inn_guard.adapters import wrap
from inn_guard.adapters.captured_modules import Closure
from inn_guard.adapters.torch_transforms import TorchTransform
from inn_guard.core.invertible import NotApplicable
from inn_guard.execution.state import preserve_state
from tests.cases.functions import BATCH, CASES, EXCEPTIONS, FEATURES, Coupling, Directed
from tests.oracles import transforms as reference

GLOBAL_NET = nn.Linear(2, 2, dtype=torch.float64)


def through_global(x):
    return GLOBAL_NET(x)


def through_another_function(x):
    return through_global(x) + 1


class Callable:
    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


def modules_of(function):
    return Closure(function).modules()


def test_modules_are_seen_wherever_a_callable_holds_them():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    blocks = [net, {"last": other}]

    def through_list(x):
        return blocks[1]["last"](blocks[0](x))

    assert modules_of(net) == [net]
    assert modules_of(net.forward) == [net]
    assert modules_of(functools.partial(net, 1, key=other)) == [net, other]
    assert modules_of(lambda x: net(x)) == [net]
    assert modules_of(through_list) == [net, other]
    assert modules_of(through_global) == [GLOBAL_NET]
    assert modules_of(through_another_function) == [GLOBAL_NET]
    assert modules_of(Callable(net)) == [net]
    assert modules_of(Callable(net).__call__) == [net]
    assert modules_of(torch.tanh) == []


def test_modules_seen_are_parameters_of_the_wrapper_each_once():
    net = Coupling()
    model = wrap(encode=lambda x: net(x)[0], decode=lambda z: net.inverse(z)[0])
    assert [id(p) for p in model.parameters()] == [id(p) for p in net.parameters()]
    assert list(model.state_dict()) == [f"module.0.{name}" for name in net.state_dict()]


@pytest.mark.parametrize(
    "bind",
    [
        lambda net: net,
        lambda net: net.forward,
        lambda net: functools.partial(net),
        lambda net: lambda x: net(x),
        lambda net: lambda x: (lambda y: net(y))(x),
        lambda net: Callable(net),
    ],
)
def test_a_deep_copy_is_bound_to_the_copied_modules(bind):
    net, x = nn.Linear(2, 2), torch.randn(3, 2)
    original = Closure(bind(net))
    memo = {}
    closure_copy = copy.deepcopy(original, memo)
    assert torch.equal(closure_copy(x), original(x))
    (copied,) = closure_copy.modules()
    assert copied is not net
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.equal(closure_copy(x), original(x))
    assert torch.equal(original(x), net(x))


def test_a_deep_copy_of_a_function_of_globals_leaves_the_globals_alone():
    closure_copy = copy.deepcopy(Closure(through_another_function))
    (copied,) = closure_copy.modules()
    assert copied is not GLOBAL_NET
    assert copy.deepcopy(closure_copy).modules()[0] is not copied
    assert modules_of(through_another_function) == [GLOBAL_NET]
    assert torch.equal(closure_copy(torch.ones(1, 2)), through_another_function(torch.ones(1, 2)))


def test_a_recursive_closure_can_be_copied():
    net = nn.Linear(1, 1)

    def countdown(x, depth=2):
        return net(x) if depth == 0 else countdown(x, depth - 1)

    closure_copy = copy.deepcopy(Closure(countdown))
    assert torch.equal(closure_copy(torch.ones(1, 1)), countdown(torch.ones(1, 1)))
    assert closure_copy.modules()[0] is not net


def test_untouched_restores_modules_inside_closures():
    norm = nn.BatchNorm1d(2)
    model = wrap(encode=lambda x: norm(x), decode=lambda z: z)
    with preserve_state(model):
        model(torch.randn(4, 2))
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0


def test_the_reverse_flag_convention():
    net = Directed()
    model, x = (
        wrap(encode=net, decode=functools.partial(net, reverse=True)),
        torch.randn(3, FEATURES),
    )
    assert torch.equal(model(x), net(x))
    assert torch.equal(model.inverse(x), net(x, reverse=True))


def test_log_det_may_come_with_z_or_apart_or_not_at_all():
    net, x = Coupling(), torch.randn(3, FEATURES)
    together = wrap(encode=net, decode=net.inverse)
    apart = wrap(
        encode=lambda x: net(x)[0],
        decode=lambda z: net.inverse(z)[0],
        log_det=lambda x: net(x)[1][:, None],
    )
    without = wrap(encode=lambda x: net(x)[0], decode=lambda z: net.inverse(z)[0])
    expected = reference.log_abs_det(reference.jacobian(lambda x: net(x)[0], x))
    torch.testing.assert_close(together.forward_and_log_det(x)[1], expected)
    torch.testing.assert_close(apart.forward_and_log_det(x)[1], expected)
    with pytest.raises(NotApplicable, match=r"return \(z, log_det\) or pass log_det="):
        without.forward_and_log_det(x)
    with pytest.raises(NotApplicable):
        apart.inverse_and_log_det(x)


@pytest.mark.parametrize("result", [None, (1, 2), [torch.zeros(1)] * 3, (torch.zeros(1), 0.0, 0.0)])
def test_other_results_are_refused(result):
    with pytest.raises(
        TypeError, match=r"expected encode to return one tensor or \(tensor, log_det\), got a"
    ):
        wrap(encode=lambda x: result, decode=abs)(torch.zeros(1, 1))


def test_encode_that_is_no_callable_is_refused():
    with pytest.raises(TypeError, match="expected a callable, got Tensor"):
        Closure(torch.zeros(1))


def test_context_reaches_every_callable_and_every_layer():
    seen = []

    def shift(x, c):
        seen.append(c)
        return x + c

    def unshift(z, c):
        return z - c

    model = wrap(
        encode=shift, decode=unshift, layers=[(shift, unshift)], log_det=lambda x, c: 0.0 * c[:, 0]
    )
    context, x = torch.randn(3, 2), torch.randn(3, 2)
    model = model.with_context(context)
    assert torch.equal(model(x), x + context)
    assert torch.equal(model.select(torch.tensor([2]))(x[2:]), (x + context)[2:])
    assert torch.equal(model.layers()[0].inverse(x), x - context)
    assert model.forward_and_log_det(x)[1].shape == (3,)
    assert all(c.shape[1] == 2 for c in seen)


def test_callables_that_write_into_their_input_leave_ours_alone():
    model, x = wrap(encode=lambda x: x.mul_(2), decode=lambda z: z.div_(2)), torch.ones(2, 2)
    model.inverse(model(x))
    assert torch.equal(x, torch.ones(2, 2))


# torch.distributions


def test_every_torch_transform_is_a_case_or_an_exception():
    cases = {
        type(part.transform).__name__
        for case in CASES
        for part in case.make()[0].modules()
        if is_torch(part)
    }
    structural = {"Transform", "ComposeTransform"}
    assert {name for name in T.__all__ if name != "identity_transform"} - structural - cases - set(
        EXCEPTIONS
    ) == set()


def is_torch(module):
    return isinstance(module, TorchTransform)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_transforms_that_are_no_bijections_are_refused(name):
    x = torch.randn(3, 6)
    with pytest.raises(TypeError, match=f"expected a bijective transform, got {name}, which"):
        wrap(getattr(T, name)())(x)


def test_the_cache_of_a_transform_does_not_fool_the_round_trip():
    transform, x = T.TanhTransform(cache_size=1), torch.full((1, 1), 30.0)
    fooled = transform.inv(transform(x))
    assert torch.equal(fooled, x)  # the cache returns the stored x
    model = wrap(transform)
    assert (
        model.inverse(model(x)) - x
    ).abs() > 1  # tanh(30) is 1 in float64: the information is gone
    nested = wrap(T.IndependentTransform(T.TanhTransform(cache_size=1), 1, cache_size=1))
    assert (nested.inverse(nested(x)) - x).abs() > 1


def test_the_users_transform_keeps_its_cache_and_its_tensors():
    scale = torch.tensor([2.0, 3.0])
    transform = T.AffineTransform(0.0, scale, cache_size=1)
    before = dict(vars(transform))
    model = wrap(transform)
    model.inverse(model(torch.ones(1, 2)))
    model.to_dtype(torch.float32)
    assert vars(transform) == before
    assert transform.scale is scale
    assert model.transform.scale is scale


def test_parameters_of_a_transform_are_registered_and_follow_a_copy():
    scale = nn.Parameter(torch.tensor([2.0, 3.0]))
    model = wrap(T.ComposeTransform([T.AffineTransform(0.0, scale), T.ExpTransform()]))
    assert [id(p) for p in model.parameters()] == [id(scale)]
    closure_copy = copy.deepcopy(model)
    with torch.no_grad():
        scale.fill_(1.0)
    x = torch.ones(1, 2)
    torch.testing.assert_close(closure_copy(x).log(), torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(model(x).log(), x)
    assert next(model.float().parameters()) is scale
    assert model(x.float()).dtype == torch.float32


def test_a_scale_that_depends_on_parameters_keeps_its_graph():
    log_scale = torch.zeros(2, requires_grad=True)
    model = wrap(T.AffineTransform(0.0, log_scale.exp()))
    model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(log_scale.grad, torch.ones(2))
    assert (
        model.to_dtype(torch.float32)(torch.ones(1, 2, dtype=torch.float32)).dtype == torch.float32
    )


def test_event_dimensions_are_summed_and_demanded():
    x = torch.randn(BATCH, 2, 3)
    for event_dim in range(3):
        model = wrap(T.AffineTransform(0.0, torch.full((2, 3), 2.0), event_dim=event_dim))
        expected = torch.full((BATCH,), 6 * torch.tensor(2.0).log().item())
        torch.testing.assert_close(model.forward_and_log_det(x)[1], expected)
    with pytest.raises(ValueError, match="expected a batch of at least 3 dimensions"):
        model(x[0])


def test_a_context_is_refused():
    with pytest.raises(TypeError, match="expected no context"):
        wrap(T.ExpTransform(), context=torch.zeros(1))
