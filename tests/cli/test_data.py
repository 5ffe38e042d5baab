"""Data files: read, converted with a notice, or refused in words; no code in them is run."""

from __future__ import annotations

import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from inn_guard.cli import data
from inn_guard.cli.data import Rows, read_context, read_data
from inn_guard.cli.models import load_weights
from inn_guard.cli.usage import MissingPackage, WrongUsage


class Loaded:
    """Rows and their tensor."""

    def __init__(self, rows, dtype):
        self.total = rows.total
        self.tensor = rows.to(dtype)


def load(path, *, samples=100, dtype=torch.float32):
    return Loaded(read_data(path, samples=samples), dtype)


def array(tmp_path, values, name="x.npy"):
    np.save(tmp_path / name, values)
    return tmp_path / name


def test_numbers_come_as_they_are(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, 2, 3))
    rows = load(array(tmp_path, values), dtype=torch.float64)
    assert rows.total == 7
    assert np.array_equal(rows.tensor.numpy(), values)
    first = load(tmp_path / "x.npy", samples=3, dtype=torch.float64)
    assert np.array_equal(first.tensor.numpy(), values[:3])
    assert first.total == 7


@pytest.mark.parametrize("kind", [">f4", "<f8", "f2", "longdouble"])
def test_any_float_and_byte_order_and_layout(kind, tmp_path):
    values = np.asfortranarray(np.arange(12).reshape(3, 4)).astype(kind)
    assert load(array(tmp_path, values)).tensor.tolist() == values.astype(float).tolist()


@pytest.mark.parametrize("kind", ["u1", "i8", "?"])
def test_integers_are_converted_aloud(kind, tmp_path, capsys):
    rows = load(array(tmp_path, np.array([[0, 1], [1, 0]], dtype=kind)))
    assert rows.tensor.dtype is torch.float32
    assert rows.tensor.tolist() == [[0, 1], [1, 0]]
    assert "converted to float32, not scaled" in capsys.readouterr().err


def test_nan_is_kept_and_overflow_is_said(tmp_path, capsys):
    rows = load(array(tmp_path, np.array([[np.nan, np.inf, 1e300, 1.0]])))
    assert str(rows.tensor.tolist()) == "[[nan, inf, inf, 1.0]]"
    told = capsys.readouterr().err
    assert "2 of 4 values of x.npy are NaN or Inf" in told
    assert "1 of 4 values of x.npy do not fit float32 and become Inf" in told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros(3), r"got shape \(3,\)"),
        (np.zeros(()), r"got shape \(\)"),
        (np.zeros((0, 3)), r"got shape \(0, 3\)"),
        (np.zeros((3, 0)), r"got shape \(3, 0\)"),
        (np.zeros((2, 2), dtype=complex), "got complex128"),
        (np.array([["a", "b"]]), "got <U1"),
        (np.zeros((2, 2), dtype=[("a", "f4")]), "got"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(values, words, tmp_path):
    with pytest.raises(WrongUsage, match=words):
        load(array(tmp_path, values))


def test_pickled_arrays_are_refused_unread(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(WrongUsage, match="cannot be read as an array of numbers"):
        load(path)


def test_files_of_other_kinds_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 2)))
    with pytest.raises(WrongUsage, match=r"is an archive.*expected one array"):
        load(tmp_path / "x.npz")
    (tmp_path / "x.png").write_bytes(b"\x89PNG....")
    with pytest.raises(WrongUsage, match=r"does not begin as a .npy file does"):
        load(tmp_path / "x.png")
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(WrongUsage, match=r"does not begin as a .npy file does"):
        load(tmp_path / "empty.npy")
    with pytest.raises(WrongUsage, match="there is no file or folder"):
        load(tmp_path / "none.npy")


def test_truncated_and_boasting_files_are_refused(tmp_path):
    whole = array(tmp_path, np.zeros((5, 4))).read_bytes()
    for content in (whole[:-8], whole[:40], whole.replace(b"(5, 4)", b"(9, 9)"), whole[:6]):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(WrongUsage, match="cannot be read as an array of numbers"):
            load(tmp_path / "x.npy")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200), header=st.binary(max_size=80))
def test_any_bytes_after_the_magic_are_an_array_or_wrong_usage(junk, header, tmp_path):
    length = len(header).to_bytes(2, "little")
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + length + header + junk)
    with pytest.raises(WrongUsage):
        load(tmp_path / "x.npy")


def test_more_than_memory_should_hold_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_BYTES", 100)
    path = array(tmp_path, np.zeros((10, 4)))
    with pytest.raises(WrongUsage, match="pass a smaller --samples"):
        load(path)
    assert load(path, samples=3).tensor.shape == (3, 4)


