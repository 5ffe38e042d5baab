"""fit and its checkpoints: exact resume, also after a kill; damaged and foreign files."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.common.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.common.fit import Batch, FitSettings, fit

ROOT = Path(__file__).parents[2]
SETTINGS = FitSettings(steps=40, batch_size=8, checkpoint_every=7, validate_every=10, clip=1.0)


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def make_data():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1, keepdim=True)


def run(settings, checkpoint=None, fail_at=None):
    model = make_model()

    def loss(batch: Batch):
        if batch.step == fail_at:
            raise KeyboardInterrupt
        noise = torch.randn(batch.x.shape, generator=batch.generator)
        return (model(batch.x + 0.1 * noise) - batch.tensors[1]).square().mean()

    history = fit(
        model,
        loss,
        make_data(),
        settings=settings,
        validate=lambda step: 1 / step,
        checkpoint=checkpoint,
    )
    return model, history


def assert_same_state(a, b):
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("interrupted_at", [1, 7, 23, 39])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, interrupted_at):
    whole, history = run(SETTINGS)
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(SETTINGS, path, fail_at=interrupted_at)
    resumed, resumed_history = run(SETTINGS, path)
    assert_same_state(whole, resumed)
    assert resumed_history == history


#: a run that prints a line and waits in the middle of step 20
KILLED = """
import pathlib, sys, torch
from benchmarks.common.fit import fit
from test_fit import SETTINGS, make_data, make_model
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
model = make_model()
def loss(batch):
    if batch.step == 20:
        print("step 20", flush=True)
        sys.stdin.read()
    noise = torch.randn(batch.x.shape, generator=batch.generator)
    return (model(batch.x + 0.1 * noise) - batch.tensors[1]).square().mean()
path = pathlib.Path(sys.argv[1])
fit(model, loss, make_data(), settings=SETTINGS, validate=lambda step: 1 / step, checkpoint=path)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_process_resumes_to_the_same_weights(tmp_path):
    path = tmp_path / "run.safetensors"
    folders = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        env={**os.environ, "PYTHONPATH": folders},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        # it waits in the middle of step 20, after the checkpoint of step 14
        assert process.stdout.readline() == "step 20\n"
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    assert_same_state(run(SETTINGS)[0], run(SETTINGS, path)[0])


def test_early_stopping_counts_validations_without_a_new_best():
    model = make_model()
    values = iter([3.0, 1.0, math.nan, 2.0, 0.5])
    settings = replace(SETTINGS, validate_every=2, patience=2)
    history = fit(
        model,
        lambda batch: model(batch.x).square().mean(),
        make_data(),
        settings=settings,
        validate=lambda _: next(values),
    )
    assert history.stopped_early
    assert history.steps == 8
    assert history.best == 1.0


def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path):
    path = tmp_path / "run.safetensors"
    model = make_model()

    def loss(batch):
        return model(batch.x).square().mean() * (math.nan if batch.step == 10 else 1.0)

    with pytest.raises(FloatingPointError, match="step 10"):
        fit(model, loss, make_data(), settings=SETTINGS, checkpoint=path)
    fresh = make_model()
    assert load_checkpoint(path, fresh, torch.optim.Adam(fresh.parameters()))["steps"] == 7


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: b"", lambda data: b"\x80\x04" + data]
)
def test_a_damaged_checkpoint_is_named_and_changes_nothing(tmp_path, damage):
    path = tmp_path / "run.safetensors"
    run(SETTINGS, path)
    path.write_bytes(damage(path.read_bytes()))
    model = make_model()
    with pytest.raises(ValueError, match=r"run\.safetensors"):
        load_checkpoint(path, model, torch.optim.Adam(model.parameters()))
    assert_same_state(model, make_model())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    other = nn.Linear(2, 2)
    save_checkpoint(path, other, torch.optim.Adam(other.parameters()), progress={})
    model = make_model()
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(path, model, torch.optim.Adam(model.parameters()))


def test_a_checkpoint_of_another_precision_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    single = make_model().float()
    save_checkpoint(path, single, torch.optim.Adam(single.parameters()), progress={})
    double = make_model().double()
    with pytest.raises(
        ValueError, match=r"expected shape .* of torch.float64, got shape .* of torch.float32"
    ):
        load_checkpoint(path, double, torch.optim.Adam(double.parameters()))
    assert_same_state(double, make_model().double())


@pytest.mark.parametrize(
    "kind", [torch.optim.Adafactor, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad]
)
def test_every_kind_of_moment_comes_back(tmp_path, kind):
    path, model = tmp_path / "run.safetensors", make_model()
    optimizer = kind(model.parameters(), lr=0.01)
    model(make_data()[0]).mean().backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, progress={})
    other = make_model()
    fresh = kind(other.parameters(), lr=0.01)
    load_checkpoint(path, other, fresh)
    for trained, its in ((model, optimizer), (other, fresh)):
        its.zero_grad()
        trained(make_data()[0]).square().mean().backward()
        its.step()
    assert_same_state(model, other)


def test_too_little_data_is_an_error():
    with pytest.raises(ValueError, match="batch size"):
        fit(make_model(), lambda batch: batch.x.mean(), (torch.zeros(3, 3),), settings=SETTINGS)
