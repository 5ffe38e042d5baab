"""Lipschitz constants of some outputs, and of the distance from the Jacobian at a point."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inn_guard.lipschitz.networks.conditioner import AnalysedNetwork, analyse
from inn_guard.numerics.intervals import Box, Interval
from tests.lipschitz.soundness import ROUNDING, sample

NETS = {
    "vectors": (
        lambda: nn.Sequential(
            nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)
        ),
        (3,),
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 4, 3, padding=1)
        ),
        (2, 4, 4),
    ),
}


def norms(J: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(J.detach(), 2).max())


@pytest.mark.parametrize("radius", [1e-6, 0.1, 2.0])
@pytest.mark.parametrize("name", NETS)
def test_no_sampled_distance_is_above(name, radius):
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double()
    centre = torch.randn(shape, dtype=torch.float64)
    box = Box(centre - radius, centre + radius)
    over: AnalysedNetwork = analyse(net, box)
    point = analyse(net, Interval.of(centre))
    constant = over.constant(reference=point.preactivations)
    x = sample(box, 50).double()
    jacobian = torch.vmap(torch.func.jacrev(lambda t: net(t[None])[0]))
    rows = torch.tensor([2, 0])
    J, J_c = jacobian(x), jacobian(centre[None])
    for known, pick in ((constant, slice(None)), (constant.rows(rows), rows)):
        flat = J[:, pick].reshape(len(x), -1, centre.numel())
        apart = flat - J_c[:, pick].reshape(1, -1, centre.numel())
        assert norms(flat) <= known.lipschitz * ROUNDING
        assert norms(apart) <= known.deviation * ROUNDING + 1e-13
    assert constant.rows(rows).lipschitz < constant.lipschitz
    if radius < 1e-3:
        assert constant.deviation < 1e-2 * constant.lipschitz
