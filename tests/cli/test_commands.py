"""Commands from their arguments to the exit code."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from inn_guard.cli import main
from inn_guard.cli.commands import app, exit_code
from inn_guard.report.verdict import Verdict
from tests.cases.trials import first

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
        (["--seed", str(2**63)], "--seed"),
        (["--memory", "nan"], "error: expected --memory as a positive number of GiB, got nan"),
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
    for words in ([], ["--data", data]):
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
    for words in (["--help"], ["audit", "--help"], ["repair", "--help"]):
        said = run(*words).stdout
        for line in ("0  stable or marginal", "1  unstable or non_finite", "2  wrong usage"):
            assert line in said


@pytest.mark.parametrize("module", first(1, ["PIL", "typer", "safetensors", "rich"]))
def test_without_its_extra_the_command_says_what_to_install(module):
    package = {"PIL": "pillow"}.get(module, module)
    code = f"import sys; sys.modules[{module!r}] = None; from inn_guard.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == f"inn-guard needs {package}: pip install '.[cli]'\n"


def test_without_its_extra_a_page_is_refused_with_code_three(monkeypatch, data, tmp_path):
    monkeypatch.delitem(sys.modules, "inn_guard.report.html", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = audit("stable", data, "--html", tmp_path / "a.html")
    assert done.exit_code == 3
    assert done.stderr == "inn-guard needs jinja2: pip install '.[report]'\n"


@pytest.mark.parametrize(("factory", "code"), [("Drawn", 0), ("DrawnLossy", 1)])
def test_without_data_a_model_is_audited_on_its_own_draws(factory, code, tmp_path):
    saved = tmp_path / "a.json"
    done = run("audit", f"{NETS}:{factory}", "--dtype", "float32", "--json", saved)
    assert done.exit_code == code, done.output
    assert "note: no data: the model is audited on 256 draws" in done.stderr
    report = json.loads(saved.read_text())
    assert list(report["counted"]) == ["sampling", "reconstruction"]
    assert report["settings"]["data"] == "256 draws of the model"
    assert {row["name"] for row in report["results"]} == {
        "preflight",
        "sampling",
        "reconstruction",
    }
    assert not any("Standardise" in advice for advice in report["advice"])


def test_without_data_draws_come_from_the_prior_and_fit_the_context(tmp_path):
    prior = ["--prior", f"{NETS}:wide_base", "--samples", "5", "--uses", "reconstruction"]
    done = run("audit", f"{NETS}:stable", *prior, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert settings["shape"] == [5, 4]
    assert settings["base"] == "prior Normal"
    np.save(tmp_path / "c.npy", np.ones((3, 4)))
    words = ["audit", f"{NETS}:Shift", *prior, "--context", tmp_path / "c.npy"]
    done = run(*words, "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "b.json").read_text())["settings"]["shape"] == [3, 4]


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        ("stable", [], "error: expected DATA, because the model declares no base distribution"),
        ("Unwilling", [], "error: drawing from the model raised RuntimeError: no inverse today"),
        ("stable", ["--prior", "nets"], "error: expected --prior as package.module:factory"),
        ("stable", ["--prior", f"{NETS}:number"], "error: drawing from the model raised TypeError"),
        ("number", [], "error: "),
        ("Drawn", ["--samples", str(10**12)], "error: expected --samples of at most 1,048,576"),
    ],
)
def test_without_data_what_cannot_be_drawn_from_is_wrong_usage(factory, options, words):
    done = run("audit", f"{NETS}:{factory}", *options)
    assert done.exit_code == 2, done.output
    assert done.stderr.splitlines()[-1].startswith(words)


def test_limits_are_read_from_a_file(data, tmp_path):
    path = tmp_path / "limits.toml"
    assert audit("unstable", data, "--dtype", "float32").exit_code == 1
    for content in ("reconstruction = 100", "[limits]\nreconstruction = 1e2"):
        path.write_text(content)
        done = audit("unstable", data, "--dtype", "float32", "--limits", path)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"speed = 1", "expected limits out of density, sampling"),
        (b"density = 'low'", "density"),
        (b"density = -1", "expected a positive limit density; got -1.0"),
        (b"density = nan", "expected a positive limit density; got nan"),
        (b"density =", "cannot be read as TOML"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (b"limits = 3", "expected a table [limits]"),
        (b"a = " + b"[" * 10_000, "cannot be read as TOML"),
        (b"density = 1" + b"0" * 400, "expected a positive limit density; got inf"),
        (b"#" * 2**20 + b"##", "more than 1 MiB"),
    ],
)
def test_limits_that_are_none_are_wrong_usage_before_the_model_is_imported(
    content, words, data, tmp_path
):
    (tmp_path / "limits.toml").write_bytes(content)
    done = audit("stable", data, "--limits", tmp_path / "limits.toml")
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert words in line
    assert audit("stable", data, "--limits", tmp_path / "none.toml").exit_code == 2


@pytest.fixture
def saved(data, tmp_path):
    """A report that passes and one that fails, as files of the same name."""
    paths = []
    for factory in ("stable", "unstable"):
        folder = tmp_path / factory
        folder.mkdir()
        paths.append(folder / "report.json")
        audit(factory, data, "--dtype", "float32", "--json", paths[-1])
    return paths


def test_saved_reports_are_put_side_by_side(saved, tmp_path):
    done = run("compare", *saved, "--html", tmp_path / "c.html")
    assert done.exit_code == 0, done.output
    head, *rows = done.stdout.splitlines()
    assert head.split() == [str(path) for path in saved]
    assert rows[-1].split() == ["verdict", "stable", "unstable"]
    assert "unstable" in (tmp_path / "c.html").read_text()
    same = run("compare", saved[0], saved[0]).stdout.splitlines()[0].split()
    assert same == ["1:", str(saved[0]), "2:", str(saved[0])]


def test_a_comparison_fails_on_demand_if_a_use_no_longer_passes(saved):
    good, bad = saved
    codes = [
        run("compare", *pair, "--fail-if-worse").exit_code
        for pair in ((good, bad), (bad, good), (good, good), (bad, bad))
    ]
    assert codes == [1, 0, 0, 0]


def test_what_cannot_be_compared_is_wrong_usage(saved, tmp_path):
    assert run("compare").exit_code == 2
    done = run("compare", saved[0], tmp_path / "none.json")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("option", ["--data", "--html", "--limits", "--weights", "--context"])
def test_a_name_too_long_for_a_file_is_wrong_usage(option, data):
    done = run(
        "audit", f"{NETS}:stable", *([data] if option != "--data" else []), option, "1" * 400
    )
    assert done.exit_code == 2, done.output
    assert "name too long" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no file without an end")
def test_a_report_without_an_end_is_wrong_usage(monkeypatch):
    monkeypatch.setattr("inn_guard.report.from_json.MAX_BYTES", 1000)
    done = run("report", "/dev/zero")
    assert done.exit_code == 2
    assert "at most 1,000 characters" in done.stderr


def test_details_name_every_check(saved):
    said = run("report", saved[0], "--details").stdout
    assert "preflight" in said
    assert "relative error 0 of the feature" in said


def test_a_terminal_gets_tables_of_its_width(saved, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(
        "inn_guard.cli.output.Console", functools.partial(Console, force_terminal=True)
    )
    for words in (["report", saved[1]], ["compare", *saved]):
        plain = re.sub(r"\x1b\[[\d;]*m", "", run(*words).stdout)
        assert max(map(len, plain.splitlines())) <= 60
        assert "reconstruction" in plain
    assert "FAILS" in run("report", saved[1]).stdout
