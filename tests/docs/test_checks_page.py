"""The pages of checks and uses: their figures are those of the code, their output is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import inn_guard as ig
from inn_guard.audits import (
    log_det,
    preflight,
    rare_event_sampling,
    sampling,
    shadowing,
)
from inn_guard.audits.dequantization_attack import SpectralAscent, sign_ascent
from inn_guard.audits.level import Level
from inn_guard.audits.out_of_distribution import audit as other_inputs
from inn_guard.audits.reach import STRETCHES
from inn_guard.audits.registry import AUDITS
from inn_guard.audits.solver_settings import HELPS
from inn_guard.jacobian.shadowing import NEWTON_STEPS
from inn_guard.report.uses import USES

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text("utf-8") for path in (DOCS / "checks").glob("*.md")}
TEXT = re.sub(r"\s+", " ", " ".join(PAGES.values()))
LIMITS = ig.Limits()
LOOKS = sampling.LOOKS
RARE = AUDITS["rare_event_sampling"].all_settings()
NUMBERS = {2: "two", 5: "five"}
FRACTIONS = {0.1: "tenth", 0.5: "half"}


def setting(check: str, name: str) -> int:
    return AUDITS[check].all_settings()[name]


@pytest.mark.parametrize(
    "sentence",
    [
        f"On {preflight.SAMPLES} samples",
        f"{LIMITS.density:g} nats for the worst sample",
        f"{LIMITS.sampling:g} for the rate of lost draws; the {LIMITS.confidence:.0%}"
        " Clopper".replace("%", " %"),
        f"after {LOOKS[Level.QUICK][0]:,} and {LOOKS[Level.QUICK][1]:,} draws, at level full also"
        f" after {LOOKS[Level.FULL][2]:,}",
        f"{LIMITS.reconstruction:g}, or 8 eps",
        f"decomposed up to D = {log_det.DENSE[Level.QUICK]:,} ({log_det.DENSE[Level.FULL]:,} at",
        f"for {log_det.USUAL} to {log_det.MOST} samples",
        f"of at least {log_det.LEAST} samples",
        f"{LIMITS.gradient_angle:g} degree and {LIMITS.gradient_length:g}",
        f"more than {other_inputs.BITS:g} bits per dimension",
        f"along {other_inputs.DIRECTIONS} random directions",
        f"a round trip of {setting('out_of_distribution', 'samples')} samples for each family",
        f"{4 * setting('jacobian_spectrum', 'max_steps')} products of"
        f" {setting('jacobian_spectrum', 'samples')} samples",
        f"D products of {setting('full_spectrum', 'samples')} samples",
        f"with {RARE['particles']:,} particles: the best {FRACTIONS[rare_event_sampling.KEPT]} of",
        f"{NUMBERS[RARE['moves']]} times, down to a rate of "
        f"{rare_event_sampling.KEPT ** RARE['levels']:.0e}".replace("e-0", "e-"),
        f"The mean of {NUMBERS[RARE['repeats']]} runs is given",
        f"In up to {rare_event_sampling.TEMPERED_DIMENSIONS} dimensions weighted draws of"
        f" temperature {rare_event_sampling.TEMPERATURE}",
        f"more than a factor of {rare_event_sampling.DISAGREEMENT:g} is said",
        f"at most {RARE['repeats'] * RARE['particles'] * (1 + RARE['moves'] * RARE['levels']):,}"
        " round trips",
        f"Up to D = {shadowing.MAX_DIMENSION}, below float64, of {shadowing.MAX_SAMPLES} orbits",
        f"{LIMITS.draw:g} of the size of a state",
        f"of {setting('shadowing', 'draws'):,} draws, and {NEWTON_STEPS + 1} D products of"
        f" {setting('shadowing', 'samples')} samples",
        f"{SpectralAscent().budget:g} forward passes of"
        f" {setting('dequantization_attack', 'samples')} samples",
        f"after each {FRACTIONS[sign_ascent.STAGE]} of the budget",
        f"{setting('lipschitz_bounds', 'seconds'):g} seconds of work on one slow core",
        f"up to {STRETCHES[-1]:,.0f} times as far from their centre",
        f"were measured to fall to {FRACTIONS[1 / HELPS]} or less".replace("were", "was"),
    ],
)
def test_a_figure(sentence):
    assert sentence.replace("95%", "95 %") in TEXT


def test_every_check_has_a_page_with_its_question_level_and_uses():
    assert set(PAGES) == set(AUDITS)
    index = (DOCS / "checks.md").read_text("utf-8")
    for name, check in AUDITS.items():
        page = PAGES[name]
        assert page.startswith(f"# {name}\n\n*{check.question}*\n\nLevel {check.level}. ")
        decided = "Decides no use"
        for use in check.uses:
            decided = f"Decides `{use}`"
        assert decided in page
        uses = ", ".join(f"`{use}`" for use in check.uses)
        row = f"| [{name}](checks/{name}.md) | {check.question} | {check.level} | {uses} |"
        assert re.sub(r" +", " ", row) in index


def test_every_use_has_a_page_with_its_question():
    pages = {path.stem: path.read_text("utf-8") for path in (DOCS / "uses").glob("*.md")}
    assert set(pages) == set(USES)
    for name, question in USES.items():
        assert f"*{question}* The use `{name}`." in pages[name]


@pytest.mark.parametrize("folder", ["checks", "uses"])
def test_every_page_has_the_same_parts(folder):
    parts = {"checks": ["What is measured", "Limit"], "uses": ["Figure", "Limit, and why"]}
    for path in (DOCS / folder).glob("*.md"):
        found = re.findall(r"^## (.*)$", path.read_text("utf-8"), flags=re.MULTILINE)
        first = [part for part in found if part not in ("Example", "What to do")]
        assert set(first) <= set(parts[folder]), path
        assert found[-2:] == ["Example", "What to do"], path


def test_the_site_leads_to_every_page():
    """Pages of libraries are added by docs/pages.py."""
    site = (DOCS.parent / "mkdocs.yml").read_text("utf-8")
    linked = set(re.findall(r": (\S+\.md)$", site, flags=re.MULTILINE))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    notebooks = {
        f"notebooks/{path.stem}.md" for path in (DOCS.parent / "notebooks").glob("*.ipynb")
    }
    own = {page for page in pages if not page.startswith("guides/libraries/")}
    assert own | notebooks <= linked
