"""Changes of a model between the two passes, and hooks, which run as in plain training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from inn_guard.layers.chain import Chain
from inn_guard.memory_saving import memory_saving
from tests.cases.trials import first
from tests.memory_saving import nets
from tests.memory_saving.test_model import assert_close, moments
from tests.memory_saving.test_replay import (
    NETWORKS,
    generators,
    seed_generators,
    with_batch_norm,
    with_spectral_norm,
)

GUARDS = [None, 1e-6]


def with_network(make) -> Chain:
    model = Chain(
        nets.flow(1), nets.coupling(network=make(nets.FEATURES)), nets.flow(1), nets.TwoSided(make)
    ).train()
    model(nets.vectors(9))  # ActNorm is initialised
    return model


def assert_like_plain(model, train, *, guard=None):
    """``train(f, model, x)`` has the same effects whether f is the model or saves memory."""
    results = []
    for saving in (False, True):
        net, x = copy.deepcopy(model), nets.vectors(9).requires_grad_()
        seed_generators()
        train(memory_saving(net, guard=guard) if saving else net, net, x)
        results.append(
            ([x.grad, *(p.grad for p in net.parameters())], list(net.buffers()), generators())
        )
    (expected, buffers, state), (found, found_buffers, found_state) = results
    assert_close(found, expected)
    assert found_state == state
    for a, b in zip(found_buffers, buffers, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("guard", first(1, GUARDS))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_modes_are_those_of_the_forward_pass(network, training, guard):
    def train(f, model, x):
        model.train(training)
        loss = nets.nll(*f.forward_and_log_det(x))
        model.train(not training)
        loss.backward()
        assert all(module.training is not training for module in model.modules())

    assert_like_plain(with_network(network), train, guard=guard)


def test_a_fresh_actnorm_is_not_initialised_by_a_backward_pass():
    model = nets.flow(1)
    for layer in model.layers():
        if hasattr(layer, "initialized"):
            layer.initialized.fill_(False)
    before = copy.deepcopy(model.state_dict())
    loss = moments(memory_saving(model)(nets.vectors()))
    model.train()
    loss.backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("twice", [False, True], ids=["backward", "double backward"])
def test_hooks_on_tensors_run_once(twice):
    def train(f, model, x):
        y, calls = 2 * x, []
        for tensor in (y, *model.parameters()):
            tensor.register_hook(lambda gradient: calls.append(gradient) or 3 * gradient)
        loss = nets.nll(*f.forward_and_log_det(y))
        if twice:
            (gradient,) = torch.autograd.grad(loss, y, create_graph=True)
            loss = loss + gradient.square().sum()
            calls.clear()
        loss.backward()
        assert len(calls) == 1 + len(list(model.parameters()))

    assert_like_plain(nets.flow(), train)


def double_output(module, inputs, output):
    return 2 * output


def double_input(module, inputs):
    return (2 * inputs[0],)


def double_gradient(module, into, out_of):
    return tuple(2 * gradient for gradient in into)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(double_output),
    "forward_pre": lambda module: module.register_forward_pre_hook(double_input),
    "backward": lambda module: module.register_full_backward_hook(double_gradient),
    "backward_pre": lambda module: module.register_full_backward_pre_hook(
        lambda module, out_of: (2 * out_of[0],)
    ),
}


@pytest.mark.parametrize("guard", first(1, GUARDS))
@pytest.mark.parametrize("part", ["layer", "network"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_hooks_on_modules_count_as_in_plain_training(hook, part, guard):
    def train(f, model, x):
        for k in (2, 12):
            layer = model.layers()[k]
            hook(layer if part == "layer" else layer.network)
        moments(f(x)).backward()

    assert_like_plain(nets.flow(), train, guard=guard)


def test_a_method_of_one_instance_counts_as_in_plain_training():
    def train(f, model, x):
        layer = model.layers()[7]
        vars(layer)["forward"] = lambda x, inner=layer.forward: 2 * inner(x)
        moments(f(x)).backward()

    assert_like_plain(nets.flow(), train)


def test_statistics_that_moved_in_between_are_noticed():
    for make in (with_batch_norm, with_spectral_norm):
        model, x = with_network(make).eval(), nets.vectors(9)
        loss = moments(memory_saving(model)(x))
        model.train()(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_cache_that_would_lose_gradients_is_refused():
    saving, x = memory_saving(with_network(with_spectral_norm)), nets.vectors(9)
    with parametrize.cached():
        with pytest.raises(RuntimeError, match=r"outside torch\.nn\.utils\.parametrize\.cached"):
            saving(x)
        memory_saving(nets.flow())(x).sum().backward()  # nothing there to be cached
    saving(x).sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_exchanged_parameters_are_noticed(frozen):
    model = nets.flow().requires_grad_(not frozen)
    saving = memory_saving(model)
    others = {name: nn.Parameter(1.1 * parameter) for name, parameter in saving.named_parameters()}
    loss = moments(torch.func.functional_call(saving, others, (nets.vectors(),)))
    with pytest.raises(RuntimeError, match=r"'log_scale' of ActNorm .* got another"):
        loss.backward()