def test_context_keeps_labels_and_demands_a_row_for_each_sample(tmp_path):
    rows = Rows(np.zeros((2, 3)), 5, "x.npy")
    labels = read_context(
        array(tmp_path, np.arange(5, dtype=np.uint8), "c.npy"),
        rows=rows,
        samples=9,
        dtype=torch.float32,
    )
    assert labels.dtype is torch.int64
    assert labels.tolist() == [0, 1]
    numbers = read_context(
        array(tmp_path, np.ones((5, 2)), "c.npy"), rows=rows, samples=9, dtype=torch.float32
    )
    assert numbers.shape == (2, 2)
    assert numbers.dtype is torch.float32
    with pytest.raises(
        WrongUsage, match=r"expected --context with 5 rows, as many as the data have; .* has 4"
    ):
        read_context(
            array(tmp_path, np.ones((4, 2)), "c.npy"), rows=rows, samples=9, dtype=torch.float32
        )


def picture(folder, name, pixels, mode=None):
    Image.fromarray(np.asarray(pixels), mode).save(folder / name)


def test_images_come_by_name_scaled_and_channels_first(tmp_path, capsys):
    colours = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    picture(tmp_path, "b.png", colours[1])
    picture(tmp_path, "a.png", colours[0])
    rows = load(tmp_path, dtype=torch.float64)
    assert rows.tensor.shape == (2, 3, 4, 5)
    assert np.array_equal(rows.tensor.numpy(), colours.transpose(0, 3, 1, 2) / 255)
    assert "2 of 2 images" in capsys.readouterr().err
    assert load(tmp_path, samples=1).total == 2


def test_grey_sixteen_bit_and_palette_images(tmp_path, capsys):
    (tmp_path / "grey").mkdir()
    picture(tmp_path / "grey", "a.png", np.array([[0, 255]], dtype=np.uint8))
    picture(tmp_path / "grey", "b.png", np.array([[0, 65535]], dtype=np.uint16))
    Image.new("1", (2, 1), 1).save(tmp_path / "grey" / "c.png")
    assert load(tmp_path / "grey").tensor.tolist() == [[[[0, 1]]], [[[0, 1]]], [[[1, 1]]]]
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "grey" / "d.png")
    mixed = load(tmp_path / "grey").tensor
    assert mixed.shape == (4, 3, 1, 2)
    assert mixed[3, :, 0, 0].tolist() == [1, 0, 0]
    told = capsys.readouterr().err
    assert "d.png is of mode RGBA: converted to RGB" in told
    assert "the grey ones are taken as colour" in told


def test_images_of_two_sizes_are_refused_by_name(tmp_path):
    picture(tmp_path, "a.png", np.zeros((4, 5), dtype=np.uint8))
    picture(tmp_path, "b.png", np.zeros((5, 4), dtype=np.uint8))
    with pytest.raises(WrongUsage, match=r"a.png is 5 x 4 and b.png 4 x 5"):
        load(tmp_path)


def test_folders_without_images_and_with_other_files(tmp_path, capsys):
    with pytest.raises(WrongUsage, match="found none"):
        load(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    picture(tmp_path, "a.png", np.zeros((2, 2), dtype=np.uint8))
    assert load(tmp_path).total == 1
    assert "1 entries of" in capsys.readouterr().err


def test_damaged_and_huge_images_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    picture(tmp_path, "a.png", noise)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(WrongUsage, match="cannot be read as an image"):
            load(tmp_path)
    path.write_bytes(whole)
    monkeypatch.setattr(data, "MOST_PIXELS", 100)
    with pytest.raises(WrongUsage, match="40 x 40 pixels, more than an audit can take"):
        load(tmp_path)


def test_torch_files_are_read_as_one_tensor(tmp_path):
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    torch.save(values.requires_grad_(), tmp_path / "x.pt")
    assert torch.equal(load(tmp_path / "x.pt", samples=4).tensor, values[:4])
    torch.save(values.detach().bfloat16(), tmp_path / "x.pth")
    assert torch.equal(load(tmp_path / "x.pth").tensor, values.bfloat16().float())


def test_torch_files_of_other_things_are_refused_and_not_run(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.zeros(2, 2)}, path)
    with pytest.raises(WrongUsage, match=r"expected one tensor .* got dict: save the batch alone"):
        load(path)
    torch.save(print, path)
    with pytest.raises(WrongUsage, match="cannot be read as a tensor"):
        load(path)
    path.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(WrongUsage, match="cannot be read as a tensor"):
        load(path)


