"""The attack against closed forms, the paper's loop written out, and models that break, raise,
hang or lie.
"""

from __future__ import annotations

import dataclasses
import math

import FrEIA.framework
import FrEIA.modules
import pytest
import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.audits.audited_model import AuditedModel
from inn_guard.audits.dequantization_attack import (
    Ascent,
    GradientFree,
    ProjectedGradient,
    Quantization,
    RandomSearch,
    Restarts,
    Search,
    SpectralAscent,
)
from inn_guard.audits.dequantization_attack.audit import (
    dequantization_attack,
    differentiable_inverse,
)
from inn_guard.audits.dequantization_attack.search import run_attack
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.report.verdict import Verdict
from tests.cases.trials import first
from tests.oracles.attacks import projected_gradient, reconstruction_error

STRATEGIES = {
    "random": RandomSearch(budget=160),
    "paper": ProjectedGradient(restarts=2, steps=30, step_size=5e-3),
    "implicit": ProjectedGradient(steps=15, step_size=5e-3, gradient=Search.implicit_gradient),
    "ascent": Ascent(budget=160),
    "spectral": SpectralAscent(budget=160),
    "gradient free": GradientFree(budget=160),
    "restarts": Restarts(2, Ascent(budget=80)),
}


def generous(name):
    """The strategy with enough for maps so small that bookkeeping is most of what a gradient
    costs.
    """
    chosen = STRATEGIES[name]
    if isinstance(chosen, Restarts):
        return Restarts(chosen.count, dataclasses.replace(chosen.strategy, budget=1500))
    return dataclasses.replace(chosen, budget=1500)


class Bent(Invertible):
    """F is the identity; its inverse is off by |x - x_0|^2 in the first coordinate, so the error
    is known.
    """

    def __init__(self, target):
        super().__init__()
        self.register_buffer("target", target)

    def forward(self, x):
        return x * 1.0

    def inverse(self, z):
        off = (z - self.target).square().flatten(1).sum(1)
        first = torch.zeros_like(z)
        first.view(len(z), -1)[:, 0] = 1
        return z + first * off.reshape(-1, *[1] * (z.dim() - 1))


class Pole(Invertible):
    """z = x, whose inverse is not finite for samples whose first value exceeds a level."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        return x * 1.0

    def inverse(self, z):
        first = z.flatten(1)[:, :1].reshape(-1, *[1] * (z.dim() - 1))
        return z + torch.where(first > self.level, math.inf, 1e-4 * first)


def couplings(blocks=4, size=6, gain=3.0, dtype=torch.float64):
    torch.manual_seed(3)
    steps = []
    for _ in range(blocks):
        steps += [AffineCoupling(MLP([size // 2, 16, size])), Permutation(torch.randperm(size))]
    model = Chain(*steps)
    for step in model.layers():
        if isinstance(step, AffineCoupling):
            step.network[-1].weight.data.mul_(gain)
    return model.to(dtype).eval()


def images(count=4, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(256, (count, *(shape or (6,))), generator=generator) / 256).to(dtype)


def attacked(model, x, strategy, bits=8, seed=0, at_once=1):
    cubes = Quantization(bits).cubes(x)
    return run_attack(
        AuditedModel(model),
        cubes,
        strategy,
        generator=torch.Generator().manual_seed(seed),
        seconds=30,
        at_once=at_once,
    ), cubes


@pytest.mark.parametrize("name", ["random", "spectral"])
@pytest.mark.parametrize("breaks", [False, True])
def test_draws_in_one_batch_find_what_single_ones_find(name, breaks):
    x = images()
    centre = Quantization(8).cubes(x).centre
    model = Pole(centre[0, 0].item() if breaks else 2.0)
    alone, _ = attacked(model, x, generous(name))
    together, _ = attacked(model, x, generous(name), at_once=8)
    assert torch.equal(alone.points, together.points)
    torch.testing.assert_close(alone.error, together.error)
    assert alone.spent == pytest.approx(together.spent, abs=8 * alone.price["error"])


# closed forms


@pytest.mark.parametrize("name", ["paper", "ascent", "spectral", "gradient free", "random"])
def test_the_farthest_corner_is_found_where_the_error_is_known(name):
    """error = |x' - x_0|^2 is largest at one corner of the cube: climbers reach it, the others
    come near.
    """
    x = images()
    cubes = Quantization(8).cubes(x)
    search, _ = attacked(Bent(cubes.centre + 1.5 * cubes.half), x, generous(name))
    best = (2.5 * cubes.half).square().flatten(1).sum(1)
    assert bool((search.error <= best * (1 + 1e-9)).all())
    assert bool(
        (search.error >= best * (0.95 if name in ("paper", "ascent", "restarts") else 0.5)).all()
    )


def test_an_ill_conditioned_linear_map_errs_by_its_amplified_rounding():
    """W = diag(1, 1e-3), then an offset of 1: z is off by up to eps / 2, x by 1000 times that, in
    float32.
    """

    class Offset(Invertible):
        def forward(self, x):
            return x * x.new_tensor([1.0, 1e-3]) + 1

        def inverse(self, z):
            return (z - 1) / z.new_tensor([1.0, 1e-3])

    search, _ = attacked(Offset(), images(4, 2, dtype=torch.float32), Ascent(budget=3000))
    half_ulp = torch.finfo(torch.float32).eps / 2 / 1e-3
    assert bool((search.error <= 1.01 * half_ulp).all())
    assert bool((search.error >= 0.9 * half_ulp).all())


class Recorded(Search):
    """A search that remembers where it was asked for gradients, and with which nudge."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.visited = []

    def gradient(self, x, nudge=None):
        self.visited.append((x, nudge))
        return super().gradient(x, nudge)


