"""Bound rules are loaded; budgets are seconds of processor time, so that a busy machine changes nothing."""

from __future__ import annotations

import time

import pytest

from inn_guard.lipschitz import rules


@pytest.fixture(autouse=True)
def _rules():
    rules.load()


@pytest.fixture(autouse=True)
def _processor_time(monkeypatch):
    monkeypatch.setattr("inn_guard.execution.deadline.now", time.process_time)
