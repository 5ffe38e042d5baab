"""``inn-guard bench``: the list, the way to an experiment, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
import tarfile

import pytest
from typer.testing import CliRunner

from benchmarks.common.experiments import EXPERIMENTS
from inn_guard.cli.commands import app

FAST = "attacks.step_cost"


def run(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_every_experiment_is_listed_with_its_claim(words):
    done = run(*words)
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    for one in EXPERIMENTS:
        assert one.name in text
        assert one.claim in text


def test_smoke_runs_write_below_the_current_folder(tmp_path):
    path = list(sys.path)
    done = run(FAST, "--preset", "smoke")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "attacks_step_cost_smoke.csv").exists()
    assert sys.path == path


def test_help_behind_a_name_is_that_of_the_experiment():
    done = run(FAST, "--help")
    assert done.exit_code == 0
    assert "--preset {smoke,cpu" in done.stdout
    assert "--data-root" not in done.stdout
    assert "--data-root" in run("nif.tables", "--help").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["nonsense"],
            "expected the name of an experiment, got 'nonsense'; inn-guard bench lists them",
        ),
        (["--preset", "smoke"], "expected the name of an experiment before its options"),
        ([FAST, "--preset", "enormous"], "invalid choice: 'enormous'"),
        ([FAST, "--no-such-flag", "1"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_wrong_usage_is_code_two(words, said):
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.stderr


def test_missing_data_is_code_two_with_the_command_that_fetches_it(tmp_path):
    done = run(
        "nif.tables", "--preset", "smoke", "--data", "mnist", "--data-root", tmp_path / "none"
    )
    assert done.exit_code == 2
    assert f"torchvision.datasets.MNIST('{tmp_path / 'none'}', download=True)" in done.stderr
    assert f"--data-root {tmp_path / 'none'}" in done.stderr


def test_an_installed_package_without_the_repository_says_to_clone_it(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "inn_guard.__file__", str(tmp_path / "site-packages" / "inn_guard" / "__init__.py")
    )
    done = run()
    assert done.exit_code == 2
    assert "clone the repository" in done.stderr


def test_an_installed_package_finds_the_clone_in_the_current_folder(tmp_path):
    """In another process, with a copy of the package for the wheel and the skeleton of a clone."""
    site, clone = tmp_path / "site", tmp_path / "clone"
    for folder in (site, clone / "inn_guard", clone / "benchmarks" / "common"):
        folder.mkdir(parents=True)
    (clone / "benchmarks" / "common" / "experiments.py").write_text(
        "def listing():\n    return 'the clone speaks'\n"
    )
    _copy_package(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from inn_guard.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the clone speaks" in done.stdout
    assert f"the experiments are those of {clone}" in done.stderr


def _copy_package(target):
    import inn_guard

    packed = target / "package.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(inn_guard.__path__[0], "inn_guard")
    with tarfile.open(packed) as archive:
        archive.extractall(target, filter="data")
