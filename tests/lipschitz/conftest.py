"""Budgets of these tests are seconds of the processor, so that a busy machine changes nothing."""

from __future__ import annotations

import time

import pytest


@pytest.fixture(autouse=True)
def _processor_time(monkeypatch):
    monkeypatch.setattr("inn_guard.execution.deadline.now", time.process_time)
