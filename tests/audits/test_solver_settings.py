"""Settings of iterative inverses: named only if turning them was measured to help; no trace."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.audits.context import audited_model
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.audits.solver_settings import find_helpful_setting
from inn_guard.layers.chain import Chain
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.ode import Adaptive, FixedStep, NeuralODE, RungeKutta
from inn_guard.layers.residual import Residual
from tests.cases.toys import Linear, Warp


def data(batch: int = 8, dimension: int = 3, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, dimension, generator=generator).to(dtype)


class Newton(nn.Module):
    """z = x + x^3, inverted by bisection; the settings lie where users put them."""

    def __init__(self, **settings) -> None:
        super().__init__()
        for name, value in settings.items():
            setattr(self, name, value)

    def how_often(self) -> int:
        return self.num_iters

    def forward(self, x: Tensor) -> Tensor:
        return x + x**3

    def inverse(self, z: Tensor) -> Tensor:
        low, high = -z.abs(), z.abs()
        for _ in range(int(self.how_often())):
            middle = (low + high) / 2
            below = self.forward(middle) < z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


class ByClass(Newton):
    n_iter = 4

    def how_often(self) -> int:
        return self.n_iter


class ByTolerance(Newton):
    """Bisects until the interval is below a tolerance."""

    def how_often(self) -> int:
        width = self.options["xtol"]
        return max(1, int(torch.tensor(8.0 / width).log2().ceil()))


class ByPartial(Newton):
    def how_often(self) -> int:
        return self.count()


@dataclass(frozen=True)
class Solver:
    max_iterations: int = 4


class BySolver(Newton):
    def how_often(self) -> int:
        return self.solver.max_iterations


def constant(steps: int) -> int:
    return steps


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Newton(num_iters=4), "num_iters to "),
        (ByClass(), "n_iter to "),
        (ByTolerance(options={"xtol": 0.5}), "xtol to "),
        (ByPartial(count=functools.partial(constant, steps=4)), "steps to "),
        (BySolver(solver=Solver()), "max_iterations to "),
    ],
    ids=["attribute", "class", "dict", "partial", "dataclass"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_setting_that_helps_is_named_wherever_it_lies(model, name, dtype):
    before = copy.deepcopy(vars(model))
    result = reconstruction(ig.wrap(model), data(dtype=dtype))
    assert result.verdict == "unstable"
    assert result.settings["cause"] == "tolerance", result.reason
    assert name in result.advice
    assert "another map" not in result.reason
    after = {k: v for k, v in vars(model).items() if k not in ("count",)}
    assert after == {k: v for k, v in before.items() if k not in ("count",)}
    if isinstance(model, ByPartial):
        assert model.count.keywords == {"steps": 4}
    if isinstance(model, ByClass):
        assert ByClass.n_iter == 4


def test_following_the_advice_works():
    model = Newton(num_iters=4)
    turned = find_helpful_setting(audited_model(ig.wrap(model), data()), data(), 0.01)
    model.num_iters = int(turned.after)
    after = reconstruction(ig.wrap(model), data())
    assert after.values["relative_error"] == pytest.approx(turned.error_after)
    assert after.verdict == "stable"


class ByResidual(Newton):
    """Bisects until F(x) is as near to z as the tolerance says, which floats may never reach."""

    def inverse(self, z: Tensor) -> Tensor:
        low, high = -z.abs(), z.abs()
        x = (low + high) / 2
        while bool(((self.forward(x) - z).abs() > self.tol).any()):
            below = self.forward(x) < z
            low, high = torch.where(below, x, low), torch.where(below, high, x)
            x = (low + high) / 2
        return x


def test_a_trial_that_does_not_end_is_ended_after_a_number_of_operations():
    """Turned three times, the tolerance is below the rounding of float32 at z = 400."""
    x = torch.linspace(7, 7.5, 8).reshape(8, 1).float()
    model = audited_model(ig.wrap(ByResidual(tol=10.0)), x)
    turned = find_helpful_setting(model, x, 1e-9)
    assert (turned.name, turned.before, turned.after) == ("tol", "10", "0.001")
    assert not turned.suffices


class Unrelated(Newton):
    """A wrong inverse beside numbers that have nothing to do with it."""

    def inverse(self, z: Tensor) -> Tensor:
        return 1.1 * Newton.inverse(self, z)


class OfTheMap(Newton):
    """The number of steps is the map's own: with more of them it is another one."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.n_steps

    def inverse(self, z: Tensor) -> Tensor:
        return z / (self.n_steps + 0.5)


