"""log_prob of a memory-saving model: the library's own base, and no activations of the layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.memory_saving import memory_saving
from tests.cases.all import A_THIRD, CASES, one_of_each_kind
from tests.cases.case import randomize, seeded
from tests.cases.trials import first

FEATURES, HIDDEN, BLOCKS, BATCH = 4, 32, 6, 16


def normflows_flows() -> list:
    import normflows as nf

    flows = []
    for _ in range(BLOCKS):
        network = nf.nets.MLP([FEATURES // 2, HIDDEN, HIDDEN, FEATURES], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(network), nf.flows.Permute(FEATURES, mode="swap")]
    return flows


def normflows_flow():
    import normflows as nf

    return wrap(nf.NormalizingFlow(nf.distributions.DiagGaussian(FEATURES), normflows_flows()))


def normflows_flow_of_classes():
    import normflows as nf

    base = nf.distributions.ClassCondDiagGaussian(FEATURES, 3)
    return wrap(nf.ClassCondFlow(base, normflows_flows()), context=torch.arange(BATCH) % 3)


def normflows_conditional_flow():
    import normflows as nf

    flows = []
    for _ in range(BLOCKS):
        flows.append(
            nf.flows.CoupledRationalQuadraticSpline(FEATURES, 2, HIDDEN, num_context_channels=2)
        )
    base = nf.distributions.DiagGaussian(FEATURES, trainable=False)
    model = nf.ConditionalNormalizingFlow(base, flows)
    return wrap(model, context=torch.randn(BATCH, 2))


def nflows_flow():
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform, ReversePermutation

    def network(inputs: int, outputs: int) -> nn.Module:
        return _Network([inputs, HIDDEN, HIDDEN, outputs])

    transforms = []
    for _ in range(BLOCKS):
        coupling = AffineCouplingTransform(torch.arange(FEATURES) % 2, network)
        transforms += [coupling, ReversePermutation(FEATURES)]
    return wrap(Flow(CompositeTransform(transforms), StandardNormal([FEATURES])))


class _Network(nn.Sequential):
    """A network that takes a context and ignores it."""

    def __init__(self, sizes: list[int]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        super().__init__(*layers[:-1])

    def forward(self, x, context=None):
        return super().forward(x)


def zuko_flow():
    import zuko

    return wrap(zuko.flows.NICE(FEATURES, transforms=BLOCKS, hidden_features=(HIDDEN, HIDDEN)))


MODELS = [
    normflows_flow,
    normflows_flow_of_classes,
    normflows_conditional_flow,
    nflows_flow,
    zuko_flow,
]


def numbers_kept(call) -> tuple[torch.Tensor, int]:
    """The result of a call and how many numbers autograd keeps for its backward pass."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // 8


@pytest.mark.parametrize("make", first(2, MODELS))
def test_log_prob_keeps_no_activations_and_has_the_plain_gradient(make):
    with seeded(4):
        model = make().double()
        randomize(model, 0.1)
        x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    saving = memory_saving(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() for p in model.parameters())

    expected, plain = numbers_kept(lambda: model.log_prob(x))
    found, saved = numbers_kept(lambda: saving.log_prob(x))
    assert torch.allclose(found, expected, rtol=1e-12)
    assert saved - weights < 0.2 * (plain - weights)

    gradients = torch.autograd.grad(found.mean(), parameters)
    for a, b in zip(gradients, torch.autograd.grad(expected.mean(), parameters), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12


WITH_DENSITY = [case for case in CASES if case.has_layers and case.has_log_det]


@pytest.mark.parametrize("case", one_of_each_kind(WITH_DENSITY, A_THIRD))
def test_log_prob_is_that_of_every_model(case):
    model, x = case.make()
    found = memory_saving(model).log_prob(x)
    assert torch.allclose(found, model.log_prob(x), rtol=1e-5, atol=1e-4)


def test_disabled_it_is_the_models_own_log_prob():
    with seeded(4):
        model = normflows_flow().double()
    saving = memory_saving(model)
    saving.enabled = False
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64)
    assert torch.equal(saving.log_prob(x), model.log_prob(x))
    assert torch.allclose(saving.log_prob(x), model.module.log_prob(x), rtol=1e-12)
