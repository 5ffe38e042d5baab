"""Every test runs in float64 (default), on one thread, from a known state of the random generators.

HYPOTHESIS_PROFILE=thorough searches longer, always in the same places, so that a run that passed
passes again; HYPOTHESIS_PROFILE=search searches elsewhere at every run.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from zlib import crc32

import pytest
import torch
from hypothesis import settings

from tests.execution import clocks

settings.register_profile("ci", max_examples=10, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=400, deadline=None, derandomize=True)
settings.register_profile("search", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--share", default="1/1", help="K/N: the K-th of N equal parts of the tests")


def pytest_collection_modifyitems(config, items):
    """Tests of a library that is in no extra of the developers are not collected without it.

    Of the others, those of the wanted share: tests are dealt by their names, so that every process
    picks the same.
    """
    share, shares = map(int, config.getoption("--share").split("/"))
    checked = bool(config.getoption("--jaxtyping-packages", default=None))
    kept, without = [], []
    for item in items:
        libraries = [mark.args[0] for mark in item.iter_markers("library")]
        wanted = crc32(item.nodeid.encode()) % shares == share - 1
        if checked and item.get_closest_marker("unchecked"):
            wanted = False
        if wanted and all(find_spec(name) for name in libraries):
            kept.append(item)
        else:
            without.append(item)
    config.hook.pytest_deselected(items=without)
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def counted_clock():
    """What every deadline reads, in fixtures of all scopes too."""
    clock = clocks.CountedClock(tick=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inn_guard.execution.deadline.now", clock)
        yield clock


@pytest.fixture
def only_hangs_time_out(monkeypatch):
    """Time limits end what calls ``clocks.hangs``, whatever the seconds are."""
    monkeypatch.setattr("inn_guard.execution.time_limit._Timer._expires", clocks.expires)


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
