from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from inn_guard.core.invertible import Invertible, NotApplicable
from inn_guard.layers.chain import Chain
from inn_guard.layers.networks import MLP
from inn_guard.memory_saving import memory_saving
from inn_guard.training.regularizers import Direction, FiniteDifferences
from tests.cases.all import A_THIRD, CASES, one_of_each_kind
from tests.memory_saving import nets
from tests.oracles import memory_saving as reference

LAYERED = [case for case in CASES if case.has_layers]
NETS = {
    "flow": (nets.flow, nets.vectors),
    "glow": (nets.glow, nets.images),
    "multiscale": (nets.multiscale, nets.images),
}


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def net_and_x(request):
    make, data = request.param
    return make(), data()


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs, allow_unused=True)


def assert_close(found, expected, tolerance=1e-9):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert (a - b).norm() <= tolerance * (b.norm() + 1e-3)


def moments(z):
    """A scalar with a gradient that differs in every entry."""
    weights = torch.linspace(0.5, 1.5, z[0].numel(), dtype=z.dtype).reshape(z[0].shape)
    return (weights * (z + z.square() / 3)).sum()


CALLS = {
    "forward": lambda f, x: moments(f(x)),
    "forward_and_log_det": lambda f, x: nets.nll(*f.forward_and_log_det(x)),
    "log_det alone": lambda f, x: f.forward_and_log_det(x)[1].square().sum(),
    "inverse": lambda f, x: moments(f.inverse(x)),
    "inverse_and_log_det": lambda f, x: nets.nll(*f.inverse_and_log_det(x)),
    "log_prob": lambda f, x: f.log_prob(x).mean(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_values_and_gradients_are_the_plain_ones(net_and_x, call):
    model, x = net_and_x
    if "inverse" in next(name for name, value in CALLS.items() if value is call):
        x = model(x).detach()
    x = x.requires_grad_()
    saving = memory_saving(model)
    plain_value, value = call(model, x), call(saving, x)
    assert torch.allclose(value, plain_value, rtol=1e-12, atol=0)
    inputs = [x, *model.parameters()]
    assert_close(gradients(value, inputs), gradients(plain_value, inputs))


def test_the_passes_written_out_give_the_same(net_and_x):
    model, x = net_and_x
    fast = gradients(
        nets.nll(*memory_saving(model).forward_and_log_det(x)), list(model.parameters())
    )
    assert_close(fast, reference.memory_saving_gradients(model, x, nets.nll), 1e-9)
    assert_close(fast, reference.true_gradients(model, x, nets.nll), 1e-9)


@pytest.mark.parametrize("case", one_of_each_kind(LAYERED, A_THIRD))
def test_every_layered_model_of_the_contract(case):
    torch.set_default_dtype(torch.float32)
    model, x = case.make()
    saving = memory_saving(model)
    x = x.requires_grad_()
    call = CALLS["forward_and_log_det" if case.has_log_det else "forward"]
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    tolerance = 1e-7 + 1e3 * case.float64_floor
    assert_close(gradients(call(saving, x), inputs), gradients(call(model, x), inputs), tolerance)
    guarded = memory_saving(model, guard=1e-3)
    assert_close(gradients(call(guarded, x), inputs), gradients(call(model, x), inputs), tolerance)


def test_context_gets_its_gradient():
    model, x = nets.conditional_flow(), nets.vectors()
    source = torch.randn(nets.BATCH, 2, requires_grad=True)
    embedding = nn.Linear(2, 2)
    inputs = [source, *embedding.parameters(), *model.parameters()]

    def loss(f):
        return nets.nll(*f.with_context(embedding(source)).forward_and_log_det(x))

    saving = memory_saving(model)
    assert_close(gradients(loss(saving), inputs), gradients(loss(model), inputs))
    rows = torch.tensor([3, 1])
    context = torch.randn(nets.BATCH, 2)
    selected = saving.with_context(context).select(rows)(x[rows])
    assert torch.equal(selected, model.with_context(context[rows])(x[rows]))


def test_backward_accumulates_and_hooks_fire_once():
    model, x = nets.flow(), nets.vectors()
    fired = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    saving = memory_saving(model)
    nets.nll(*saving.forward_and_log_det(x)).backward()
    assert sorted(map(id, fired)) == sorted(map(id, model.parameters()))
    once = [parameter.grad.clone() for parameter in model.parameters()]
    nets.nll(*saving.forward_and_log_det(x)).backward()
    assert_close(
        [parameter.grad for parameter in model.parameters()], [2 * gradient for gradient in once]
    )


def test_second_backward_needs_retain_graph():
    model, x = nets.flow(), nets.vectors()
    parameters = list(model.parameters())
    loss = nets.nll(*memory_saving(model).forward_and_log_det(x))
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_close(torch.autograd.grad(loss, parameters), first, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)


def test_double_backward():
    model, x = nets.flow(1), nets.vectors(2).requires_grad_()
    inputs = [x, *model.parameters()]

    def gradient_penalty(f):
        z, log_det = f.forward_and_log_det(x)
        found = torch.autograd.grad(nets.nll(z, log_det), inputs, create_graph=True)
        return sum(gradient.square().sum() for gradient in found)

    saving = memory_saving(model)
    assert_close(
        gradients(gradient_penalty(saving), inputs), gradients(gradient_penalty(model), inputs)
    )
    assert torch.autograd.gradcheck(saving, (x,))
    assert torch.autograd.gradgradcheck(saving, (x,))


def test_batched_and_forward_mode_derivatives():
    model, x = nets.flow(1), nets.vectors().requires_grad_()
    saving, rows = memory_saving(model), torch.randn(4, nets.BATCH, nets.FEATURES)
    found, expected = (
        torch.autograd.grad(f(x), x, rows, is_grads_batched=True) for f in (saving, model)
    )
    assert_close(found, expected)
    with forward_ad.dual_level(), pytest.raises(NotApplicable, match=r"use its \.inner"):
        saving(forward_ad.make_dual(x.detach(), x.detach()))


def test_distributed_data_parallel(tmp_path):
    model, x = nets.flow(), nets.vectors()
    expected = gradients(moments(model(x)), list(model.parameters()))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(memory_saving(model))
        reduced = []

        def hook(state, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.register_comm_hook(None, hook)
        moments(parallel(x)).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert sum(reduced) == sum(p.numel() for p in model.parameters())
    assert_close([p.grad for p in model.parameters()], expected)


def test_one_network_evaluation_for_inversion_and_gradient():
    counted = nets.Counted(MLP([nets.FEATURES // 2, 8, nets.FEATURES]))
    model = Chain(nets.flow(1), nets.coupling(network=counted), nets.flow(1)).eval()
    loss = nets.nll(*memory_saving(model).forward_and_log_det(nets.vectors()))
    assert counted.calls == 1
    loss.backward()
    assert counted.calls == 2


def test_frozen_parameters():
    model, x = nets.flow(), nets.vectors()
    layers = model.layers()
    for layer in layers[:8]:
        layer.requires_grad_(False)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = nets.nll(*memory_saving(model).forward_and_log_det(x))
    assert_close(
        gradients(loss, wanted), gradients(nets.nll(*model.forward_and_log_det(x)), wanted)
    )
    loss = nets.nll(*memory_saving(model).forward_and_log_det(x))
    layers[12].requires_grad_(False)  # between forward and backward
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.requires_grad_(False)
    assert not memory_saving(model)(x).requires_grad
    x = x.requires_grad_()
    assert_close(
        gradients(moments(memory_saving(model)(x)), [x]), gradients(moments(model(x)), [x])
    )


def test_frozen_layers_at_the_front_are_not_differentiated():
    counted = nets.Counted(MLP([nets.FEATURES // 2, 8, nets.FEATURES]))
    front = nets.coupling(network=counted).requires_grad_(False)
    model = Chain(nets.flow(1).requires_grad_(False), front, nets.flow(1))
    memory_saving(model)(nets.vectors()).sum().backward()
    assert counted.calls == 1


def test_layers_that_share_parameters():
    shared, other = nets.coupling(), nets.flow(1)
    model, x = Chain(shared, other, shared, shared).eval(), nets.vectors()
    parameters = list(model.parameters())
    loss, plain = (nets.nll(*f.forward_and_log_det(x)) for f in (memory_saving(model), model))
    assert_close(gradients(loss, parameters), gradients(plain, parameters))


def test_several_calls_before_one_backward_and_inside_a_larger_net():
    model, x = nets.flow(), nets.vectors()
    before, after = nn.Linear(nets.FEATURES, nets.FEATURES), nn.Linear(nets.FEATURES, 1)
    parameters = [*before.parameters(), *model.parameters(), *after.parameters()]

    def loss(f):
        z = f(f(before(x)))
        return after(z).sum() + nets.nll(*f.forward_and_log_det(2 * z)) + moments(f.inverse(z))

    assert_close(
        gradients(loss(memory_saving(model)), parameters), gradients(loss(model), parameters)
    )
    nested = memory_saving(Chain(memory_saving(nets.flow(1)), model))
    value = moments(nested(x))
    wanted = list(nested.parameters())
    assert_close(gradients(value, wanted), gradients(moments(nested.inner(x)), wanted))


def test_no_grad_costs_nothing_and_leaves_no_graph():
    counted = nets.Counted(MLP([nets.FEATURES // 2, 8, nets.FEATURES]))
    saving = memory_saving(Chain(nets.coupling(network=counted), nets.flow(1)))
    with torch.no_grad():
        z = saving(nets.vectors())
    assert not z.requires_grad
    assert counted.calls == 1
    with torch.inference_mode():
        saving(nets.vectors())


def test_first_training_batch_initialises_from_data():
    torch.manual_seed(0)
    fresh = Chain(*(layer for _ in range(3) for layer in nets.flow(1).layers())).train()
    for layer in fresh.layers():
        if hasattr(layer, "initialized"):
            layer.initialized.fill_(False)
    twin, x = copy.deepcopy(fresh), 3 * nets.vectors() + 1
    nets.nll(*memory_saving(fresh).forward_and_log_det(x)).backward()
    nets.nll(*twin.forward_and_log_det(x)).backward()
    assert_close([p.grad for p in fresh.parameters()], [p.grad for p in twin.parameters()])
    for name, value in twin.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_deepcopy_and_state_dict():
    model, x = nets.flow(), nets.vectors()
    names = list(model.state_dict())
    saving = memory_saving(model, guard=1e-3)
    saving(x).sum().backward()
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(saving)
    assert torch.equal(twin(x), saving(x))
    assert all(a is not b for a, b in zip(twin.parameters(), saving.parameters(), strict=True))
    twin.load_state_dict(saving.state_dict())
    single = saving.to_dtype(torch.float32)
    assert single(x.float()).dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float64


def test_changes_in_place_between_forward_and_backward_are_noticed():
    model, x = nets.flow(), nets.vectors()
    loss = moments(memory_saving(model)(x))
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = moments(memory_saving(model)(x))
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_callers_input_is_left_alone():
    model, x = nets.flow(), nets.vectors()
    before = x.clone()
    moments(memory_saving(model)(x)).backward()
    assert torch.equal(x, before)
    assert x.grad is None


class Captures(nets.NoInverse):
    """Uses a tensor that wants gradients and is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.ones((), requires_grad=True)]

    def forward(self, x):
        return super().forward(x) * self.hidden[0]


def test_a_gradient_that_would_be_lost_is_an_error():
    loss = moments(memory_saving(Chain(nets.flow(1), Captures()))(nets.vectors()))
    with pytest.raises(RuntimeError, match=r"layer 5 \(Captures\) .* register it as a parameter"):
        loss.backward()


def test_layer_without_an_inverse_and_injective_layer():
    model, x = (
        Chain(nets.flow(1), nets.NoInverse(), nets.flow(1), nets.NoInverse(), nets.flow(1)),
        nets.vectors(),
    )
    parameters = list(model.parameters())
    loss, plain = (nets.nll(*f.forward_and_log_det(x)) for f in (memory_saving(model), model))
    assert_close(gradients(loss, parameters), gradients(plain, parameters))


class Halved(Invertible):
    """z = the first half of x, bent: injective on none but x = (z, 0)."""

    bijective = False

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return first + second.sin()

    def inverse(self, z):
        return torch.cat([z, torch.zeros_like(z)], dim=1)


def test_injective_layers_have_their_input_stored():
    model, x = Chain(nets.flow(1), Halved()), nets.vectors().requires_grad_()
    inputs = [x, *model.parameters()]
    assert_close(
        gradients(moments(memory_saving(model)(x)), inputs), gradients(moments(model(x)), inputs)
    )
    z = model(x).detach().requires_grad_()
    inputs = [z, *model.parameters()]
    found = gradients(moments(memory_saving(model).inverse(z)), inputs)
    assert_close(found, gradients(moments(model.inverse(z)), inputs))


def test_it_is_seen_by_others_as_the_model_itself():
    model, x = nets.flow(), nets.vectors()
    saving = memory_saving(memory_saving(model))
    assert saving.inner is model
    assert saving.name == model.name
    assert saving.block is model.block
    assert saving.layers() == model.layers()
    assert torch.equal(saving.linearize(x).output, model(x))


def test_what_has_no_chain_is_refused():
    with pytest.raises(NotApplicable, match="has no layers"):
        memory_saving(nets.coupling())
    with pytest.raises(TypeError, match=r"call wrap\(encode=f, decode=g\)"):
        memory_saving(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="positive guard"):
        memory_saving(nets.flow(), guard=0.0)
    with pytest.raises(NotApplicable):
        memory_saving(Chain(nets.flow(1), Halved())).forward_and_log_det(nets.vectors())


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name)
def test_finite_differences_under_memory_saving(direction):
    model, x = nets.flow(), nets.vectors()
    parameters = list(model.parameters())
    found = []
    for f in (memory_saving(model), model):
        z, log_det = f.forward_and_log_det(x)
        penalty = FiniteDifferences(0.1, direction=direction, seed=3)(f, x, z)
        found.append([penalty, *gradients(nets.nll(z, log_det) + penalty, parameters)])
    assert_close(*found)
