"""Actions: what happens to a training run after an audit, bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.memory_saving import memory_saving
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from inn_guard.training.actions import (
    AdaptCoefficient,
    DisableMemorySaving,
    EmitWarning,
    RaiseError,
    RollBack,
    StabilityError,
    StabilityWarning,
    log10_condition_number,
)
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.records import Record
from inn_guard.training.regularizers import AdaptiveCoefficient, NormalizingFlowLoss
from tests.oracles.regularizers import Embedding, LinearMap


def record(verdict=Verdict.UNSTABLE, *, step=7, **values):
    return Record(
        step,
        AuditReport(
            (AuditResult("quick_round_trip", verdict, "the inverse is lost", values=values),)
        ),
    )


STABLE = record(Verdict.STABLE)


def spectrum(verdict, **values):
    return Record(
        0, AuditReport((AuditResult("jacobian_spectrum", verdict, "because", values=values),))
    )


def silent(action, *records):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StabilityWarning)
        for one in records:
            action(one)


@pytest.mark.parametrize("verdict", [Verdict.UNSTABLE, Verdict.NON_FINITE])
def test_warn_and_raise_say_what_was_found(verdict):
    with pytest.warns(StabilityWarning, match="step 7: quick_round_trip: the inverse is lost"):
        EmitWarning()(record(verdict))
    with pytest.raises(
        StabilityError, match="step 7: quick_round_trip: the inverse is lost"
    ) as caught:
        RaiseError()(record(verdict))
    assert caught.value.report.verdict is verdict
    copied = pickle.loads(pickle.dumps(caught.value))
    assert str(copied) == str(caught.value)
    assert copied.report.verdict is verdict


@pytest.mark.parametrize("verdict", [Verdict.STABLE, Verdict.NOT_APPLICABLE])
def test_nothing_happens_without_a_finding(verdict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EmitWarning()(record(verdict))
        RaiseError()(record(verdict))


def test_when_is_the_user_s():
    late = RaiseError(
        when=lambda found: (
            found.step > 10 and found.report["quick_round_trip"].values["relative_error"] > 0.5
        )
    )
    late(record(step=3, relative_error=1.0))
    late(record(step=13, relative_error=0.1))
    with pytest.raises(StabilityError):
        late(record(Verdict.STABLE, step=13, relative_error=1.0))


def chain(depth=3):
    return Chain(*(AffineCoupling(MLP([2, 8, 4])) for _ in range(depth)))


class Counted(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that a graph keeps."""

    def __init__(self):
        self.numbers = 0

        def pack(tensor):
            self.numbers += tensor.numel()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def kept_by(model, x):
    counted = Counted()
    with counted:
        z, log_det = model.forward_and_log_det(x)
    (z.square().sum() - log_det.sum()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return counted.numbers, gradients


def test_switch_off_stores_activations_from_then_on_with_the_same_gradients():
    model, x = chain(12), torch.randn(200, 4)
    saving = memory_saving(model)
    saved, rebuilt = kept_by(saving, x)
    plain, true = kept_by(model, x)
    assert saved < plain / 2
    action = DisableMemorySaving(saving)
    action(STABLE)
    assert action.values == {"memory_saving": 1.0}
    assert kept_by(saving, x)[0] == saved
    with pytest.warns(StabilityWarning, match="memory saving is off"):
        action(record())
    assert action.values == {"memory_saving": 0.0}
    kept, gradients = kept_by(saving, x)
    assert kept == plain
    assert all(torch.equal(a, b) for a, b in zip(gradients, true, strict=True))
    torch.testing.assert_close(gradients, rebuilt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action(record())  # once is enough
    assert not saving.with_context(None).enabled
    saving.inverse(x)
    saving.enabled = True
    assert kept_by(saving, x)[0] == saved


def test_switch_off_remembers():
    action = DisableMemorySaving(memory_saving(chain()))
    silent(action, record())
    other = DisableMemorySaving(memory_saving(chain()))
    other.load_state_dict(action.state_dict())
    assert not other.saving.enabled


def test_the_condition_number_of_a_report():
    assert (
        log10_condition_number(spectrum(Verdict.STABLE, log10_condition_number=2.5).report) == 2.5
    )
    assert log10_condition_number(spectrum(Verdict.NON_FINITE).report) == math.inf
    rectangular = spectrum(
        Verdict.STABLE, encoder_condition_number=10.0, decoder_condition_number=1000.0
    )
    assert log10_condition_number(rectangular.report) == pytest.approx(3)
    with pytest.raises(ValueError, match=r'checks=\["jacobian_spectrum"\]'):
        log10_condition_number(STABLE.report)
    with pytest.raises(ValueError, match="because"):
        log10_condition_number(spectrum(Verdict.NOT_APPLICABLE).report)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (LinearMap(torch.diag(torch.tensor([1.0, 5.0, 200.0, 2.0])).double()), math.log10(200)),
        (Embedding(torch.tensor([[4.0, 0, 0, 0], [0, 1.0, 0, 0]]).double()), math.log10(4)),
        (LinearMap(torch.full((4, 4), math.nan).double()), math.inf),
    ],
    ids=["square", "rectangular", "nan"],
)
def test_the_condition_number_of_a_real_report(model, expected):
    report = AuditHook(model, checks=["jacobian_spectrum"])(torch.randn(5, 4))
    assert log10_condition_number(report) == pytest.approx(expected, rel=1e-6)


