"""Results compare entry by entry, and their repr is one line."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from inn_guard.report.result import AuditResult, to_full_batch
from inn_guard.report.verdict import Verdict
from tests.report.examples import finding

NAN = float("nan")


def result(**changes):
    fields = {
        "uses": {"density": finding("stable", 1e-6, 0.1, "nats")},
        "headline": ("max_error",),
        "values": {"max_error": 1e-6, "median_error": NAN},
        "per_sample": {"error": torch.tensor([1.0, NAN])},
        "per_layer": ({"index": 3, "name": "ActNorm", "gain": NAN},),
        "settings": {"seed": 0, "shape": (2, 3)},
    }
    return AuditResult("density", Verdict.STABLE, "right", **(fields | changes))


def test_nan_equals_nan_and_equal_results_have_equal_hashes():
    assert result() == result()
    assert hash(result()) == hash(result())
    assert len({result(), result()}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"uses": {}},
        {"values": {"max_error": 1e-6, "median_error": 0.0}},
        {"values": {"max_error": 1e-6}},
        {"per_sample": {"error": torch.tensor([1.0, 2.0])}},
        {"per_sample": {"error": torch.tensor([1.0, NAN, NAN])}},
        {"per_sample": {"error": torch.tensor([1.0, NAN], dtype=torch.float16)}},
        {"per_layer": ()},
        {"settings": {"seed": 1, "shape": (2, 3)}},
        {"measured_mask": {"error": torch.tensor([True, False])}},
        {"advice": "none"},
    ],
    ids=str,
)
def test_any_other_entry_makes_another_result(change):
    assert result() != result(**change)


def test_a_result_is_no_text():
    assert result() != "density"
    assert dataclasses.replace(result(), name="other") != result()


def test_the_repr_is_one_line_with_the_figures_that_decided():
    assert repr(result()) == "density: stable (max_error=1e-06)"
    assert repr(result(headline=())) == "density: stable (max_error=1e-06)"
    assert repr(AuditResult.not_applicable("a", "why")) == "a: not_applicable"
    # a headline whose figure could not be measured is left out
    assert repr(result(headline=("absent",))) == "density: stable"


def test_values_by_name():
    assert result()["max_error"] == 1e-6
    with pytest.raises(KeyError, match="no value 'error' in density; it has max_error, median"):
        result()["error"]


def test_some_rows_become_a_full_batch_with_a_mask():
    full = to_full_batch({"error": torch.tensor([0.5])}, torch.tensor([1]), 3)
    assert math.isnan(full["per_sample"]["error"][0])
    assert full["measured_mask"]["error"].tolist() == [False, True, False]
    everything = to_full_batch({"error": torch.ones(3)}, torch.arange(3), 3)
    assert everything["measured_mask"] == {}


def test_results_whose_figures_are_nan_are_equal():
    """Of two NaNs that are not the same object, too, which tuples of Python 3.12 would compare."""

    def result(figure: float) -> AuditResult:
        found = finding("undecided", figure, 0.1, "nats")
        return AuditResult("a", Verdict.UNDECIDED, "", uses={"density": found})

    assert result(float("nan")) == result(float("nan"))
    assert result(float("nan")) != result(1.0)
