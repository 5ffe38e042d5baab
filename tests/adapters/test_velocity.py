"""Continuous flows by their velocity, against flows known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import inn_guard as ig
from inn_guard.adapters import velocity as velocities
from inn_guard.layers.ode import Adaptive, FixedStep, HutchinsonTrace, RungeKutta

SIZE = 3


class Affine(nn.Module):
    """dx/dt = A x + t b, whatever the arguments are called."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(0.7 * torch.randn(SIZE, SIZE))

    def at(self, t, x):
        return x @ self.A.T + t


class TimeFirst(Affine):
    def forward(self, t, x, args=None):
        return self.at(t, x)


class TimeLast(Affine):
    def forward(self, x, timesteps):
        return self.at(timesteps[:, None], x)


class TimeAsFeature(Affine):
    def forward(self, v):
        return self.at(v[:, -1:], v[:, :-1])


def exact(A, x, start, end):
    """The solution at ``end``: of the linear equation in (x, t, 1)."""
    whole = torch.zeros(SIZE + 2, SIZE + 2)
    whole[:SIZE, :SIZE], whole[:SIZE, SIZE], whole[SIZE, SIZE + 1] = A, 1.0, 1.0
    state = torch.cat([x, torch.full((len(x), 1), start), torch.ones(len(x), 1)], 1)
    return (state @ torch.linalg.matrix_exp((end - start) * whole).T)[:, :SIZE]


@pytest.mark.parametrize("kind", [TimeFirst, TimeLast, TimeAsFeature])
@pytest.mark.parametrize("times", [(1.0, 0.0), (0.0, 1.0), (0.2, 0.8)])
def test_the_flow_runs_from_the_time_of_the_data_to_that_of_the_latents(kind, times):
    field, x = kind(), torch.randn(5, SIZE)
    model = ig.wrap(velocity=field, solver=FixedStep(40), times=times)
    z, log_det = model.forward_and_log_det(x)
    torch.testing.assert_close(z, exact(field.A.detach(), x, *times), rtol=1e-6, atol=1e-6)
    expected = (times[1] - times[0]) * field.A.trace()
    torch.testing.assert_close(log_det, expected.expand(5), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.inverse(z), x, rtol=1e-6, atol=1e-6)
    assert {id(p) for p in model.parameters()} == {id(field.A)}
    assert model.name == kind.__name__
    assert model.to_dtype(torch.float32)(x.float()).dtype == torch.float32


def test_a_velocity_may_not_depend_on_the_time():
    net, x = nn.Linear(SIZE, SIZE, bias=False), torch.randn(5, SIZE)
    z = ig.wrap(velocity=net, solver=FixedStep(40), times=(0.0, 1.0))(x)
    expected = x @ torch.linalg.matrix_exp(net.weight.detach()).T
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


class NeuralODE(nn.Module):
    """As in torchdyn: holds a velocity, returns the times and the path."""

    def __init__(self):
        super().__init__()
        self.vf = TimeFirst()

    def forward(self, x, t_span=None):
        return torch.linspace(0, 1, 2), x[None]


def test_what_holds_a_velocity_is_refused_and_the_advice_works():
    node, x = NeuralODE(), torch.randn(5, SIZE)
    with pytest.raises(TypeError, match=r"wrap\(velocity=model\.vf, solver=\.\.\.\)"):
        ig.audit(node, x)
    with pytest.raises(TypeError, match=r"wrap\(velocity=model\.vf, solver=\.\.\.\)"):
        ig.wrap(node)
    with pytest.raises(TypeError, match=r"Pass velocity=model\.vf"):
        ig.wrap(velocity=node)(x)
    with pytest.raises(
        TypeError, match=r"looks like a velocity; call wrap\(velocity=model, solver"
    ):
        ig.audit(node.vf, x)
    assert ig.wrap(velocity=node.vf)(x).shape == x.shape


