"""The page: complete, escaped, and sufficient unto itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.formatting import sentence
from inn_guard.report.html import render, write_html
from inn_guard.report.result import AuditResult
from inn_guard.report.sections import drawings
from inn_guard.report.verdict import Verdict
from tests.report.examples import finding, one_result_report, unstable_report

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
    found = finding("unstable", 1.0, 0.1, EVIL, reason=EVIL)
    result = AuditResult(
        EVIL,
        Verdict.UNSTABLE,
        EVIL,
        uses={"density": found},
        values={EVIL: 1.0},
        units={EVIL: EVIL},
        per_sample={EVIL: torch.tensor([1.0, 2.0])},
        per_layer=({"index": EVIL, "name": EVIL, EVIL: 3.0, "kind": EVIL},),
        tables={EVIL: ({EVIL: EVIL, "verdict": EVIL},)},
        settings={EVIL: EVIL, "worst_layer": EVIL, "lowest": f"density {EVIL}"},
        advice=EVIL,
        images={EVIL: torch.rand(1, 1, 2, 2)},
    )
    return AuditReport(
        (result,),
        model=EVIL,
        settings={EVIL: [EVIL, {EVIL: EVIL}], "date": EVIL, "level": EVIL},
        counted={"density": EVIL},
        advice=(f"{EVIL}\n{EVIL}",),
    )


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
    assert page.of("img") == []
    assert len(page.of("image")) == 1


def test_no_address_is_in_an_ordinary_page():
    assert not re.search(
        r"https?:|//[a-z]", re.sub(r"base64,[^\"]*", "", render(unstable_report()))
    )


def test_everything_measured_is_on_the_page():
    report = unstable_report()
    text = Page(render(report)).text
    for result in report.results:
        assert sentence(result.reason) in text
        for unit in result.units.values():
            assert unit in text
    for shown in ("layer 23 (Squeeze)", "not finite", "NaN", "Inf", "How it was measured"):
        assert shown in text
    assert "1 of 64 is NaN, 1 of 64 is infinite" in text
    assert "float16" in text


def test_the_advice_is_a_list_with_code_and_stands_once():
    page = render(unstable_report())
    assert "<pre><code>ig.RegularizerHook(flow, [ig.FiniteDifferences(1.0)])</code></pre>" in page
    assert page.count("Bound the scales of layer 23.") == 1
    assert "Lower the condition number" not in page


def test_without_advice_of_the_report_that_of_the_failed_checks_is_shown():
    failed = AuditResult("a", Verdict.UNSTABLE, "off", advice="Use float64.")
    sound = AuditResult("b", Verdict.STABLE, "fine", advice="Never shown.")
    text = Page(render(AuditReport((failed, sound)))).text
    assert "Use float64." in text
    assert "Never shown." not in text


def test_uses_come_first_the_failing_ones_before_the_others():
    page = render(unstable_report())
    cards = re.findall(r'<article class="use (\w+)">.*?<h3>(.*?)</h3>', page, re.DOTALL)
    assert cards == [("non_finite", "Reconstruction"), ("stable", "Density")]
    assert page.index("<article") < page.index('<details class="check')
    text = Page(page).text
    assert "3.1×10⁻¹³ nats" in " ".join(text.split())
    assert "limit 0.1" in text


def test_failing_checks_are_open_and_come_first_and_sound_ones_are_folded():
    page = render(unstable_report())
    found = re.findall(r'<details class="check (\w+)"( open)?>', page)
    labels = ["non_finite", "unstable", "unstable", "stable", "not_applicable"]
    assert [label for label, _ in found] == labels
    assert [bool(opened) for _, opened in found] == [True, True, True, False, False]


def test_a_failing_check_of_a_use_that_does_not_count_is_folded():
    found = finding("unstable", 1.0, 0.0, "of the families fail")
    check = AuditResult("a", Verdict.UNSTABLE, "", uses={"other_inputs": found})
    page = render(AuditReport((check,), counted={}))
    assert '<details class="check unstable">' in page
    assert "100 % <span" in page
    assert "Not counted." in page


@pytest.mark.parametrize(
    ("figure", "place"), [(0.1, "50.0"), (0.0, "0.0"), (float("inf"), "100.0"), (1e-4, "25.0")]
)
def test_the_bar_of_a_use_has_the_limit_in_its_middle(figure, place):
    found = finding("stable", figure, 0.1, "nats")
    check = AuditResult("density", Verdict.STABLE, "", uses={"density": found})
    assert f'<i style="left: {place}%">' in render(AuditReport((check,)))


def test_links_lead_to_sections_and_ids_are_unique():
    page = Page(render(unstable_report()))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"][1:] for link in page.of("a")}
    assert targets <= set(ids)
    assert targets == {"uses", "advice", "settings", *(f"check-{index}" for index in range(5))}


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_banner_follows_the_verdict(verdict):
    page = render(one_result_report(verdict))
    assert re.search(r'class="verdict (\w+)"', page).group(1) == verdict.label


def test_stable_and_empty_reports_say_so():
    stable = Page(render(one_result_report())).text
    assert "No check that decides a use was run." in stable
    assert "What to do" not in stable
    assert "No check was run." in Page(render(AuditReport(()))).text


def test_layers_are_numbered_by_their_own_index():
    """The rows of layer_blame have the indices 1, 3, ..., 31: no figure or table may renumber."""
    page = render(unstable_report())
    drawn = set(re.findall(r">(\d+)  (?:ActNorm|Squeeze|AffineCoupling|Invertible)", page))
    assert drawn == {str(index) for index in range(1, 32, 2)}
    assert re.search(r'<td class="number">31</td><td class="">Squeeze</td>', page)


def test_unknown_checks_are_shown_in_full():
    rows = ({"index": 4, "name": "a", "slope": 1.0}, {"index": 6, "name": "b", "slope": 2.0})
    result = AuditResult(
        "from_the_future",
        Verdict.STABLE,
        "new",
        values={"depth": 3.5},
        per_sample={"angle": torch.rand(5)},
        per_layer=rows,
        tables={"attacks": ({"kind": "pgd", "error": 0.125},)},
    )
    page = Page(render(AuditReport((result,))))
    assert len(page.of("svg")) == 2
    for shown in ("From the future", "Depth", "3.5", "Attacks", "pgd", "0.125", "Slope"):
        assert shown in page.text


def test_families_have_colours_and_stand_open():
    rows = (
        {"family": "noise", "verdict": "not invertible", "decides": "yes", "max_error": 3.0},
        {"family": "constant", "verdict": "passes", "decides": "yes", "max_error": 1e-6},
        {"family": "scale x 10", "verdict": "not finite", "decides": "no", "max_error": None},
    )
    result = AuditResult(
        "out_of_distribution",
        Verdict.UNSTABLE,
        "",
        tables={"families": rows},
        settings={"limit": 0.01},
    )
    page = render(AuditReport((result,)))
    assert "<details open>\n    <summary>Families: 3 rows</summary>" in page
    assert '<td class="tone unstable">not invertible</td>' in page
    assert '<td class="tone stable">passes</td>' in page
    assert '<td class="tone non_finite">not finite</td>' in page


def test_the_lowest_precision_of_each_use_is_a_table():
    result = AuditResult(
        "precision", Verdict.STABLE, "", settings={"lowest": "density bfloat16, sampling none"}
    )
    page = render(AuditReport((result,)))
    assert "<summary>Lowest precision: 2 rows</summary>" in page
    assert '<td class="">density</td><td class="">bfloat16</td>' in page
    assert '<td class="">sampling</td><td class="">none</td>' in page


LIMITS = {
    "density": {"per_sample": {"error": torch.tensor([1e-6, 1.0])}, "settings": {"limit": 0.1}},
    "log_det": {"per_sample": {"error": torch.tensor([1e-6, 1.0])}, "settings": {"limit": 0.1}},
    "reconstruction": {
        "per_sample": {"relative_error": torch.tensor([1e-6, 1.0])},
        "settings": {"limit": 0.1},
    },
    "gradient_angle": {
        "per_layer": ({"index": 3, "name": "a", "angle": 2.0},),
        "settings": {"angle_limit": 0.1},
    },
    "sampling": {
        "tables": {"looks": ({"draws": 10, "lost": 1, "rate_low": 0.01, "rate_high": 0.3},)},
        "settings": {"rate_limit": 0.001},
    },
    "out_of_distribution": {
        "tables": {"families": ({"family": "noise", "max_error": 3.0},)},
        "settings": {"limit": 0.1},
    },
}


@pytest.mark.parametrize("name", LIMITS)
def test_figures_that_a_limit_decides_show_it(name):
    result = AuditResult(name, Verdict.UNSTABLE, "", **LIMITS[name])
    (figure,) = drawings(result)
    assert "limit 0.1" in figure.markup
    assert figure.see.endswith(".")
    assert figure.title


@pytest.mark.parametrize(
    ("largest", "shown"), [(10.0, "Condition number"), (float("inf"), "Log10 condition number")]
)
def test_of_a_quantity_and_its_logarithm_the_one_that_fits_is_drawn(largest, shown):
    values = torch.tensor([1.0, largest])
    measured = {"condition_number": values, "log10_condition_number": torch.tensor([0.0, 400.0])}
    page = render(one_result_report(per_sample=measured))
    assert re.findall(r"<h4>(.*?)</h4>", page) == [shown]


def test_whole_spectra_have_their_plot():
    spectra = {"singular_values": torch.rand(2, 9)}
    page = render(
        AuditReport((AuditResult("full_spectrum", Verdict.STABLE, "fine", per_sample=spectra),))
    )
    assert re.findall(r"<h4>(.*?)</h4>", page) == ["All singular values"]


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


def test_what_was_not_examined_reads_like_no_finding():
    """A cell without a number has a dash; a quantity of some samples has no NaN in its caption."""
    nan = float("nan")
    rows = ({"kind": "float16", "error": None}, {"kind": "float32", "error": 0.5})
    page = render(
        one_result_report(
            tables={"t": rows},
            per_sample={"error": torch.tensor([0.1, nan, nan])},
            measured_mask={"error": torch.tensor([True, False, False])},
        )
    )
    assert 'title="not examined">—</td>' in page
    assert "Not examined: 2 of 3 samples of the batch." in page
    assert "NaN" not in page