def test_adapt_raises_and_lowers_the_coefficient():
    coefficient = AdaptiveCoefficient(NormalizingFlowLoss(1.0), target=100.0)
    action = AdaptCoefficient(coefficient)
    before = coefficient.value
    action(spectrum(Verdict.STABLE, log10_condition_number=4.0))
    raised = coefficient.value
    assert raised > before
    action(spectrum(Verdict.STABLE, log10_condition_number=0.5))
    assert coefficient.value < raised
    assert action.values == {"coefficient": coefficient.value}
    AdaptCoefficient(coefficient, measured=lambda report: 9.0)(STABLE)


class Net(nn.Module):
    """An invertible part, a head, running statistics, and a buffer that is in no state_dict."""

    def __init__(self):
        super().__init__()
        self.inn, self.norm, self.head = chain(), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("average", torch.zeros(4), persistent=False)

    def forward(self, x):
        z = self.inn(x)
        self.average.mul_(0.9).add_(0.1 * z.detach().mean(0))
        return self.head(self.norm(z))


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


def steps(net, optimizer, schedule, seeds):
    for seed in seeds:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        optimizer.zero_grad()
        net(x.to(net.head.weight.dtype)).square().mean().backward()
        optimizer.step()
        schedule.step()


def state(net, optimizer, schedule):
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(
        [[t.detach() for t in tensors], optimizer.state_dict(), schedule.state_dict()]
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rolled_back_weights_go_on_exactly_as_the_stable_ones_did(name, dtype):
    torch.manual_seed(0)
    net = Net().to(dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    parts = (net, optimizer, schedule)
    action = RollBack(*parts)
    steps(*parts, range(5))
    action(STABLE)
    stable = state(*parts)
    steps(*parts, range(5, 9))
    expected = state(*parts)
    for _ in range(
        3
    ):  # several times, each after other steps: what is kept must not be what is trained
        with torch.no_grad():
            net.head.weight.fill_(math.nan)
        steps(*parts, range(20, 23))
        with pytest.warns(StabilityWarning, match="rolled back to the weights of step 7"):
            action(record())
        assert same(state(*parts), stable)
        assert all(p.grad is None for p in net.parameters())
        steps(*parts, range(5, 9))
        assert same(state(*parts), expected)
    assert action.values == {"rollbacks": 3.0}


def test_rollback_keeps_the_same_parameters_and_lies_on_the_cpu():
    net = Net()
    action = RollBack(net)
    action(STABLE)
    before = list(net.parameters())
    silent(action, record())
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    kept = action.state_dict()["kept"]["tensors"]
    assert all(t.device.type == "cpu" and not t.requires_grad for t in kept.values())
    assert "average" in kept
    assert not any(
        t.data_ptr() == p.data_ptr()
        for t in kept.values()
        for p in [*net.parameters(), *net.buffers()]
    )


def test_rollback_ends_a_run_that_does_not_get_better():
    net = Net()
    action = RollBack(net, limit=2)
    with pytest.raises(StabilityError, match="no audit has passed before"):
        action(record())
    silent(action, STABLE, record(), record(), STABLE, record(), record())
    with pytest.raises(StabilityError, match="2 rollbacks in a row"):
        action(record())
    assert action.count == 4
    with pytest.raises(ValueError, match="limit"):
        RollBack(net, limit=0)


def test_rollback_between_forward_and_backward_is_an_error_not_a_wrong_gradient():
    net = Net()
    action = RollBack(net)
    action(STABLE)
    loss = net(torch.randn(8, 4)).square().mean()
    silent(action, record())
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.thorough
def test_a_training_run_that_explodes_comes_back():
    """One absurd step ruins the weights; the next audit puts the last stable ones back."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    hook = AuditHook(net.inn, every=2, actions=[RollBack(net, optimizer)])
    for step in range(9):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x).square().mean() * (1e30 if step == 5 else 1.0)).backward()
        optimizer.step()
        if step == 6:
            with pytest.warns(StabilityWarning, match="weights of step 4"):
                assert hook(x).verdict.failed
        else:
            hook(x)
    assert hook(x, step=10).verdict is Verdict.STABLE
