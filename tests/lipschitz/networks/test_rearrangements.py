"""Rearrangements inside a network: Lipschitz constants and boxes against sampled truth."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse, subnetwork_lipschitz
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.models.aef.networks import big_nets, small_nets
from inn_guard.numerics.intervals import Box
from tests.lipschitz.soundness import ROUNDING, sample


class Chosen(nn.Module):
    def __init__(self, index: list[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x):
        return -functional.pad(x, (0, 2)).index_select(1, self.index).reshape(-1, 2, 2)


NETS = {
    "chosen": (
        lambda: nn.Sequential(nn.Linear(3, 4), Chosen([5, 0, 3, 2]), nn.Flatten(), nn.Linear(4, 2)),
        (3,),
    ),
    "encoder": (lambda: small_nets((1, 8, 8), 2, channels=(2, 3)).encoder, (1, 8, 8)),
    "decoder": (lambda: small_nets((1, 8, 8), 2, channels=(2, 3)).decoder, (2,)),
    "big encoder": (lambda: big_nets((2, 8, 8), 4, blocks=1).encoder, (2, 8, 8)),
    "big decoder": (lambda: big_nets((2, 8, 8), 4, blocks=1).decoder, (4,)),
}


@pytest.mark.parametrize("name", NETS)
def test_constants_and_boxes(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double().eval()
    box = Box(-torch.ones(shape), torch.ones(shape))
    bound = subnetwork_lipschitz(net, box, effort=SearchBudget(steps=0))
    x = sample(box, 24)
    J = torch.func.vmap(torch.func.jacrev(lambda t: net(t[None])[0].flatten()))(x).flatten(2)
    assert float(torch.linalg.matrix_norm(J, 2).max().detach()) <= bound * ROUNDING
    output = analyse(net, box).output
    with torch.no_grad():
        y = net(x)
    assert bool(((output.lo <= y + 1e-12) & (y - 1e-12 <= output.hi)).all())


@pytest.mark.parametrize(
    "net", [Chosen([0, 0, 1, 2]), nn.AvgPool2d(2, stride=1), nn.Upsample(scale_factor=1.5)]
)
def test_what_is_no_such_move_is_not_guessed(net):
    shape = (2,) if isinstance(net, Chosen) else (1, 4, 4)
    with pytest.raises(Unbounded):
        analyse(net, Box(-torch.ones(shape), torch.ones(shape)))
