"""The README and docs: examples run as they stand, what they point to exists, one page is short."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import inn_guard as ig
from inn_guard.cli.commands import app
from tests.docs.blocks import ROOT, blocks, pages

README = ROOT / "README.md"
#: runs the blocks of every page in a namespace of their own
PROGRAM = """
import contextlib, io, json, os, sys, traceback
answers = {}
for page, codes in json.load(sys.stdin).items():
    names, printed, error = {}, io.StringIO(), ""
    before = set(os.listdir())
    with contextlib.redirect_stdout(printed):
        try:
            for code in codes:
                exec(compile(code, page, "exec"), names)
        except Exception:
            error = traceback.format_exc()
    written = sorted(set(os.listdir()) - before)
    answers[page] = {"printed": printed.getvalue(), "error": error, "written": written}
print(json.dumps(answers))
"""


def name(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in pages() if blocks(page) and page.name != "CONTRIBUTING.md"]
by_page = pytest.mark.parametrize("page", pages(), ids=name)


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Page -> what its examples printed and, if one failed, its traceback."""
    folder = tmp_path_factory.mktemp("examples")
    jobs = {name(page): [_runnable(block, page) for block in blocks(page)] for page in WITH_CODE}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(jobs),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def _runnable(block, page):
    """The code, below empty lines so that tracebacks name the line; "" without its library."""
    if not all(importlib.util.find_spec(library) for library in block.needs):
        return ""
    return "\n" * (block.line - 1) + block.code


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
@pytest.mark.xdist_group("examples")
def test_the_examples_run(page, examples):
    """One after the other, as a reader would paste them, without those of absent libraries."""
    assert not examples[name(page)]["error"], examples[name(page)]["error"]


@by_page
def test_links_and_files_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    places = re.findall(r"`((?:inn_guard|benchmarks|tests|notebooks|docs|tools)/[\w/.]+)`", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    missing += [place for place in places if not _exists(place)]
    assert not missing


@by_page
def test_dotted_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(inn_guard(?:\.\w+)+)[`(]", text)):
        assert _resolves(name), name
    for name in set(re.findall(r"\big\.(\w+(?:\.\w+)*)", text)):
        assert _resolves(f"inn_guard.{name}"), f"ig.{name}"


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs" / "results").glob("*.md")), ids=lambda page: page.stem
)
def test_the_commands_of_results_name_scripts_and_their_flags(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:python -m benchmarks\.|inn-guard bench )([a-z]\w*\.\w+)(.*)", text)
    for name, arguments in commands:
        config = importlib.import_module(f"benchmarks.{name}").Config
        known = {"preset", "out"} | {field.name for field in dataclasses.fields(config)}
        flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", arguments)}
        assert flags <= known, name


@by_page
def test_shell_commands_name_commands_and_options_that_exist(page):
    commands = typer.main.get_command(app).commands
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    shell = "\n".join(re.findall(r"```(?:bash|yaml)\n(.*?)```", text, flags=re.DOTALL))
    for name, words in re.findall(r"(?:inn-guard|-m inn_guard) ([a-z]+)(.*)", shell):
        assert name in commands, name
        if name == "bench":
            continue  # every experiment has options of its own
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(--[a-z][a-z-]*)", words)) <= known, words


def test_the_readme_is_one_page():
    assert README.stat().st_size <= 10_000


def _shown(page: Path) -> str:
    """The output that a page shows after its example; "" if it shows none."""
    text = page.read_text(encoding="utf-8")
    shown = re.search(r"```python\n[^`]*```\n\n```text\n(.*?)```", text, flags=re.DOTALL)
    return shown.group(1) if shown else ""


@pytest.mark.parametrize("page", filter(_shown, WITH_CODE), ids=name)
@pytest.mark.xdist_group("examples")
def test_the_output_that_a_page_shows_is_what_its_example_prints(page, examples):
    """Figures may differ in their last digits from machine to machine; the words may not."""
    if page == README:
        pytest.importorskip("nflows")
    printed = examples[name(page)]["printed"]
    assert _words(printed) == _words(_shown(page)), f"paste into {name(page)}:\n{printed}"


def test_the_pages_with_output_are_known():
    """A change of the pattern above must not leave them out."""
    shown = {name(page) for page in filter(_shown, WITH_CODE)}
    assert {"README.md", "docs/checks/density.md", "docs/uses/density.md"} <= shown
    assert len(shown) >= 1 + len(ig.AUDITS) + len(ig.USES)


@pytest.mark.xdist_group("examples")
def test_the_readme_writes_its_report(examples):
    pytest.importorskip("nflows")
    assert examples["README.md"]["written"] == ["report.html"]


def test_the_readmes_picture_is_small():
    assert 0 < (ROOT / "docs" / "images" / "exploding_inverse.png").stat().st_size < 60_000


def test_the_page_of_library_failures_is_up_to_date():
    """If it fails: python docs/libraries.py."""
    libraries = script("libraries")
    assert libraries.PAGE.read_text(encoding="utf-8") == libraries.page()


def test_the_readme_names_every_check_with_its_level():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|$", README.read_text(encoding="utf-8"), re.M)
    levels = {name: level for name, level in rows if level in ("quick", "standard", "full")}
    assert levels == {name: str(check.level) for name, check in ig.AUDITS.items()}


def test_the_reference_documents_names_that_exist():
    sys.modules.pop("reference", None)
    reference = script("reference")
    for page, (_, modules) in reference.PAGES.items():
        if "inn_guard.training.lightning" in modules:
            continue  # imports lightning
        documented = reference.documented(page)
        assert documented
        for name in documented:
            assert _resolves(name), name
    public = {name.rsplit(".", 1)[1] for name in reference.documented("inn_guard")}
    assert public == set(ig.__all__)
    assert {name.rsplit(".", 1)[1] for name in reference.checks()} >= set(ig.AUDITS)


def _words(report: str) -> list[str]:
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", report).split()


def _exists(place: str) -> bool:
    """Of a file or folder; a name in capitals (LIB, SCRIPT) stands for any."""
    if re.search(r"[A-Z]{3,}", place.removesuffix(".md")):
        return True
    return (ROOT / place).exists() or (ROOT / f"{place}.ipynb").exists()


def _resolves(name: str) -> bool:
    """Whether imports and attributes reach a dotted name, wherever the module in it ends."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            found = getattr(found, part, None)
        if found is not None:
            return True
    return False