@pytest.mark.parametrize(
    "model",
    [
        Unrelated(num_iters=40, eps=1e-5, warmup_steps=1000),
        OfTheMap(n_steps=2),
        Linear(torch.eye(3)).float(),
    ],
    ids=["wrong", "of the map", "none"],
)
def test_nothing_is_named_that_does_not_help(model):
    wrapped = ig.wrap(model)
    assert find_helpful_setting(audited_model(wrapped, data()), data(), 0.01) is None


def test_an_iteration_that_diverges_gets_no_more_iterations():
    """Lipschitz constant 4: every further iteration makes it worse."""
    steep = Residual(Linear(4 * torch.eye(3)), solver=FixedPoint(max_iterations=5))
    result = reconstruction(Chain(steep).float(), data())
    assert result.verdict.failed
    assert result.settings["setting"] == ""
    assert "max_iterations" not in result.advice
    assert "Lipschitz" in result.advice


def test_tolerances_that_only_help_together_are_turned_together():
    """sin(3 x) with both tolerances at the same height: one alone leaves the other."""

    class Field(nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.sin(3 * x)

    ode = NeuralODE(Field(), solver=Adaptive(rtol=3e-2, atol=3e-2))
    result = reconstruction(ode, data(dtype=torch.float64))
    assert "tol" in result.settings["setting"], result.reason
    assert ode.solver == Adaptive(rtol=3e-2, atol=3e-2)


class Field(nn.Module):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(2 * x)


@pytest.mark.parametrize(
    "model",
    [
        Warp(3, iterations=8),
        NeuralODE(Field(), solver=Adaptive(rtol=1e-4, atol=1e-4)),
        NeuralODE(Field(), solver=FixedStep(4, RungeKutta.RK4)),
    ],
    ids=["fixed point", "adaptive", "fixed step"],
)
def test_an_error_far_below_the_limit_is_a_floor_and_nothing_to_turn(model):
    result = reconstruction(model.to_dtype(torch.float32), data())
    assert result.verdict == "stable", result.reason
    assert "the inverse itself is exact to" in result.reason
    assert result.settings["setting"] == ""
    assert "in place of" not in result.reason
    assert result.advice == ""


def test_a_setting_is_named_where_the_error_is_near_the_limit():
    model = NeuralODE(Field(), solver=FixedStep(120, RungeKutta.EULER)).to_dtype(torch.float32)
    result = reconstruction(model, data())
    assert result.verdict == "marginal", result.reason
    assert "steps 1920 in place of 120" in result.reason
    assert result.advice == ""


class WorseAlone(nn.Module):
    """Few samples are inverted less exactly than many, as by solvers with steps for a batch."""

    tol = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, z: Tensor) -> Tensor:
        return z + (max(40 * self.tol, 1.0) if len(z) <= 8 else 0.5)


def test_a_setting_that_helps_the_worst_samples_alone_only_is_not_named():
    result = reconstruction(ig.wrap(WorseAlone()), data(64))
    alone = find_helpful_setting(audited_model(ig.wrap(WorseAlone()), data()), data(), 0.01)
    assert alone is not None
    assert alone.error_after * 2 <= alone.error_before
    assert alone.error_after > result.values["relative_error"]
    assert result.settings["setting"] == ""
    assert "in place of" not in result.reason
    assert "tol" not in result.advice


def test_a_cnf_of_zuko_names_its_tolerances():
    flows = pytest.importorskip("zuko").flows
    torch.manual_seed(0)
    flow = flows.CNF(3, hidden_features=(16,), atol=1e-3, rtol=1e-3).float()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(3)
    result = reconstruction(ig.wrap(flow), data())
    assert "tol" in result.settings["setting"], result.reason
    # what was turned was a copy's
    tolerances = [module.atol for module in flow.modules() if hasattr(module, "atol")]
    assert tolerances == [1e-3]


def test_residual_flows_of_normflows_have_nothing_to_turn():
    normflows = pytest.importorskip("normflows")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net = normflows.nets.LipschitzMLP([3, 16, 3], init_zeros=False, lipschitz_const=0.9)
    flow = normflows.NormalizingFlow(
        normflows.distributions.DiagGaussian(3), [normflows.flows.Residual(net)]
    ).float()
    result = reconstruction(ig.wrap(flow), data())
    assert result.verdict.passed, result.reason
    assert result.settings["setting"] == ""
