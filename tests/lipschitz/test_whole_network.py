"""Whole networks: no bound below a sampled ratio; methods as tight as theory orders them."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform
from torch import nn

import inn_guard as ig
from inn_guard.audits.lipschitz_bounds import lipschitz_bounds as audit_bounds
from inn_guard.execution.deadline import Deadline
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.layers.partition import Halves
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Squeeze
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.lipschitz.bounds import lipschitz_bounds
from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.search import branch_and_bound, form_norm
from inn_guard.lipschitz.maps.base import NoRule, bounded_map
from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.networks.conditioner import SearchBudget
from inn_guard.lipschitz.whole_network import (
    bound_layers,
    forward_factors,
    inverse_factors,
    product,
)
from inn_guard.lipschitz.witness import Witness, measure
from inn_guard.numerics.intervals import Box, Interval
from tests.cases.trials import first
from tests.lipschitz.soundness import ROUNDING, jacobians, sample

EFFORT = SearchBudget(steps=25, seconds=2.0)


def loud(model: nn.Module, std: float) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
    return model


def dense(affine: bool, size: int = 4, blocks: int = 3) -> Chain:
    layers = []
    for k in range(blocks):
        kept, changed = Halves(swapped=k % 2 == 1).sizes(size)
        net = MLP([kept, 6, 6, changed * (2 if affine else 1)], activation=nn.SiLU)
        partition = Halves(swapped=k % 2 == 1)
        coupling = (
            AffineCoupling(net, partition=partition, scale=squashed_sigmoid())
            if affine
            else AdditiveCoupling(net, partition=partition)
        )
        layers += [
            loud(coupling, 0.5),
            Diagonal(size),
            InvertibleLinear(size),
            Permutation.reverse(size),
        ]
    return Chain(*layers)


def ratios(model: Chain, box: Interval, count: int = 200) -> Pair:
    sigma = torch.linalg.svdvals(jacobians(model, sample(box, count)))
    return Pair(float(sigma[:, 0].max()), float(1 / sigma[:, -1].min()))


@pytest.mark.parametrize("affine", first(1, [True, False]))
@pytest.mark.parametrize("trial", first(1, range(6)))
def test_recursion_over_whole_networks(affine, trial):
    torch.manual_seed(trial)
    model = dense(affine)
    box = Box(-torch.ones(4), torch.ones(4)) if affine or trial % 2 else Box.everywhere((4,))
    layers = bound_layers(
        [(layer.name, bounded_map(layer.block, layer)) for layer in model.layers()], box, EFFORT
    )
    true = ratios(model, box)
    ahead, back = forward_factors(layers, EFFORT), inverse_factors(layers, EFFORT)
    for factors, truth, single in (
        (ahead, true.forward, "forward"),
        (back, true.inverse, "inverse"),
    ):
        bound = product([f.bound for f in factors])
        assert truth <= bound * ROUNDING
        assert bound <= product([getattr(layer.bounds, single) for layer in layers]) * ROUNDING
        assert [f.first for f in factors[1:]] == [f.last for f in factors[:-1]]
    assert any(f.proof is not None for f in ahead)


@pytest.mark.thorough
def test_convolutional_network_in_one_chain():
    torch.manual_seed(3)
    coupling = [loud(AdditiveCoupling(ConvNet(2, 5, 2, activation=nn.ELU)), 0.3) for _ in range(3)]
    parts = [layer for c in coupling for layer in (c, InvertibleLinear(4), Permutation.reverse(4))]
    model = Chain(Squeeze(), *parts)
    box = Box.everywhere((1, 8, 8))
    layers = bound_layers(
        [(layer.name, bounded_map(layer.block, layer)) for layer in model.layers()], box, EFFORT
    )
    true = ratios(model, box, 12)
    ahead, back = forward_factors(layers, EFFORT), inverse_factors(layers, EFFORT)
    assert true.forward <= product([f.bound for f in ahead]) * ROUNDING
    assert true.inverse <= product([f.bound for f in back]) * ROUNDING
    assert max(f.last - f.first for f in ahead) == 9


@pytest.mark.thorough
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("size", first(1, [2, 3]))
def test_branch_and_bound_brackets_the_truth(affine, size):
    torch.manual_seed(size)
    model = dense(affine, size, blocks=2)
    box = Box(-torch.ones(size), 0.5 * torch.ones(size))
    bounds = lipschitz_bounds(model, box, seconds=2.0, effort=SearchBudget(steps=5, seconds=0.5))
    true = ratios(model, box, 2000)
    for upper, lower, truth in zip(
        (bounds.forward, bounds.inverse),
        (bounds.lower_forward, bounds.lower_inverse),
        true,
        strict=True,
    ):
        assert lower <= upper
        assert truth <= upper * ROUNDING
        assert truth <= lower * 1.05
    assert bounds.forward <= (1.02 if size == 2 else 1.5) * bounds.lower_forward
    assert bounds.scope.startswith("on the box")
    for witness in bounds.witnesses:
        assert witness.replay(model) == pytest.approx(witness.ratio, rel=1e-9)
    assert bounds.lower_forward == pytest.approx(bounds.witnesses[0].replay(model), rel=1e-9)


def test_branch_and_bound_without_time_is_still_a_bound():
    torch.manual_seed(0)
    model = dense(affine=True, size=2, blocks=3)
    box = Box(-2 * torch.ones(2), 2 * torch.ones(2))
    maps = [bounded_map(layer.block, layer) for layer in model.layers()]
    found = branch_and_bound(maps, box, lower=Pair(0.0, 0.0), deadline=Deadline.after(0.05))
    true = ratios(model, box)
    assert true.forward <= found.pair.forward * ROUNDING
    assert true.inverse <= found.pair.inverse * ROUNDING


def test_form_norm_dominates_members():
    for d in (2, 3, 4):
        J = AffineForm(torch.randn(200, d, d), torch.randn(2, 200, d, d), torch.rand(200, d, d))
        for _ in range(20):
            e, rest = 2 * torch.rand(2, 200, 1, 1) - 1, J.rest * (2 * torch.rand(200, d, d) - 1)
            inside = J.middle + (J.slopes * e).sum(0) + rest
            assert (torch.linalg.matrix_norm(inside, 2) <= form_norm(J)).all()
    unknown = torch.full((1, 2, 2), math.nan)
    assert form_norm(AffineForm(unknown, torch.ones(2, 1, 2, 2), unknown)) == math.inf
    exact = torch.eye(2)[None] * 3
    assert float(form_norm(AffineForm(exact, 0 * exact[None], 0 * exact))) == pytest.approx(
        3, rel=1e-6
    )


def test_unknown_layers_give_infinity_with_the_reason():
    model = ig.wrap(encode=lambda x: x * 2, decode=lambda z: z / 2)
    bounds = lipschitz_bounds(model, Box.everywhere((2,)), seconds=2.0)
    assert bounds.forward == bounds.inverse == math.inf
    assert "no rule" in bounds.reason
    assert bounds.lower_forward == pytest.approx(2)
    described = bounded_map(model.block, model)
    assert isinstance(described, NoRule)


def test_remark_3_turns_upper_bounds_into_lower_ones():
    model = Chain(Diagonal(2))
    with torch.no_grad():
        model.steps[0].log_scale.copy_(torch.tensor([1.0, 1.0]))
    bounds = lipschitz_bounds(model, Box.everywhere((2,)), seconds=1.0)
    assert bounds.lower_forward >= (1 - 1e-9) / bounds.inverse
    assert bounds.lower_forward <= bounds.forward
    assert bounds.scope == "global"


@pytest.mark.thorough
def test_a_batch_as_the_domain_means_its_box_and_any_model_is_wrapped():
    torch.manual_seed(0)
    library_model = AffineCouplingTransform(
        torch.tensor([0, 1]), lambda inner, outer: ResidualNet(inner, outer, 8)
    ).eval()
    x = torch.rand(16, 2)
    by_batch = lipschitz_bounds(library_model, x, seconds=3.0)
    by_box = lipschitz_bounds(ig.wrap(library_model), Box.around(x), seconds=3.0)
    assert by_batch.scope == by_box.scope
    assert by_batch.lower_forward <= by_batch.forward < math.inf


def test_other_domains_are_refused():
    model = Chain(Diagonal(2))
    with pytest.raises(TypeError, match="domain"):
        lipschitz_bounds(model, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="finite samples"):
        lipschitz_bounds(model, torch.tensor([[0.0, math.nan]]))
    for shape in [(0, 2), ()]:
        with pytest.raises(ValueError, match="expected a batch"):
            lipschitz_bounds(model, torch.zeros(shape))
    with pytest.raises(ValueError, match="expected a domain of the shape of one sample"):
        lipschitz_bounds(Chain(InvertibleLinear(2)), torch.zeros(4, 3))


def test_a_loose_bound_says_so():
    bounds = lipschitz_bounds(Chain(Diagonal(2)), Box.everywhere((2,)), seconds=1.0)
    assert "loose" not in str(bounds)
    assert "proves nothing" not in str(bounds)
    assert len(repr(bounds)) < 120
    loose = replace(bounds, upper=Pair(math.inf, 1e46))
    assert "proves nothing" in str(loose)
    assert "loose: the upper bound is 1e+46 times the largest value found" in str(loose)
    assert loose.looseness.forward == math.inf


def test_a_product_beyond_the_range_of_floats_has_a_reason():
    steep = [Diagonal(2) for _ in range(3)]
    for layer in steep:
        nn.init.constant_(layer.log_scale, 300.0)
    bounds = lipschitz_bounds(Chain(*steep).double(), Box.everywhere((2,)), seconds=0.1)
    assert bounds.forward == math.inf
    assert "beyond the range of float64" in bounds.reason


def test_progress_and_text():
    said = []
    bounds = lipschitz_bounds(
        Chain(Diagonal(2)),
        Box.everywhere((2,)),
        seconds=1.0,
        progress=lambda text, share: said.append(share),
    )
    assert said == sorted(said)
    assert said[-1] == 1.0
    assert "Lip(F^-1)" in str(bounds)


@pytest.mark.thorough
def test_nothing_is_left_on_the_model():
    model = dense(affine=True, size=2, blocks=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    lipschitz_bounds(
        model, Box(-torch.ones(2), torch.ones(2)), seconds=2.0, effort=SearchBudget(steps=2)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_witnesses_replay_what_they_say():
    model = Chain(InvertibleLinear(3))
    with torch.no_grad():
        model.steps[0].matrix.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    witness = Witness(torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), 3.0)
    assert witness.replay(model) == pytest.approx(3.0)


def linear_pair(first, second):
    model = Chain(InvertibleLinear(2), InvertibleLinear(2))
    with torch.no_grad():
        model.steps[0].matrix.copy_(first)
        model.steps[1].matrix.copy_(second)
    return model


@pytest.mark.parametrize("a", [1e3, 1e7, 1e9, 1e12])
def test_witnesses_of_two_shears_are_not_above_the_truth(a):
    """J = [[1, a], [a, a^2 + 1]] has determinant 1; float64 keeps as little of it as of a^2."""
    model = linear_pair(torch.tensor([[1.0, a], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [a, 1.0]]))
    stretch, shrink = measure(model, torch.randn(5, 2))
    largest = (
        a**2 + 2 + a * math.sqrt(a**2 + 4)
    ) / 2  # J is symmetric, and its smallest value the inverse of this
    assert stretch.ratio <= largest * ROUNDING
    assert 1 / shrink.ratio <= largest * ROUNDING
    assert stretch.ratio == pytest.approx(largest, rel=1e-5)
    if a < 1e4:
        assert 1 / shrink.ratio == pytest.approx(largest, rel=1e-2)


@pytest.mark.parametrize("seed", first(2, range(8)))
def test_witnesses_are_not_above_the_truth_where_two_layers_nearly_cancel(seed):
    """A of condition number 1e16 and its inverse, against their product in rational numbers."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(2, 2, generator=generator)).Q for _ in range(2))
    A = U @ torch.diag(torch.tensor([1e8, 1e-8])) @ V
    B = torch.linalg.inv(A)
    exact = [
        [
            sum(Fraction(B[i, k].item()) * Fraction(A[k, j].item()) for k in range(2))
            for j in range(2)
        ]
        for i in range(2)
    ]
    values = torch.linalg.svdvals(torch.tensor([[float(entry) for entry in row] for row in exact]))
    stretch, shrink = measure(linear_pair(A, B), torch.randn(3, 2, generator=generator))
    assert stretch is None or stretch.ratio <= values[0] * ROUNDING
    assert 1 / shrink.ratio <= ROUNDING / values[-1]


