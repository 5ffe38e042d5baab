"""memory_saving(exact=True): gradients as true as float32 allows."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

from benchmarks.performance.measurement import peak_allocated
from inn_guard.adapters import wrap
from inn_guard.core.invertible import Invertible
from inn_guard.exact import Mismatch
from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.autoregressive import maf
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.partition import Mask
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.scales import SigmoidScale
from inn_guard.memory_saving import memory_saving
from tests.cases.all import CASES, one_of_each_kind
from tests.cases.trials import trials
from tests.memory_saving import nets

LAYERED = [case for case in CASES if case.has_layers and case.make()[0].layers()]
FAST = frozenset(
    {
        "freia-GraphINN-branches",
        "ours/glow flow",
        "ours/injective chain",
        "memcnn-chain",
        "nflows-MultiscaleCompositeTransform-odd",
        "normflows-MultiscaleFlow",
        "zuko-NSF-context",
    }
)
#: Rounding of a float32 gradient that a lucky batch may hide in the stored activations.
ROUNDING = 4 * torch.finfo(torch.float32).eps


def nll(model, x):
    return nets.nll(*model.forward_and_log_det(x))


def forward_loss(model, x):
    return model(x).square().sum()


def gradient(model, x, loss=nll, of=None):
    """Gradients of the input and of the parameters as one float64 vector."""
    x = x.detach().clone().requires_grad_()
    inputs = [x, *(p for p in (of or model).parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss(model, x), inputs, allow_unused=True)
    flat = []
    for tensor, one in zip(inputs, found, strict=True):
        flat.append((torch.zeros_like(tensor) if one is None else one).flatten().double())
    return torch.cat(flat)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def couplings(*, features=16, layers=32, gain=6.0):
    """Affine couplings whose contractions outgrow float32."""
    torch.manual_seed(1)
    steps: list[Invertible] = []
    for k in range(layers):
        scale = SigmoidScale(1e-3, 1.001)
        coupling = AffineCoupling.on_halves(
            features,
            lambda identity, out: MLP([identity, 16, out], activation=nn.SiLU),
            swapped=bool(k % 2),
            scale=scale,
        )
        with torch.no_grad():
            for parameter in list(coupling.network.parameters())[-2:]:
                parameter.mul_(gain)
        steps.append(coupling)
    return Chain(*steps).float()


@pytest.mark.parametrize("case", one_of_each_kind(LAYERED, FAST))
def test_every_layered_model_is_as_close_to_float64_as_stored_activations(case):
    torch.set_default_dtype(torch.float32)
    model, x = case.make()
    loss = nll if case.has_log_det else forward_loss
    single = model.to_dtype(torch.float32)
    true = gradient(model, x, loss)
    stored = gradient(single, x.float(), loss)
    saving = memory_saving(single, exact=True)
    found = gradient(saving, x.float(), loss)
    assert distance(found, true) <= 2 * distance(stored, true) + ROUNDING


@trials(3, 9)
def test_gradients_are_right_where_the_float_inverse_is_lost(trials):
    model = couplings(features=8, layers=12, gain=16.0)
    double = model.to_dtype(torch.float64)
    floating, exact = memory_saving(model), memory_saving(model, exact=True)
    ratios = []
    for _ in range(trials):
        # of one batch the ratio of two rounding errors may be anything: their median counts
        x = torch.randn(32, 8, dtype=torch.float32)
        true = gradient(double, x.double())
        assert not distance(gradient(floating, x), true) < 0.5
        ratios.append(distance(gradient(exact, x), true) / distance(gradient(model, x), true))
    assert statistics.median(ratios) <= 2


def test_both_directions_and_a_context():
    model = nets.conditional_flow()
    single, x = model.to_dtype(torch.float32), nets.vectors()
    context = torch.randn(nets.BATCH, 2, dtype=torch.float64)

    def inverse_loss(f, z):
        return nets.nll(*f.inverse_and_log_det(z))

    for loss in (nll, inverse_loss):
        found = []
        for f, dtype in ((model, torch.float64), (single, torch.float32)):
            given = context.detach().to(dtype).requires_grad_()
            wrapped = f if dtype == torch.float64 else memory_saving(f, exact=True)
            value = loss(wrapped.with_context(given), x.to(dtype))
            inputs = [given, *f.parameters()]
            flat = [g.double().flatten() for g in torch.autograd.grad(value, inputs)]
            found.append(torch.cat(flat))
        assert distance(found[1], found[0]) < 1e-5


def test_one_pass_of_the_network_restores_and_differentiates():
    network = nets.Counted(MLP([2, 8, 4]))
    saving = memory_saving(Chain(AffineCoupling(network), Permutation.reverse(4)), exact=True)
    x = torch.randn(5, 4)
    nll(saving, x).backward()
    network.calls = 0
    value = nll(saving, x)
    assert network.calls == 1
    value.backward()
    assert network.calls == 2


def test_twice_in_one_graph_and_several_losses():
    model = nets.flow(1).to_dtype(torch.float32)
    saving, x = memory_saving(model, exact=True), nets.vectors().float()

    def twice(f, x):
        z, log_det = f.forward_and_log_det(x)
        again, _ = f.forward_and_log_det(0.1 * z)
        return nets.nll(again, log_det)

    assert distance(gradient(saving, x, twice), gradient(model, x, twice)) < 1e-5
    z, log_det = saving.forward_and_log_det(x)
    parameters = list(model.parameters())
    first = torch.autograd.grad(z.sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(log_det.sum(), parameters, allow_unused=True, retain_graph=True)
    both = torch.autograd.grad(z.sum() + log_det.sum(), parameters)
    for a, b, c in zip(first, second, both, strict=True):
        expected = a if b is None else a + b
        assert torch.allclose(expected, c, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z.sum(), parameters)


def test_double_backward_is_that_of_stored_activations():
    model = nets.flow(1).to_dtype(torch.float32)
    x = nets.vectors(2).float().requires_grad_()

    def penalty(f):
        found = torch.autograd.grad(nll(f, x), x, create_graph=True)[0]
        return torch.autograd.grad(found.square().sum(), x)[0]

    assert distance(penalty(memory_saving(model, exact=True)), penalty(model)) < 1e-5


def mixed() -> Chain:
    """A layer without a rule, an autoregressive one, dropout and BatchNorm in training mode."""
    torch.manual_seed(0)
    dropout = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    normed = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return (
        Chain(
            Logit(0.1),
            maf(4, layers=1, hidden=8),
            AdditiveCoupling(dropout),
            AdditiveCoupling(normed),
            ActNorm(4),
            Diagonal(4),
        )
        .float()
        .train()
    )


def test_layers_that_are_stored_or_random_train_as_with_stored_activations():
    x = torch.rand(16, 4, dtype=torch.float32)
    results = []
    for make in (lambda model: model, lambda model: memory_saving(model, exact=True)):
        model = mixed()
        f = make(model)
        for _ in range(2):
            torch.manual_seed(5)
            model.zero_grad()
            nll(f, x).backward()
        gradients = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        results.append((gradients, [b.clone() for b in model.buffers()], torch.rand(3)))
    (stored, buffers, drawn), (found, own_buffers, own_drawn) = results
    assert distance(found, stored) < 1e-5
    for own, expected in zip(own_buffers, buffers, strict=True):
        assert torch.allclose(own, expected, rtol=1e-5)
    assert torch.equal(own_drawn, drawn)


def test_the_plan_says_what_is_stored_and_why():
    saving = memory_saving(mixed().eval(), exact=True)
    assert "no batch yet" in saving.plan()
    nll(saving, torch.rand(16, 4, dtype=torch.float32)).backward()
    plan = saving.plan()
    assert "Logit" in plan
    assert "no rule is registered" in plan
    assert "would take 5 passes of its network" in plan


def test_autocast_is_refused():
    saving = memory_saving(couplings(layers=1), exact=True)
    x = torch.randn(4, 16, dtype=torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match=r"outside torch\.autocast, got bfloat16"),
    ):
        saving(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        saving(x).sum().backward()


def test_bad_data_and_arguments_are_refused():
    saving = memory_saving(couplings(layers=1), exact=True)
    with pytest.raises(ValueError, match="got NaN or Inf in 1 of 2 samples"):
        saving(torch.tensor([[1.0] * 16, [torch.nan] * 16]))
    with pytest.raises(ValueError, match="exact=True or a guard, got both"):
        memory_saving(couplings(layers=1), exact=True, guard=1e-3)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e-42, 1e-30, -0.0])
def test_gradients_at_extreme_values_are_those_of_stored_activations(value):
    model = couplings(layers=3, gain=1.0)
    x = torch.randn(8, 16, dtype=torch.float32)
    x[3, 9] = x[4, 1] = value

    def loss(f, x):
        z, log_det = f.forward_and_log_det(x)
        # a square would overflow
        return (z.abs() / (1 + z.abs().detach()) - log_det[:, None]).mean()

    true = gradient(model.to_dtype(torch.float64), x.double(), loss)
    stored = gradient(model, x, loss)
    found = gradient(memory_saving(model, exact=True), x, loss)
    assert distance(found, true) <= 2 * distance(stored, true) + ROUNDING


@pytest.mark.parametrize("library", ["nflows", "freia", "ours/masked"])
def test_couplings_of_every_library_evaluate_their_network_once(library):
    model, network = counted_coupling(library)
    saving, x = memory_saving(model, exact=True), torch.randn(5, 4, dtype=torch.float32)
    nll(saving, x).backward()
    expected = gradient(model, x)
    network.calls = 0
    value = nll(saving, x)
    assert network.calls == 1
    value.backward()
    assert network.calls == 2
    assert distance(gradient(saving, x, of=model), expected) < 1e-5


def counted_coupling(library):
    """A chain with one coupling, and its network."""
    made = []

    def network(inputs, outputs):
        made.append(nets.Counted(MLP([inputs, 8, outputs])))
        return made[-1]

    if library == "nflows":
        from nflows.transforms import AffineCouplingTransform, CompositeTransform

        class WithContext(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x, context=None):
                return self.inner(x)

        coupling = AffineCouplingTransform([0, 1, 0, 1], lambda i, o: WithContext(network(i, o)))
        return wrap(CompositeTransform([coupling]).float()), made[0]
    if library == "freia":
        import FrEIA.framework
        import FrEIA.modules

        chain = FrEIA.framework.SequenceINN(4)
        chain.append(FrEIA.modules.AffineCouplingOneSided, subnet_constructor=network)
        return wrap(chain.float()), made[0]
    mask = torch.tensor([True, False, False, True])
    return Chain(AffineCoupling(network(4, 8), partition=Mask(mask)).float()), made[0]


def test_an_error_in_a_layer_leaves_no_trace():
    class Failing(nn.Linear):
        fail = False

        def forward(self, x):
            if self.fail:
                raise ArithmeticError("no")
            return super().forward(x)

    network = Failing(2, 2)
    model = Chain(AdditiveCoupling(nn.Sequential(nn.BatchNorm1d(2), network)), Diagonal(4))
    saving = memory_saving(model.train(), exact=True)
    x = torch.randn(8, 4)
    z = saving(x)
    before = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    network.fail = True
    with pytest.raises(ArithmeticError):
        z.sum().backward()
    for now, then in zip(model.buffers(), before, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(torch.get_rng_state(), state)
    network.fail = False
    saving(x).sum().backward()


def test_a_network_that_computes_other_bits_is_named():
    class Moving(nn.Linear):
        offset = 0.0

        def forward(self, x):
            return super().forward(x) + self.offset

    network = Moving(2, 2)
    saving = memory_saving(Chain(Diagonal(4), AdditiveCoupling(network)), exact=True)
    z = saving(torch.randn(3, 4))
    network.offset = 1e-3
    with pytest.raises(Mismatch, match=r"layer 1 \(AdditiveCoupling\)"):
        z.sum().backward()


@pytest.mark.thorough
def test_memory_does_not_grow_with_depth_and_is_freed():
    def step_of(layers):
        model = couplings(layers=layers, gain=1.0)
        saving, x = memory_saving(model, exact=True), torch.randn(256, 16, dtype=torch.float32)
        held = []

        def step():
            loss = nll(saving, x)
            loss.backward()
            held.append(loss)
            for parameter in model.parameters():
                parameter.grad = None

        step()
        return step

    few, many = (peak_allocated(step_of(layers)) for layers in (3, 6))
    bits = 3 * 256 * 16 / 2 * 3  # at most three bytes an entry for the bits of 3 more layers
    assert many < few + bits
    step = step_of(3)
    assert peak_allocated(lambda: [step() for _ in range(2)]) < 1.1 * peak_allocated(step)