def recorded(model, x, strategy):
    cubes = Quantization(8).cubes(x)
    generator = torch.Generator().manual_seed(0)
    search = Recorded(
        AuditedModel(model), cubes, budget=strategy.budget, generator=generator, seconds=30
    )
    search.errors(cubes.centre)
    strategy.run(search)
    return search, cubes


def test_the_spectral_nudge_turns_to_the_direction_that_a_linear_inverse_amplifies_most():
    """W = Q diag(1, 1/2, 1/8) R.

    The power iteration on J^-T J^-1 ends at the third left singular vector of W, and
    the nudge's image at ``reach`` times the length of the starting point."""

    class Linear(Invertible):
        def __init__(self, weight):
            super().__init__()
            self.register_buffer("weight", weight)
            self.register_buffer("inverse_weight", torch.linalg.inv(weight))

        def forward(self, x):
            return x @ self.weight.T

        def inverse(self, z):
            return z @ self.inverse_weight.T

    q, r = (torch.linalg.qr(torch.randn(3, 3)).Q for _ in range(2))
    strategy = SpectralAscent(budget=4000, share=1.0)
    search, _ = recorded(
        Linear(q @ torch.diag(torch.tensor([1.0, 0.5, 0.125])) @ r), images(4, 3), strategy
    )
    assert len(search.visited) > 20
    start, (_, nudge) = search.visited[0][0], search.visited[-1]
    along = (nudge / nudge.norm(dim=1, keepdim=True)) @ q[:, 2]
    assert along.abs().min() > 1 - 1e-6
    torch.testing.assert_close(
        8 * nudge.norm(dim=1), strategy.reach * start.norm(dim=1), rtol=1e-3, atol=0
    )


def test_the_spectral_ascent_climbs_to_where_the_inverse_amplifies_most(monkeypatch):
    """F(x) = (x_1, exp(-c x_1) x_2) has gain exp(c x_1) along x_2, whatever x_2 is.

    It is the upper face of the cube in x_1.

    The round trip is exact but for rounding, so its error knows no such direction: only the gain
    does. A short first stage would therefore end the climb.
    """
    monkeypatch.setattr("inn_guard.audits.dequantization_attack.sign_ascent.STAGE", 1.0)

    class Funnel(Invertible):
        def forward(self, x):
            return torch.stack([x[:, 0], (-300 * x[:, 0]).exp() * x[:, 1]], 1)

        def inverse(self, z):
            return torch.stack([z[:, 0], (300 * z[:, 0]).exp() * z[:, 1]], 1)

    x = torch.tensor([[3.0, 128.0], [5.0, 200.0], [0.0, 64.0]]) / 256
    search, cubes = recorded(Funnel(), x, SpectralAscent(budget=2000, share=1.0))
    assert len(search.visited) > 20
    place = ((search.visited[-1][0] - cubes.centre) / cubes.half)[:, 0]
    assert place.min() > 0.98


def test_gradients_leave_the_parameters_as_they_were():
    model, x = couplings(), images()
    frozen = next(model.parameters()).requires_grad_(False)
    search, cubes = attacked(model, x, RandomSearch(budget=2))
    search.gradient(cubes.centre)

    def fails(z):
        raise ValueError("no")

    model.steps[0].inverse = fails
    search.gradient(cubes.centre)
    assert [p.requires_grad for p in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]
    assert all(p.grad is None for p in model.parameters())


def test_an_exact_inverse_has_no_error_to_find():
    result = dequantization_attack(Permutation.reverse(6), images(), strategy=Ascent(budget=60))
    assert result.verdict is Verdict.STABLE
    assert result.values["max_error"] == 0


