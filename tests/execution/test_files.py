"""atomic_write: the old file or the new one, nothing in between, nothing left behind."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from inn_guard.execution.files import atomic_write


def test_replaces_content_and_leaves_only_the_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]


def test_an_error_keeps_the_old_file_and_removes_the_partial_one(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_nothing_written_is_an_error_not_a_lost_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert path.read_text() == "old"


def test_suffix_is_kept_for_writers_that_read_it(tmp_path):
    with atomic_write(tmp_path / "table.csv") as partial:
        assert partial.suffix == ".csv"
        assert partial.parent == tmp_path
        partial.write_text("a,b\n")


def test_mode_of_an_existing_file_is_kept_and_a_new_one_follows_the_umask(tmp_path):
    old = tmp_path / "old"
    old.write_text("")
    old.chmod(0o600)
    for path in (old, tmp_path / "new"):
        with atomic_write(path) as partial:
            partial.write_text("x")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(old.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_written_to_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with atomic_write(pipe) as partial:
        partial.write_text("through")
    reader.join()
    assert received == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_folder_errors_say_what_to_do(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="create it first"),
        atomic_write(tmp_path / "none" / "a"),
    ):
        pass
    with (
        pytest.raises(IsADirectoryError, match="expected the path of a file"),
        atomic_write(tmp_path),
    ):
        pass
