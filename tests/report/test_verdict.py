"""Verdicts are ordered from good to bad, and equal their labels."""

from __future__ import annotations

import itertools

import pytest

from inn_guard.report.verdict import Verdict

ORDER = ("not_applicable", "stable", "marginal", "undecided", "unstable", "non_finite")


def test_the_order_is_from_good_to_bad_also_against_labels():
    assert tuple(map(str, Verdict)) == ORDER
    for (place, one), (other_place, other) in itertools.product(enumerate(ORDER), repeat=2):
        assert (Verdict(one) < Verdict(other)) == (place < other_place)
        assert (Verdict(one) <= other) == (place <= other_place)
        assert (Verdict(one) > other) == (place > other_place)
        assert (Verdict(one) >= Verdict(other)) == (place >= other_place)


@pytest.mark.parametrize("label", ORDER)
def test_a_verdict_equals_its_label(label):
    verdict = Verdict(label)
    assert verdict == label
    assert verdict != "fine"
    assert hash(verdict) == hash(label)
    assert str(verdict) == verdict.label == f"{verdict}" == label
    assert verdict.sentence.endswith(".")


def test_what_passes_and_what_fails():
    passed = [verdict.label for verdict in Verdict if verdict.passed]
    failed = [verdict.label for verdict in Verdict if verdict.failed]
    assert passed == ["stable", "marginal"]
    assert failed == ["unstable", "non_finite"]


def test_the_worst_of_several():
    assert Verdict.worst([Verdict.STABLE, Verdict.UNSTABLE, Verdict.MARGINAL]) is Verdict.UNSTABLE
    assert Verdict.worst([]) is Verdict.NOT_APPLICABLE


@pytest.mark.parametrize("other", ["good", 1, None])
def test_anything_else_cannot_be_compared(other):
    with pytest.raises(TypeError, match="one of the labels not_applicable, stable"):
        assert other > Verdict.STABLE
