"""How much of a long list a test runs under `make test`; `make thorough` runs all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def trials(few: int, many: int) -> pytest.MarkDecorator:
    """The test's argument ``trials``: ``few``, and ``many`` under ``make thorough`` only."""
    return pytest.mark.parametrize("trials", [few, pytest.param(many, marks=pytest.mark.thorough)])


def first(count: int, values: Iterable[Any]) -> list[Any]:
    """Parameters of a test: those after the first ``count`` under ``make thorough`` only."""
    parameters = list(values)
    for k in range(count, len(parameters)):
        parameters[k] = pytest.param(parameters[k], marks=pytest.mark.thorough)
    return parameters
