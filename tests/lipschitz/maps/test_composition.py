"""Maps of the last entries of a vector: boxes of data that are not flat yet."""

from __future__ import annotations

import torch

from inn_guard.layers import Diagonal
from inn_guard.lipschitz.maps.base import bounded_map
from inn_guard.lipschitz.maps.composition import OnTail
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.numerics.intervals import Interval


def stretching() -> Diagonal:
    layer = Diagonal(2)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([4.0, 0.5]).log())
    return layer


def test_the_whole_of_an_image_is_its_own_tail():
    x = torch.randn(2, 3, 3)
    box, layer = Interval(x, x + 1), stretching()
    tail = OnTail(bounded_map(layer, layer), (2, 3, 3))
    for given in (box, box.map(torch.flatten)):
        bounds = tail.bounds(given, SearchBudget())
        assert abs(bounds.forward - 4) < 1e-9
        assert abs(bounds.inverse - 2) < 1e-9
        ends = layer(torch.stack([x, x + 1])).flatten(1)
        image = tail.image(given)
        assert (image.lo <= ends.amin(0)).all()
        assert (image.hi >= ends.amax(0)).all()
        assert image.hi.max() < ends.max() + 1e-9


def test_the_head_passes():
    x = torch.randn(5)
    image = OnTail(bounded_map(stretching(), stretching()), (2,)).image(Interval(x, x + 1))
    assert torch.equal(image.lo[:3], x[:3])
    assert torch.equal(image.hi[:3], x[:3] + 1)
