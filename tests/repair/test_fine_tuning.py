"""stabilize: what it repairs, what it leaves alone, and how it ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import inn_guard as ig
from inn_guard.core.base import BaseDistribution
from inn_guard.layers.chain import Chain
from inn_guard.repair.copies import independent_copy
from inn_guard.repair.penalties import VolumeAgainstSize, penalties_for
from tests.audits.test_advice import exponential
from tests.cases.toys import Linear


class Flow(Chain):
    """A chain with a standard normal base."""

    def base(self) -> BaseDistribution:
        return BaseDistribution(lambda n, context: torch.randn(n, 6), torch.ones(()))


def data(batch: int = 64, *, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(batch, 6, generator=generator)


def lossy(gain: float = 0.7) -> Flow:
    """Loses draws far from 0, where its scales grow with the state."""
    return Flow(*exponential(gain, layers=4).steps)


def shrinking(log_scale: float = -9.0) -> ig.Invertible:
    """z = (x_1, ..., x_6 e^s) + 1e6: in float32 the last feature is lost."""

    class Shrinks(ig.Invertible):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.full((6,), log_scale))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.log_scale.exp() + 1.0

        def inverse(self, z: Tensor) -> Tensor:
            return (z - 1.0) / self.log_scale.exp()

        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self(x), self.log_scale.sum().expand(len(x))

    return Shrinks()


@pytest.fixture(autouse=True)
def _float32(_float64):
    torch.set_default_dtype(torch.float32)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


QUICK = {"steps": 60, "every": 20, "learning_rate": 2e-2}


def test_saves_draws_and_leaves_the_model_alone():
    model, x = lossy(), data()
    before, generator = state(model), torch.get_rng_state()
    model.eval()
    steady = ig.stabilize(model, [x], uses=["sampling"], **QUICK)
    assert steady.before.verdict.failed
    assert steady.passed
    assert ig.audit(steady.model, x, uses=["sampling"], seed=17).verdict.passed
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not steady.model.training
    assert all(p.grad is None for p in (*model.parameters(), *steady.model.parameters()))
    assert type(steady.model) is Flow
    assert steady.advice == ()


@pytest.mark.thorough
def test_a_loader_that_shuffles_leaves_the_generators_alone():
    loader = DataLoader(TensorDataset(data()), batch_size=16, shuffle=True)
    generator = torch.get_rng_state()
    runs = []
    for _ in range(2):
        steady = ig.stabilize(lossy(), loader, uses=["sampling"], steps=2, every=2)
        assert torch.equal(torch.get_rng_state(), generator)
        torch.rand(3)
        generator = torch.get_rng_state()
        runs.append(state(steady.model))
    assert same(*runs)


def test_says_where_nothing_can_be_measured():
    class Opaque(Linear):
        pass

    model = Flow(Opaque(torch.eye(6)))
    model.layers = lambda: ()
    steady = ig.stabilize(model, [data()], uses=["gradients"])
    assert not steady.passed
    assert "measured" in steady.reason


def test_saves_round_trips_of_a_part_with_a_loss_of_its_own():
    net = nn.Module()
    net.inn, net.head = Chain(Linear(torch.eye(6)), shrinking(-16.0)), nn.Linear(6, 2)
    x, labels = data(), torch.arange(64) % 2

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model.head(model.inn(batch[0])), batch[1])

    steady = ig.stabilize(
        net,
        [(x, labels)],
        loss=loss,
        part=lambda model: model.inn,
        uses=["reconstruction"],
        coefficient=0.1,
        steps=200,
        every=50,
        learning_rate=0.3,
    )
    assert steady.before.verdict.failed
    assert steady.passed, steady
    assert not torch.equal(steady.model.head.weight, net.head.weight)


def test_says_where_every_use_passes_already():
    steady = ig.stabilize(lossy(0.01), [data()], uses=["sampling", "reconstruction"])
    assert steady.steps == 0
    assert steady.passed
    assert "already" in steady.reason


def test_says_where_it_does_not_get_there_and_what_to_try():
    class OneWay(Linear):
        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z) * 1.5

    model = Flow(OneWay(torch.eye(6)))
    steady = ig.stabilize(model, [data()], uses=["reconstruction"], steps=4, every=2)
    assert not steady.passed
    assert steady.verdict.failed
    assert "not enough" in steady.reason
    assert any("ig.exact(flow)" in text for text in steady.advice)
    assert not any("ig.stabilize" in text for text in steady.advice)


def test_density_and_other_inputs_have_no_penalty():
    class Claims(Linear):
        def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward_and_log_det(x)
            return z, log_det + 1.0

    model = Flow(Claims(torch.eye(6)))
    steady = ig.stabilize(model, [data()], uses=["density"], steps=4)
    assert steady.steps == 0
    assert not steady.passed
    assert "density" in steady.reason
    assert penalties_for(["density", "other_inputs"], model, data(), coefficient=None, seed=0) == []


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.thorough)])
def test_weights_that_are_not_finite_are_a_finding(value):
    model = lossy()
    with torch.no_grad():
        model.steps[0].gain[0] = value
    steady = ig.stabilize(model, [data()], uses=["reconstruction"], steps=4)
    assert steady.steps == 0
    assert not steady.passed
    assert "NaN or Inf" in steady.reason


def test_a_loss_that_raises_is_raised_with_the_result_so_far():
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 30:
            raise ZeroDivisionError("mine")
        return -model.log_prob(batch).mean()

    model, x = lossy(), data()
    before = state(model)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        ig.stabilize(model, [x], loss=loss, uses=["sampling"], tolerance=1e-9, **QUICK)
    assert same(state(model), before)
    assert caught.value.stabilized.kept_step > 0
    assert len(caught.value.stabilized.looks) > 1


def test_an_interrupt_returns_the_best_state():
    def batches():
        for _ in range(25):
            yield data()
        raise KeyboardInterrupt

    model = lossy()
    before = state(model)
    with pytest.warns(UserWarning, match="interrupted"):
        steady = ig.stabilize(model, batches(), uses=["sampling"], tolerance=1e-9, **QUICK)
    assert steady.interrupted
    assert steady.kept_step > 0
    assert same(state(model), before)


@pytest.mark.thorough
def test_an_iterator_that_ends_ends_the_repair():
    steady = ig.stabilize(
        lossy(), iter([data()] * 7), uses=["sampling"], tolerance=1e-9, every=4, steps=50
    )
    assert steady.steps == 7
    assert "batches ended after 7 steps" in steady.reason


def test_frozen_parameters_stay():
    model = lossy()
    model.steps[0].requires_grad_(False)
    steady = ig.stabilize(model, [data()], uses=["sampling"], steps=10, every=10)
    assert torch.equal(steady.model.steps[0].gain, model.steps[0].gain)
    assert steady.steps == 10
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad_\(True\)"):
        ig.stabilize(model, [data()])


def test_modes_and_statistics_stay_in_eval_mode():
    net = nn.Module()
    net.inn, net.head = lossy(), nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    net.inn.train()
    net.head.eval()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model.head(model.inn(batch)).square().mean()

    steady = ig.stabilize(
        net, [data()], loss=loss, part=lambda m: m.inn, uses=["sampling"], steps=4, every=4
    )
    assert [m.training for m in steady.model.modules()] == [m.training for m in net.modules()]
    mean = steady.model.head[0].running_mean
    assert torch.equal(mean, torch.zeros_like(mean))


def test_steps_whose_gradient_is_not_finite_are_left_out():
    counted = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        counted.append(1)
        value = -model.log_prob(batch).mean()
        return value * math.nan if len(counted) % 2 else value

    steady = ig.stabilize(lossy(), [data()], loss=loss, uses=["sampling"], steps=6, every=6)
    assert steady.skipped_steps == 3
    assert steady.steps == 3
    assert all(p.isfinite().all() for p in steady.model.parameters())

    steady = ig.stabilize(
        lossy(),
        [data()],
        loss=lambda m, b: m.log_prob(b).mean() * math.nan,
        steps=6,
        every=3,
        uses=["sampling"],
    )
    assert steady.steps == 0
    assert "finite" in steady.reason


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"every": True}, "every"),
        ({"coefficient": -1.0}, "coefficient"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"clip": 0.0}, "clip"),
        ({"uses": ["speed"]}, "uses"),
        ({"batches": []}, "at least one batch"),
        ({"x": torch.zeros(2, 6), "context": lambda batch: None}, "x or context"),
    ],
)
def test_bad_settings_are_refused(arguments, match):
    batches = arguments.pop("batches", [data()])
    with pytest.raises(ValueError, match=match):
        ig.stabilize(lossy(), batches, **arguments)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"\[x\] for a single batch"):
        ig.stabilize(lossy(), data())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ig.stabilize(3, [data()])
    with pytest.raises(TypeError, match="batches of tensors"):
        ig.stabilize(lossy(), [{"x": data()}])
    with pytest.raises(TypeError, match="scalar tensor"):
        ig.stabilize(lossy(), [data()], loss=lambda m, b: m(b), uses=["sampling"])
    with pytest.raises(ValueError, match="pass loss="):
        ig.stabilize(WithoutLogDet(), [data()], uses=["reconstruction"])


class WithoutLogDet(nn.Module):
    """Loses its last feature in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((6,), -14.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_scale.exp() + 1.0

    def inverse(self, z: Tensor) -> Tensor:
        return (z - 1.0) / self.log_scale.exp()


def test_without_a_base_the_loss_is_the_likelihood_of_a_normal_one_and_said():
    """As `audit` draws from N(0, I)."""
    model, x = exponential(0.7, layers=4).to_dtype(torch.float32), data()
    steady = ig.stabilize(model, [x], uses=["sampling"], steps=2, every=2)
    assert "under N(0, I), since the model has no base" in steady.reason
    assert steady.loss_before == pytest.approx(-model.log_prob(x).mean().item())
    given = ig.stabilize(
        model, [x], loss=lambda m, b: -m.log_prob(b).mean(), uses=["sampling"], steps=2, every=2
    )
    assert "N(0, I)" not in given.reason
    assert given.loss_after == steady.loss_after
    assert "N(0, I)" not in ig.stabilize(lossy(), [x], uses=["sampling"], steps=2, every=2).reason


class ReverseFlag(nn.Module):
    """A convention that only a batch shows."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = exponential(0.7, layers=4)

    def forward(self, x: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor, None]:
        both = self.chain.inverse_and_log_det(x) if reverse else self.chain.forward_and_log_det(x)
        return *both, None


def test_a_model_with_a_convention_of_its_own_is_repaired():
    steady = ig.stabilize(ReverseFlag().float(), [data()], uses=["sampling"], **QUICK)
    assert isinstance(steady.model, ReverseFlag)
    assert steady.passed, steady


def test_the_result_prints_and_writes(tmp_path):
    pytest.importorskip("pandas")
    steady = ig.stabilize(lossy(), [data()], uses=["sampling"], steps=2, every=2)
    text = str(steady)
    assert "before" in text
    assert steady.reason in text
    assert set(steady.to_frame()["report"]) == {"before", "after"}
    steady.to_html(tmp_path / "a.html")
    assert (tmp_path / "a.html").stat().st_size > 0


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(1e-3, 1e3))
def test_the_penalty_at_the_data_is_that_of_the_singular_values(logs, factor):
    """Of a diagonal map of white data: D log(root mean square / geometric mean)."""
    scales = factor * torch.tensor(logs, dtype=torch.float64).exp()
    corners = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    value = VolumeAgainstSize()(Linear(torch.diag(scales)), corners.double())
    expected = 3 * (scales.square().mean().sqrt().log() - scales.log().mean())
    assert abs(value - expected) < 1e-9 * (1 + abs(expected))


def test_without_a_log_determinant_the_inverse_is_penalised():
    class Plain(ig.Invertible):
        def forward(self, x: Tensor) -> Tensor:
            return x

        def inverse(self, z: Tensor) -> Tensor:
            return z

    (one,) = penalties_for(["gradients"], Plain(), data(), coefficient=None, seed=0)
    assert isinstance(one.regularizer, ig.FiniteDifferences)
    (two,) = penalties_for(["gradients"], Linear(torch.eye(6)), data(), coefficient=2.0, seed=0)
    assert isinstance(two.regularizer, VolumeAgainstSize)
    assert two.coefficient == 2.0


@pytest.mark.thorough
def test_a_conditional_flow_by_the_context_of_its_batches():
    flows = pytest.importorskip("zuko.flows")
    torch.manual_seed(0)
    flow = flows.NSF(6, 2, transforms=2, hidden_features=(16,))
    batches = [(data(), torch.randn(64, 2))]
    steady = ig.stabilize(
        flow, batches, context=lambda batch: batch[1], uses=["sampling", "density"], steps=2
    )
    assert steady.before.uses["density"].verdict.passed


def test_a_copy_shares_nothing():
    weight_norm = nn.utils.weight_norm(nn.Linear(2, 2))
    weight_norm(torch.ones(1, 2))  # keeps a weight with its graph
    copied = independent_copy(nn.Sequential(weight_norm))
    assert same(state(copied), state(nn.Sequential(weight_norm)))

    class Clings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def __deepcopy__(self, memo: object) -> Clings:
            return self

    with pytest.raises(TypeError, match="shares"):
        independent_copy(nn.Sequential(Clings()))
