"""The page: complete, escaped, and sufficient unto itself."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.formatting import sentence
from inn_guard.report.html import render, write_html
from inn_guard.report.result import AuditResult, Verdict
from tests.report.examples import unstable_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, visible text, and whether every tag is closed by its own kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


EVIL = '<script>alert("x")</script><img src=https://evil.example/a.png onerror=alert(1)>'


def evil_report():
    return AuditReport(
        (
            AuditResult(
                EVIL, Verdict.UNSTABLE, EVIL, values={EVIL: 1.0}, units={EVIL: EVIL},
                per_sample={EVIL: torch.tensor([1.0, 2.0])}, per_layer=({"layer": EVIL, EVIL: 3.0, "kind": EVIL},),
                tables={EVIL: ({EVIL: EVIL},)}, settings={EVIL: EVIL, "worst_layer": EVIL}, advice=EVIL,
                images={EVIL: torch.rand(1, 1, 2, 2)},
            ),
        ),
        model=EVIL,
        settings={EVIL: [EVIL, {EVIL: EVIL}]},
    )  # fmt: skip


@pytest.mark.parametrize("make", [unstable_report, evil_report, lambda: AuditReport(())])
def test_the_page_fetches_nothing_and_runs_nothing(make):
    text = render(make())
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "audio",
    }
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    policy = next(
        meta for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy["content"].startswith("default-src 'none'")


def test_hostile_names_are_shown_as_text():
    page = Page(render(evil_report()))
    assert page.text.count('alert("x")') > 8
    assert len(page.of("img")) == 1


def test_no_address_is_in_an_ordinary_page():
    assert not re.search(
        r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", render(unstable_report()))
    )


def test_everything_measured_is_on_the_page():
    report = unstable_report()
    text = Page(render(report)).text
    for result in report.results:
        assert sentence(result.reason) in text
        assert sentence(result.advice) in text
        for unit in result.units.values():
            assert unit in text
    assert "layer 11 (AffineCoupling)" in text
    assert "Not finite" in text
    assert "NaN" in text
    assert "Inf" in text
    assert "1 of 64 is NaN, 1 of 64 is infinite" in text
    assert "How it was measured" in text
    assert "float16" in text


def test_links_lead_to_sections_and_ids_are_unique():
    page = Page(render(unstable_report()))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} == {f"audit-{index}" for index in range(5)}
    assert {f"audit-{index}" for index in range(5)} <= set(ids)


def test_headline_follows_the_verdict():
    def headline(verdict):
        page = render(AuditReport((AuditResult("a", verdict, "why"),), "m"))
        return re.search(r'class="verdict (\w+)"', page).group(1)

    assert [headline(verdict) for verdict in Verdict] == [verdict.label for verdict in Verdict]


def test_stable_and_empty_reports_say_so():
    stable = Page(render(AuditReport((AuditResult("a", Verdict.STABLE, "fine"),), "m"))).text
    assert "No audit found a fault." in stable
    assert "Nothing is needed." in stable
    empty = Page(render(AuditReport(()))).text
    assert "No audit was run." in empty
    assert "Nothing is needed." not in empty


def test_unknown_audits_are_shown_in_full():
    result = AuditResult(
        "from_the_future", Verdict.STABLE, "new", values={"depth": 3.5}, per_sample={"angle": torch.rand(5)},
        per_layer=({"slope": 1.0}, {"slope": 2.0}), tables={"attacks": ({"kind": "pgd", "error": 0.125},)},
    )  # fmt: skip
    page = Page(render(AuditReport((result,))))
    assert len(page.of("svg")) == 2
    for shown in ("From the future", "Depth", "3.5", "Attacks", "pgd", "0.125", "Slope"):
        assert shown in page.text


@pytest.mark.parametrize(
    ("largest", "shown"), [(10.0, "Condition number"), (float("inf"), "Log10 condition number")]
)
def test_of_a_quantity_and_its_logarithm_the_one_that_fits_is_drawn(largest, shown):
    values = torch.tensor([1.0, largest])
    measured = {"condition_number": values, "log10_condition_number": torch.tensor([0.0, 400.0])}
    page = render(AuditReport((AuditResult("a", Verdict.STABLE, "fine", per_sample=measured),)))
    assert re.findall(r"<h4>(.*?)</h4>", page) == [shown]


def test_whole_spectra_have_their_plot():
    spectra = {"singular_values": torch.rand(2, 9)}
    page = render(
        AuditReport((AuditResult("full_spectrum", Verdict.STABLE, "fine", per_sample=spectra),))
    )
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["Whole spectrum"]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4), ()])
def test_per_sample_tensors_of_odd_shapes_do_no_harm(shape):
    result = AuditResult("a", Verdict.STABLE, "fine", per_sample={"odd": torch.zeros(shape)})
    assert "Fine." in render(AuditReport((result,)))


def test_page_is_written_whole(tmp_path):
    report = unstable_report()
    write_html(report, tmp_path / "page.html")
    report.to_html(tmp_path / "same.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text == render(report) == (tmp_path / "same.html").read_text(encoding="utf-8")


def test_absent_libraries_are_named_with_the_remedy():
    code = (
        "import sys, importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'jinja2' else f(n, *a); import inn_guard.report"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stderr.splitlines()[-1]
        == "ImportError: reports need jinja2; type: pip install inn_guard[report]"
    )


def test_what_was_not_examined_reads_like_no_finding():
    """A dash for a cell without a number, and no NaN in the caption of a quantity of some samples."""
    nan = float("nan")
    rows = ({"arithmetic": "float16", "error": None}, {"arithmetic": "float32", "error": 0.5})
    result = AuditResult(
        "a", Verdict.STABLE, "fine", tables={"t": rows},
        per_sample={"error": torch.tensor([0.1, nan, nan])}, measured_mask={"error": torch.tensor([True, False, False])},
    )  # fmt: skip
    page = render(AuditReport((result,)))
    assert 'title="not examined">—</td>' in page
    assert "Not examined: 2 of 3 samples of the batch." in page
    assert "NaN" not in page