def test_tables_with_and_without_a_header(tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_text("1,2.5\n-3,nan\n4,5\n")
    assert load(path, samples=1).tensor.tolist() == [[1, 2.5]]
    assert load(path).total == 3
    assert "names of the columns" not in capsys.readouterr().err
    path.write_text("a,b\n1,2\n")
    assert load(path).tensor.tolist() == [[1, 2]]
    assert "the first line is taken for the names of the columns" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["1,2\n3\n", "1,2\n3,x\n", "1;2\n3;4\n", "a,b\n"])
def test_tables_that_are_none_are_refused(text, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(WrongUsage):
        load(tmp_path / "x.csv")


def deflated(path, seed):
    """The archive again, compressed, as a trap would be."""
    packed = path.with_name(f"packed{seed}{path.suffix}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed


def test_archives_that_unpack_to_much_more_than_their_size_are_refused_unread(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(2**21, 4), path)
    assert load(path, samples=1).total == 2**21
    bomb = deflated(path, 0)
    with pytest.raises(WrongUsage, match=r"unpacks to .* without compression; save it again"):
        load(bomb)
    with pytest.raises(WrongUsage, match="without compression"):
        load_weights(nn.Linear(2, 2), bomb)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.zeros(2, 2, dtype=torch.float8_e5m2)],
    ids=["sparse", "8 bits"],
)
def test_tensors_that_numpy_does_not_know_are_refused_with_the_remedy(tensor, tmp_path):
    torch.save(tensor, tmp_path / "x.pt")
    with pytest.raises(WrongUsage, match=r"save x\.to_dense\(\)\.float\(\)"):
        load(tmp_path / "x.pt")


def test_a_view_that_is_larger_than_its_file_is_refused(tmp_path):
    torch.save(torch.zeros(1, dtype=torch.bfloat16).expand(2**32, 2**10), tmp_path / "x.pt")
    with pytest.raises(WrongUsage, match="takes 32768 GiB"):
        load(tmp_path / "x.pt")


def test_images_that_take_too_much_together_are_refused_by_their_headers(tmp_path, monkeypatch):
    for k in range(4):
        Image.new("L", (64, 64)).save(tmp_path / f"{k}.png")
    monkeypatch.setattr(data, "MOST_IMAGE_BYTES", 3 * 64 * 64 * 24)
    with pytest.raises(WrongUsage, match=r"4 images .* pass a smaller --samples"):
        load(tmp_path)
    assert len(load(tmp_path, samples=3).tensor) == 3


def write_parquet(path, columns):
    arrow = pytest.importorskip("pyarrow")
    arrow.parquet = pytest.importorskip("pyarrow.parquet")
    arrow.parquet.write_table(arrow.table(columns), path)
    return path


@pytest.mark.library("pyarrow")
def test_the_columns_of_a_parquet_file_are_the_features(tmp_path):
    columns = {"a": [1, 2, 3], "b": [0.5, None, 2.5], "c": [True, False, True]}
    rows = read_data(write_parquet(tmp_path / "x.parquet", columns), samples=2)
    assert rows.total == 3
    assert np.array_equal(rows.array, [[1, 0.5, 1], [2, np.nan, 0]], equal_nan=True)


@pytest.mark.library("pyarrow")
def test_parquet_rows_of_several_batches_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PARQUET_ROWS", 4)
    path = write_parquet(tmp_path / "x.parquet", {"a": list(range(11))})
    for samples in (3, 4, 9, 11, 100):
        assert read_data(path, samples=samples).array[:, 0].tolist() == list(range(11))[:samples]


@pytest.mark.library("pyarrow")
def test_parquet_files_that_are_no_table_of_numbers(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"a": [1.0], "name": ["x"]})
    with pytest.raises(WrongUsage, match="column 'name' is string: leave it out"):
        read_data(path, samples=2)
    nested = write_parquet(tmp_path / "n.parquet", {"a": [[1.0, 2.0]]})
    with pytest.raises(WrongUsage, match="column 'a' is list"):
        read_data(nested, samples=2)
    empty = write_parquet(tmp_path / "e.parquet", {"a": []})
    with pytest.raises(WrongUsage, match="column 'a' is null"):
        read_data(empty, samples=2)
    whole = write_parquet(tmp_path / "x.parquet", {"a": [1.0, 2.0]}).read_bytes()
    for content in (b"", b"PAR1", whole[:-9], whole[:-30] + b"\xff" * 20 + whole[-10:]):
        path.write_bytes(content)
        with pytest.raises(WrongUsage, match="cannot be read as a table of numbers"):
            read_data(path, samples=2)


def test_without_pyarrow_parquet_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        MissingPackage, match=r"^inn-guard needs pyarrow: pip install '.\[parquet\]'$"
    ):
        read_data(tmp_path / "x.parquet", samples=2)
