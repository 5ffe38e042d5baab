from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.report.verdict import Verdict
from tests.memory_saving import nets
from tests.oracles import memory_saving as reference


class Scale(Invertible):
    """z = w x entry by entry, with an inverse that is ``factor`` times too large."""

    def __init__(self, factor=1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.5, 0.5]))
        self.factor = factor

    def forward(self, x):
        return x * self.w

    def inverse(self, z):
        return self.factor * z / self.w


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_closed_form():
    """z = w w w x: gradients are w^2 sum x, for all but the first layer with x rebuilt ``factor``
    times too large.
    """
    factor = 1.7
    model, x = Chain(Scale(), Scale(), Scale(factor)), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    result = gradient_angle(model, x, loss=lambda z: z.sum(), batch_size=2)
    w, total = torch.tensor([1.5, 0.5]), x.sum(0)
    true = (w * w * total).repeat(3)
    found = torch.cat([w * w * total, factor * w * w * total, factor * w * w * total])
    cosine = float(true @ found / (true.norm() * found.norm()))
    assert result.values["max_angle"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-9)
    assert result.values["max_distance"] == pytest.approx(
        float((true - found).norm() / true.norm()), rel=1e-9
    )
    assert result.verdict is Verdict.UNSTABLE
    assert result.advice
    assert [row["distance"] for row in result.per_layer] == pytest.approx(
        [0, factor - 1, factor - 1], abs=1e-12
    )
    assert [row["angle"] for row in result.per_layer] == pytest.approx([0, 0, 0], abs=1e-6)


class Careless(Invertible):
    """z = x + tanh(w x) / 2, with one step of the fixed-point iteration for an inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x + torch.tanh(self.w * x) / 2

    def inverse(self, z):
        return z - torch.tanh(self.w * z) / 2

    def forward_and_log_det(self, x):
        slope = 1 + self.w * (1 - torch.tanh(self.w * x).square()) / 2
        return self.forward(x), slope.log().sum(1)


def test_against_the_walk_written_out():
    model, x = Chain(Careless(), nets.flow(1), Careless(), nets.flow(1)), nets.vectors(8)
    result = gradient_angle(model, x, loss=nets.nll, batch_size=4)
    angles, distances = [], []
    for rows in torch.arange(8).split(4):
        g = flat(reference.memory_saving_gradients(model, x[rows], nets.nll, first=x[rows]))
        h = flat(reference.true_gradients(model, x[rows], nets.nll))
        angles.append(math.degrees(math.acos(float(g @ h / (g.norm() * h.norm())))))
        distances.append(float((g - h).norm() / h.norm()))
    assert min(angles) > 0.1
    assert [row["angle"] for row in result.tables["minibatch"]] == pytest.approx(angles, rel=1e-7)
    assert [row["distance"] for row in result.tables["minibatch"]] == pytest.approx(
        distances, rel=1e-9
    )
    assert result.values["mean_angle"] == pytest.approx(sum(angles) / 2, rel=1e-7)
    assert result.values["max_distance"] == pytest.approx(max(distances), rel=1e-9)


def test_healthy_nets_are_stable_at_rounding():
    for model, x in ((nets.flow(), nets.vectors()), (nets.glow(), nets.images())):
        result = gradient_angle(model, x, batch_size=2)
        assert result.verdict is Verdict.STABLE
        assert result.values["max_angle"] < 1e-9
        assert 0 < result.values["rounding_distance"] < 1e-12
        assert not result.advice


def test_exploding_inverses_are_found_layer_by_layer():
    result = gradient_angle(nets.exploding().float(), nets.vectors(10).float(), batch_size=5)
    assert result.verdict.failed
    assert result.verdict is Verdict.NON_FINITE or result.values["max_angle"] > 1
    last, first = result.per_layer[-1], result.per_layer[0]
    assert last["distance"] < 1e-5
    assert not first["distance"] < 0.1
    assert sum(row["parameters"] for row in result.per_layer) == sum(
        p.numel() for p in nets.exploding().parameters()
    )


def test_nan_is_a_finding():
    result = gradient_angle(
        Chain(Scale(), Scale(), Scale(math.nan)), torch.ones(3, 2), loss=lambda z: z.sum()
    )
    assert result.verdict is Verdict.NON_FINITE
    assert "memory-saving gradient is not finite in 1 of 1" in result.reason
    assert math.isnan(result.values["max_angle"])
    result = gradient_angle(nets.flow(), nets.vectors() * math.inf)
    assert result.verdict is Verdict.NON_FINITE
    assert "every sample of x contains NaN" in result.reason
    with torch.no_grad():
        broken = Chain(Scale(), Scale())
        broken.layers()[0].w[0] = math.nan
    result = gradient_angle(broken, torch.ones(3, 2))
    assert result.verdict is Verdict.NON_FINITE
    assert "true gradient itself" in result.reason


def test_samples_that_are_not_finite_are_left_out():
    model, x = nets.flow(), nets.vectors(8)
    poisoned = torch.cat([x[:3], torch.full_like(x[:1], math.nan), x[3:]])
    result = gradient_angle(model, poisoned, batch_size=4)
    assert result.verdict is Verdict.STABLE
    assert result.tables == gradient_angle(model, x, batch_size=4).tables
    assert (result.uses["gradients"].samples, result.uses["gradients"].of) == (8, 9)


class Longer(Scale):
    """Its inverse is right, and its gradient points where it should, but is too long."""

    def __init__(self, factor: float) -> None:
        super().__init__(factor)

    def inverse(self, z):
        return self.factor * z / self.w


def test_a_wrong_length_decides_where_the_angle_is_right():
    """z = w1 w2 x, the loss linear: only the first layer's gradient scales with the rebuilt x."""
    model = Chain(Scale(), Scale(1.05))
    with torch.no_grad():
        model.layers()[0].w.fill_(1e6)  # the gradient of this layer is a millionth of the other's
    result = gradient_angle(model, torch.ones(1, 2), loss=lambda z: z.sum())
    finding = result.uses["gradients"]
    assert result.verdict is Verdict.UNSTABLE
    assert finding.unit == "of |h|"
    assert finding.limit == 0.01
    assert finding.figure == pytest.approx(0.05, rel=1e-3)


