"""Every committed result says how it came about, and belongs to the script as it is today."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex

import pytest

from benchmarks.common import runner
from benchmarks.common.experiments import EXPERIMENTS

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"
ORIGINS = sorted(RESULTS.rglob("*.json"))
BY_STEM = {one.stem: one for one in EXPERIMENTS}
#: written by tests.zoo.table_of_uses, which has no configuration
OTHER_TABLES = {RESULTS / "zoo" / "uses.csv"}


def origin(path):
    return json.loads(path.read_text(encoding="utf-8"))


def experiment_and_preset(path):
    """The results of the preset cpu bear the name of the experiment alone."""
    if path.stem in BY_STEM:
        return BY_STEM[path.stem], "cpu"
    stem, _, preset = path.stem.rpartition("_")
    return BY_STEM[stem], preset


def name_of(path):
    return str(path.relative_to(RESULTS).with_suffix(""))


def test_every_table_has_its_origin():
    tables = {path.with_suffix(".json") for path in set(RESULTS.rglob("*.csv")) - OTHER_TABLES}
    assert tables == set(ORIGINS)


@pytest.mark.parametrize("path", ORIGINS, ids=name_of)
def test_the_origin_is_complete_and_its_command_gives_its_configuration(path):
    written = origin(path)
    assert set(written) == {
        "command", "config", "data", "python", "packages", "threads", "accelerator",
    }  # fmt: skip
    assert {"torch", "numpy"} <= set(written["packages"])
    experiment, preset = experiment_and_preset(path)
    script = experiment.module
    fields = {field.name for field in dataclasses.fields(script.Config)}
    assert set(written["config"]) == fields, "run it again, or remove it"

    inn_guard, bench, name, *words = shlex.split(written["command"])
    assert (inn_guard, bench, name) == ("inn-guard", "bench", experiment.name)
    config = runner.configured(script, words)
    assert dataclasses.asdict(config) == as_tuples(written["config"])
    assert runner.command(script, preset, config) == written["command"]


def as_tuples(value):
    """JSON has lists where a configuration has tuples."""
    if isinstance(value, dict):
        return {key: as_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("path", ORIGINS, ids=name_of)
def test_results_on_files_have_their_checksums(path):
    written = origin(path)
    config = written["config"]
    named = ("data", "dataset", "subjects", "cases", "sets")
    chosen = json.dumps([config.get(key) for key in named]).lower()
    folder = config.get("data_root") or config.get("root")
    if folder and ("mnist" in chosen or "cifar" in chosen):
        assert written["data"]
    assert all(len(digest) == 64 for digest in written["data"].values())
