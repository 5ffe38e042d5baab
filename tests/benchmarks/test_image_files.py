"""Readers of the official layouts: round trips, and files that are not what they say."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest

from benchmarks.common.image_files import read_cifar10, read_mnist


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (7, 3, 32, 32), dtype=np.uint8), generator.integers(0, 10, 7)


def records(images):
    pixels, labels = images
    return np.concatenate(
        [labels[:, None].astype(np.uint8), pixels.reshape(7, -1)], axis=1
    ).tobytes()


def python_batch(images):
    pixels, labels = images
    return pickle.dumps({b"data": pixels.reshape(7, -1), b"labels": labels.tolist()}, protocol=2)


def archive(path, members):
    with tarfile.open(path, "w:gz") as handle:
        for name, data in members.items():
            info = tarfile.TarInfo(f"../outside/{name}")
            info.size = len(data)
            handle.addfile(info, io.BytesIO(data))


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.tobytes()
    )


@pytest.mark.parametrize("layout", ["bin", "py", "bin archive", "py archive"])
def test_every_layout_of_cifar10_gives_the_images(tmp_path, images, layout):
    data = records(images) if layout.startswith("bin") else python_batch(images)
    name = "test_batch.bin" if layout.startswith("bin") else "test_batch"
    if layout.endswith("archive"):
        kind = "binary" if layout.startswith("bin") else "python"
        archive(tmp_path / f"cifar-10-{kind}.tar.gz", {name: data})
    else:
        folder = tmp_path / f"cifar-10-batches-{layout}"
        folder.mkdir()
        (folder / name).write_bytes(data)
    read = read_cifar10(tmp_path, train=False)
    np.testing.assert_array_equal(read.pixels, images[0])
    np.testing.assert_array_equal(read.labels, images[1])
    assert len(read.checksums[name]) == 64
    assert sorted(path.name for path in tmp_path.parent.glob("outside*")) == []


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_plain_and_compressed(tmp_path, images, suffix):
    pixels, labels = images[0][:, 0, :28, :28], images[1].astype(np.uint8)
    for name, array in (("t10k-images-idx3-ubyte", pixels), ("t10k-labels-idx1-ubyte", labels)):
        data = idx(np.ascontiguousarray(array))
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    read = read_mnist(tmp_path, train=False)
    np.testing.assert_array_equal(read.pixels[:, 0], pixels)
    np.testing.assert_array_equal(read.labels, labels)


def test_a_missing_data_set_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install torchvision"):
        read_cifar10(tmp_path, train=True)
    with pytest.raises(FileNotFoundError, match=r"torchvision\.datasets\.MNIST"):
        read_mnist(tmp_path, train=True)


class Hostile:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        pickle.dumps({}),
        pickle.dumps(Hostile()),
        pickle.dumps({b"data": [1], b"labels": [1]}),
    ],
    ids=["empty", "garbage", "no keys", "code", "list"],
)
def test_hostile_python_batches_are_refused_and_run_nothing(tmp_path, data, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(data)
    with pytest.raises(ValueError, match="test_batch"):
        read_cifar10(tmp_path, train=False)
    assert capsys.readouterr().out == ""


def test_truncated_files_are_named(tmp_path, images):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(records(images)[:-1])
    with pytest.raises(ValueError, match=r"test_batch\.bin"):
        read_cifar10(tmp_path, train=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[0][:, 0])[:-5])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(images[1].astype(np.uint8)))
    with pytest.raises(ValueError, match="promises"):
        read_mnist(tmp_path, train=False)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[0][:, 0]))[:-20])
    with pytest.raises(ValueError, match="gzip"):
        read_mnist(tmp_path, train=False)


def test_a_truncated_archive_is_named(tmp_path, images):
    path = tmp_path / "cifar-10-binary.tar.gz"
    archive(path, {"test_batch.bin": records(images)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="tar"):
        read_cifar10(tmp_path, train=False)
