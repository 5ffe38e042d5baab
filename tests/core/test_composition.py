"""Layers held against their map: values, inverse, log-determinant; nothing accused by rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.core.composition import Composition, compare_inverses, compare_layers
from inn_guard.core.invertible import NotApplicable
from inn_guard.execution.state import preserve_state
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.memory_saving import memory_saving
from tests.cases.toys import Linear, random_chain
from tests.memory_saving import nets


def data(batch: int = 8, dimension: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, dimension, generator=generator, dtype=torch.float64)


class Stack(Chain):
    """A chain that lists its layers although a subclass computes something else."""

    def layers(self):
        return tuple(self.steps)


class OtherForward(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class OtherInverse(Stack):
    def inverse(self, z: Tensor) -> Tensor:
        return 1.01 * super().inverse(z)


class OtherLogDet(Stack):
    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward_and_log_det(x)
        return z, log_det + 0.5


class OtherInverseLogDet(Stack):
    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_and_log_det(z)
        return x, log_det + 0.5


class RaisesHalfway(Stack):
    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.steps[0].cache = x
        raise ArithmeticError("halfway")


def layers() -> list:
    torch.manual_seed(0)
    first, last = Diagonal(6), Diagonal(6)
    with torch.no_grad():
        first.log_scale.normal_()
        last.log_scale.normal_()
    return [first.double(), last.double()]


def compared(model, t: Tensor = None, *, backwards: bool = False) -> Composition:
    compare = compare_inverses if backwards else compare_layers
    with preserve_state(model) as restore:
        return compare(model, data() if t is None else t, restore=restore)


def test_layers_that_are_the_map_differ_in_nothing():
    assert compared(Stack(*layers())) == Composition()
    assert compared(Stack(*layers()), backwards=True) == Composition()
    assert compared(Linear(torch.eye(6).double())) == Composition()  # none


@pytest.mark.parametrize(
    ("kind", "what", "backwards"),
    [
        (OtherForward, "forward", False),
        (OtherInverse, "inverse", False),
        (OtherInverse, "inverse", True),
        (OtherLogDet, "log_det", False),
        (OtherInverseLogDet, "log_det", True),
    ],
)
def test_what_differs_is_named_and_nothing_else(kind, what, backwards):
    found = compared(kind(*layers()), backwards=backwards)
    named = {name for name in ("forward", "inverse", "log_det") if getattr(found, name)}
    # the log-determinant along another map is not looked at for its own sake
    assert named == {what}
    assert bool(found.other_map) == (what != "log_det")


def test_what_raises_is_no_difference_and_leaves_no_trace():
    model = RaisesHalfway(*layers())
    assert compared(model) == Composition()
    assert not hasattr(model.steps[0], "cache")


def test_small_features_are_compared_in_their_own_units():
    class Small(Stack):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return torch.cat([z[:, :5], 2 * z[:, 5:]], dim=1)

    units = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e6, 1e-9], dtype=torch.float64)
    assert compared(Small(*layers()), data() * units).forward


class Reordered(Stack):
    """The same chain, its matrices multiplied into one before they meet the data."""

    def _matrix(self) -> Tensor:
        product = torch.eye(6, dtype=self.steps[0].matrix.dtype)
        for step in self.steps:
            product = step.matrix @ product
        return product

    def forward(self, x: Tensor) -> Tensor:
        return x @ self._matrix().T

    def inverse(self, z: Tensor) -> Tensor:
        return torch.linalg.solve(self._matrix(), z.T).T


@pytest.mark.parametrize("decades", [0, 2, 3, 4])
def test_another_order_of_the_same_sums_is_the_same_map(decades):
    """Rounding that a condition number amplifies is not taken for another map."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(2):
        left, right = (torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q for _ in range(2))
        steps.append(Linear(left @ torch.diag(torch.logspace(0, -decades, 6)) @ right))
    assert compared(Reordered(*steps), data().float()) == Composition()


def test_random_log_determinants_are_no_difference():
    class Noisy(Stack):
        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward_and_log_det(x)
            return z, log_det + torch.randn(len(x))

    assert compared(Noisy(*layers())) == Composition()


# who uses it