# twins


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_batched_attack_is_the_loop_over_samples_and_steps(dtype):
    """Same starts; on an error that is smooth, the same points and errors, sample by sample."""
    x = images(3, 4, dtype=dtype)
    model = Bent(x + 0.01).to(dtype)
    steps, size = 25, 2e-4
    search, cubes = attacked(model, x, ProjectedGradient(steps=steps, step_size=size))
    starts = cubes.uniform(torch.Generator().manual_seed(0))
    for b in range(len(x)):
        alone = Bent(model.target[b : b + 1])
        worst, where = projected_gradient(
            alone, starts[b], cubes.lower[b], cubes.upper[b], steps=steps, step_size=size
        )
        centre = reconstruction_error(alone, cubes.centre[b])
        assert search.error[b].item() == pytest.approx(
            max(worst, centre), rel=10 * torch.finfo(dtype).eps
        )
        if worst > centre:
            torch.testing.assert_close(search.points[b], where)


def test_implicit_and_automatic_gradients_agree_where_both_are_right():
    """On a smooth map with a visibly wrong inverse, both are r - J^T J^-T r; here J is a rotation
    and a stretch.
    """

    class Shifted(Invertible):
        def forward(self, x):
            return torch.sinh(x)

        def inverse(self, z):
            return torch.asinh(z) + 0.1 * (z - z.detach()) + 0.1

    class Right(Shifted):
        def inverse(self, z):
            return torch.asinh(z + 0.1)

    x = images()
    search, cubes = attacked(Right(), x, RandomSearch(budget=2))
    by_autograd = search.gradient(cubes.centre)
    implicit = search.implicit_gradient(cubes.centre)
    torch.testing.assert_close(by_autograd.error, implicit.error)
    torch.testing.assert_close(by_autograd.to_x, implicit.to_x, rtol=1e-6, atol=1e-9)


# findings


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_pole_inside_the_cube_is_found_and_is_a_finding(name):
    x = images() * 0 + 0.5
    level = 0.5 + 0.75 / 256
    result = dequantization_attack(
        Pole(level), x, strategy=generous(name), quantization=Quantization()
    )
    assert result.verdict is Verdict.NON_FINITE
    assert result.values["non_finite_samples"] == 4
    assert result.per_sample["error"].isinf().all()
    assert result.per_sample["centre_error"].isfinite().all()


def test_broken_samples_leave_and_the_others_go_on():
    x = torch.cat([images(2) * 0 + 0.5, images(2) * 0 + 0.1])
    search, _ = attacked(Pole(0.5), x, RandomSearch(budget=40))
    assert search.error.isinf().tolist() == [True, True, False, False]
    assert search.active.tolist() == [2, 3]
    calls_after = search.spent
    assert calls_after > 30


def test_a_model_that_raises_breaks_only_the_samples_it_raises_for():
    class Picky(Bent):
        def inverse(self, z):
            if bool((z > 0.9).any()):
                raise ValueError("outside")
            return super().inverse(z)

    x = torch.cat([images(2, 3) * 0 + 0.95, images(2, 3) * 0 + 0.1])
    for strategy in (Ascent(budget=40), RandomSearch(budget=40)):
        result = dequantization_attack(Picky(x[:1] * 0), x, strategy=strategy)
        assert result.verdict is Verdict.NON_FINITE
        assert result.per_sample["error"].isinf().tolist() == [True, True, False, False]


def test_a_gradient_that_lies_is_noticed():
    """An inverse that hides its iteration from autograd, as FrEIA's i-ResNet does."""

    class Hidden(Invertible):
        def forward(self, x):
            return 3 * x

        def inverse(self, z):
            return (z / 3).detach() + (z - z.detach())

    x = images()
    assert not differentiable_inverse(AuditedModel(Hidden()), x, seconds=30)
    assert differentiable_inverse(AuditedModel(couplings()), x, seconds=30)
    result = dequantization_attack(Hidden(), x)
    assert result.settings["strategy"].startswith("GradientFree")
    assert dequantization_attack(couplings(), x).settings["strategy"].startswith("SpectralAscent")


def test_injective_maps_and_data_without_a_finite_sample():
    class Injective(Bent):
        bijective = False

    x = images()
    assert dequantization_attack(Injective(x), x).verdict is Verdict.NOT_APPLICABLE
    assert dequantization_attack(Bent(x), x * math.nan).verdict is Verdict.NON_FINITE


