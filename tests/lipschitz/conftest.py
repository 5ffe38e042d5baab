"""Bound rules are loaded, and the counted clock of tests/conftest.py runs slower.

A search over a small network does little between two reads.
"""

from __future__ import annotations

import pytest

from inn_guard.lipschitz import rules


@pytest.fixture(autouse=True)
def _rules():
    rules.load()


@pytest.fixture(scope="module", autouse=True)
def _slow_clock(counted_clock):
    before = counted_clock.tick
    counted_clock.tick = 0.001
    yield
    counted_clock.tick = before
