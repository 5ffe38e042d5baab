"""Calls that raise in the middle: the model is clean afterwards, and our own faults are not its."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import AutogradJacobian
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP


class NoSecondDerivative(torch.autograd.Function):
    """The identity, whose products J v cannot be had from reverse mode."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class Caching(Invertible):
    """A coupling whose inverse samples with a cache, as TarFlow's does.

    While it does, forward means another thing; the inverse raises in forward mode and where a
    latent is large, and leaves its flag and cache behind.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = AffineCoupling(MLP([2, 8, 4]))
        self.sampling = False
        self.cache: list[Tensor] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + len(self.cache) + self.calls

    def inverse(self, z: Tensor) -> Tensor:
        self.sampling = True
        self.cache.append(z)
        self.calls += 1
        if torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError("this operation has no forward AD")
        if bool((z.abs() > 3).any()):
            raise RuntimeError("a latent is out of range")
        x = NoSecondDerivative.apply(self.inner.inverse(z))
        self.sampling = False
        self.cache.clear()
        self.calls -= 1
        return x

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.inner.forward_and_log_det(x)[1]

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.inverse(z), self.inner.inverse_and_log_det(z)[1]


def test_what_a_broken_call_leaves_behind_does_not_spoil_the_rest_of_a_check():
    model = Caching()
    x = 0.3 * torch.randn(32, 4)
    checks = ["jacobian_spectrum", "out_of_distribution", "precision", "sampling"]
    report = ig.audit(model, x, checks=checks, uses=["density", "reconstruction"])
    for result in report:
        assert "not finite" not in result.reason, report.details()
    assert report["jacobian_spectrum"].verdict == "stable", report.details()
    assert report["precision"].verdict == "stable", report.details()
    assert report["sampling"]["rate"] < 0.05
    assert (model.sampling, model.cache, model.calls.item()) == (False, [], 0)


class Fast(AffineCoupling):
    """A coupling with Jacobian products of its own, which are broken in one way."""

    broken = ""

    def linearize(self, x: Tensor) -> AutogradJacobian:
        if self.broken == "linearize":
            raise IndexError("Dimension out of range")
        jacobian = AutogradJacobian(self.forward, self.inverse, x)
        return _Products(jacobian, self.broken)


class _Products:
    def __init__(self, jacobian: AutogradJacobian, broken: str) -> None:
        self.output, self._inner, self._broken = jacobian.output, jacobian, broken

    def _call(self, name: str, vector: Tensor) -> Tensor:
        if name == self._broken:
            raise IndexError("Dimension out of range")
        return getattr(self._inner, name)(vector)

    def jvp(self, v: Tensor) -> Tensor:
        return self._call("jvp", v)

    def vjp(self, u: Tensor) -> Tensor:
        return self._call("vjp", u)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        return self._call("inverse_jvp", u)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        return self._call("inverse_vjp", v)

    def multiply(self, matrix: Tensor) -> Tensor:
        raise IndexError("Dimension out of range")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "broken", ["linearize", "jvp", "vjp", "inverse_jvp", "inverse_vjp", "multiply"]
)
def test_products_of_our_own_that_raise_are_replaced_by_autograd(broken):
    torch.manual_seed(0)
    layers = [Fast(MLP([2, 8, 4])) for _ in range(2)]
    plain = [AffineCoupling(layer.network) for layer in layers]
    for layer in layers:
        layer.broken = broken
    x = torch.randn(8, 4, dtype=torch.float64)
    checks = ["jacobian_spectrum", "layer_blame", "full_spectrum"]
    found, expected = (
        ig.audit(Chain(*parts).double(), x, checks=checks) for parts in (layers, plain)
    )
    for name in checks:
        assert found[name].verdict == expected[name].verdict, found[name].reason
        assert "IndexError" not in found[name].reason
    condition = expected["jacobian_spectrum"]["condition_number"]
    assert found["jacobian_spectrum"]["condition_number"] == pytest.approx(condition, rel=1e-2)


def test_a_model_that_raises_is_still_a_finding():
    class Raising(nn.Module):
        def encode(self, x: Tensor) -> Tensor:
            return 2 * x

        def decode(self, z: Tensor) -> Tensor:
            raise IndexError("of the model")

    model = Raising()
    flow = ig.wrap(encode=model.encode, decode=model.decode)
    result = ig.audit(flow, torch.randn(8, 4), checks=["reconstruction"])["reconstruction"]
    assert result.verdict == "unstable"
    assert "IndexError: of the model" in result.reason


def test_under_a_default_device_without_numbers():
    torch.manual_seed(0)
    model, x = Chain(AffineCoupling(MLP([2, 8, 4]))), torch.randn(16, 4)
    plain = ig.audit(model, x, level="quick")
    with torch.device("meta"):
        report = ig.audit(model, x, level="quick")
        assert torch.zeros(1).is_meta
    assert report.verdict == plain.verdict
    assert report["reconstruction"].values == plain["reconstruction"].values


def test_no_thread_stays():
    before = set(threading.enumerate())
    torch.manual_seed(0)
    ig.audit(Chain(AffineCoupling(MLP([2, 8, 4]))), torch.randn(8, 4), level="quick", progress=True)
    assert set(threading.enumerate()) == before


class NoBackward(torch.autograd.Function):
    """2 x, whose backward pass raises."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("no backward pass here")


@pytest.mark.parametrize("check", ["log_det", "jacobian_spectrum", "layer_blame"])
def test_a_backward_pass_that_raises_is_no_derivative(check):
    class Doubled(Invertible):
        def forward_and_log_det(self, x):
            return NoBackward.apply(x), x.new_full((len(x),), 4 * torch.log(torch.tensor(2.0)))

        def forward(self, x):
            return self.forward_and_log_det(x)[0]

        def inverse(self, z):
            return z / 2

    report = ig.audit(Doubled(), torch.randn(8, 4), checks=[check], progress=False)
    # a log-determinant that nothing can be compared with is not called right
    expected = "undecided" if check == "log_det" else "not_applicable"
    assert report[check].verdict == expected
    if report[check].verdict == "not_applicable":
        assert "its backward pass raises KeyError" in report[check].reason


SEEN: list[bool] = []  #: outside of the model, whose own lists are restored


class Watched(Chain):
    """Notes under which autocast it is called."""

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(torch.is_autocast_enabled("cpu"))
        return super().forward(x)


def test_no_pass_runs_under_the_autocast_of_the_caller():
    """Weights that it casts without a graph would stay in its cache: a step would not move them."""
    model = Watched(AffineCoupling(MLP([2, 8, 4])))
    SEEN.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ig.audit(model, torch.randn(16, 4), checks=["preflight", "log_det"])
        assert torch.is_autocast_enabled("cpu")
    assert SEEN
    assert not any(SEEN)
