from __future__ import annotations

import io
import math
import pickle

import pytest
import torch

from inn_guard.training.regularizer_hook import RegularizerHook
from inn_guard.training.regularizers import (
    AdaptiveCoefficient,
    Direction,
    FiniteDifferences,
    NormalizingFlowLoss,
)
from inn_guard.training.schedule import every
from tests.oracles.regularizers import TwoCouplings


def data(seed=0, rows=8):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(seed=0):
    return [FiniteDifferences(1e-2, seed=seed), NormalizingFlowLoss(1e-3)]


def train(model, hook, steps):
    """Ten lines of a training loop; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for step in steps:
        x = data(step)
        z = model(x)
        loss = (z - 1).square().mean() + hook(x, z=z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_due_at_multiples_and_exactly_zero_between():
    calls = []

    class Counting(TwoCouplings):
        def forward_and_log_det(self, x):
            calls.append(len(x))
            return super().forward_and_log_det(x)

    model = Counting().double()
    hook, x = RegularizerHook(model, both(), every=3), data()
    due = []
    for _ in range(7):
        calls.clear()
        penalty = hook(x)
        due.append(bool(penalty))
        assert penalty.shape == ()
        if not due[-1]:
            assert penalty.item() == 0
            assert not penalty.requires_grad
            assert (penalty.dtype, penalty.device) == (x.dtype, x.device)
            assert calls == []
    assert due == [True, False, False, True, False, False, True]


def test_any_function_of_the_step_is_a_schedule():
    hook, x = (
        RegularizerHook(TwoCouplings().double(), both(), every=lambda step: step in (1, 4)),
        data(),
    )
    assert [bool(hook(x)) for _ in range(6)] == [False, True, False, False, True, False]


def test_penalties_add_up_and_are_kept_for_the_log():
    model, x = TwoCouplings().double(), data()
    hook = RegularizerHook(model, both(), every=1)
    assert hook.last == {}
    expected = [regularizer(model, x).item() for regularizer in both()]
    assert hook(x).item() == pytest.approx(sum(expected), rel=1e-12)
    assert hook.last == {"FiniteDifferences": expected[0], "NormalizingFlowLoss": expected[1]}


def test_two_of_a_kind_are_told_apart_and_functions_have_names():
    def weight_decay(model, x, z=None):
        return sum(parameter.square().sum() for parameter in model.parameters())

    regularizers = [
        FiniteDifferences(1.0, direction=direction)
        for direction in (Direction.FORWARD, Direction.INVERSE)
    ]
    hook = RegularizerHook(TwoCouplings().double(), [*regularizers, weight_decay], every=1)
    hook(data())
    assert list(hook.last) == ["FiniteDifferences[0]", "FiniteDifferences[1]", "weight_decay"]


def test_resuming_continues_bit_for_bit():
    whole = TwoCouplings().double()
    expected = train(whole, RegularizerHook(whole, both(), every=3), range(20))

    model = TwoCouplings().double()
    hook = RegularizerHook(model, both(), every=3)
    losses = train(model, hook, range(11))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "hook": hook.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = TwoCouplings(seed=5).double()
    resumed.load_state_dict(saved["model"])
    hook = RegularizerHook(resumed, both(seed=77), every=3)
    hook.load_state_dict(saved["hook"])
    losses += train(resumed, hook, range(11, 20))
    assert losses == expected
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_resuming_restores_a_steered_coefficient():
    def hook():
        return RegularizerHook(
            TwoCouplings(), [AdaptiveCoefficient(FiniteDifferences(1.0), target=10.0)], every=1
        )

    first, second = hook(), hook()
    first.regularizers[0].update(3.0)
    first(data())
    second.load_state_dict(first.state_dict())
    assert (
        second.regularizers[0].value == first.regularizers[0].value != hook().regularizers[0].value
    )
    assert torch.equal(first(data()), second(data()))


def test_a_state_of_other_regularizers_is_refused():
    hook = RegularizerHook(TwoCouplings(), both())
    with pytest.raises(ValueError, match="same regularizers"):
        hook.load_state_dict(RegularizerHook(TwoCouplings(), both()[:1]).state_dict())
    with pytest.raises(ValueError, match="same regularizers"):
        hook.load_state_dict(RegularizerHook(TwoCouplings(), both()[::-1]).state_dict())


def test_gradient_accumulation_counts_optimizer_steps_when_told():
    """All parts of a due step are penalised, and their mean is the whole batch's penalty."""
    model, x = TwoCouplings().double(), data(rows=8)
    hook = RegularizerHook(model, [NormalizingFlowLoss(1.0)], every=2)
    parts = [[hook(part, step=step).item() for part in x.split(2)] for step in range(4)]
    assert [all(values) for values in parts] == [True, False, True, False]
    whole = NormalizingFlowLoss(1.0)(model, x).item()
    assert sum(parts[0]) / 4 == pytest.approx(whole, rel=1e-12)
    assert hook.state_dict()["step"] == 4


