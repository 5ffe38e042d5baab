"""The regularizers on nets of nflows and FrEIA, with and without context, against slow copies."""

from __future__ import annotations

import pytest
import torch

from inn_guard.adapters import wrap
from inn_guard.training.regularizer_hook import RegularizerHook
from inn_guard.training.regularizers import FiniteDifferences, NormalizingFlowLoss
from tests.cases.case import randomize, seeded
from tests.oracles.regularizers import literal_finite_differences, literal_normalizing_flow_loss

SIZE, CONTEXT, ROWS = 6, 2, 5


def nflows_net(context_size):
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    def network(n, m):
        return ResidualNet(
            n, m, hidden_features=8, num_blocks=1, context_features=context_size or None
        )

    masks = (torch.arange(SIZE) % 2, (torch.arange(SIZE) + 1) % 2)
    return CompositeTransform([AffineCouplingTransform(mask, network) for mask in masks])


def freia_net(context_size):
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock, PermuteRandom

    def network(n, m):
        return torch.nn.Sequential(torch.nn.Linear(n, 8), torch.nn.Tanh(), torch.nn.Linear(8, m))

    net = SequenceINN(SIZE)
    condition = {"cond": 0, "cond_shape": (context_size,)} if context_size else {}
    for k in range(2):
        net.append(GLOWCouplingBlock, subnet_constructor=network, **condition)
        net.append(PermuteRandom, seed=k)
    return net


@pytest.fixture(params=[nflows_net, freia_net], ids=["nflows", "FrEIA"])
def net(request):
    return request.param


def randomized(net, context_size):
    with seeded():
        foreign = net(context_size).double()
        randomize(torch.nn.ParameterList(trained(foreign)))
    return foreign


def trained(foreign):
    """FrEIA keeps permutations as integer parameters."""
    return [parameter for parameter in foreign.parameters() if parameter.requires_grad]


def draws(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("context_size", [0, CONTEXT])
def test_hook_equals_the_literal_copies(net, context_size):
    foreign = randomized(net, context_size)
    x, context = draws(1, (ROWS, SIZE), (ROWS, CONTEXT))
    context = context if context_size else None
    model = wrap(foreign, context=context)
    hook = RegularizerHook(
        foreign, [FiniteDifferences(0.5, seed=3), NormalizingFlowLoss(0.25)], every=1
    )
    mine = hook(x, z=model(x), context=context)
    v, v_star = draws(3, (ROWS, SIZE), (ROWS, SIZE))
    theirs = 0.5 * sum(literal_finite_differences(model, x, v, v_star))
    theirs = theirs + 0.25 * literal_normalizing_flow_loss(model, x)
    torch.testing.assert_close(mine, theirs)
    wanted = trained(foreign)
    for got, expected in zip(
        torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_a_fraction_takes_the_conditions_of_its_rows(net):
    foreign = randomized(net, CONTEXT)
    x, context = draws(1, (ROWS, SIZE), (ROWS, CONTEXT))
    model = wrap(foreign, context=context)
    got = FiniteDifferences(1.0, fraction=0.6, seed=3)(model, x, model(x))
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(ROWS, generator=generator)[:3]
    v, v_star = (torch.randn(3, SIZE, generator=generator) for _ in range(2))
    expected = sum(
        literal_finite_differences(wrap(foreign, context=context[rows]), x[rows], v, v_star)
    )
    torch.testing.assert_close(got, expected)