def test_a_gradient_that_rounding_decides_is_undecided():
    class Chaotic(Scale):
        """Its gradient depends on the last bits of its input, which its inverse does not know."""

        def forward(self, x):
            return x + 1e-9 * self.w * torch.sin(1e18 * x.detach())

        def inverse(self, z):
            return z

    model, x = Chain(Scale(), Chaotic(), Scale()), torch.rand(4, 2) + 0.5
    model.layers()[0].requires_grad_(False)
    model.layers()[2].requires_grad_(False)
    result = gradient_angle(model, x, seed=1, loss=lambda z: z.sum())
    assert result.verdict is Verdict.UNDECIDED
    assert "not determined at this precision" in result.reason


def test_small_angles_have_digits():
    """1e-10 of the gradient off at a right angle: 1e-10 rad, where arccos of the cosine would say
    0.
    """
    error = 1e-10

    class Off(Scale):
        def inverse(self, z):
            return super().inverse(z) * torch.tensor([1 + error, 1 - error])

    result = gradient_angle(
        Chain(Scale(), Off()), torch.tensor([[1.0, 9.0]]), loss=lambda z: z.sum()
    )
    distance, angle = result.values["max_distance"], math.radians(result.values["max_angle"])
    assert 0 < angle <= 1.001 * distance < 2 * error


class NoLayers(Scale):
    pass


def test_not_applicable():
    assert gradient_angle(NoLayers(), torch.ones(2, 2)).verdict is Verdict.NOT_APPLICABLE
    from inn_guard.layers.permutation import Permutation

    flip = Chain(Permutation.reverse(2), Permutation.reverse(2))
    assert gradient_angle(flip, torch.ones(2, 2)).verdict is Verdict.NOT_APPLICABLE


def test_losses_of_one_and_two_arguments_and_the_default():
    model, x = nets.flow(), nets.vectors()
    default = gradient_angle(model, x)
    assert default.tables == gradient_angle(model, x, loss=nets.nll).tables
    plain = gradient_angle(Chain(Scale(), Scale()), torch.ones(2, 2))
    assert (
        plain.tables
        == gradient_angle(
            Chain(Scale(), Scale()), torch.ones(2, 2), loss=lambda z: z.square().mean()
        ).tables
    )


@pytest.mark.parametrize(
    "loss", [lambda z: z, lambda z: z.sum().item(), lambda z: z.detach().sum()]
)
def test_a_loss_that_is_no_differentiable_number(loss):
    with pytest.raises(ValueError, match="one differentiable number"):
        gradient_angle(nets.flow(), nets.vectors(), loss=loss)


def test_conditions_follow_their_minibatch():
    model, x = nets.conditional_flow(), nets.vectors()
    with_context = model.with_context(torch.randn(nets.BATCH, 2))
    result = gradient_angle(with_context, x, batch_size=2)
    assert result.verdict is Verdict.STABLE
    assert result.values["max_angle"] < 1e-9


def test_no_trace():
    model, x = nets.flow().train(), nets.vectors()
    model.layers()[0].requires_grad_(False)
    gradient = [torch.randn_like(p) for p in model.parameters()]
    for parameter, value in zip(model.parameters(), gradient, strict=True):
        parameter.grad = value
    wanted, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    gradient_angle(model, x)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is g for p, g in zip(model.parameters(), gradient, strict=True))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    frozen = nets.flow().requires_grad_(False)
    assert gradient_angle(frozen, x).verdict is Verdict.STABLE
    assert not any(p.requires_grad for p in frozen.parameters())
