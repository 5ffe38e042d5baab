"""A figure's frame: size, axes, the palette, and the way from matplotlib to SVG that sits inside a page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
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
    """One picture of a report.

    Attributes:
        markup: SVG or HTML, safe to put into a page as it is.
        caption: what is seen, in one or two sentences, with everything that the picture leaves out.
        title: heading above the picture; empty if it needs none.
        wide: whether it takes the whole width of the page rather than half of it.
    """

    markup: Markup
    caption: str
    title: str = ""
    wide: bool = False


def axes(width: float = 5.2, height: float = 2.9) -> tuple[Figure, Axes]:
    """A figure of that size in inches with one pair of axes, drawn lightly; no state is kept in matplotlib."""
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
    """Label an axis, already drawn on, that shows log10 of the values by the values themselves: 10⁻³, 1, 10³.

    Drawing the logarithm on a linear axis reaches where a float64, and matplotlib's own logarithmic
    axis, cannot.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(_powers(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda power, _: power_of_ten(power)))


def _powers(low: float, high: float) -> list[float]:
    """Ticks between two powers of ten: whole decades where there are several, else 1-2-5 steps, else even ones."""
    if high - low > 1.7:
        return list(MaxNLocator(nbins=6, integer=True).tick_values(low, high))
    steps = (1, 2, 5) if high - low > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    decades_within = range(math.floor(low), math.ceil(high))
    ticks = [decade + math.log10(step) for decade in decades_within for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    return shown if len(shown) > 1 else list(MaxNLocator(nbins=3).tick_values(low, high))


def drawing(figure: Figure, caption: str, *, title: str = "", wide: bool = False) -> Drawing:
    """``figure`` as a `Drawing`; its title and caption are also what a screen reader says."""
    return Drawing(svg(figure, description=f"{title}. {caption}"), caption, title, wide)


def svg(figure: Figure, *, description: str) -> Markup:
    """``figure`` as one SVG element without addresses, fixed fonts or colours, fit to stand inside an HTML page."""
    buffer = io.BytesIO()
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": legible(description)}),
        _any_script(),
    ):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _remove(root, f"{_SVG}metadata", f"{_SVG}style")
    used = set(re.findall(r'#(\w+)[)"]', ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        _to_page(element, used)
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": legible(description),
    }
    return Markup(ElementTree.tostring(root, encoding="unicode"))


@contextmanager
def _any_script() -> Iterator[None]:
    """No warnings about letters that matplotlib's font lacks: the page's reader has its own fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _remove(root: ElementTree.Element, *tags: str) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in tags:
                parent.remove(child)


def _to_page(element: ElementTree.Element, used: set[str]) -> None:
    """Name spaces, unused ids and fixed fonts go; colours become variables of the page."""
    element.tag = str(element.tag).removeprefix(_SVG)
    attributes = {key.removeprefix(_XLINK): value for key, value in element.attrib.items()}
    if attributes.get("id") not in used:
        attributes.pop("id", None)
    if "style" in attributes:
        attributes["style"] = _themed(attributes["style"])
    element.attrib = attributes


def _themed(style: str) -> str:
    style = re.sub(r"font-family:[^;]*;?\s*", "", style)
    style = re.sub(r"font:\s*([\d.]+px)[^;]*", r"font-size: \1", style)
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style
