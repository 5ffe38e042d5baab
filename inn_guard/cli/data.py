"""From a file or a folder on a command line to a batch; every conversion is reported."""

from __future__ import annotations

import csv
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inn_guard.cli.archives import check_archive
from inn_guard.cli.usage import MissingPackage, WrongUsage, notice
from inn_guard.core.tensors import dtype_name

__all__ = ["Rows", "read_context", "read_data"]

IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"),
}
IMAGE_FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM"]
TORCH_SUFFIXES = {".pt", ".pth"}
#: what --data and --context may be, in messages
KINDS = "a .npy, .pt, .csv or .parquet file"
#: types of columns, as pyarrow writes them
PARQUET_NUMBERS = {
    *("bool", "halffloat", "float", "double"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}
PARQUET_ROWS = 4096  #: decoded at once
MOST_BYTES = 2**34  # 16 GiB of float64
MOST_IMAGE_BYTES = 2**31  # 2 GiB, of which several copies are made
MOST_PIXELS = 2**26  # of one image


@dataclass(frozen=True)
class Rows:
    """The first rows of a file, as they were read.

    Attributes:
        array: real numbers, (rows, ...).
        total: how many rows the file has.
        name: of the file, for notices.
    """

    array: np.ndarray
    total: int
    name: str

    def to(self, dtype: torch.dtype) -> Tensor:
        """The rows in ``dtype``; NaN and Inf are kept, and what does not fit is reported."""
        exact = torch.from_numpy(self.array.astype(np.float64))
        tensor = exact.to(dtype)
        count = exact.numel()
        if is_integer(self.array):
            low, high = self.array.min(), self.array.max()
            notice(
                f"{self.name} holds {self.array.dtype} from {low} to {high}: converted to "
                f"{dtype_name(dtype)}, not scaled"
            )
        if bad := int((~exact.isfinite()).sum()):
            notice(f"{bad} of {count} values of {self.name} are NaN or Inf")
        if lost := int((exact.isfinite() & ~tensor.isfinite()).sum()):
            notice(
                f"{lost} of {count} values of {self.name} do not fit {dtype_name(dtype)} and "
                "become Inf"
            )
        return tensor


def read_data(path: Path, *, samples: int) -> Rows:
    """The first ``samples`` of a file (samples, *data), or of a folder of images.

    A file is .npy, .pt, .csv or .parquet.

    Images are taken in the order of their names, as (C, H, W) in [0, 1].

    Raises:
        WrongUsage: if there is no such data, or it cannot be a batch.
    """
    try:
        if path.is_dir():
            return _read_images(path, samples)
        return _read_file(path, samples, least_dimensions=2)
    except MemoryError as error:
        raise WrongUsage(f"{path} does not fit into memory: pass a smaller --samples") from error


def read_context(path: Path, *, rows: Rows | None, samples: int, dtype: torch.dtype) -> Tensor:
    """The rows of a file that belong to ``rows``: in ``dtype``, or int64 for integers (labels).

    Without data, the first ``samples`` rows.

    Raises:
        WrongUsage: if the file cannot be read, or has another number of rows than the data.
    """
    count = samples if rows is None else len(rows.array)
    context = _read_file(path, count, least_dimensions=1)
    if rows is not None and context.total != rows.total:
        raise WrongUsage(
            f"expected --context with {rows.total} rows, as many as the data have; {path} has "
            f"{context.total}"
        )
    if is_integer(context.array):
        return torch.from_numpy(context.array.astype(np.int64))
    return context.to(dtype)


def is_integer(array: np.ndarray) -> bool:
    """Whether an array holds integers or booleans."""
    return array.dtype.kind in "iub"


def _read_file(path: Path, count: int, *, least_dimensions: int) -> Rows:
    if not path.is_file():
        raise WrongUsage(
            f"there is no file or folder {path}: pass data as .pt, .npy, .csv or .parquet, or a "
            "folder of images"
        )
    if path.suffix.lower() in TORCH_SUFFIXES:
        array = _torch_array(path)
    elif path.suffix.lower() == ".csv":
        array = _csv_array(path)
    elif path.suffix.lower() == ".parquet":
        return _parquet_rows(path, count)
    else:
        array = _numpy_array(path)
    expected = f"expected numbers of shape (samples, ...) in {path}, got"
    if array.dtype.kind not in "fiub":
        raise WrongUsage(f"{expected} {array.dtype}")
    if array.ndim < least_dimensions or array.size == 0:
        raise WrongUsage(f"{expected} shape {array.shape}")
    part = array[:count]
    _check_size(len(part), part[:1].size, path)
    return Rows(np.array(part), len(array), path.name)


def _numpy_array(path: Path) -> np.ndarray:
    """The array of a .npy file, not yet read: only its header and its length are trusted."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"PK":
        raise WrongUsage(
            f"{path} is an archive, as of numpy.savez or torch.save; expected one array: save it "
            "with numpy.save, or name a file of torch.save .pt"
        )
    if magic != b"\x93NUMPY":
        raise WrongUsage(
            f"expected {KINDS} or a folder of images, but {path} does not begin as a .npy file does"
        )
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged or hostile header may raise anything
        raise WrongUsage(f"{path} cannot be read as an array of numbers: {error}") from error


def _torch_array(path: Path) -> np.ndarray:
    """The tensor of a file of ``torch.save``; no code in it is run."""
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        first = str(error).partition("\n")[0]
        raise WrongUsage(f"{path} cannot be read as a tensor: {first}") from error
    if not isinstance(content, Tensor):
        raise WrongUsage(
            f"expected one tensor in {path}, got {type(content).__name__}: save the batch alone, "
            "torch.save(x, path)"
        )
    if content.numel() * 8 > MOST_BYTES:
        # a view can have more entries than its file
        size = content.numel() * 8 / 2**30
        raise WrongUsage(f"the tensor in {path} takes {size:.0f} GiB: save fewer samples")
    if content.dtype is torch.bfloat16:  # numpy has no such type
        content = content.float()
    try:
        return content.detach().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, on the meta device, 8 bits
        raise WrongUsage(
            f"expected a dense tensor of numbers in {path}, got {content.dtype}, {content.layout}: "
            "save x.to_dense().float()"
        ) from error


def _csv_array(path: Path) -> np.ndarray:
    """A table of numbers with commas between; a first line without numbers is its header."""
    if path.stat().st_size > MOST_BYTES:
        raise WrongUsage(f"{path} is larger than {MOST_BYTES / 2**30:.0f} GiB: save it as .npy")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = next(csv.reader(file), [])
        header = not any(_is_number(cell) for cell in first)
        if header:
            notice(f"{path.name}: the first line is taken for the names of the columns")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a table without rows is refused below, by its shape
            return np.loadtxt(path, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8")
    except (ValueError, csv.Error) as error:
        raise WrongUsage(
            f"{path} cannot be read as a table of numbers: {error}; pass one of numbers"
        ) from error


def _parquet_rows(path: Path, count: int) -> Rows:
    """The first rows of a table whose columns are numbers; no more is decoded than they need."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise MissingPackage("pyarrow", "parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            other = [field for field in schema if str(field.type) not in PARQUET_NUMBERS]
            if other:
                raise WrongUsage(
                    f"expected columns of numbers in {path}, but column {other[0].name!r} is "
                    f"{other[0].type}: leave it out"
                )
            total = file.metadata.num_rows
            _check_size(min(count, total), len(schema), path)
            parts = [np.zeros((0, len(schema)))]
            parts += _parquet_parts(file, count)
            values = np.concatenate(parts)
    except (WrongUsage, MemoryError):
        raise
    except Exception as error:  # a damaged or hostile file may raise anything
        raise WrongUsage(
            f"{path} cannot be read as a table of numbers: {error}; pass one of numbers"
        ) from error
    if values.size == 0:
        raise WrongUsage(
            f"expected numbers of shape (samples, ...) in {path}, got shape {values.shape}"
        )
    return Rows(values, total, path.name)


def _parquet_parts(file: Any, count: int) -> Iterator[np.ndarray]:
    """Parts of the first ``count`` rows, (rows, columns); missing values are NaN."""
    left = count
    for batch in file.iter_batches(batch_size=PARQUET_ROWS):
        part = batch.slice(0, left)
        columns = [column.cast("float64").to_numpy(zero_copy_only=False) for column in part.columns]
        yield np.stack(columns, axis=1)
        left -= part.num_rows
        if left <= 0:
            return


def _check_size(rows: int, columns: int, path: Path) -> None:
    if rows * columns * 8 > MOST_BYTES:
        size = rows * columns * 8 / 2**30
        raise WrongUsage(f"{rows} samples of {path} take {size:.0f} GiB: pass a smaller --samples")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_images(folder: Path, samples: int) -> Rows:
    entries = sorted(folder.iterdir())
    paths = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not paths:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise WrongUsage(f"expected images ({suffixes}) in the folder {folder}, found none")
    if len(paths) < len(entries):
        notice(f"{len(entries) - len(paths)} entries of {folder} are not images and are left out")
    _check_total(folder, paths[:samples])
    pixels = [_pixels(path) for path in paths[:samples]]
    height, width, channels = pixels[0].shape
    for path, image in zip(paths, pixels, strict=False):
        if image.shape[:2] != (height, width):
            raise WrongUsage(
                f"expected images of one size, but {paths[0].name} is {width} x {height} and "
                f"{path.name} {image.shape[1]} x {image.shape[0]}"
            )
        if image.shape[2] != channels:
            channels = 3
    if any(image.shape[2] != channels for image in pixels):
        notice(f"{folder} holds grey and colour images: the grey ones are taken as colour")
    stack = np.stack([np.broadcast_to(image, (height, width, channels)) for image in pixels])
    notice(f"{len(stack)} of {len(paths)} images of {folder}, scaled to [0, 1]")
    return Rows(np.ascontiguousarray(np.moveaxis(stack, -1, 1)), len(paths), folder.name)


def _check_total(folder: Path, paths: list[Path]) -> None:
    """Refuse images that take too much memory together, by the sizes in their headers."""
    total = 0
    for path in paths:
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                total += 3 * 8 * image.width * image.height
        except Exception as error:  # a damaged or hostile image may raise anything
            raise WrongUsage(f"{path} cannot be read as an image: {error}") from error
    if total > MOST_IMAGE_BYTES:
        raise WrongUsage(
            f"{len(paths)} images of {folder} take {total / 2**30:.1f} GiB, at most "
            f"{MOST_IMAGE_BYTES / 2**30:.0f} fit: pass a smaller --samples"
        )


def _pixels(path: Path) -> np.ndarray:
    """One image as (H, W, C) in [0, 1], C = 1 or 3."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise WrongUsage(
                    f"{path} has {image.width} x {image.height} pixels, more than an audit can take"
                )
            if image.mode.startswith("I;16"):
                return np.asarray(image, dtype=np.float64)[..., None] / 65535
            mode = "RGB"
            if image.mode in ("1", "L"):
                mode = "L"
            elif image.mode != "RGB":
                notice(f"{path.name} is of mode {image.mode}: converted to RGB")
            plain = np.asarray(image.convert(mode), dtype=np.float64)
            return plain.reshape(image.height, image.width, -1) / 255
    except WrongUsage:
        raise
    except Exception as error:  # a damaged or hostile image may raise anything
        raise WrongUsage(f"{path} cannot be read as an image: {error}") from error
