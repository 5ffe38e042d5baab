"""inn-guard repair, from its arguments to the exit code and the file of weights."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import inn_guard as ig
from inn_guard.cli.commands import app
from inn_guard.cli.models import load_weights
from tests.cli import nets

NETS = "tests.cli.nets"
FAST = ["--steps", "40", "--every", "20", "--learning-rate", "0.5"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32))
    return path


def repair(factory, data, *options):
    words = ["repair", f"{NETS}:{factory}", data, "--loss", f"{NETS}:no_loss", *options]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "suffix", [".pt", pytest.param(".safetensors", marks=pytest.mark.thorough)]
)
def test_the_repaired_weights_pass(suffix, data, tmp_path):
    out = tmp_path / f"repaired{suffix}"
    done = repair("shrinking", data, "--uses", "reconstruction", "--out", out, *FAST)
    assert done.exit_code == 0, done.output
    assert "before" in done.stdout
    model = nets.shrinking()
    x = torch.from_numpy(np.load(data))
    assert ig.audit(model, x, uses=["reconstruction"], level="quick").verdict.failed
    load_weights(model, out)
    assert ig.audit(model, x, uses=["reconstruction"], level="quick").verdict.passed


def test_what_does_not_pass_ends_with_1_and_says_what_to_try(data, tmp_path):
    out = tmp_path / "repaired.pt"
    done = repair("singular", data, "--uses", "reconstruction", "--out", out, "--steps", "2")
    assert done.exit_code == 1, done.output
    assert "1. " in done.stdout
    assert out.exists()


def test_a_full_disk_leaves_no_part_of_the_weights(monkeypatch, data, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "repaired.pt"
    done = repair("stable", data, "--uses", "reconstruction", "--out", out)
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy"]


@pytest.mark.parametrize(
    ("factory", "options", "says"),
    [
        ("stable", ["--uses", "speed"], "--uses"),
        ("stable", ["--out", "missing/folder/a.pt"], "folder that exists"),
        ("stable", ["--loss", "nothing"], "--loss"),
        ("stable", ["--loss", f"{NETS}:absent"], "absent"),
        ("wide_base", [], "torch.nn.Module"),
        ("shrinking", ["--loss", f"{NETS}:number", "--uses", "reconstruction"], "argument"),
    ],
)
def test_wrong_usage_ends_with_2(factory, options, says, data):
    done = repair(factory, data, *options)
    assert done.exit_code == 2, done.output
    assert says in done.stderr


def test_without_a_base_the_likelihood_of_a_normal_one_is_the_loss_and_said(data):
    words = ["repair", f"{NETS}:shrinking", data, "--uses", "reconstruction", "--steps", 2]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code in (0, 1)
    assert "under N(0, I), since the model has no base" in done.stdout.replace("\n", " ")