def test_functions_and_contexts_are_velocities_too():
    field, x, c = TimeFirst(), torch.randn(4, SIZE), torch.randn(4, SIZE)
    model = ig.wrap(velocity=lambda t, x, c: field(t, x) * c, context=c, solver=FixedStep(20))
    assert {id(p) for p in model.parameters()} == {id(field.A)}
    rows = torch.tensor([2])
    torch.testing.assert_close(model.select(rows)(x[2:3]), model(x)[2:3])


def test_adaptive_solvers_at_usual_tolerances_are_sound():
    net = nn.Sequential(nn.Linear(3, 16), nn.SELU(), nn.Linear(16, 2)).float()
    report = ig.audit(ig.wrap(velocity=net), torch.randn(16, 2).float(), level="quick")
    assert report.verdict.passed
    assert "by Adaptive(rtol=1e-05" in " ".join(str(report).split())


class Steep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, t, x):
        return -self.rate * x


def test_coarse_steps_fail_and_the_advised_steps_were_measured_to_suffice():
    x, field = torch.randn(32, 2), Steep()
    coarse = ig.wrap(velocity=field, solver=FixedStep(4, RungeKutta.EULER))
    report = ig.audit(coarse, x, checks=["reconstruction"])
    assert report.verdict == "unstable"
    # a step forward and one back multiply by 1 - h^2: the error of n steps of 1 / n is 1 / n
    assert report["reconstruction"].advice.startswith("Set steps to 256 in place of 4:")
    finer = ig.wrap(velocity=field, solver=FixedStep(256, RungeKutta.EULER))
    assert ig.audit(finer, x, checks=["reconstruction"]).verdict.passed
    assert math.isclose(report["reconstruction"].values["relative_error"], 1 - (15 / 16) ** 4)


def test_a_wrong_inverse_is_not_put_down_to_steps():
    class Irreversible(Steep):
        def forward(self, t, x):
            return torch.randn_like(x)

    model = ig.wrap(velocity=Irreversible(), solver=FixedStep(4))
    report = ig.audit(model, torch.randn(8, 2), checks=["reconstruction"])
    assert "steps" not in report["reconstruction"].advice


def test_a_random_trace_leaves_the_density_undecided(monkeypatch):
    monkeypatch.setattr(velocities, "EXACT_UP_TO", 2)
    field, x = TimeFirst(), torch.randn(16, SIZE)
    model = ig.wrap(velocity=field, solver=FixedStep(2))
    report = ig.audit(model, x, checks=["density"])
    assert report["density"].verdict == "undecided"
    fixed = ig.wrap(velocity=field, solver=FixedStep(2), trace=HutchinsonTrace(probes=2))
    assert "an estimate, HutchinsonTrace(probes=2, seed=0)" in fixed.convention


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"velocity": 3.0}, "expected velocity as a function"),
        ({"velocity": Steep(), "solver": "euler"}, r"FixedStep\(100, RungeKutta.EULER\)"),
        ({"velocity": Steep(), "solver": Adaptive}, "expected solver as a method with its steps"),
        ({"velocity": Steep(), "times": (1, 1)}, r"\(0.0, 1.0\) for FFJORD"),
        ({"velocity": Steep(), "encode": abs}, "velocity and its solver alone, got encode"),
        ({"encode": abs, "decode": abs, "solver": "dopri5"}, "velocity and its solver alone"),
    ],
)
def test_what_does_not_describe_a_flow_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        ig.wrap(**arguments)


def test_a_velocity_of_another_shape_is_refused_with_what_was_tried():
    model = ig.wrap(velocity=lambda t, x: x[:, :1])
    with pytest.raises(TypeError, match=r"dx/dt of shape \(4, 3\); tried velocity\(t, x\), scalar"):
        model(torch.randn(4, SIZE))
    assert ig.wrap(velocity=Steep(), solver="dopri8")(torch.ones(1, 2)).shape == (1, 2)
