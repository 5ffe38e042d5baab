"""Every experiment runs in its smallest size and gives a table."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").glob("*/*.py"))
    if "def smoke(cls)" in path.read_text(encoding="utf-8")
]


@pytest.fixture(autouse=True)
def _as_on_the_command_line(monkeypatch, tmp_path):
    """float32, and unfinished rows in a folder of their own."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def test_there_are_experiments():
    assert "benchmarks.exploding_inverses.digits_classifier" in EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name):
    experiment = importlib.import_module(name)
    config = experiment.Config.smoke()
    assert dataclasses.is_dataclass(config)
    assert type(config).__dataclass_params__.frozen
    frame = experiment.run(config)
    assert len(frame) > 0
    assert not frame.columns.duplicated().any()
    if hasattr(experiment, "draw"):
        experiment.draw(frame)


def test_the_demo_writes_reports_and_an_index_that_links_them(tmp_path):
    experiment = importlib.import_module("benchmarks.exploding_inverses.digits_classifier")
    config = dataclasses.replace(
        experiment.Config.smoke(), nets=("plain",), regularizers=("none", "FD"), reports=str(tmp_path / "out")
    )
    frame = experiment.run(config)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert list(frame["regularizer"]) == ["none", "FD"]
    for name in ("plain_none.html", "plain_FD.html"):
        assert f'href="{name}"' in page
        assert "reconstruction" in (tmp_path / "out" / name).read_text(encoding="utf-8")


def test_a_run_that_ends_in_nan_is_a_row(monkeypatch):
    experiment = importlib.import_module("benchmarks.exploding_inverses.digits_classifier")
    config = dataclasses.replace(experiment.Config.smoke(), learning_rate=1e30)
    (*_, row) = experiment.measure(config, "plain", "FD")
    assert row["verdict"] == "non_finite"
