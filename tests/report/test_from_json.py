"""What to_json writes, from_json reads: the same report, but for images."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

import inn_guard as ig
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.from_json import from_json, load
from inn_guard.report.html import render
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from tests.cases.toys import random_chain
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
        per_layer=({"index": 4, "gain": float("inf"), "name": "inf net"},),
        tables={"t": ({"error": float("nan")},)},
        settings={"limit": float("inf")},
    )
    (back,) = from_json(AuditReport((result,), "m").to_json()).results
    assert str(dict(back.values)) == "{'nan': nan, 'inf': inf, 'low': -inf}"
    assert str(back.per_sample["e"].tolist()) == str(result.per_sample["e"].double().tolist())
    assert back.per_layer[0]["gain"] == float("inf")
    assert back.per_layer[0]["name"] == "inf net"
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
    assert "layer 23 (Squeeze)" in render(from_json(unstable_report().to_json()))


GOOD = json.loads(unstable_report(samples=4, layers=2).to_json())


FINDING = GOOD["results"][0]["uses"]["density"]


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
        '{"schema": 1, "results": [], "model": "m"}',
        '{"schema": true, "results": [], "model": "m"}',
        '{"schema": 2, "results": 1, "model": "m"}',
        '{"schema": 2, "results": [3], "model": "m"}',
        '{"schema": 2, "results": [], "model": "m", "settings": [1]}',
        '{"schema": 2, "results": [], "model": "m", "advice": [1]}',
        '{"schema": 2, "results": [], "model": "m", "advice": [], "counted": [1]}',
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
        broken(advice=3),
        broken(headline="max_error"),
        broken(units={"a": 1}),
        broken(uses={"likelihood": {}}),
        broken(uses={"density": {"verdict": "fine"}}),
        broken(uses={"density": {**FINDING, "figure": "large"}}),
        broken(uses={"density": {**FINDING, "samples": True}}),
    ],
    ids=lambda text: text[:24],
)
def test_anything_else_is_refused_in_words(text):
    with pytest.raises(ValueError, match=r"expected (a saved report|a report saved)"):
        from_json(text)


def test_another_schema_is_refused_with_the_remedy():
    content = {**GOOD, "schema": 3}
    with pytest.raises(ValueError, match="schema 3: read it with the version of inn_guard that"):
        from_json(json.dumps(content))


def test_a_report_made_by_hand_may_leave_out_what_counts():
    content = {**GOOD, "counted": None, "asked": None}
    back = from_json(json.dumps(content))
    assert back.counted is None
    assert back.asked is None


def test_findings_come_back():
    back = from_json(unstable_report().to_json())
    assert back.uses == unstable_report().uses


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="got no text"):
        load(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("[1]")
    monkeypatch.setattr("inn_guard.report.from_json.MAX_BYTES", 2)
    with pytest.raises(ValueError, match="at most 2 characters, got more"):
        load(tmp_path / "r.json")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.json")


#: what a damaged file may hold in place of anything
STRAY = (
    *(None, True, 0, -1, 1e308, 10**400, "", "nan", "inf", "x" * 200, "<script>", "\ud800"),
    *([], {}, [1, 2], [[1], [2, 3]], {"a": 1}, {"a": [1]}, [None], ["nan"], [{}], [{"index": "x"}]),
)


def places(node: object, prefix: tuple = ()) -> list[tuple]:
    """The paths to everything inside a JSON document; of a long list to its first entries."""
    found = [prefix] if prefix else []
    if isinstance(node, dict):
        for key in node:
            found += places(node[key], (*prefix, key))
    elif isinstance(node, list):
        for k in range(min(len(node), 3)):
            found += places(node[k], (*prefix, k))
    return found


def damaged(document: dict, rng: random.Random) -> str:
    """The document with one to four of its values replaced, removed or cut."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        path = rng.choice(places(document))
        *above, last = path
        node: Any = document
        for key in above:
            node = node[key]
        deed = rng.random()
        if deed < 0.6:
            node[last] = rng.choice(STRAY)
        elif deed < 0.8:
            del node[last]
        elif isinstance(node[last], list):
            node[last] = node[last][: len(node[last]) // 2]
    return json.dumps(document)


def check_damaged(seeds: range, report: AuditReport) -> None:
    """Either refused by a ValueError, or shown in every way."""
    text = report.to_json()
    for seed in seeds:
        try:
            read = from_json(damaged(json.loads(text), random.Random(seed)))
        except ValueError:
            continue
        for show in (str, repr, AuditReport.details, AuditReport.to_markdown, AuditReport.to_json):
            show(read)
        if seed % 10 == 0:
            render(read)


def test_a_damaged_report_is_refused_or_shown():
    check_damaged(range(40), unstable_report(samples=4, layers=3))


@pytest.mark.thorough
def test_many_damaged_reports_are_refused_or_shown():
    model, x = random_chain(), torch.randn(8, 6)
    check_damaged(range(1000), ig.audit(model, x, level="full"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"settings": {"samples": [1, 2]}}, "number"),
        ({"settings": {"rate_limit": "inf"}}, "rate_limit"),
        ({"tables": {"looks": [{"draws": 3}]}}, "column 'lost'"),
        ({"tables": {"looks": [dict.fromkeys(("draws", "lost", "rate_low"), 1)]}}, "rate_high"),
        ({"per_layer": [{"gain": [1, 2]}]}, r"got `array` - at `\$.results\[0\].per_layer\[0\]"),
        ({"per_layer": [{"gain": 10**30}]}, "<= 1000000000000000000"),
        ({"uses": {"density": {**FINDING, "figure": "large"}}}, "'large' - at"),
    ],
)
def test_what_could_not_be_drawn_is_refused(change, match):
    document = json.loads(unstable_report(samples=4, layers=3).to_json())
    document["results"][0] |= change
    with pytest.raises(ValueError, match=match):
        from_json(json.dumps(document))
