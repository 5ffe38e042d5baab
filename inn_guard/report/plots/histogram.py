"""How a quantity is spread over the samples."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inn_guard.report.formatting import format_number, heading, title
from inn_guard.report.plots.axis_scale import Scale, scale_for, to_numpy
from inn_guard.report.plots.svg import BAD, INK, LOW, MUTED, Drawing, axes, decades, drawing

__all__ = ["histogram"]


def histogram(
    name: str, values: Tensor, *, unit: str = "", measured_mask: Tensor | None = None
) -> Drawing:
    """A histogram of one number per sample, logarithmic where the numbers ask for it.

    Numbers that have no place on the axis (NaN, Inf, and zeros on a logarithmic one) are counted in
    the caption.

    Args:
        name: the quantity, as in `AuditResult.per_sample`.
        values: one number per sample, shape (B,).
        unit: of the numbers.
        measured_mask: the samples that have a number, (B,) bool; None: all. The others are counted
            as not examined.
    """
    numbers = to_numpy(values if measured_mask is None else values[measured_mask]).ravel()
    scale = scale_for(numbers)
    places = scale.place(numbers)
    empty = bool(np.isnan(places).all())
    figure, axis = axes(height=0.9) if empty else axes()
    axis.set_xlabel(scale.label(title(name), unit))
    axis.grid(visible=False, axis="x")
    if empty:
        axis.text(
            0.5, 0.4, "no finite number to show", color=BAD, ha="center", transform=axis.transAxes
        )
        axis.set(xticks=[], yticks=[])
    else:
        axis.set_ylabel("samples")
        _draw(axis, places[~np.isnan(places)], scale)
        _mark(axis, float(scale.place(np.array(_median(numbers[np.isfinite(numbers)])))))
    caption = f"{_spread(numbers)} {left_out(numbers, scale)} {_not_examined(measured_mask)}"
    return drawing(figure, " ".join(caption.split()), title=heading(name))


def _draw(axis: Axes, places: np.ndarray, scale: Scale) -> None:
    low, high = places.min(), places.max()
    margin = 0.5 if scale.logarithmic else max(abs(low), 1.0) * 0.05
    bounds = (low, high) if high - low > 1e-9 * max(1.0, abs(low)) else (low - margin, low + margin)
    axis.hist(
        places,
        bins=int(np.clip(np.sqrt(places.size) * 2, 8, 40)),
        range=bounds,
        color=LOW,
        rwidth=0.92,
    )
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if scale.logarithmic:
        decades(axis.xaxis)


def _mark(axis: Axes, median: float) -> None:
    """A line at the median of all finite numbers; none if the median itself has no place on the axis."""
    if not np.isnan(median):
        axis.axvline(median, color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axis.text(
            median, 1.02, " median", color=MUTED, size=8.5, transform=axis.get_xaxis_transform()
        )


def _median(numbers: np.ndarray) -> float:
    """One of the numbers, so that it can neither overflow nor lie where there are none."""
    return float(np.quantile(numbers, 0.5, method="inverted_cdf"))


def _spread(numbers: np.ndarray) -> str:
    shown = numbers[np.isfinite(numbers)]
    if not shown.size:
        return f"{numbers.size} samples."
    middle, largest = format_number(_median(shown)), format_number(float(shown.max()))
    return f"{numbers.size} samples: median {middle}, largest {largest}."


def _not_examined(measured_mask: Tensor | None) -> str:
    """A sentence on the samples that have no number; empty if all have."""
    if measured_mask is None or bool(measured_mask.all()):
        return ""
    return f"Not examined: {int((~measured_mask).sum())} of {measured_mask.numel()} samples of the batch."


def left_out(numbers: np.ndarray, scale: Scale) -> str:
    """A sentence on the numbers that have no place on the axis; empty if all have."""
    counts = {"NaN": np.isnan(numbers).sum(), "infinite": np.isinf(numbers).sum()}
    if scale.logarithmic:
        counts["exactly zero"] = (numbers == 0).sum()
        counts["negative"] = ((numbers < 0) & np.isfinite(numbers)).sum()
    parts = [
        f"{count} of {numbers.size} {'is' if count == 1 else 'are'} {what}"
        for what, count in counts.items()
        if count
    ]
    return f"Not drawn: {', '.join(parts)}." if parts else ""
