"""Affine forms: sampled members inside every result, exact rationals inside every rounded one."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from inn_guard.layers.networks import MLP
from inn_guard.lipschitz.branch_and_bound.affine_forms import AffineForm
from inn_guard.lipschitz.branch_and_bound.lookup_table import Table
from inn_guard.lipschitz.branch_and_bound.taylor import NetworkOnBoxes
from inn_guard.numerics.intervals import Interval

COUNT, POINTS = 500, 40
OPERATIONS = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a * (b.reciprocal() if isinstance(b, AffineForm) else 1 / b),
    "square": lambda a, b: a.square(),
    "scaled": lambda a, b: 3.0 - a * 0.1 + 0.7,
    "compound": lambda a, b: (a * b - a.square()) * (b + 2.0),
}  # fmt: skip


def forms(seed: int, scale: float) -> tuple[AffineForm, AffineForm]:
    torch.manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(COUNT) - 2)
    a, b = (
        AffineForm(
            sizes * torch.randn(COUNT),
            scale * sizes * torch.randn(2, COUNT),
            scale * sizes * torch.rand(COUNT),
        )
        for _ in range(2)
    )
    return a, b


def member(form: AffineForm, e: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    return form.middle + (form.slopes * e).sum(0) + form.rest * rho


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_members_stay_inside(name, scale):
    operation, (a, b) = OPERATIONS[name], forms(3, scale)
    result = operation(a, b)
    away = b.middle.abs() > b.spread if name == "quotient" else torch.ones(COUNT, dtype=torch.bool)
    assert bool(result.rest[away].isfinite().all())
    assert bool(result.rest[~away].isinf().all())
    for k in range(POINTS):
        e, (p, q) = 2 * torch.rand(2, COUNT) - 1, 2 * torch.rand(2, COUNT) - 1
        if k % 2:
            e, p, q = e.sign(), p.sign(), q.sign()
        true = operation(member(a, e, p), member(b, e, q))
        linear = result.middle + (result.slopes * e).sum(0)
        margin = 1e-12 * (1 + result.size)
        assert bool(((true - linear).abs() <= result.rest + margin)[away].all())
        assert bool((result.range.lo - margin <= true)[away].all())
        assert bool((true <= result.range.hi + margin)[away].all())


@pytest.mark.parametrize("name", OPERATIONS)
def test_exact_results_of_points_are_inside(name):
    torch.manual_seed(1)
    a, b = 10 ** (6 * torch.rand(2, 200) - 3) * torch.randn(2, 200)
    point = [AffineForm(x, torch.zeros(2, 200), torch.zeros(200)) for x in (a, b)]
    result = OPERATIONS[name](*point)
    tenth, more = Fraction(0.1), Fraction(0.7)
    for x, y, middle, rest in zip(
        a.tolist(), b.tolist(), result.middle.tolist(), result.rest.tolist(), strict=True
    ):
        p, q = Fraction(x), Fraction(y)
        exact = {
            "sum": p + q, "difference": p - q, "product": p * q, "quotient": p / q, "square": p * p,
            "scaled": 3 - p * tenth + more, "compound": (p * q - p * p) * (q + 2),
        }[name]  # fmt: skip
        assert abs(exact - Fraction(middle)) <= Fraction(rest)


def test_the_rest_is_of_second_order():
    a, b = (AffineForm(f.middle, f.slopes, 0 * f.rest) for f in forms(5, 1e-2))
    c, d = (AffineForm(f.middle, f.slopes, 0 * f.rest) for f in forms(5, 1e-3))
    wide, narrow = OPERATIONS["compound"](a, b), OPERATIONS["compound"](c, d)
    assert float((wide.rest / narrow.rest).median()) == pytest.approx(100, rel=0.1)


def test_what_cancels_cancels():
    a, _ = forms(7, 0.5)
    assert bool((a - a).spread.le(2 * a.rest * (1 + 1e-9) + 1e-12 * a.size).all())


def test_hulls_hold_both_and_the_narrower_of_two_is_kept():
    a, b = forms(9, 0.3)
    both = a.hull(b)
    e, p = 2 * torch.rand(2, COUNT) - 1, 2 * torch.rand(COUNT) - 1
    for one in (a, b):
        linear = both.middle + (both.slopes * e).sum(0)
        assert bool(((member(one, e, p) - linear).abs() <= both.rest * (1 + 1e-12) + 1e-12).all())
    known = Interval(a.middle - 0.1, a.middle + 0.1)
    better = a.better(known)
    assert bool(
        (better.spread <= torch.minimum(a.spread, torch.tensor(0.1)) * (1 + 1e-9) + 1e-12).all()
    )


def test_other_coordinates():
    torch.manual_seed(4)
    inner = AffineForm(torch.randn(COUNT, 2), torch.randn(2, COUNT, 2), torch.rand(COUNT, 2))
    box = inner.range
    local = AffineForm.coordinates(box)
    z = local[:, 0] * local[:, 1]
    moved = z.within(inner, box)
    for _ in range(POINTS):
        e, rho = 2 * torch.rand(2, COUNT) - 1, 2 * torch.rand(COUNT, 2) - 1
        x = inner.middle + (inner.slopes * e[:, :, None]).sum(0) + inner.rest * rho
        linear = moved.middle + (moved.slopes * e).sum(0)
        assert bool(((x.prod(1) - linear).abs() <= moved.rest + 1e-12 * (1 + moved.size)).all())


def test_dimensions_that_do_not_match_are_refused():
    a, b = forms(0, 0.1)
    with pytest.raises(ValueError, match="as many dimensions"):
        a * b[None]
    unknown = AffineForm(torch.tensor([math.nan]), torch.zeros(2, 1), torch.zeros(1))
    assert float(unknown.range.lo) == -math.inf
    assert float(unknown.range.hi) == math.inf


@pytest.mark.parametrize("activation", [torch.nn.SiLU, torch.nn.ReLU])
@pytest.mark.parametrize("width", [1.0, 0.05, 1e-3, 0.0])
def test_tables_hold_what_the_network_does(width, activation):
    torch.manual_seed(6)
    net = MLP([1, 8, 6], activation=activation).double()
    table = Table(NetworkOnBoxes(net, torch.eye(1)).jet, -3.0, 3.0, cells=128, groups=2)
    lo = (6 - width) * torch.rand(COUNT, 1) - 3
    u = AffineForm.coordinates(Interval(lo, lo + width))[:, 0]
    group = torch.randint(0, 2, (COUNT,))
    found = table(u, group)
    assert bool(found.rate.rest.isfinite().all())
    rows = 3 * group[:, None] + torch.arange(3)
    for _ in range(POINTS):
        e = 2 * torch.rand(COUNT) - 1
        x = (u.middle + u.slopes[0] * e).requires_grad_()
        y = net(x[:, None]).gather(1, rows)
        rate = torch.stack(
            [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(3)]
        )
        for form, true in ((found.value, y.detach().T), (found.rate, rate)):
            linear = form.middle + form.slopes[0] * e
            assert bool(((true - linear).abs() <= form.rest + 1e-12).all())
    if width == 0.05:
        assert float(found.value.rest.median()) < 1e-3
    beyond = table(u + 6.0, group)
    assert bool(beyond.value.rest.isinf().any())
