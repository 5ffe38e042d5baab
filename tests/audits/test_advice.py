"""Every advice: a model that fails, the advice followed, and the verdict of the use afterwards."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.audits import advice, log_det
from inn_guard.layers.chain import Chain
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.ode import ExactTrace, FixedStep, HutchinsonTrace, RungeKutta
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import ExactLogDet
from inn_guard.report.audit_report import AuditReport
from tests.cases.toys import Linear


def data(batch: int = 64, dimension: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, dimension, generator=generator, dtype=torch.float64)


def begins(report: AuditReport, text: str) -> bool:
    """Whether the report gives this advice, up to the first place that is filled in."""
    start = text.partition("{")[0]
    return any(given.startswith(start) for given in report.advice)


def rotated(condition: float) -> Linear:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
        for _ in range(2)
    )
    return Linear(left @ torch.diag(torch.logspace(0, -math.log10(condition), 6)) @ right)


def test_sound_models_get_no_advice():
    assert ig.audit(rotated(2.0), data(), level="quick").advice == ()


class Coupling(ig.Invertible):
    """z_b = x_b exp(s(x_a)), s = ``gain`` x_a, or tanh of it if bounded."""

    def __init__(self, gain: float, *, bounded: bool = False, swap: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), gain))
        self.bounded = bounded
        self.swap = swap

    def scale(self, kept: Tensor) -> Tensor:
        s = self.gain * kept
        return torch.tanh(s) if self.bounded else s

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._changed(x, 1.0)

    def inverse(self, z: Tensor) -> Tensor:
        return self.inverse_and_log_det(z)[0]

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._changed(z, -1.0)

    def _changed(self, t: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        kept, rest = t.chunk(2, dim=1)
        if self.swap:
            kept, rest = rest, kept
        s = sign * self.scale(kept)
        parts = [kept, rest * s.exp()]
        if self.swap:
            parts.reverse()
        return torch.cat(parts, dim=1), s.sum(1)


def exponential(gain: float, *, bounded: bool = False, layers: int = 6) -> Chain:
    return Chain(*(Coupling(gain, bounded=bounded, swap=bool(k % 2)) for k in range(layers)))


SAMPLING = {"uses": ["sampling"], "level": "quick"}


def test_bounding_the_scales_saves_draws():
    x = 0.3 * data().float()
    failing = ig.audit(exponential(0.4).to_dtype(torch.float32), x, **SAMPLING)
    assert failing.verdict.failed
    assert begins(failing, advice.BOUND_SAMPLING)
    bounded = exponential(0.4, bounded=True).to_dtype(torch.float32)
    assert ig.audit(bounded, x, **SAMPLING).verdict.passed


@pytest.mark.thorough  # its fast counterpart is in tests/repair
def test_a_hundred_steps_of_fine_tuning_save_draws():
    torch.set_default_dtype(torch.float32)
    model, x = exponential(0.4).to_dtype(torch.float32), 0.3 * data().float()
    failing = ig.audit(model, x, **SAMPLING)
    assert failing.verdict.failed
    assert begins(failing, advice.REPAIR_SAMPLING)
    assert advice.BY_LIKELIHOOD in "".join(failing.advice)
    steady = ig.stabilize(model, [x], uses=["sampling"], steps=100, learning_rate=5e-3)
    assert ig.audit(steady.model, x, **SAMPLING).verdict.passed


class WithoutGradients(Chain):
    """The same map, whose directions of these names run under no_grad."""

    directions: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled("forward" not in self.directions):
            return super().forward_and_log_det(x)

    def inverse(self, z: Tensor) -> Tensor:
        with torch.set_grad_enabled("inverse" not in self.directions):
            return super().inverse(z)


class Squeezed(ig.Invertible):
    """z = x e^s + 1, which loses x in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((6,), -14.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp() + 1.0

    def inverse(self, z: Tensor) -> Tensor:
        return (z - 1.0) / self.log_scale.exp()

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.log_scale.sum().expand(len(x))


@pytest.mark.parametrize(
    ("directions", "use", "says"),
    [
        (("inverse",), "sampling", "through its inverse ("),
        (("forward", "inverse"), "sampling", "through its forward and inverse ("),
        (("forward",), "reconstruction", "through its forward ("),
        (("inverse",), "reconstruction", ""),
    ],
)
def test_what_gives_no_gradient_is_not_fine_tuned_as_it_is(directions, use, says):
    torch.set_default_dtype(torch.float32)
    layers = exponential(0.4).steps if use == "sampling" else [Squeezed()]
    model = WithoutGradients(*layers).to_dtype(torch.float32)
    model.directions = directions
    x = 0.3 * data().float()
    report = ig.audit(model, x, uses=[use], level="quick")
    assert report.verdict.failed
    fine_tuned = advice.REPAIR_SAMPLING if use == "sampling" else advice.PENALISE_INVERSE
    assert begins(report, advice.NO_GRADIENT) is bool(says)
    assert begins(report, fine_tuned) is not bool(says)
    assert says in "".join(report.advice)
    if use == "sampling":
        steady = ig.stabilize(model, [x], uses=[use], steps=2)
        assert "let gradients through" in steady.reason
        assert steady.steps == 0
        assert "Train longer" not in "".join(steady.advice)
    model.directions = ()  # as the advice says
    assert ig.stabilize(model, [x], uses=[use], steps=2, every=2).steps > 0


def test_frozen_models_are_told_to_be_unfrozen_before_they_are_fine_tuned():
    model = exponential(0.4).to_dtype(torch.float32).requires_grad_(False)
    report = ig.audit(model, 0.3 * data().float(), **SAMPLING)
    (text,) = (text for text in report.advice if "ig.stabilize" in text)
    assert "flow.requires_grad_(True)\nflow = ig.stabilize" in text


def test_float64_saves_draws_that_rounding_loses():
    model = rotated(1e7)
    x = model.inverse(data()).detach()
    failing = ig.audit(model.to_dtype(torch.float32), x.float(), **SAMPLING)
    assert failing.verdict.failed
    assert begins(failing, advice.SAMPLING_FLOAT64)
    assert not begins(failing, advice.BOUND_SAMPLING)
    saved = ig.raise_precision(model.to_dtype(torch.float32), x.float(), uses=["sampling"])
    assert saved.summary.passed
    assert ig.audit(saved, x, **SAMPLING).verdict.passed


def test_float64_saves_round_trips_that_rounding_loses():
    model, settings = rotated(1e7), {"uses": ["reconstruction"], "level": "quick"}
    failing = ig.audit(model.to_dtype(torch.float32), data().float(), **settings)
    assert failing.verdict.failed
    assert begins(failing, advice.RECONSTRUCTION_FLOAT64)
    saved = ig.raise_precision(
        model.to_dtype(torch.float32), data().float(), uses=["reconstruction"]
    )
    assert saved.summary.passed
    assert ig.audit(saved, data(), **settings).verdict.passed


def test_float64_saves_densities():
    class Lossy(Linear):
        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward_and_log_det(x)
            return z, (log_det + x.sum(1) * 0 + z.square().sum(1) + 1e8) - 1e8 - z.square().sum(1)

    settings = {"uses": ["density"], "checks": ["density"]}
    model = Lossy(torch.eye(6))
    failing = ig.audit(model.to_dtype(torch.float32), data().float(), **settings)
    assert failing.verdict.failed
    assert begins(failing, advice.DENSITY_FLOAT64)
    saved = ig.raise_precision(model.to_dtype(torch.float32), data().float(), uses=["density"])
    assert saved.summary.passed
    assert ig.audit(saved, data(), **settings).verdict.passed


def test_a_formula_derived_again():
    class Claims(Linear):
        sign = -1.0

        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward_and_log_det(x)
            return z, self.sign * log_det

    model, settings = Claims(2 * torch.eye(6)), {"uses": ["density"], "level": "quick"}
    failing = ig.audit(model, data(), **settings)
    assert failing.verdict.failed
    assert begins(failing, log_det.DERIVE)
    model.sign = 1.0
    assert ig.audit(model, data(), **settings).verdict.passed


def test_standardised_data():
    """A fixed shift of 1e7 costs float32 nothing of data of that size, and all of those near 0."""

    class Centred(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z - 1.0)

    settings = {"uses": ["reconstruction"], "level": "quick"}
    x = 1e-8 * data().float()
    model = Centred(torch.eye(6)).to_dtype(torch.float32)
    failing = ig.audit(model, x, **settings)
    assert failing.verdict.failed
    assert begins(failing, advice.STANDARDISE)
    assert ig.audit(model, (x - x.mean(0)) / x.std(0), **settings).verdict.passed


def test_initialised_layers():
    transforms = pytest.importorskip("nflows.transforms")
    flows = pytest.importorskip("nflows.flows")
    distributions = pytest.importorskip("nflows.distributions")
    flow = flows.Flow(transforms.ActNorm(6), distributions.StandardNormal([6])).double().eval()
    x = data()
    fresh = ig.audit(flow, x, level="quick")
    assert begins(fresh, advice.INITIALISE)
    flow.train()
    ig.wrap(flow)(x)
    flow.eval()
    assert ig.audit(flow, x, level="quick").advice == ()


def residual(iterations: int) -> Chain:
    block = nn.Sequential(Linear(0.8 * torch.eye(6)), nn.Tanh())
    solver = FixedPoint(max_iterations=iterations)
    return Chain(Linear(torch.eye(6)), Residual(block, log_det=ExactLogDet(), solver=solver))


def test_more_iterations_where_the_error_falls_with_them():
    settings = {"uses": ["reconstruction"], "level": "quick"}
    failing = ig.audit(residual(2), data(), **settings)
    assert failing.verdict.failed
    (more,) = re.findall(r"Set max_iterations to (\d+) in place of 2:", failing.advice[0])
    after = ig.audit(residual(int(more)), data(), **settings)
    assert after.uses["reconstruction"].figure < 0.1 * failing.uses["reconstruction"].figure
    assert ig.audit(residual(200), data(), **settings).verdict.passed


def test_no_more_iterations_where_the_error_grows_with_them():
    steep = Residual(Linear(4 * torch.eye(6)), solver=FixedPoint(max_iterations=5))
    failing = ig.audit(Chain(steep), data(), uses=["reconstruction"], level="quick")
    assert begins(failing, advice.ITERATIONS)


def test_an_inverse_of_another_map():
    class Wrong(Linear):
        factor = 1.1

        def inverse(self, z: Tensor) -> Tensor:
            return self.factor * super().inverse(z)

    model, settings = Wrong(torch.eye(6)), {"uses": ["reconstruction"], "level": "quick"}
    failing = ig.audit(model, data(), **settings)
    assert begins(failing, advice.WRONG_INVERSE)
    model.factor = 1.0
    assert ig.audit(model, data(), **settings).verdict.passed


def test_a_penalty_of_the_inverse_saves_round_trips():
    """A scale that training may change, so small that float64 loses the inverse, too."""
    torch.set_default_dtype(torch.float32)

    class Shrinks(ig.Invertible):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.full((6,), -6.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.log_scale.exp() + 1e15

        def inverse(self, z: Tensor) -> Tensor:
            return (z - 1e15) / self.log_scale.exp()

    class Mild(Shrinks):
        """The same with a shift that float32 resolves to 1e-4."""

        def forward(self, x: Tensor) -> Tensor:
            return x * self.log_scale.exp() + 1e3

        def inverse(self, z: Tensor) -> Tensor:
            return (z - 1e3) / self.log_scale.exp()

    settings = {"uses": ["reconstruction"], "level": "quick"}
    x = data().float()
    assert begins(ig.audit(Chain(Shrinks()), x, **settings), advice.PENALISE_INVERSE)
    model = Chain(Mild())
    before = ig.audit(model, x, **settings)
    assert before.verdict.failed
    assert begins(before, advice.PENALISE_INVERSE)
    steady = ig.stabilize(
        model,
        [x],
        loss=lambda flow, batch: 0.0 * flow(batch).sum(),
        uses=["reconstruction"],
        steps=200,
        every=50,
        learning_rate=0.2,
    )
    assert ig.audit(steady.model, x, **settings).verdict.passed


class Shrink(ig.Invertible):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + 1

    def inverse(self, z: Tensor) -> Tensor:
        return (z - 1) / self.factor


def test_a_guard_makes_gradients_right():
    model = ig.wrap(layers=[Shrink(0.5), Shrink(1e-9), Shrink(1e9)])
    x = data().float()
    report = ig.audit(model, x, uses=["gradients"], level="quick")
    assert report.verdict.failed
    assert begins(report, advice.STORED)

    def gradient(of) -> Tensor:
        found = torch.autograd.grad(of(x).square().mean(), list(model.parameters()))
        return torch.stack(found)

    true = gradient(model)
    assert (gradient(ig.memory_saving(model)) - true).norm() > 1e-2 * true.norm()
    guarded = gradient(ig.memory_saving(model, guard=1e-3))
    assert (guarded - true).norm() < 1e-3 * true.norm()


def test_densities_that_hold_are_said_and_nothing_is_said_twice():
    class OneWay(Linear):
        def inverse(self, z: Tensor) -> Tensor:
            return z * math.nan

    report = ig.audit(OneWay(torch.eye(6)), data(), level="quick")
    assert begins(report, advice.DENSITY_HOLDS)
    assert len(set(report.advice)) == len(report.advice)
    assert ig.audit(OneWay(torch.eye(6)), data(), uses=["density"], level="quick").verdict.passed


def test_what_could_not_be_measured_gets_the_advice_of_its_check():
    report = ig.audit(rotated(2.0), data() * math.nan, level="quick")
    assert report.advice == ("Remove NaN and Inf from the data, then audit again.",)


def test_every_advice_has_its_test():
    text = Path(__file__).read_text(encoding="utf-8")
    names = [
        name
        for name in vars(advice)
        if name.isupper() and name not in ("UNUSUAL_SCALE", "ROWS", "GIVES", "USES")
    ]
    assert [name for name in names if f"advice.{name}" not in text] == []


def test_what_cannot_be_trained_is_replaced():
    rounding = ig.wrap(encode=torch.round, decode=lambda z: z)
    report = ig.audit(rounding, data(), uses=["reconstruction"], level="quick")
    assert begins(report, advice.REPLACE)
    assert not begins(report, advice.PENALISE_INVERSE)
    fixed = ig.wrap(encode=lambda x: 2 * x, decode=lambda z: z / 2)
    assert ig.audit(fixed, data(), uses=["reconstruction"], level="quick").verdict == "stable"


def test_log_determinants_of_the_exact_flow_need_small_steps():
    growth = nn.Linear(2, 2, bias=False).double()
    growth.weight.data.copy_(4 * torch.eye(2))
    coarse = ig.wrap(velocity=lambda t, x: growth(x), solver=FixedStep(3, RungeKutta.EULER))
    report = ig.audit(coarse, torch.randn(8, 2), checks=["log_det"])
    assert report.advice == (log_det.SMALLER_STEPS,)
    fine = ig.wrap(velocity=lambda t, x: growth(x), solver=FixedStep(100))
    assert ig.audit(fine, torch.randn(8, 2), checks=["log_det"]).verdict.passed


@pytest.mark.parametrize(
    ("seed", "verdict", "text"),
    [(None, "undecided", advice.RANDOM_DENSITY), (0, "unstable", log_det.EXACT_TRACE)],
    ids=["drawn at every call", "drawn once"],
)
def test_estimated_traces_are_exact_where_log_p_is_evaluated(seed, verdict, text):
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, settings = data(16, 3), {"uses": ["density"], "checks": ["density", "log_det"]}

    def report(trace) -> AuditReport:
        return ig.audit(ig.wrap(velocity=net, solver=FixedStep(4), trace=trace), x, **settings)

    estimated = report(HutchinsonTrace(seed=seed))
    assert estimated.uses["density"].verdict == verdict
    assert estimated.advice == (text,)
    assert report(ExactTrace()).verdict.passed


def test_a_random_map_is_not_told_to_take_the_exact_trace():
    noisy = ig.wrap(
        encode=lambda x: (x + 0.1 * torch.randn(x.shape).to(x), x.new_zeros(len(x))),
        decode=lambda z: z,
    )
    report = ig.audit(noisy, data(16), uses=["density"], level="quick")
    assert advice.RANDOM_DENSITY not in report.advice
