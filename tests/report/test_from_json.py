"""What to_json writes, from_json reads: the same report, but for images."""

from __future__ import annotations

import json

import pytest
import torch

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.from_json import from_json
from inn_guard.report.html import render
from inn_guard.report.result import AuditResult, Verdict
from tests.report.examples import unstable_report

NAN = float("nan")


def test_everything_but_images_comes_back():
    report = unstable_report()
    back = from_json(report.to_json())
    assert back.verdict is report.verdict
    assert back.worst_layer == report.worst_layer
    assert back.to_json() == report.to_json()
    for old, new in zip(report.results, back.results, strict=True):
        assert new.images == {}
        for name, values in old.per_sample.items():
            torch.testing.assert_close(
                new.per_sample[name], values.double(), rtol=0, atol=0, equal_nan=True
            )


def test_nan_and_inf_survive_and_are_numbers_again():
    result = AuditResult(
        "a",
        Verdict.NON_FINITE,
        "inf",
        values={"nan": float("nan"), "inf": float("inf"), "low": float("-inf")},
        per_sample={"e": torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-310])},
        per_layer=({"gain": float("inf"), "layer": "inf net"},),
        tables={"t": ({"error": float("nan")},)},
        settings={"limit": float("inf")},
    )
    (back,) = from_json(AuditReport((result,), "m").to_json()).results
    assert str(dict(back.values)) == "{'nan': nan, 'inf': inf, 'low': -inf}"
    assert str(back.per_sample["e"].tolist()) == str(result.per_sample["e"].double().tolist())
    assert back.per_layer[0]["gain"] == float("inf")
    assert back.per_layer[0]["layer"] == "inf net"
    assert str(back.tables["t"][0]["error"]) == "nan"
    assert back.settings["limit"] == float("inf")
    assert back.reason == "inf"


def test_which_samples_were_examined_comes_back():
    mask = torch.tensor([True, False])
    result = AuditResult(
        "a",
        Verdict.STABLE,
        "",
        per_sample={"e": torch.tensor([1.0, NAN])},
        measured_mask={"e": mask},
    )
    (back,) = from_json(AuditReport((result,), "m").to_json()).results
    assert torch.equal(back.measured_mask["e"], mask)


def test_a_saved_report_can_be_shown():
    assert "layer 11 (AffineCoupling)" in render(from_json(unstable_report().to_json()))


GOOD = json.loads(unstable_report(samples=4, layers=2).to_json())


def broken(**changes):
    content = json.loads(json.dumps(GOOD))
    content["results"][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "NaN",
        "[" * 100_000,
        '{"results": 1, "model": "m"}',
        '{"results": [3], "model": "m"}',
        '{"results": [], "model": "m", "settings": [1]}',
        broken(verdict="excellent"),
        broken(verdict=None),
        broken(reason=3),
        broken(values=[1]),
        broken(values={"a": "<script>"}),
        broken(values={"a": True}),
        broken(values={"a": 10**400}),
        broken(per_sample={"a": [1, [2]]}),
        broken(per_sample={"a": [None]}),
        broken(per_sample={"a": {}}),
        broken(measured_mask={"a": [1, 0]}),
        broken(per_layer={"a": 1}),
        broken(per_layer=[1]),
        broken(tables={"a": 1}),
    ],
    ids=lambda text: text[:24],
)
def test_anything_else_is_refused_in_words(text):
    with pytest.raises(ValueError, match=r"expected a (saved report|report saved|verdict)"):
        from_json(text)
