"""Hostile surroundings: damaged files, interrupted and refused writes, threads, models without
values.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.common.image_files import MissingData, read_cifar10, read_mnist
from inn_guard.cli.models import load_weights
from inn_guard.cli.usage import WrongUsage
from inn_guard.execution.files import atomic_write
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.from_json import from_json
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from tests.cases.toys import random_chain
from tests.cli.nets import Scale

ROOT = Path(__file__).parents[2]
once_per_file = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)


def saved() -> str:
    values = {"error": 1.5, "lost": float("nan")}
    rows = ({"layer": "<script>alert(1)</script>", "share": 0.5},)
    result = AuditResult(
        "reconstruction", Verdict.UNSTABLE, "a <b>reason</b>", values=values, per_layer=rows
    )
    return AuditReport((result,), "Net<img src=x>", {"samples": 3}).to_json()


@once_per_file
@given(place=st.integers(0, 600), junk=st.text(max_size=6), cut=st.integers(0, 40))
def test_a_damaged_saved_report_is_a_report_or_a_value_error(place, junk, cut):
    text = saved()
    place %= len(text)
    try:
        read = from_json(text[:place] + junk + text[place + cut :])
    except ValueError:
        return
    assert isinstance(str(read), str)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, '{"model": 1e999}', "\x00", ""]
)
def test_reports_that_go_too_deep_or_too_far_are_refused(text):
    with pytest.raises(ValueError, match=r"expected|digits"):
        from_json(text)


def test_names_with_markup_are_text_on_the_page(tmp_path):
    from_json(saved()).to_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page


@once_per_file
@given(junk=st.binary(max_size=80), place=st.integers(0, 4000), cut=st.integers(0, 4000))
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_weights_fit_or_are_refused_and_never_half_loaded(name, junk, place, cut, tmp_path):
    import safetensors.torch

    state, buffer = {"scale": torch.arange(4.0)}, io.BytesIO()
    if name.endswith("pt"):
        torch.save(state, buffer)
    whole = buffer.getvalue() or safetensors.torch.save(state)
    place %= len(whole)
    (tmp_path / name).write_bytes(whole[:place] + junk + whole[place + cut % len(whole) :])
    model = Scale()
    before = model.scale.detach().clone()
    try:
        load_weights(model, tmp_path / name)
    except WrongUsage:
        assert torch.equal(model.scale, before)


@once_per_file
@given(data=st.binary(max_size=64), promised=st.integers(0, 2**32 - 1))
def test_any_mnist_file_is_read_or_refused(data, promised, tmp_path):
    images = bytes([0, 0, 8, 3]) + promised.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2 + data
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + data)
    with pytest.raises(ValueError, match="train-"):
        read_mnist(tmp_path, train=True)


@once_per_file
@given(data=st.binary(max_size=200))
def test_any_python_batch_of_cifar_is_refused(data, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    (folder / "test_batch").write_bytes(b"\x80\x02" + data)
    with pytest.raises(ValueError, match="test_batch"):
        read_cifar10(tmp_path, train=False)


@pytest.mark.parametrize("name", ["../../test_batch.bin", "/etc/test_batch.bin"])
def test_archives_write_nothing_wherever_their_members_point(name, tmp_path):
    record = np.zeros(3073, dtype=np.uint8).tobytes()
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(record)
        archive.addfile(member, io.BytesIO(record))
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    assert len(read_cifar10(tmp_path, train=False).labels) == 1
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_links_in_archives_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises((ValueError, MissingData)):
        read_cifar10(tmp_path, train=False)


KILLED = """
import sys, time
from inn_guard.execution.files import atomic_write
with atomic_write(sys.argv[1]) as partial:
    partial.write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


@contextmanager
def no_room():
    """Files of this process may not grow beyond 100 bytes, as on a disk that is full.

    Only inside the block: pytest's own output may go to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_keeps_the_old_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    report = from_json(saved())
    with no_room(), pytest.raises(OSError, match="File too large"):
        report.to_json(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


class Slow(nn.Module):
    """Modes and random numbers that an audit in another thread would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.002)
        MODES.append(self.training)
        return x * self.scale

    def inverse(self, z: Tensor) -> Tensor:
        return z / self.scale


MODES: list[bool] = []


def test_two_audits_in_two_threads_neither_disturb_each_other_nor_the_model():
    model, x, reports = Slow(), torch.randn(4, 4), []
    before = torch.get_rng_state()
    MODES.clear()

    def work():
        reports.append(ig.audit(model, x, checks=["reconstruction", "jacobian_spectrum"]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = list(MODES)
    MODES.clear()
    alone = ig.audit(model, x, checks=["reconstruction", "jacobian_spectrum"])
    assert len(reports) == 3
    # checks of the threads take turns; none sees a mode that another one has set
    assert sorted(together) == sorted(3 * MODES)
    for report in reports:
        assert [dict(r.values) for r in report.results] == [dict(r.values) for r in alone.results]
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_on_the_meta_device_is_refused_with_what_to_do():
    with torch.device("meta"):
        model = Slow()
    for x in (torch.randn(4, 4), torch.randn(4, 4, device="meta")):
        with pytest.raises(ValueError, match=r"meta device, which has none: call model.to_empty"):
            ig.audit(model, x)
    with pytest.raises(ValueError, match="meta device, which has none: load data"):
        ig.audit(
            random_chain(depth=1, spread=0.5).to(torch.float32), torch.randn(2, 6, device="meta")
        )


def test_a_report_with_what_no_json_holds_is_written_whole(tmp_path):
    result = AuditResult(
        "x", Verdict.STABLE, "\ud800 \x00", values={"a": float("inf")}, settings={"f": print}
    )
    text = AuditReport((result,), "n").to_json()
    assert json.loads(text)["results"][0]["values"]["a"] == "inf"
