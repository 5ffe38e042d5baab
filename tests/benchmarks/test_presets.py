"""Every experiment runs in its smallest size, and the tables of experiments agree."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.common import experiments
from benchmarks.common.experiments import EXPERIMENTS
from benchmarks.common.runner import preset
from inn_guard.cli.commands import app

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = {
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks").glob("*/*.py")
    if "\nPRESETS = " in path.read_text(encoding="utf-8")
}

#: one or two of many cases of a kind, where each takes seconds
FEWER_CASES = {
    "aef.against_vae": ["--models", "AEF linear,AEF center"],
    "aef.curves": ["--models", "VAE,AEF spread"],
    "injflow.table1": ["--models", "VAE,InjFlow"],
    "performance.scale": ["--sides", "8"],
}

#: experiments that take about a second; the others run under ``make thorough``
QUICK = {
    "attacks.step_cost",
    "census.census",
    "exploding_inverses.regularizer_cost",
    "exploding_inverses.toy_regression",
    "lipschitz.depth",
    "lipschitz.soundness",
    "performance.extremes",
    "performance.full_jacobian",
    "performance.ill_conditioned",
}


@pytest.fixture(autouse=True)
def _as_on_the_command_line(monkeypatch, tmp_path):
    """float32, and unfinished rows in a folder of their own."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def test_every_script_is_in_the_table_and_the_table_in_the_readme():
    assert sorted(one.name for one in EXPERIMENTS) == sorted(SCRIPTS)
    assert len({one.stem for one in EXPERIMENTS}) == len(EXPERIMENTS)
    assert experiments.readme_table() in (ROOT / "benchmarks" / "README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "one", [one for one in EXPERIMENTS if one.reference], ids=lambda one: one.name
)
def test_the_papers_numbers_are_there(one):
    assert len(one.published()) > 1


def quick_ones_first():
    for one in EXPERIMENTS:
        marks = [] if one.name in QUICK else [pytest.mark.thorough]
        yield pytest.param(one, id=one.name, marks=marks)


@pytest.mark.parametrize("one", quick_ones_first())
def test_smoke(one, tmp_path):
    config = preset(one.module, "smoke")
    assert dataclasses.is_dataclass(config)
    assert type(config).__dataclass_params__.frozen
    words = ["bench", one.name, "--preset", "smoke", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, *FEWER_CASES.get(one.name, [])])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / f"{one.stem}_smoke.csv")
    assert len(frame) > 0
    assert not frame.columns.duplicated().any()
    written = json.loads((tmp_path / f"{one.stem}_smoke.json").read_text())
    assert set(written["config"]) == {field.name for field in dataclasses.fields(config)}
    assert written["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (tmp_path / f"{one.stem}_smoke.png").exists() == hasattr(one.module, "draw")
    assert ("paper's numbers" in done.stdout) == bool(one.reference)


@pytest.mark.thorough
def test_the_demo_writes_reports_and_an_index_that_links_them(tmp_path):
    experiment = importlib.import_module("benchmarks.exploding_inverses.digits_classifier")
    config = dataclasses.replace(
        preset(experiment, "smoke"),
        nets=("plain",),
        regularizers=("none", "FD"),
        reports=str(tmp_path / "out"),
    )
    frame = experiment.run(config)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert list(frame["regularizer"]) == ["none", "FD"]
    for name in ("plain_none.html", "plain_FD.html"):
        assert f'href="{name}"' in page
        assert "reconstruction" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_a_run_that_ends_in_nan_is_a_row(monkeypatch):
    experiment = importlib.import_module("benchmarks.exploding_inverses.digits_classifier")
    config = dataclasses.replace(preset(experiment, "smoke"), learning_rate=1e30)
    (*_, row) = experiment.measure(config, "plain", "FD")
    assert row["verdict"] == "non_finite"