def test_an_audit_takes_another_inverse_for_the_models_own():
    report = ig.audit(OtherInverse(*layers()), data(), level="quick")
    assert "the inverses of its layers do not compose" in report["preflight"].reason
    assert report.uses["reconstruction"].verdict == "unstable"
    assert report.uses["density"].verdict == "stable"
    assert report.uses["gradients"].verdict == "not_applicable"


def test_a_wrong_log_det_is_blamed_on_the_log_det_alone():
    report = ig.audit(OtherLogDet(*layers()), data(), level="quick")
    assert report.uses["density"].verdict == "unstable"
    assert "every layer's own is right, their sum is not" in report["log_det"].reason
    assert report.uses["gradients"].verdict == "stable", report["gradient_angle"].reason
    assert "add up to another number" in report["gradient_angle"].reason
    assert report["preflight"].verdict == "stable"


def test_memory_saving_refuses_only_what_its_layers_do_not_compute():
    x = data().requires_grad_()
    with pytest.raises(NotApplicable, match="do not compose to its forward"):
        memory_saving(OtherForward(*layers()))(x)
    with pytest.raises(NotApplicable, match=r"by 5.0e-01 nats.*correct the log-determinant"):
        memory_saving(OtherLogDet(*layers())).forward_and_log_det(x)
    assert memory_saving(OtherLogDet(*layers()))(x).requires_grad
    with pytest.raises(NotApplicable, match="do not compose to its inverse"):
        memory_saving(OtherInverse(*layers())).inverse(x)
    with pytest.raises(NotApplicable, match="correct the log-determinant"):
        memory_saving(OtherInverseLogDet(*layers())).inverse_and_log_det(x)


def test_a_latent_that_differs_with_the_log_det_is_found():
    class Shifted(Linear):
        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward_and_log_det(x)
            return z + 1, log_det

    report = ig.audit(Shifted(torch.eye(6).double()), data(), level="quick")
    assert "other latents than forward" in report["preflight"].reason
    assert report.uses["density"].verdict == "undecided"


@pytest.mark.parametrize("keep", ["input", "output"])
def test_what_is_kept_is_a_choice(keep):
    model, x = nets.flow(3), nets.vectors(8)
    saving = memory_saving(model, keep=keep)
    saving(x).sum().backward()
    kept = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for own, other in zip(kept, model.parameters(), strict=True):
        assert torch.allclose(own, other.grad, rtol=1e-9, atol=1e-12)


def test_the_output_alone_needs_inverses_and_gives_no_second_derivative():
    model, x = nets.flow(2), nets.vectors(4).requires_grad_()
    z = memory_saving(model, keep="output")(x)
    with pytest.raises(NotApplicable, match='keep="input"'):
        torch.autograd.grad(z.sum(), x, create_graph=True)
    first = memory_saving(Chain(nets.NoInverse(), nets.flow(1)), keep="output")
    with pytest.raises(NotApplicable, match=r"layer 0 .* its inverse is missing"):
        first(x).sum().backward()
    for settings in ({"guard": 1e-3}, {"exact": True}):
        with pytest.raises(ValueError, match='expected keep="input" with a guard'):
            memory_saving(model, keep="output", **settings)
    with pytest.raises(ValueError, match='expected keep as "input" or "output"'):
        memory_saving(model, keep="x")


class Halfway(Diagonal):
    """Its inverse is a hundredth off: what keeps z alone rebuilds x wrongly."""

    def inverse(self, z: Tensor) -> Tensor:
        return 1.5 * super().inverse(z) + 0.3


def test_the_gradients_check_reports_both_choices():
    """Only the first layer's inverse is wrong: its input is x itself, or rebuilt."""
    nn.init.normal_((first := Halfway(6).double()).log_scale)
    model = Chain(first, layers()[0])
    result = ig.AUDITS["gradient_angle"](model, data())
    assert result.verdict == "stable"
    assert result.values["other_angle"] > 1
    assert "with z alone kept it is off by" in result.reason
    chosen = ig.AUDITS["gradient_angle"](model, data(), keep="output")
    assert chosen.verdict == "unstable"
    assert chosen.values["max_angle"] == pytest.approx(result.values["other_angle"])
    assert chosen.values["other_angle"] == pytest.approx(result.values["max_angle"], abs=1e-9)


def test_a_chain_of_the_package_is_never_refused():
    assert compared(random_chain(), data()) == Composition()