def test_context_of_the_batch():
    model, x, context = TwoCouplings(context_size=2).double(), data(), data(9)[:, :2]
    hook = RegularizerHook(model, both(), every=1)
    expected = sum(regularizer(model.with_context(context), x) for regularizer in both())
    torch.testing.assert_close(hook(x, context=context), expected)
    assert model.context is None


def test_global_generator_is_untouched():
    hook, x = RegularizerHook(TwoCouplings().double(), both(), every=1), data()
    before = torch.get_rng_state()
    hook(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_non_finite_penalties_pass_through():
    x = data()
    x[0, 0] = math.nan
    hook = RegularizerHook(TwoCouplings().double(), both(), every=1)
    assert hook(x).isnan()
    assert math.isnan(hook.last["FiniteDifferences"])


def test_bad_input_is_refused():
    hook = RegularizerHook(TwoCouplings(), both(), every=1)
    with pytest.raises(ValueError, match="state_dict"):
        hook.load_state_dict({})
    with pytest.raises(ValueError, match="period"):
        every(0)
    with pytest.raises(ValueError, match="period"):
        RegularizerHook(TwoCouplings(), both(), every=0)
    with pytest.raises(ValueError, match="at least one sample"):
        hook(torch.zeros(0, 6))
    with pytest.raises(TypeError, match=r"x.float\(\)"):
        hook(torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="number of steps"):
        RegularizerHook(TwoCouplings(), both(), every=True)
    with pytest.raises(TypeError, match="a regularizer or a list"):
        RegularizerHook(TwoCouplings(), [FiniteDifferences])
    for penalty in (3.0, torch.ones(2), None):
        with pytest.raises(TypeError, match="scalar tensor"):
            RegularizerHook(TwoCouplings(), [lambda *given, penalty=penalty: penalty], every=1)(
                data()
            )


def test_a_hook_can_be_sent_to_another_process():
    hook, x = RegularizerHook(TwoCouplings().double(), both(), every=3), data()
    hook(x)
    sent = pickle.loads(pickle.dumps(hook))
    assert [sent.due(step) for step in range(4)] == [True, False, False, True]
    assert sent.next_step == 1
    assert torch.equal(sent(x, step=3), hook(x, step=3))


@pytest.mark.parametrize("autocast", [False, True])
def test_training_under_autocast_gets_gradients(autocast):
    model, x = TwoCouplings().float(), data().float()
    hook = RegularizerHook(model, both(), every=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = model(x)
        loss = z.float().square().mean() + hook(x, z=z)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_one_regularizer_needs_no_list():
    model, x = TwoCouplings().double(), data()
    alone = RegularizerHook(model, FiniteDifferences(1e-2), every=1)
    listed = RegularizerHook(model, [FiniteDifferences(1e-2)], every=1)
    assert torch.equal(alone(x), listed(x))


def test_repr_is_one_line_with_the_settings():
    hook = RegularizerHook(TwoCouplings().double(), FiniteDifferences(1e-2), every=3)
    hook(data())
    text = repr(hook)
    assert "\n" not in text
    assert text.startswith("RegularizerHook(TwoCouplings, [FiniteDifferences(coefficient=0.01, ")
    assert text.endswith("every=3, next_step=1, skipped_steps=0)")


def linear_problem():
    """A weight w with the loss c w: the gradient is c."""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    return weight, optimizer, RegularizerHook(TwoCouplings(), FiniteDifferences(1.0))


def test_steps_with_a_gradient_that_is_not_finite_are_left_out():
    weight, optimizer, hook = linear_problem()
    made = []
    for factor in (1.0, math.nan, math.inf, 2.0):
        made.append(hook.step((factor * weight).sum(), optimizer))
    assert made == [True, False, False, True]
    assert hook.skipped_steps == 2
    assert weight.grad is None
    other, plain, _ = linear_problem()
    for factor in (1.0, 2.0):
        plain.zero_grad()
        (factor * other).sum().backward()
        plain.step()
    assert torch.equal(weight, other)


def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is_finite():
    weight, optimizer, hook = linear_problem()
    assert not hook.step(weight.sum() + math.nan, optimizer)
    assert weight.tolist() == [1, 1]


def test_gradients_are_clipped_to_the_norm_and_accumulated():
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    hook = RegularizerHook(TwoCouplings(), [])
    (3 * weight[0]).backward()
    hook.step(4 * weight[1], optimizer, clip=1.0)
    torch.testing.assert_close(weight.detach(), -torch.tensor([0.6, 0.8], dtype=torch.float64))
    hook.step(0.1 * weight[0], optimizer, clip=1.0)
    assert weight[0].item() == pytest.approx(-0.7, rel=1e-6)
    with pytest.raises(ValueError, match="clip > 0"):
        hook.step(weight.sum(), optimizer, clip=0.0)


def test_skipped_steps_are_part_of_the_state():
    weight, optimizer, hook = linear_problem()
    hook.step(math.nan * weight.sum(), optimizer)
    resumed = RegularizerHook(TwoCouplings(), FiniteDifferences(1.0))
    resumed.load_state_dict(hook.state_dict())
    assert resumed.skipped_steps == 1
