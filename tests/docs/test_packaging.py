"""What is shipped: a wheel and an sdist with the package; the wheel needs no optional library."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = (
    "pyproject.toml",
    "pytest_inn_guard.py",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "CITATION.cff",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
)
BUILD = """
import sys, setuptools.build_meta as backend
folder = sys.argv[1]  # the backend changes sys.argv
backend.build_wheel(folder), backend.build_sdist(folder)
"""
SERIAL = """
import importlib.abc, sys

OPTIONAL = set(sys.argv[1].split(","))
tried = []


class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in OPTIONAL:
            tried.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import torch
import inn_guard as ig

assert ig.__file__.startswith(sys.argv[2]), ig.__file__
model = ig.wrap(encode=lambda x: 2 * x, decode=lambda z: z / 2)
report = ig.audit(model, torch.randn(4, 3), checks=["reconstruction", "jacobian_spectrum"])
assert report.verdict is ig.Verdict.STABLE, str(report)
report.to_json(sys.argv[2] + "/report.json")
assert not {name.partition(".")[0] for name in sys.modules} & OPTIONAL
for write, extra in ((report.to_frame, "report"), (lambda: report.to_html("x.html"), "report")):
    try:
        write()
    except ImportError as error:
        assert any(name in str(error) for name in ("pandas", "matplotlib", "jinja2")), error
    else:
        raise AssertionError("no error without the optional libraries")
print("works")
"""
#: not jinja2 and mpmath, which torch itself imports
OPTIONAL = (
    "nflows,FrEIA,normflows,zuko,memcnn,sbi,lightning,pandas,matplotlib,typer,torchdiffeq,sklearn,"
    "safetensors,PIL,beartype,hypothesis,pytest"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist of a copy of the sources: builds leave folders behind."""
    folder = tmp_path_factory.mktemp("package")
    source, out = folder / "source", folder / "out"
    out.mkdir()
    shutil.copytree(
        ROOT / "inn_guard", source / "inn_guard", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in SHIPPED:
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_module_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "inn_guard").rglob("*")
        if path.suffix in (".py", ".html", ".css", ".typed")
    }
    here.add("pytest_inn_guard.py")
    assert {name for name in names if ".dist-info/" not in name} == here
    metadata = (
        zipfile.ZipFile(built[0]).read(next(n for n in names if n.endswith("METADATA"))).decode()
    )
    assert "License-Expression: MIT" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_a_reader_wants(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(SHIPPED) <= names
    assert {"inn_guard/__init__.py", "inn_guard/report/report.html", "inn_guard/py.typed"} <= names


def test_the_wheel_audits_without_any_optional_library(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    answer = subprocess.run(
        [sys.executable, "-c", SERIAL, OPTIONAL, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.stdout.splitlines()[-1:] == ["works"], answer.stderr


def test_the_conda_recipe_needs_what_the_package_needs():
    """conda calls torch pytorch; requirements are otherwise written alike, with one space more."""
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", project, flags=re.M | re.S).group(1)
    names = [line.strip().strip('",').replace(">=", " >=") for line in needed.splitlines()]
    recipe = (ROOT / "conda" / "meta.yaml").read_text()
    run = recipe.partition("  run:\n")[2].partition("\n\n")[0].splitlines()
    wanted = ["python >=3.10", *(name.replace("torch ", "pytorch ") for name in names)]
    assert [line.strip().removeprefix("- ") for line in run] == wanted


def test_commits_are_checked_by_the_ruff_of_the_tests():
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_makefile_installs_the_extra_of_the_docs():
    """`make docs` installs these names without the package, which would bring torch."""
    project = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^docs = \[(.*)\]$", project, flags=re.M).group(1).replace(",", "")
    assert f"install --quiet {extra}  # the extra docs" in (ROOT / "Makefile").read_text()


def test_citation_changelog_and_package_agree_on_the_version():
    import inn_guard

    assert f"{{{inn_guard.__version__}}}" in (ROOT / "docs" / "cite.md").read_text()
    assert f'version: "{inn_guard.__version__}"' in (ROOT / "conda" / "meta.yaml").read_text()

    assert f"version: {inn_guard.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {inn_guard.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{inn_guard.__version__}"' in (ROOT / "pyproject.toml").read_text()
