"""A use speaks by its deciding finding."""

from __future__ import annotations

import math

import pytest

from inn_guard.report.uses import USES, UseVerdict, checked_uses
from inn_guard.report.verdict import Verdict
from tests.report.examples import finding


def test_a_use_shows_the_figures_of_its_finding():
    found = finding("unstable", 0.4, 0.1, "nats", reason="log p(x) is off", samples=32)
    use = UseVerdict("density", found.verdict, "density", found, counted=True, why="")
    assert (use.figure, use.limit, use.unit) == (0.4, 0.1, "nats")
    assert (use.samples, use.of, use.reason) == (32, 64, "log p(x) is off")
    assert str(use) == "density: unstable (log p(x) is off)"


def test_a_use_that_was_not_measured_has_no_figure():
    use = UseVerdict("sampling", Verdict.UNDECIDED, "", None, counted=True, why="")
    assert math.isnan(use.figure)
    assert math.isnan(use.limit)
    assert (use.unit, use.samples, use.of) == ("", 0, 0)
    assert str(use) == "sampling: undecided (not measured)"


def test_uses_are_named_once_in_their_own_order():
    assert checked_uses("sampling") == ("sampling",)
    assert checked_uses(["sampling", "density", "sampling"]) == ("density", "sampling")
    assert checked_uses([]) == ()
    assert checked_uses(USES) == tuple(USES)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"uses out of density, sampling, .*; got 'likelihood'"):
        checked_uses(["density", "likelihood"])
    with pytest.raises(TypeError, match="uses"):
        checked_uses([3])
