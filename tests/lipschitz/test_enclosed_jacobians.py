"""Enclosed Jacobians: never below a sampled ratio, tighter where layers repeat, best cuts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from inn_guard.execution.deadline import Deadline
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.certificate import Certificate
from inn_guard.lipschitz.maps.coupling import ByChannel, Coupling
from inn_guard.lipschitz.maps.elementary import Rearrangement
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.transformers.affine import Additive
from inn_guard.lipschitz.whole_network import Factor, cheapest, jacobian_factors, product
from inn_guard.numerics.intervals import Box, Interval
from tests.cases.trials import first
from tests.lipschitz.soundness import ROUNDING, jacobians, sample
from tests.lipschitz.test_whole_network import dense, loud, ratios

#: no recursion: what is left are products of norms and of enclosed Jacobians
NARROW = SearchBudget(steps=0, width=0)


@pytest.mark.parametrize("affine", first(1, [True, False]))
@pytest.mark.parametrize("seed", first(1, range(2)))
def test_no_sampled_ratio_is_above(affine, seed):
    torch.manual_seed(seed)
    model, box = dense(affine), Box(-torch.ones(4), torch.ones(4))
    bounds = lipschitz_bounds(model, box, seconds=0.2, effort=NARROW)
    true = ratios(model, box)
    proved = bounds.certificate.bounds
    assert true.forward <= proved[0] * ROUNDING
    assert true.inverse <= proved[1] * ROUNDING
    assert bounds.certificate.check()


def repeated(count: int) -> Chain:
    """Additive couplings that keep the same half: Jacobians add up, while norms multiply."""
    torch.manual_seed(0)
    layers = [loud(AdditiveCoupling(MLP([1, 4, 1], activation=nn.Tanh)), 1.0) for _ in range(count)]
    return Chain(*layers).double()


def test_repeated_masks_add_instead_of_multiplying(tmp_path):
    model = repeated(6)
    bounds = lipschitz_bounds(model, Box.everywhere((2,)), seconds=0.2, effort=NARROW)
    for side, method in zip(("forward", "inverse"), bounds.method, strict=True):
        assert method == "enclosed Jacobians"
        assert getattr(bounds, side) < 0.5 * product(
            [getattr(layer.bounds, side) for layer in bounds.per_layer]
        )
        assert getattr(bounds, f"lower_{side}") <= getattr(bounds, side)
    bounds.certificate.save(tmp_path / "bound.npz")
    loaded = Certificate.load(tmp_path / "bound.npz")
    assert loaded.check()
    assert loaded.bounds == bounds.certificate.bounds


def test_runs_are_products_of_the_matrices_and_end_where_one_is_unknown():
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.rand(3, 3, generator=generator, dtype=torch.float64) for _ in range(5)]
    enclosed = [Interval.of(matrix) for matrix in matrices]
    factors = jacobian_factors([*enclosed[:3], None, *enclosed[3:]], Deadline())
    assert {(f.first, f.last) for f in factors} == {(0, 2), (0, 3), (1, 3), (4, 6)}
    first = next(f for f in factors if (f.first, f.last) == (0, 3))
    truth = float(torch.linalg.matrix_norm(matrices[2] @ matrices[1] @ matrices[0], 2))
    assert truth <= first.bound <= truth * (1 + 1e-12)


def test_the_cheapest_cuts_are_those_of_trying_all():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        runs = [(i, j) for i, j in itertools.combinations(range(6), 2)]
        factors = [
            Factor(i, j, float(torch.rand((), generator=generator) + 0.5) ** (j - i))
            for i, j in runs
        ]
        bound = {(f.first, f.last): f.bound for f in factors}
        best = math.inf
        for cuts in itertools.product([False, True], repeat=4):
            ends = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), 5]
            best = min(best, math.prod(bound[pair] for pair in itertools.pairwise(ends)))
        found = cheapest(5, factors)
        assert math.prod(f.bound for f in found) == pytest.approx(best)
        assert [f.first for f in found] == [0, *(f.last for f in found[:-1])]


def test_infinite_factors_are_still_a_path():
    found = cheapest(2, [Factor(0, 1, math.inf), Factor(1, 2, 2.0)])
    assert product([f.bound for f in found]) == math.inf
    with pytest.raises(ValueError, match="lead from layer 0"):
        cheapest(2, [Factor(0, 1, 1.0)])


def test_damaged_permutations_and_splits_have_no_enclosure():
    """What repeats an entry has no inverse, whatever the transpose looks like."""
    box = Box(-torch.ones(4), torch.ones(4))
    order = torch.tensor([0, 0, 2, 3])
    with pytest.raises(Unbounded, match="repeated"):
        Rearrangement(lambda x: x[:, order], order).jacobians(box)
    split = ByChannel(torch.tensor([0, 1]), torch.tensor([1, 3]))
    damaged = Coupling(split, nn.Linear(2, 2), Additive(), [torch.arange(2)])
    with pytest.raises(Unbounded, match="no partition"):
        damaged.jacobians(box)


def small_images() -> Chain:
    """Two couplings of images of 16 entries, whose slopes differ from pixel to pixel."""
    torch.manual_seed(3)
    layers: list = []
    for _ in range(2):
        net = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.Conv2d(3, 2, 3, padding=1, bias=False)
        )
        layers += [loud(AdditiveCoupling(net), 0.5), Permutation.reverse(4)]
    return Chain(*layers).double()


@pytest.mark.parametrize(("width", "loosest"), [(1e-4, 1.01), (0.1, 5.0)])
def test_small_images_are_bounded_pixel_by_pixel(width, loosest):
    model = small_images()
    centre = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    bounds = lipschitz_bounds(model, Box(centre - width, centre + width), seconds=0.5)
    assert max(bounds.looseness) < loosest
    state = sample(bounds.per_layer[0].box, 64)
    J = torch.eye(16, dtype=torch.float64)
    for layer, found in zip(model.layers(), bounds.per_layer, strict=True):
        margin = 1e-9 * (1 + state.abs())
        assert bool((found.box.lo <= state + margin).all())
        assert bool((state - margin <= found.box.hi).all())
        J, state = jacobians(layer, state) @ J, layer(state).detach()
    sigma = torch.linalg.svdvals(J)
    assert float(sigma[:, 0].max()) <= bounds.forward * ROUNDING
    assert float(1 / sigma[:, -1].min()) <= bounds.inverse * ROUNDING
