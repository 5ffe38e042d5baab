"""From a file or a folder on a command line to a batch; every conversion is said."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inn_guard.cli.usage import WrongUsage, note

__all__ = ["Rows", "load_context", "load_data"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
_FORMATS = ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM"]
_MOST_BYTES = 2**34  # 16 GiB of float64
_MOST_PIXELS = 2**26


class Rows(NamedTuple):
    """The first rows of a file: a tensor, and how many rows the file has."""

    tensor: Tensor
    total: int


def load_data(path: Path, *, samples: int, dtype: torch.dtype) -> Rows:
    """The first ``samples`` of a .npy file (samples, *data), or of a folder of images, in ``dtype``.

    Images are taken in the order of their names, as (C, H, W) in [0, 1]. NaN and Inf are kept.

    Raises:
        WrongUsage: if there is no such data, or it cannot be a batch.
    """
    if path.is_dir():
        return _images(path, samples, dtype)
    array, total = _read(path, samples, least_dimensions=2)
    if array.dtype.kind in "iub":
        low, high = array.min(), array.max()
        note(
            f"{path.name} holds {array.dtype} from {low} to {high}: converted to {_name(dtype)}, not scaled"
        )
    return Rows(_converted(array, dtype, path), total)


def load_context(path: Path, *, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The rows of a .npy file that belong to ``rows``: numbers in ``dtype``, integers (labels) as int64.

    Raises:
        WrongUsage: if the file cannot be read, or has another number of rows than the data.
    """
    array, total = _read(path, len(rows.tensor), least_dimensions=1)
    if total != rows.total:
        raise WrongUsage(
            f"expected --context with {rows.total} rows, as many as --data has; {path} has {total}"
        )
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype(np.int64))
    return _converted(array, dtype, path)


def _read(path: Path, count: int, *, least_dimensions: int) -> tuple[np.ndarray, int]:
    array = _map(path)
    expected = f"expected numbers of shape (samples, ...) in {path}, got"
    if array.dtype.kind not in "fiub":
        raise WrongUsage(f"{expected} {array.dtype}")
    if array.ndim < least_dimensions or array.size == 0:
        raise WrongUsage(f"{expected} shape {array.shape}")
    part = array[:count]
    if part.size * 8 > _MOST_BYTES:
        size = part.size * 8 / 2**30
        raise WrongUsage(
            f"{len(part)} samples of {path} take {size:.0f} GiB; type a smaller --samples"
        )
    return np.array(part), len(array)


def _map(path: Path) -> np.ndarray:
    """The array of a .npy file, not yet read: only its header and its length are trusted so far."""
    if not path.is_file():
        raise WrongUsage(f"there is no file or folder {path}")
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"PK":
        raise WrongUsage(
            f"{path} is an archive (.npz), expected one array; type numpy.save(path, array) to make one"
        )
    if magic != b"\x93NUMPY":
        raise WrongUsage(
            f"expected a .npy file or a folder of images, but {path} does not begin as a .npy file does"
        )
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged or hostile header may raise anything
        raise WrongUsage(f"{path} cannot be read as an array of numbers: {error}") from error


def _converted(array: np.ndarray, dtype: torch.dtype, path: Path) -> Tensor:
    exact = torch.from_numpy(array.astype(np.float64))
    tensor = exact.to(dtype)
    if bad := int((~exact.isfinite()).sum()):
        note(f"{bad} of {exact.numel()} values of {path.name} are NaN or Inf")
    if lost := int((exact.isfinite() & ~tensor.isfinite()).sum()):
        note(
            f"{lost} of {exact.numel()} values of {path.name} do not fit {_name(dtype)} and become Inf"
        )
    return tensor


def _images(folder: Path, samples: int, dtype: torch.dtype) -> Rows:
    entries = sorted(folder.iterdir())
    paths = [path for path in entries if path.suffix.lower() in _SUFFIXES and path.is_file()]
    if not paths:
        raise WrongUsage(
            f"expected images ({', '.join(sorted(_SUFFIXES))}) in the folder {folder}, found none"
        )
    if len(paths) < len(entries):
        note(f"{len(entries) - len(paths)} entries of {folder} are no images and are left out")
    pixels = [_pixels(path) for path in paths[:samples]]
    for path, image in zip(paths, pixels, strict=False):
        if image.shape[:2] != pixels[0].shape[:2]:
            sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (pixels[0], image)]
            raise WrongUsage(
                f"expected images of one size, but {paths[0].name} is {sizes[0]} and {path.name} {sizes[1]}"
            )
    channels = max(image.shape[2] for image in pixels)
    if any(image.shape[2] != channels for image in pixels):
        note(f"{folder} holds grey and colour images: the grey ones are taken as colour")
    stack = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in pixels])
    note(f"{len(stack)} of {len(paths)} images of {folder}, scaled to [0, 1]")
    return Rows(torch.from_numpy(stack).movedim(-1, 1).contiguous().to(dtype), len(paths))


def _pixels(path: Path) -> np.ndarray:
    """One image as (H, W, C) in [0, 1], C = 1 or 3."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise WrongUsage(
                    f"{path} has {image.width} x {image.height} pixels, more than an audit can take"
                )
            if image.mode.startswith("I;16"):
                return np.asarray(image, dtype=np.float64)[..., None] / 65535
            if image.mode not in ("1", "L", "RGB"):
                note(f"{path.name} is of mode {image.mode}: converted to RGB")
            plain = image.convert("L" if image.mode in ("1", "L") else "RGB")
            return np.asarray(plain, dtype=np.float64).reshape(image.height, image.width, -1) / 255
    except WrongUsage:
        raise
    except Exception as error:  # a damaged or hostile image may raise anything
        raise WrongUsage(f"{path} cannot be read as an image: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
