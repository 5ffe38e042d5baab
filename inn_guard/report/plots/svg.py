"""A figure's frame: size, axes, the palette, and SVG that a page can hold."""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from inn_guard.report.formatting import legible, power_of_ten

__all__ = [
    "BAD",
    "GRID",
    "HIGH",
    "INK",
    "LOW",
    "MUTED",
    "Drawing",
    "axes",
    "decades",
    "drawing",
    "legend",
    "limit_line",
    "message",
    "standalone",
    "svg",
]

# Okabe and Ito's palette, safe for colour-blind readers. A page replaces each by the CSS variable
# named here, so that the same figure is readable on a dark screen and on paper.
HIGH, LOW, BAD = "#d55e00", "#0072b2", "#a02c6f"
INK, MUTED, GRID = "#1b1f24", "#5b6470", "#d9dde3"
_VARIABLES = {
    HIGH: "--high",
    LOW: "--low",
    BAD: "--bad",
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Drawing:
    """One figure of a report.

    Attributes:
        markup: an SVG element, all text in it escaped, for a page that sets the palette.
        caption: the figures in words, with everything that the picture leaves out.
        title: heading above the picture; empty if it needs none.
        see: one sentence on what to look for.
    """

    markup: str
    caption: str
    title: str = ""
    see: str = ""


def axes(width: float = 5.2, height: float = 2.9) -> tuple[Figure, Axes]:
    """A figure of that size in inches with one pair of axes; matplotlib keeps no state of it."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axis = figure.add_subplot(facecolor="none")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    axis.tick_params(which="both", colors=MUTED, labelsize=9, length=0)
    axis.grid(visible=True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, size=9.5, parse_math=False)
    return figure, axis


def decades(axis: Axis) -> None:
    """Label an axis that shows log10 of the values by the values themselves: 10⁻³, 1, 10³.

    Call this after drawing. The logarithm on a linear axis reaches where a float64, and
    matplotlib's own logarithmic axis, cannot.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(_powers(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda power, _: power_of_ten(power)))


def _powers(low: float, high: float) -> list[float]:
    """Ticks between two powers of ten: whole decades, else 1-2-5 steps, else even ones."""
    if high - low > 1.7:
        return list(MaxNLocator(nbins=6, integer=True).tick_values(low, high))
    steps = [1, 1.5, 2, 3, 4, 5, 6, 7, 8]
    if high - low > 0.6:
        steps = [1, 2, 5]
    shown = []
    for decade in range(math.floor(low), math.ceil(high)):
        ticks = decade + np.log10(steps)
        shown += list(ticks[(low <= ticks) & (ticks <= high)])
    return shown if len(shown) > 1 else list(MaxNLocator(nbins=3).tick_values(low, high))


def limit_line(axis: Axes, place: float, text: str) -> None:
    """A dashed vertical line at a limit, with its name above it."""
    axis.axvline(place, color=BAD, linewidth=1.1, linestyle=(0, (4, 2)))
    where = axis.get_xaxis_transform()
    axis.text(place, 1.02, text, color=BAD, size=8.5, ha="center", transform=where)


def legend(axis: Axes, *entries: tuple[str, str]) -> None:
    """Names of what is drawn, each in its colour, above the axes."""
    place = 0.0
    for text, colour in entries:
        axis.text(place, 1.02, text, color=colour, size=9, transform=axis.transAxes)
        place += 0.05 + 0.022 * len(text)


def message(text: str, label: str, *, colour: str = BAD) -> Figure:
    """A flat figure that says why there is nothing to draw."""
    figure, axis = axes(height=1.1)
    axis.set_xlabel(label)
    axis.grid(visible=False)
    axis.text(0.5, 0.4, text, color=colour, ha="center", transform=axis.transAxes)
    axis.set(xticks=[], yticks=[])
    return figure


def drawing(figure: Figure, caption: str, *, title: str = "") -> Drawing:
    """``figure`` as a `Drawing`; its title and caption are also what a screen reader says."""
    return Drawing(svg(figure, description=f"{title}. {caption}"), caption, title)


def standalone(drawing: Drawing) -> str:
    """The SVG of a drawing as a file of its own, with the palette's colours on any light ground."""
    text = drawing.markup
    for colour, variable in _VARIABLES.items():
        text = text.replace(f"var({variable})", colour)
    attributes = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    return text.replace("<svg ", f"<svg {attributes} ", 1)


def svg(figure: Figure, *, description: str) -> str:
    """``figure`` as one SVG element for a page, without addresses, fixed fonts or fixed colours."""
    buffer = io.BytesIO()
    # text stays text; ids come from the description, so that the same figure has the same SVG and
    # two figures of a page have different ids
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": legible(description)}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # matplotlib's own font lacks letters of many scripts, but the reader's fonts are used
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    # they name addresses, and set line joins for everything on the page
    _remove(root, f"{_SVG}metadata", f"{_SVG}style")
    used = set(re.findall(r'#(\w+)[)"]', ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        _to_page(element, used)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": legible(description),
    }
    return ElementTree.tostring(root, encoding="unicode")


def _remove(root: ElementTree.Element, *tags: str) -> None:
    """Remove all elements with these tags below ``root``."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in tags:
                parent.remove(child)


def _to_page(element: ElementTree.Element, used: set[str]) -> None:
    """Remove name spaces, unused ids and fixed fonts; make colours variables of the page."""
    element.tag = str(element.tag).removeprefix(_SVG)
    attributes = {}
    for key, value in element.attrib.items():
        attributes[key.removeprefix(_XLINK)] = value
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if "style" in attributes:
        attributes["style"] = _themed(attributes["style"])
    element.attrib = attributes


def _themed(style: str) -> str:
    """A style with the page's font and with variables of the page as colours."""
    style = re.sub(r"font-family:[^;]*;?\s*", "", style)
    style = re.sub(r"font:\s*([\d.]+px)[^;]*", r"font-size: \1", style)
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style
