"""Rows of small images: original, reconstruction, difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import Tensor

from inn_guard.report.formatting import format_number, legible, title
from inn_guard.report.plots.axis_scale import to_numpy
from inn_guard.report.plots.svg import Drawing

__all__ = ["pictures"]

_MOST = 8  # images in a row
_NON_FINITE = (
    0.91,
    0.12,
    0.55,
)  # a pixel that is NaN or Inf; no grey and no step of the blue-red scale


def pictures(images: Mapping[str, Tensor]) -> Drawing:
    """One row of images per entry, all but differences on the grey or colour scale of the first entry.

    A name that contains "difference" is drawn red where positive and blue where negative. Pixels
    that are not finite are drawn in magenta, and the caption counts them; it also says where values
    were cut at the ends of the scale.

    Args:
        images: names to tensors (n, C, H, W); of other than 1 or 3 channels the first 3 or 1 are
            shown.
    """
    arrays = {name: to_numpy(tensor) for name, tensor in images.items()}
    reference = next(
        (array for name, array in arrays.items() if not _signed(name)), next(iter(arrays.values()))
    )
    bounds = _bounds(reference)
    rows, notes = [], []
    for name, array in arrays.items():
        limits = _symmetric(array) if _signed(name) else bounds
        rows.append(
            _row(name, [_paint(image, limits, signed=_signed(name)) for image in array[:_MOST]])
        )
        notes.append(_note(name, array, limits))
    markup = Markup('<div class="pictures">{}</div>').format(Markup("").join(rows))
    return Drawing(markup, " ".join(note for note in notes if note), title="Images", wide=True)


def _signed(name: str) -> bool:
    return "difference" in name


def _bounds(array: np.ndarray) -> tuple[float, float]:
    shown = array[np.isfinite(array)]
    if not shown.size:
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    if low >= 0.0 and 0.5 < high <= 1.0:
        return 0.0, 1.0
    return low, high if high > low else low + 1.0


def _symmetric(array: np.ndarray) -> tuple[float, float]:
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0)) or 1.0
    return -largest, largest


def _paint(image: np.ndarray, limits: tuple[float, float], *, signed: bool) -> np.ndarray:
    """(C, H, W) numbers to (H, W, 3) colours in [0, 1]."""
    low, high = limits
    with np.errstate(all="ignore"):
        level = np.clip((image / 2 - low / 2) / (high / 2 - low / 2), 0.0, 1.0)
    bad = ~np.isfinite(image).all(axis=0)
    if signed:
        mean = np.nan_to_num(level).mean(axis=0)
        colours = colormaps["RdBu_r"](mean)[..., :3]
    else:
        channels = np.nan_to_num(level[:3] if len(level) >= 3 else level[:1])
        colours = np.broadcast_to(channels.transpose(1, 2, 0), (*image.shape[1:], 3)).copy()
    colours[bad] = _NON_FINITE
    return colours


def _row(name: str, painted: list[np.ndarray]) -> Markup:
    cells = Markup("").join(
        Markup('<img src="data:image/png;base64,{}" alt="{}">').format(
            _png(image), f"{title(name)} {index}"
        )
        for index, image in enumerate(painted)
    )
    return Markup('<div class="strip"><span>{}</span>{}</div>').format(escape(title(name)), cells)


def _png(colours: np.ndarray) -> str:
    buffer = io.BytesIO()
    imsave(buffer, colours, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _note(name: str, array: np.ndarray, limits: tuple[float, float]) -> str:
    bad = int((~np.isfinite(array)).sum())
    visible = (
        limits[1] / 2 - limits[0] / 2
    ) / 255  # half a grey level: nearer to an end, nothing is seen to be cut
    cut = int(
        (np.isfinite(array) & ((array < limits[0] - visible) | (array > limits[1] + visible))).sum()
    )
    parts = [f"scale {format_number(limits[0])} to {format_number(limits[1])}"]
    parts += [f"{cut} of {array.size} values cut at its ends"] if cut else []
    parts += [f"{bad} values are not finite (magenta)"] if bad else []
    parts += [f"first {_MOST} of {len(array)} images"] if len(array) > _MOST else []
    parts += (
        [f"{array.shape[1]} channels, shown by the first {3 if array.shape[1] > 3 else 1}"]
        if array.shape[1] not in (1, 3)
        else []
    )
    return legible(f"{title(name)}: {', '.join(parts)}.")
