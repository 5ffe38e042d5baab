"""preflight: every misbehaviour is found by measuring, and none in a model that behaves."""

from __future__ import annotations

import re

import pytest
import torch
from nflows.transforms import ActNorm, CompositeTransform
from torch import Tensor, nn

from inn_guard.adapters import wrap
from inn_guard.audits.preflight import preflight
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Linear, Warp, random_chain


def data(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Base(Linear):
    def __init__(self) -> None:
        super().__init__(2 * torch.eye(6))


class Initialising(Base):
    """Sets its scale from the first batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(6))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.scale.copy_(x.detach().std(0))
            self.ready = True
        return super().forward(x) / self.scale

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z * self.scale)


class Random(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.randn_like(x)


class Coupled(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean(0)


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class InverseInPlace(Base):
    def inverse(self, z: Tensor) -> Tensor:
        return z.div_(2)


class InverseRaises(Base):
    def inverse(self, z: Tensor) -> Tensor:
        raise ArithmeticError("singular")


class InverseRandom(Base):
    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z) + 0.1 * torch.randn_like(z)


class InverseKeeps(Base):
    """Returns what the last forward call was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return super().forward(x)

    def inverse(self, z: Tensor) -> Tensor:
        return self.kept.clone()


class InverseMissing(Base):
    def inverse(self, z: Tensor) -> Tensor:
        raise NotImplementedError("not written yet")


class InverseShape(Base):
    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z)[:, :3]


class Misordered(Chain):
    def layers(self) -> tuple[Invertible, ...]:
        return tuple(reversed(super().layers()))


class Counting(Base):
    """Counts its calls in a buffer, as continuous flows count evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)

    def inverse(self, z: Tensor) -> Tensor:
        self.calls += 1
        return super().inverse(z)


class Scheduled(Counting):
    """The count matters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.calls


class RefusesLarge(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 100:
            raise ValueError("outside the domain")
        return super().forward(x)


@pytest.mark.parametrize(
    "model",
    [Base(), Warp(6), random_chain(), Base().to_dtype(torch.float32)],
    ids=lambda m: m.name,
)
def test_a_model_that_behaves_is_stable(model):
    dtype = next(model.parameters()).dtype
    result = preflight(model.eval(), data().to(dtype))
    assert result.verdict is Verdict.STABLE, result.reason
    assert "tables" not in result.reason
    assert not result.tables


def test_what_is_written_without_effect_is_remarked():
    result = preflight(Counting().eval(), data())
    assert result.verdict is Verdict.STABLE
    (remark,) = result.tables["findings"]
    assert remark["finding"] == "a forward call writes calls, which changes no result"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Initialising, r"rewrites 1 parameters or buffers \(scale\)"),
        (Scheduled, r"rewrites 1 parameters or buffers \(calls\)"),
        (Random, "forward is random"),
        (Coupled, "depends on the others in its batch"),
        (InPlace, "forward writes into its input"),
        (InverseInPlace, "inverse writes into its input"),
        (InverseRaises, "cannot be inverted.*ArithmeticError: singular"),
        (InverseRandom, "the inverse is random"),
        (InverseKeeps, "the inverse depends on the forward call before it"),
        (InverseMissing, "cannot be inverted.*NotImplementedError: not written yet"),
        (InverseShape, r"inverse of the model returns shape \(4, 3\), expected \(4, 6\)"),
        (lambda: Misordered(Linear(torch.randn(6, 6)), Warp(6)), "do not compose"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_misbehaviour_is_found(make, found):
    result = preflight(make().eval(), data())
    assert result.verdict is Verdict.UNSTABLE
    assert re.search(found, result.reason), result.reason
    assert result.advice
    assert result.tables["findings"]


def test_batch_coupling_is_found_in_a_single_sample_too():
    class Standardised(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - x.mean(0, keepdim=True) * 0.5

    assert "depends on the others" in preflight(Standardised().eval(), data(1)).reason


def test_training_mode_is_remarked_and_eval_mode_measured():
    model = wrap(layers=[Base(), (nn.BatchNorm1d(6), lambda z: z)])
    model.train()
    result = preflight(model, data())
    assert "training mode" in result.reason
    assert "rewrites" not in result.reason, "running statistics stand still in eval mode"
    assert model.training


def test_batch_norm_that_ignores_eval_mode_is_found():
    class Stubborn(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            self.training = True
            return super().forward(x)

    norm = Stubborn(6)
    result = preflight(wrap(encode=norm, decode=lambda z: z).eval(), data())
    assert result.verdict is Verdict.UNSTABLE
    assert "running_mean" in result.reason
    assert norm.num_batches_tracked == 0


def test_values_outside_the_domain_are_a_finding_and_a_wrong_shape_an_error():
    result = preflight(RefusesLarge().eval(), 1e6 * data())
    assert result.verdict is Verdict.UNSTABLE
    assert "ValueError: outside the domain" in result.reason
    with pytest.raises(ValueError, match=r"accepts, got \(5,\) per sample.*RuntimeError"):
        preflight(Base().eval(), torch.randn(4, 5))


def test_broken_parameters_are_counted():
    model = Base()
    with torch.no_grad():
        model.matrix[0, :2] = torch.nan
    result = preflight(model.eval(), data())
    assert result.verdict is Verdict.UNSTABLE
    assert "2 entries of its parameters are NaN or Inf" in result.reason


def test_mixed_parameters_are_remarked():
    model = Chain(Base(), Base().to_dtype(torch.float32))
    model.steps[1].forward = lambda x: x * 2
    model.steps[1].inverse = lambda z: z / 2
    result = preflight(model.eval(), data())
    assert "several dtypes: torch.float32, torch.float64" in result.reason


def test_layers_that_have_not_seen_a_training_batch_are_found():

    layer = ActNorm(4).eval()
    x = torch.randn(16, 4)
    fresh = preflight(wrap(CompositeTransform([layer])), x)
    assert fresh.verdict is Verdict.UNSTABLE
    assert "first batch in training mode sets 2 parameters" in fresh.reason
    assert not bool(layer.initialized)
    layer.train()(x)
    assert preflight(wrap(CompositeTransform([layer.eval()])), x).verdict is Verdict.STABLE
