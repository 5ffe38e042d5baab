"""AuditContext: one linearization, one check of the batch, one snapshot, one copy, counted."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import inn_guard as ig
from inn_guard.audits.audited_model import ModelError
from inn_guard.audits.context import AuditContext, audited_model, same_up_to_rounding
from inn_guard.audits.priors import base_of
from inn_guard.execution.parallel import WorkSharing
from inn_guard.layers.chain import Chain
from tests.cases.toys import Linear, random_chain


def counted(monkeypatch, place: str) -> list[object]:
    """Calls of the function at that place, one entry for each."""
    module, _, name = place.rpartition(".")
    calls: list[object] = []
    import importlib

    original = getattr(importlib.import_module(module), name)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, counting)
    return calls


def data(batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(3))


def context(model, x, **settings) -> AuditContext:
    made = AuditContext(audited_model(model, x), x, base_of(model, x))
    return dataclasses.replace(made, **settings)


def test_a_standard_audit_linearizes_once(monkeypatch):
    calls = counted(monkeypatch, "inn_guard.audits.context.Linearization")
    elsewhere = [
        counted(monkeypatch, f"inn_guard.audits.{name}.Linearization")
        for name in ("jacobian_spectrum", "layer_blame", "precision.forecast")
    ]
    ig.audit(random_chain(depth=2, spread=0.5), data())
    assert len(calls) == 1
    assert not any(elsewhere)


def test_the_batch_is_checked_once(monkeypatch):
    calls = counted(monkeypatch, "inn_guard.audits.run.checked_batch")
    alone = counted(monkeypatch, "inn_guard.audits.spec.checked_batch")
    ig.audit(random_chain(depth=2), data(), level="quick")
    assert len(calls) == 1
    assert not alone


def test_the_state_is_kept_once_for_all_checks(monkeypatch):
    calls = counted(monkeypatch, "inn_guard.audits.context.StateSnapshot")
    again = counted(monkeypatch, "inn_guard.audits.spec.StateSnapshot")
    ig.audit(random_chain(depth=2), data(), level="quick")
    assert len(calls) == 1
    assert not again


def test_the_float64_copy_is_made_once(monkeypatch):
    made = []
    original = Chain.to_dtype

    def counting(self, dtype):
        made.append(dtype)
        return original(self, dtype)

    monkeypatch.setattr(Chain, "to_dtype", counting)
    ig.audit(random_chain(depth=2).float(), data().float(), level="standard")
    assert made.count(torch.float64) == 1


def test_a_copy_is_found_as_it_was_made():
    made = context(random_chain(depth=1), data())
    copy = made.in_dtype(torch.float32)
    assert copy is made.in_dtype(torch.float32)
    before = [parameter.clone() for parameter in copy.parameters()]
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.data.mul_(2)  # unseen by autograd
    made.take_back_copies()
    assert all(map(torch.equal, copy.parameters(), before))
    bounded = made.within(WorkSharing(None, 1e9))
    assert bounded.in_dtype(torch.float32) is not bounded.in_dtype(torch.float32)


def test_results_are_shared_by_rows():
    x = data()
    x[2] = math.nan
    made = context(random_chain(depth=1), x)
    assert made.finite_rows().tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert made.usable_rows() is made.usable_rows()
    rows = made.usable_rows()
    assert made.linearization(rows) is made.linearization(rows.clone())
    assert made.linearization(rows[:2]) is not made.linearization(rows)
    bounded = made.within(WorkSharing(None, 1e9))
    assert bounded.linearization(rows) is not bounded.linearization(rows)


def test_generators_begin_anew():
    made = context(random_chain(depth=1), data(), seed=7)
    draws = [torch.rand(3, generator=made.generator()) for _ in range(2)]
    assert torch.equal(*draws)


def test_layers_that_compose_to_another_map_are_hidden():
    class Misordered(Chain):
        def layers(self):
            return tuple(reversed(super().layers()))

    steps = Linear(torch.randn(6, 6)), Linear(torch.diag(torch.arange(1.0, 7.0)))
    assert len(context(Chain(*steps), data()).model.layers()) == 2
    assert context(Misordered(*steps), data()).model.layers() == ()
    assert "do not compose" in context(Misordered(*steps), data()).model.composition.forward


def test_the_mode_is_seen_and_put_back():
    model = random_chain(depth=1).train()
    model.steps[0].eval()
    made = context(model, data())
    assert "" in made.model.trained
    assert model.training
    assert not model.steps[0].training


def test_a_missing_kernel_is_a_failure_not_a_missing_inverse():
    x = data().bfloat16()
    model = context(Linear(torch.eye(6)).bfloat16(), x).model
    says = "inverse of the model raises (NotImplementedError|RuntimeError)"  # torch 2.6: the latter
    with pytest.raises(ModelError, match=says):
        model.inverse(x)


def test_same_up_to_rounding():
    a = torch.tensor([1.0, math.nan, math.inf])
    assert same_up_to_rounding(a, a + 1e-12, 1e-9)
    assert not same_up_to_rounding(a, a + 1e-6, 1e-9)
    assert not same_up_to_rounding(a, torch.ones(3), 1.0)
    assert not same_up_to_rounding(a, a[:2], 1.0)
    assert same_up_to_rounding(a * math.nan, a * math.nan, 0.0)


def test_a_linearization_that_fails_is_not_tried_again(monkeypatch):
    class Raising(Linear):
        def forward(self, x):
            raise RuntimeError("no")

    calls = counted(monkeypatch, "inn_guard.audits.context.Linearization")
    x = data()
    checked = context(Raising(torch.eye(6)), x)
    for _ in range(2):
        with pytest.raises(ModelError, match="RuntimeError: no"):
            checked.linearization(torch.arange(4))
    assert len(calls) == 1
