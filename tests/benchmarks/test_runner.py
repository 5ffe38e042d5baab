"""What experiments share: finished cases survive a kill, results say what they were measured on."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

import pandas as pd
import pytest

from benchmarks.common import experiments, runner
from benchmarks.common.image_files import file_checksums


@dataclass(frozen=True)
class Config:
    size: int = 2
    rates: tuple[float, ...] = (0.5,)
    data: str = "mnist"
    data_root: str = ""
    fast: bool = False


PRESETS = {"smoke": {}, "cpu": {"size": 3}}

calls: list[str] = []


def run(config):
    def measure(config, case):
        calls.append(case)
        if case == "b" and calls.count("b") == 1:
            raise KeyboardInterrupt
        return [{"size": config.size, "value": ord(case)}]

    return runner.collect(config, {key: key for key in "abc"}, measure)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls.clear()


def test_a_killed_run_goes_on_behind_its_last_whole_case(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Config())
    (unfinished,) = (tmp_path / "runs").iterdir()
    with unfinished.open("a") as file:
        file.write('\n{"case": "b", "rows": [{"size"')
    frame = run(Config())
    assert calls == ["a", "b", "b", "c"]
    assert list(frame["value"]) == [97, 98, 99]
    assert not unfinished.exists()


def test_another_configuration_does_not_take_the_cases_of_a_killed_run():
    with pytest.raises(KeyboardInterrupt):
        run(Config())
    run(Config(size=5))
    assert calls.count("a") == 2


def test_flags_are_parsed_as_the_fields_they_set_and_results_hold_the_checksums(tmp_path, capsys):
    folder = tmp_path / "files" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"labels")
    calls.append("b")  # no kill
    words = [
        "--preset",
        "smoke",
        "--size",
        "7",
        "--rates",
        "0.1,0.2",
        "--data-root",
        str(tmp_path / "files"),
    ]
    runner.main(__name__, argv=[*words, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*_smoke.json")
    written = json.loads(path.read_text())
    digest = hashlib.sha256(b"labels").hexdigest()
    assert written["config"]["size"] == 7
    assert written["config"]["rates"] == [0.1, 0.2]
    assert written["data"] == {"MNIST/raw/t10k-labels-idx1-ubyte.gz": digest}
    assert digest in capsys.readouterr().out
    assert list(pd.read_csv(path.with_suffix(".csv"))["size"]) == [7] * 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--size", "abc"], r"--size: expected something like 2; got 'abc'"),
        (["--rates", "0.5,x"], r"--rates: expected something like \(0\.5,\); got '0\.5,x'"),
        (["--fast", "maybe"], r"--fast: expected something like False; got 'maybe'"),
        (["--preset", "huge"], "invalid choice"),
        (["--out", "file"], "--out: expected a folder that can be written to; got file"),
        (
            ["--out", "file/within"],
            "--out: expected a folder that can be written to; got file/within",
        ),
    ],
)
def test_wrong_flags_end_before_anything_is_run(flags, said, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        runner.main(__name__, argv=["--preset", "smoke", *flags])
    assert end.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert not calls


def test_checksums_are_of_the_data_set_that_is_asked_for(tmp_path):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"x")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"y")
    (tmp_path / "unknown.bin").write_bytes(b"z")
    assert list(file_checksums(tmp_path, "cifar10")) == ["cifar-10-batches-bin/test_batch.bin"]
    assert list(file_checksums(tmp_path, "mnist_whole")) == ["train-images-idx3-ubyte"]
    assert len(file_checksums(tmp_path)) == 2
    assert file_checksums(tmp_path, "digits") == {}


def test_experiments_are_found_by_their_names():
    assert experiments.find("exploding_inverses.flowgan") is experiments.find("flowgan")
    assert experiments.find("nif_tables").name == "nif.tables"
    assert experiments.find("census").name == "census.census"
    with pytest.raises(
        LookupError, match=r"one of .*exploding_inverses\.regularizer_cost, performance\."
    ):
        experiments.find("regularizer_cost")


def test_the_readme_is_rewritten_around_other_tables(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    head = "| experiment | claim | paper |"
    readme.write_text(
        f"| other |\n| --- |\n\n{head}\n| --- | --- | --- |\n| `old` | | |\n\n| more |\n"
    )
    monkeypatch.setattr(experiments, "README", readme)
    experiments.write_readme()
    text = readme.read_text()
    assert text.startswith("| other |\n| --- |\n\n")
    assert text.endswith("\n\n| more |\n")
    assert experiments.readme_table() in text
    assert "`old`" not in text