def test_every_strategy_finds_at_least_the_centre_and_only_valid_points():
    model, x = couplings(dtype=torch.float32), images(dtype=torch.float32)
    for strategy in STRATEGIES.values():
        search, cubes = attacked(model, x, strategy)
        assert bool(cubes.contain(search.points).all())
        centre = [reconstruction_error(model, c) for c in cubes.centre]
        for error, before, point in zip(search.error, centre, search.points, strict=True):
            assert error >= 0.5 * before
            assert reconstruction_error(model, point) == pytest.approx(error.item(), rel=0.9)


def test_the_same_seed_finds_the_same_points():
    model, x = couplings(), images()
    a, b, c = (
        dequantization_attack(model, x, strategy=Ascent(budget=60), seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(a.per_sample["error"], b.per_sample["error"])
    assert not torch.equal(a.per_sample["error"], c.per_sample["error"])


def freia():
    net = FrEIA.framework.SequenceINN(6)
    for _ in range(3):
        net.append(FrEIA.modules.AllInOneBlock, subnet_constructor=nn.Linear)
    return net


def nflows():
    return CompositeTransform(
        [
            AffineCouplingTransform(
                ((torch.arange(6) + k) % 2).int(), lambda n, m: ResidualNet(n, m, 16)
            )
            for k in range(4)
        ]
    )


@pytest.mark.parametrize(
    "make", first(1, [nflows, freia, couplings]), ids=["nflows", "FrEIA", "ours"]
)
@pytest.mark.parametrize("name", ["paper", "ascent", "spectral"])
def test_libraries(make, name):
    torch.manual_seed(0)
    model = wrap(make().float().eval())
    result = dequantization_attack(
        model, images(3, 6, dtype=torch.float32), strategy=STRATEGIES[name]
    )
    assert result.verdict is Verdict.STABLE
    assert 0 < result.values["centre_error"] <= result.values["max_error"] < 1e-2
    found, centre = result.per_sample["error"], result.per_sample["centre_error"]
    assert (found > centre).any(), "of three cubes, the centre is not the worst point of all"
    assert result.tables["attack_curve"][-1]["forward_equivalents"] <= 1000
    assert result.values["reproduced_samples"] == 3


def test_images_of_the_worst_pairs():
    x = images(3, 1, 4, 4)
    result = dequantization_attack(Bent(x), x, strategy=Ascent(budget=40))
    assert set(result.images) >= {"original", "point found", "reconstruction"}
    assert all(t.shape == (3, 1, 4, 4) for t in result.images.values())
    assert "assumed 8 bits from 0 to 1" in result.reason


def coupled(dimension, depth, gain, seed):
    """A small net whose errors are the luck of rounding: nothing leads uphill."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    torch.manual_seed(seed)
    for _ in range(depth):
        half = dimension // 2
        coupling = AffineCoupling(MLP([half, 16, 2 * half]))
        with torch.no_grad():
            for parameter in coupling.parameters():
                parameter.mul_(gain)
        order = torch.randperm(dimension, generator=generator)
        layers += [coupling, Permutation(order)]
    return Chain(*layers).float()


@pytest.mark.parametrize(
    ("strategy", "nets"),
    [
        (SpectralAscent(), [(4, 2), (8, 2)]),
        pytest.param(
            SpectralAscent(), [(4, 4), (8, 4), (16, 3), (64, 4)], marks=pytest.mark.thorough
        ),
        pytest.param(GradientFree(), [(4, 4), (8, 4), (16, 3)], marks=pytest.mark.thorough),
    ],
    ids=["few nets", "spectral", "gradient free"],
)
def test_no_weaker_than_random_search_of_equal_cost_on_small_nets(strategy, nets):
    """The geometric mean of the worst errors; half of the budget lost would cost a tenth."""
    gains = []
    for seed, (dimension, depth) in enumerate(nets):
        model = coupled(dimension, depth, 1.5, seed)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 256, (32, dimension), generator=generator).float() / 256
        errors = [
            dequantization_attack(
                model, x, quantization=Quantization(), strategy=one, samples=32
            ).per_sample["error"]
            for one in (strategy, RandomSearch(budget=strategy.budget))
        ]
        gains.append(errors[0].log().mean() - errors[1].log().mean())
    assert torch.stack(gains).mean().exp() > 0.97


def test_a_climb_that_gains_goes_on_to_the_end():
    """The error grows with the distance from one corner: a trial shows it, the rest is climbed."""
    target = torch.zeros(1, 12)
    x = torch.full((2, 12), 0.5 + 1 / 512, dtype=torch.float32)
    climbed, drawn = (
        dequantization_attack(
            Bent(target).float(), x, quantization=Quantization(), strategy=strategy
        ).per_sample["error"]
        for strategy in (SpectralAscent(), RandomSearch(budget=800))
    )
    assert bool((climbed > drawn).all())
