"""Commands from their arguments to the exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inn_guard.cli import main
from inn_guard.cli.commands import app, exit_code
from inn_guard.report.verdict import Verdict

NETS = "tests.cli.nets"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32))
    return path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def audit(factory, data, *options, checks="reconstruction"):
    return run(
        "audit", "--model", f"{NETS}:{factory}", "--data", data, "--checks", checks, *options
    )


@pytest.mark.parametrize(
    ("factory", "code"),
    [("stable", 0), ("ready", 0), ("unstable", 1), ("singular", 1)],
)
def test_exit_code_is_the_verdict(factory, code, data):
    done = audit(factory, data, "--dtype", "float32")
    assert done.exit_code == code, done.output
    assert "reconstruction" in done.stdout


def test_every_verdict_has_an_exit_code():
    codes = {verdict.label: exit_code(verdict) for verdict in Verdict}
    assert codes == {
        "stable": 0,
        "marginal": 0,
        "unstable": 1,
        "non_finite": 1,
        "undecided": 3,
        "not_applicable": 3,
    }


def test_reports_are_written_and_read_again(data, tmp_path):
    done = audit("singular", data, "--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert done.exit_code == 1
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["verdict"] == "non_finite"
    assert saved["settings"]["model"] == f"{NETS}:singular"
    again = run("report", tmp_path / "a.json", "--html", tmp_path / "b.html")
    assert again.exit_code == 0
    assert again.stdout == done.stdout
    assert "not finite" in (tmp_path / "b.html").read_text()
    assert "not finite" in (tmp_path / "a.html").read_text()


def test_a_full_disk_loses_no_report(monkeypatch, data, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    done = audit("stable", data, "--json", tmp_path / "a.json")
    assert done.exit_code == 2
    assert "reconstruction" in done.stdout
    assert "No space left" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy"]


def test_a_dry_run_estimates_and_measures_nothing(data):
    done = audit("unstable", data, "--dry-run", "--memory", "0.5")
    assert done.exit_code == 0, done.output
    assert "nothing was measured; estimate:" in " ".join(done.stdout.split())
    assert audit("stable", data, "--memory", "0").exit_code == 2


@pytest.mark.thorough
@pytest.mark.parametrize(("factory", "code"), [("unstable", 1), ("stable", 0)])
def test_torchrun_gives_one_report_and_the_verdict_as_its_exit_code(factory, code, data, tmp_path):
    words = [
        "audit",
        "--model",
        f"{NETS}:{factory}",
        "--data",
        str(data),
        "--json",
        str(tmp_path / "two.json"),
    ]
    options = ["--checks", "reconstruction,jacobian_spectrum", "--dtype", "float32"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "inn_guard",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *words, *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.count("reconstruction ") == 1
    assert done.stderr.count("note: importing") == 1
    saved = json.loads((tmp_path / "two.json").read_text())
    assert saved["settings"]["processes"] == 2
    audit(factory, data, "--json", tmp_path / "one.json", *options[2:], checks=options[1])
    alone = json.loads((tmp_path / "one.json").read_text())
    for two, one in zip(saved["results"], alone["results"], strict=True):
        assert (two["verdict"], two["values"]) == (
            one["verdict"],
            pytest.approx(one["values"], rel=1e-5, nan_ok=True),
        )


def test_standard_output_is_the_report_and_remarks_are_apart(data):
    done = audit("stable", data)
    assert f"note: importing {NETS}, which runs its code" in done.stderr
    assert "note:" not in done.stdout


def test_samples_and_dtype_reach_the_audit(data, tmp_path):
    audit("stable", data, "--samples", "5", "--dtype", "float64", "--json", tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert saved["settings"]["shape"] == [5, 4]
    assert saved["settings"]["dtype"] == "float64"


def test_seed_repeats_the_factory_and_leaves_the_global_generator(data, tmp_path):
    def numbers(seed):
        audit("random", data, "--seed", seed, "--json", tmp_path / "a.json")
        saved = json.loads((tmp_path / "a.json").read_text())
        return next(
            row["per_sample"] for row in saved["results"] if row["name"] == "reconstruction"
        )

    before = torch.get_rng_state()
    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checks", "reconstruction,nonsense"], "; got nonsense"),
        (
            ["--html", "/nowhere/at/all/a.html"],
            "error: expected the path of a file in a folder that exists",
        ),
        (["--json", "/"], "error: expected the path of a file in a folder that exists"),
        (["--data", "missing.npy"], "error: there is no file or folder missing.npy"),
        (["--model", "json"], "error: expected MODEL as package.module:factory"),
        (["--model", "nowhere.py:make"], "error: there is no file nowhere.py"),
        (["--device", "nowhere"], "error: expected a --device of this machine, got 'nowhere'"),
        (["--device", "meta"], "error: expected a --device of this machine, got 'meta'"),
        (["--uses", "density,magic"], "error: expected --uses out of density, sampling"),
        (["--arg", "width"], "error: expected --arg name=value, got 'width'"),
        (["--arg", "width=3"], "unexpected keyword argument 'width'"),
        (["more.npy"], "error: expected MODEL and DATA, got more: more.npy"),
        (["--samples", "0"], "--samples"),
        (["--level", "extreme"], "extreme"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_wrong_usage_is_code_two_and_said_in_one_line(options, words, data):
    done = audit("stable", data, *options)
    assert done.exit_code == 2
    line = done.stderr.splitlines()[-1]
    assert words in line


def test_a_model_of_unknown_kind_and_a_wrong_shape_are_wrong_usage(data, tmp_path):
    done = audit("number", data)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    np.save(tmp_path / "flat.npy", np.zeros(3))
    assert audit("stable", tmp_path / "flat.npy").exit_code == 2
    np.save(tmp_path / "wide.npy", np.zeros((3, 9), dtype=np.float32))
    assert audit("stable", tmp_path / "wide.npy").exit_code == 2


def test_context_is_given_to_the_model(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((6, 4), dtype=np.float32))
    np.save(tmp_path / "c.npy", np.ones((6, 4), dtype=np.float32))
    done = audit("Shift", tmp_path / "x.npy", "--context", tmp_path / "c.npy")
    assert done.exit_code == 0, done.output


def test_nan_in_the_data_is_a_finding_not_an_error(tmp_path):
    x = np.ones((3, 4), dtype=np.float32)
    x[0, 0] = np.nan
    np.save(tmp_path / "x.npy", x)
    done = audit("stable", tmp_path / "x.npy")
    assert done.exit_code in (0, 1)
    assert "1 of 12 values of x.npy are NaN or Inf" in done.stderr


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"results": [], "model": 3}'])
def test_a_damaged_report_is_wrong_usage(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    done = run("report", tmp_path / "a.json")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_report_of_bytes_or_of_nothing_is_wrong_usage(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    assert run("report", tmp_path / "a.json").exit_code == 2
    assert run("report", tmp_path / "none.json").exit_code == 2


def test_crashes_are_code_three_never_a_verdict(monkeypatch, data, capsys):
    def crash(*args, **options):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("inn_guard.cli.commands.run_audit", crash)
    monkeypatch.setattr(
        sys, "argv", ["inn-guard", "audit", "--model", f"{NETS}:stable", "--data", str(data)]
    )
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3
    assert "ZeroDivisionError: a fault" in capsys.readouterr().err


def test_python_m_inn_guard():
    done = subprocess.run(
        [sys.executable, "-m", "inn_guard", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("inn_guard ")


def test_the_search_path_is_as_it_was(data):
    before = list(sys.path)
    audit("stable", data)
    assert sys.path == before


def test_model_and_data_are_arguments_or_options(data):
    name = f"{NETS}:stable"
    checks = ("--checks", "reconstruction", "--dtype", "float32")
    expected = audit("stable", data, "--dtype", "float32")
    for words in ([name, data], ["--model", name, data], [name, "--data", data]):
        done = run("audit", *words, *checks)
        assert done.exit_code == expected.exit_code == 0, done.output
    for words in ([], [name], ["--data", data]):
        done = run("audit", *words)
        assert done.exit_code == 2
        assert "expected MODEL and DATA" in done.stderr


def test_a_factory_of_a_file_with_arguments_and_a_device(data, tmp_path):
    words = ["audit", "tests/cli/nets.py:needs", data, "--arg", "width=4", "--device", "cpu"]
    done = run(*words, "--checks", "reconstruction", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert settings["arguments"] == "width=4"


def test_the_model_is_not_imported_before_the_data_have_been_read(tmp_path):
    (tmp_path / "net.py").write_text("open('imported', 'w')\n")
    done = run("audit", f"{tmp_path / 'net.py'}:make", tmp_path / "missing.npy")
    assert done.exit_code == 2
    assert "there is no file or folder" in done.stderr
    assert "importing" not in done.stderr


def test_uses_and_prior_reach_the_audit(monkeypatch, data):
    given = {}

    def watch(model, x, **options):
        given.update(options)
        raise ZeroDivisionError("seen")

    monkeypatch.setattr("inn_guard.cli.commands.run_audit", watch)
    name, prior = f"{NETS}:stable", f"{NETS}:wide_base"
    run("audit", name, data, "--uses", "density,sampling", "--prior", prior, "--seed", "3")
    assert given["uses"] == ["density", "sampling"]
    assert given["prior"].scale.tolist() == [2, 2, 2, 2]
    assert given["seed"] == 3
    assert given["checks"] is None


def test_exit_codes_are_in_help():
    for words in (["--help"], ["audit", "--help"]):
        said = run(*words).stdout
        for line in ("0  stable or marginal", "1  unstable or non_finite", "2  wrong usage"):
            assert line in said


@pytest.mark.parametrize(
    ("module", "package"), [("typer", "typer"), ("safetensors", "safetensors"), ("PIL", "pillow")]
)
def test_without_its_extra_the_command_says_what_to_install(module, package):
    code = f"import sys; sys.modules[{module!r}] = None; from inn_guard.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == f"inn-guard needs {package}: pip install '.[cli]'\n"
