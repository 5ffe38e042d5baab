"""CIFAR-10 and MNIST as their authors distribute them, read without running code in the files.

Accepted below ``root``, in this order:

* CIFAR-10: ``cifar-10-batches-bin/``, ``cifar-10-batches-py/``, ``cifar-10-binary.tar.gz``,
  ``cifar-10-python.tar.gz``
* MNIST: ``MNIST/raw/`` or ``root`` itself with ``train-images-idx3-ubyte`` and so on, plain or
  ``.gz``

Archives are read member by member and never unpacked to disk. The python layout of CIFAR-10
consists of pickles; they are read by an unpickler that knows two inert stand-ins and nothing else,
so no code in a file can run.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Images", "MissingData", "file_checksums", "read_cifar10", "read_mnist"]

LARGEST_FILE = 256 * 2**20  #: bytes; the largest official file is 177 MB
RECORD = 1 + 3 * 32 * 32
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
)
FETCH = {
    "CIFAR-10": "torchvision.datasets.CIFAR10",
    "MNIST": "torchvision.datasets.MNIST",
}
OFFICIAL = {
    "cifar10": (
        "cifar-10-batches-bin/*_batch*.bin",
        "cifar-10-batches-py/*_batch*",
        "cifar-10-*.tar.gz",
    ),
    "mnist": ("MNIST/raw/*-ubyte*", "*-idx*-ubyte*"),
}


class MissingData(FileNotFoundError):
    """A data set is not where it was said to be; the message has the command that fetches it."""


@dataclass(frozen=True)
class Images:
    """One split of an image data set.

    Attributes:
        pixels: (n, channels, height, width) uint8.
        labels: (n,) int64.
        checksums: file name -> sha256 of its bytes, so that a result can say what it was measured
            on.
    """

    pixels: np.ndarray
    labels: np.ndarray
    checksums: dict[str, str]


def read_cifar10(root: Path, *, train: bool) -> Images:
    """The training or test images of CIFAR-10 below ``root``, as many as its files hold.

    Raises:
        MissingData: with the command that fetches the data set, if no layout of it is below
            ``root``.
        ValueError: if a file is truncated or is not what its name says.
    """
    stems = ["test_batch"]
    if train:
        stems = [f"data_batch_{k}" for k in range(1, 6)]
    for folder, suffix, archive, parse in (
        ("cifar-10-batches-bin", ".bin", "cifar-10-binary.tar.gz", _cifar_records),
        ("cifar-10-batches-py", "", "cifar-10-python.tar.gz", _cifar_pickle),
    ):
        names = [stem + suffix for stem in stems]
        if (root / folder).is_dir():
            contents = _folder(root / folder, names)
        elif (root / archive).is_file():
            contents = _archive(root / archive, names)
        else:
            continue
        pixels, labels, checksums = [], [], {}
        for name, data in contents:
            some_pixels, some_labels = parse(name, data)
            pixels.append(some_pixels)
            labels.append(some_labels)
            checksums[name] = _sha256(data)
        return Images(np.concatenate(pixels), np.concatenate(labels), checksums)
    raise _missing("CIFAR-10", root)


def read_mnist(root: Path, *, train: bool) -> Images:
    """The 60,000 training or 10,000 test images of MNIST below ``root``.

    Raises:
        MissingData: with the command that fetches the data set, if its files are not below
            ``root``.
        ValueError: if a file is truncated or is not what its name says.
    """
    stem = "t10k"
    if train:
        stem = "train"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    folder = root
    if (root / "MNIST" / "raw").is_dir():
        folder = root / "MNIST" / "raw"
    paths = [_plain_or_gzip(folder / name) for name in names]
    if None in paths:
        raise _missing("MNIST", root)
    raw = [_read(path) for path in paths]
    pixels = _idx(names[0], _gunzip(paths[0].name, raw[0]), dimensions=3)
    labels = _idx(names[1], _gunzip(paths[1].name, raw[1]), dimensions=1)
    if len(pixels) != len(labels):
        raise ValueError(
            f"expected as many labels as images, got {len(labels)} and {len(pixels)} in {folder}"
        )
    checksums = {path.name: _sha256(data) for path, data in zip(paths, raw, strict=True)}
    return Images(pixels[:, None], labels.astype(np.int64), checksums)


def file_checksums(root: Path, name: str = "") -> dict[str, str]:
    """File name -> sha256 of the official files of cifar10, mnist, or both, below ``root``."""
    paths: set[Path] = set()
    for key, patterns in OFFICIAL.items():
        if name and not name.startswith(key):
            continue
        for pattern in patterns:
            paths |= {path for path in root.glob(pattern) if path.is_file()}
    checksums = {}
    for path in sorted(paths):
        checksums[str(path.relative_to(root))] = _sha256(_read(path))
    return checksums


def _plain_or_gzip(path: Path) -> Path | None:
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _missing(name: str, root: Path) -> MissingData:
    return MissingData(
        f"no {name} below {root}. Expected one of the official layouts; to fetch it, run\n"
        f'    pip install torchvision && python -c "import torchvision; '
        f"{FETCH[name]}('{root}', download=True)\"\n"
        f"and give --data-root {root}"
    )


def _read(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(
            f"{path}: expected at most {LARGEST_FILE} bytes, got {path.stat().st_size}"
        )
    return path.read_bytes()


def _folder(folder: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        if not (folder / name).is_file():
            raise MissingData(f"expected the file {name} in {folder}; it is not there")
        yield name, _read(folder / name)


def _archive(path: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            for name in names:
                if name not in members or members[name].size > LARGEST_FILE:
                    raise ValueError(
                        f"{path}: expected a member {name} of at most {LARGEST_FILE} bytes"
                    )
                handle = archive.extractfile(members[name])
                if handle is None:
                    raise ValueError(f"{path}: the member {name} cannot be read")
                yield name, handle.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete tar archive ({type(error).__name__}: {error})"
        ) from error


def _gunzip(name: str, data: bytes) -> bytes:
    if not name.endswith(".gz"):
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as handle:
            content = handle.read(LARGEST_FILE + 1)
    except (OSError, EOFError) as error:
        raise ValueError(f"{name} is not a complete gzip file ({error})") from error
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{name} unpacks to more than {LARGEST_FILE} bytes")
    return content


def _idx(name: str, data: bytes, *, dimensions: int) -> np.ndarray:
    header = 4 * (1 + dimensions)
    magic = bytes([0, 0, 8, dimensions])
    if data[:4] != magic or len(data) < header:
        raise ValueError(
            f"{name}: expected an idx file that begins with {magic.hex()}, got {data[:4].hex()!r}"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dimensions, offset=4))
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise ValueError(
            f"{name}: its header promises {expected} bytes of data, "
            f"the file holds {len(data) - header}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _cifar_records(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not data or len(data) % RECORD:
        raise ValueError(f"{name}: expected records of {RECORD} bytes, got {len(data)} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return _checked(name, records[:, 1:], records[:, 0].astype(np.int64))


def _cifar_pickle(name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _InertUnpickler(io.BytesIO(data), encoding="bytes").load()
        array, labels = batch[b"data"], batch[b"labels"]
        pixels = np.frombuffer(array.content, np.uint8).reshape(array.shape)
    except PICKLE_ERRORS as error:
        raise ValueError(
            f"{name}: not a batch of the python layout ({type(error).__name__}: {error})"
        ) from error
    return _checked(name, pixels, np.asarray(labels, dtype=np.int64))


def _checked(name: str, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pixels.ndim != 2 or pixels.shape != (len(labels), RECORD - 1):
        raise ValueError(
            f"{name}: expected {len(labels)} images of {RECORD - 1} bytes, got {pixels.shape}"
        )
    if labels.size and not (labels.min() >= 0 and labels.max() <= 9):
        raise ValueError(f"{name}: expected labels 0 to 9, got {labels.min()} to {labels.max()}")
    return pixels.reshape(-1, 3, 32, 32), labels


class _Array:
    """Replaces numpy.ndarray while a pickle is read: keeps shape and bytes, calls nothing."""

    shape: tuple[int, ...] = ()
    content: bytes = b""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if len(state) == 5:
            _, self.shape, _, _, self.content = state


def _bytes_of(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected latin1 bytes, got {encoding}")
    return text.encode("latin1")


class _InertUnpickler(pickle.Unpickler):
    """Resolves array constructors to stand-ins and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_reconstruct", "ndarray", "dtype") and module.split(".")[0] == "numpy":
            return _Array
        if (module, name) == ("_codecs", "encode"):
            return _bytes_of
        raise pickle.UnpicklingError(
            f"the file asks for {module}.{name}, which a batch of CIFAR-10 does not need"
        )
