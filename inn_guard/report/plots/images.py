"""Rows of small images: original, reconstruction, difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave
from torch import Tensor

from inn_guard.report.formatting import format_number, heading, legible, title
from inn_guard.report.plots.axis_scale import to_numpy
from inn_guard.report.plots.svg import Drawing

__all__ = ["pictures"]

_MOST = 8  #: images in a row
#: A pixel that is NaN or Inf: no grey, and no step of the blue-red scale.
_NON_FINITE = (0.91, 0.12, 0.55)
_WIDTH = 374  #: of the other figures, so that letters have the same size
_GAP = 6  #: between images
_LETTERS = 16  #: height of a line of text


def pictures(images: Mapping[str, Tensor]) -> Drawing:
    """One row of images per entry, all but differences on the scale of the first entry.

    A name that contains "difference" is drawn red where positive and blue where negative, each
    image on a scale of its own, since one bad image would blank the others. Pixels that are not
    finite are magenta, and the caption counts them; it also says where values were cut at the ends
    of the scale.

    Args:
        images: names to tensors (n, C, H, W); of other than 1 or 3 channels the first 3 or 1 are
            shown.
    """
    arrays = {}
    for name, tensor in images.items():
        arrays[name] = to_numpy(tensor)
    bounds = _bounds(_reference(arrays))
    size = (_WIDTH - (_MOST - 1) * _GAP) / _MOST
    parts: list[str] = []
    notes: list[str] = []
    top = 0.0
    for name, array in arrays.items():
        parts.append(_words(heading(name), top + _LETTERS - 4))
        top += _LETTERS
        height = size * array.shape[2] / array.shape[3]
        for place, image in enumerate(array[:_MOST]):
            limits = _symmetric(image) if _signed(name) else bounds
            pixels = _png(_paint(image, limits, signed=_signed(name)))
            parts.append(
                f'<image x="{place * (size + _GAP):.2f}" y="{top:.2f}" width="{size:.2f}" '
                f'height="{height:.2f}" preserveAspectRatio="none" '
                f'style="image-rendering: pixelated" href="data:image/png;base64,{pixels}"/>'
            )
        top += height + _GAP
        notes.append(_note(name, array, bounds))
    caption = " ".join(notes)
    label = escape(legible(f"Images. {caption}"))
    head = f'<svg viewBox="0 0 {_WIDTH} {top:.0f}" role="img" aria-label="{label}">'
    return Drawing(f"{head}{''.join(parts)}</svg>", caption, title="Images")


def _reference(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The entry whose scale the others share."""
    for name, array in arrays.items():
        if not _signed(name):
            return array
    return next(iter(arrays.values()))


def _signed(name: str) -> bool:
    return "difference" in name


def _words(text: str, bottom: float) -> str:
    """A line of text as an SVG element."""
    style = "font-size: 9px; fill: var(--muted)"
    return f'<text x="0" y="{bottom:.2f}" style="{style}">{escape(text)}</text>'


def _bounds(array: np.ndarray) -> tuple[float, float]:
    """The numbers that are drawn black and white; 0 and 1 if that is the range of the data."""
    shown = array[np.isfinite(array)]
    if not shown.size:
        return 0.0, 1.0
    low, high = float(shown.min()), float(shown.max())
    if low >= 0.0 and 0.5 < high <= 1.0:
        return 0.0, 1.0
    if high == low:
        high = low + 1.0
    return low, high


def _symmetric(array: np.ndarray) -> tuple[float, float]:
    """A range around zero that holds all finite numbers."""
    largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0)) or 1.0
    return -largest, largest


def _paint(image: np.ndarray, limits: tuple[float, float], *, signed: bool) -> np.ndarray:
    """(C, H, W) numbers to (H, W, 3) colours in [0, 1]."""
    low, high = limits
    with np.errstate(all="ignore"):
        # halves, since high - low may overflow
        level = np.clip((image / 2 - low / 2) / (high / 2 - low / 2), 0.0, 1.0)
    level = np.nan_to_num(level)
    bad = ~np.isfinite(image).all(axis=0)
    if signed:
        colours = colormaps["RdBu_r"](level.mean(axis=0))[..., :3]
    else:
        shown = 3 if len(level) >= 3 else 1
        channels = level[:shown].transpose(1, 2, 0)
        colours = np.broadcast_to(channels, (*image.shape[1:], 3)).copy()
    colours[bad] = _NON_FINITE
    return colours


def _png(colours: np.ndarray) -> str:
    buffer = io.BytesIO()
    imsave(buffer, colours, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _note(name: str, array: np.ndarray, bounds: tuple[float, float]) -> str:
    """What one row of images shows, and what it leaves out, in a sentence."""
    finite = np.isfinite(array)
    bad = int((~finite).sum())
    parts = []
    if _signed(name):
        largest = format_number(_symmetric(array)[1])
        parts.append(f"red above, blue below, up to {largest}, each on its own scale")
    else:
        low, high = bounds
        parts.append(f"from {format_number(low)} to {format_number(high)}")
        # half a grey level: a smaller cut cannot be seen; halves, since high - low may overflow
        visible = (high / 2 - low / 2) / 255
        cut = int((finite & ((array < low - visible) | (array > high + visible))).sum())
        if cut:
            parts.append(f"{cut} of {array.size} values cut at its ends")
    if bad:
        parts.append(f"{bad} values are not finite (magenta)")
    if len(array) > _MOST:
        parts.append(f"first {_MOST} of {len(array)} images")
    channels = array.shape[1]
    if channels not in (1, 3):
        parts.append(f"{channels} channels, shown by the first {3 if channels > 3 else 1}")
    return legible(f"{heading(title(name))}: {', '.join(parts)}.")