@pytest.mark.thorough
def test_a_direction_that_is_lost_altogether_is_no_error():
    model = Chain(Diagonal(2))
    with torch.no_grad():
        model.steps[0].log_scale.copy_(torch.tensor([0.0, -2000.0]))
    bounds = lipschitz_bounds(model, Box(torch.zeros(2), torch.ones(2)), seconds=1.0)
    assert 1e15 < bounds.lower_inverse <= bounds.inverse == math.inf


def changed_network(model):
    model.layers()[0].network[0].forward = lambda x: 5 * x


@pytest.mark.parametrize(
    "place",
    first(2, [None, lambda m: m.layers()[0].network[0], lambda m: m, lambda m: m.layers()[0]]),
)
def test_what_hooks_and_patched_methods_change_has_no_bound(place):
    model = dense(affine=True, size=2, blocks=2).eval()
    if place is None:
        changed_network(model)
    else:
        place(model).register_forward_hook(lambda module, args, out: 3 * out)
    bounds = lipschitz_bounds(model, Box(torch.zeros(2), torch.ones(2)), seconds=1.0)
    assert bounds.forward == bounds.inverse == math.inf
    assert "forward hook" in bounds.reason or "forward of its own" in bounds.reason


@pytest.mark.thorough
def test_audit_reports_every_layer_and_what_makes_it_large():
    torch.manual_seed(1)
    model = dense(affine=True, size=2, blocks=2).eval()
    result = audit_bounds(model, torch.rand(32, 2), seconds=0.5)
    assert result.verdict.label == "stable"
    assert len(result.per_layer) == len(model.layers())
    for row in result.per_layer:
        for side in ("forward", "inverse"):
            assert row[f"lower_{side}"] <= row[f"upper_{side}"] * ROUNDING
    assert result.values["lower_forward"] <= result.values["upper_forward"]
    unbounded = audit_bounds(model, torch.rand(32, 2), domain=Box.everywhere((2,)), seconds=2.0)
    assert unbounded.verdict.label == "undecided"
    assert "(0.5, 1)" in unbounded.advice
