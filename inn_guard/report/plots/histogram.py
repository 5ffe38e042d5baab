"""How a quantity is spread over the samples."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inn_guard.report.formatting import format_number, heading
from inn_guard.report.plots.axis_scale import Scale, scale_for, to_numpy
from inn_guard.report.plots.svg import (
    HIGH,
    INK,
    LOW,
    MUTED,
    Drawing,
    axes,
    decades,
    drawing,
    limit_line,
    message,
)

__all__ = ["histogram"]


def histogram(
    name: str,
    values: Tensor,
    *,
    unit: str = "",
    measured_mask: Tensor | None = None,
    limit: float | None = None,
    title: str = "",
) -> Drawing:
    """A histogram of one number per sample, logarithmic where the numbers ask for it.

    Numbers that have no place on the axis (NaN, Inf, and zeros on a logarithmic one) are not drawn,
    and counted in the caption.

    Args:
        name: the quantity, as in `AuditResult.per_sample`.
        values: one number per sample, shape (B,).
        unit: of the numbers.
        measured_mask: the samples that have a number, (B,) bool; None: all. The others are counted
            as not examined.
        limit: what the numbers are held against; a line is drawn there, and samples above it have
            another colour.
        title: heading. Default: the name.
    """
    measured = values if measured_mask is None else values[measured_mask]
    numbers = to_numpy(measured).ravel()
    limits = [] if limit is None else [limit]
    # the axis must hold the limit, too
    against = np.array(limits, dtype=np.float64)
    scale = scale_for(np.concatenate([numbers, against]), name)
    places = scale.place(numbers)
    label = scale.label(name, unit)
    parts = [_spread(numbers, scale), _above(numbers, limit), left_out(numbers, scale)]
    parts.append(_not_examined(measured_mask))
    caption = " ".join(part for part in parts if part)
    if bool(np.isnan(places).all()):
        figure = _nothing(numbers, label)
    else:
        figure, axis = axes()
        axis.set_xlabel(label)
        axis.set_ylabel("samples")
        axis.grid(visible=False, axis="x")
        border = scale.place(against)
        _draw(axis, places[~np.isnan(places)], scale, border[~np.isnan(border)])
        median = _median(numbers[np.isfinite(numbers)])
        _mark(axis, float(scale.place(np.array(median))))
        if limit is not None and not np.isnan(border[0]):
            limit_line(axis, border[0], f"limit {format_number(limit)}")
    return drawing(figure, caption, title=title or heading(name))


def _nothing(numbers: np.ndarray, label: str) -> Figure:
    """What takes the histogram's place: zeros on a logarithmic axis are good news, not a lack."""
    if numbers.size and (numbers == 0).all():
        return message("all are exactly zero", label, colour=MUTED)
    return message("no finite number to show", label)


def _draw(axis: Axes, places: np.ndarray, scale: Scale, border: np.ndarray) -> None:
    """The bars; those above the limit, whose place ``border`` holds, in another colour."""
    everything = np.concatenate([places, border])
    low, high = everything.min(), everything.max()
    # bins need a range of some width, also if all samples have nearly the same number
    if high - low <= 1e-9 * max(1.0, abs(low)):
        margin = 0.5 if scale.logarithmic else max(abs(low), 1.0) * 0.05
        low, high = low - margin, low + margin
    bins = int(np.clip(np.sqrt(places.size) * 2, 8, 40))
    above = np.zeros(places.shape, dtype=bool)
    if border.size:
        above = places > border[0]
    axis.hist(
        [places[~above], places[above]],
        bins=bins,
        range=(low, high),
        color=[LOW, HIGH],
        rwidth=0.92,
        stacked=True,
    )
    margin = 0.03 * (high - low)
    axis.set_xlim(low - margin, high + margin)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if scale.logarithmic:
        decades(axis.xaxis)


def _mark(axis: Axes, median: float) -> None:
    """A line at the median of all finite numbers; none if the median has no place on the axis."""
    if np.isnan(median):
        return
    axis.axvline(median, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    # higher than the name of a limit, so that the two never meet
    where = axis.get_xaxis_transform()
    axis.text(median, 1.1, "median", color=MUTED, size=8.5, ha="center", transform=where)


def _median(numbers: np.ndarray) -> float:
    """One of the numbers, so that it can neither overflow nor lie where there are none."""
    return float(np.quantile(numbers, 0.5, method="inverted_cdf"))


def _spread(numbers: np.ndarray, scale: Scale) -> str:
    """How many samples there are, their median and their largest number."""
    shown = numbers[np.isfinite(numbers)]
    if not shown.size:
        return f"{numbers.size} samples."
    middle = scale.text(_median(shown))
    largest = scale.text(float(shown.max()))
    return f"{numbers.size} samples: median {middle}, largest {largest}."


def _above(numbers: np.ndarray, limit: float | None) -> str:
    if limit is None:
        return ""
    above = int((numbers > limit).sum())
    return f"{above} of {numbers.size} are above the limit {format_number(limit)}."


def _not_examined(measured_mask: Tensor | None) -> str:
    """A sentence on the samples that have no number; empty if all have."""
    if measured_mask is None or bool(measured_mask.all()):
        return ""
    missing = int((~measured_mask).sum())
    return f"Not examined: {missing} of {measured_mask.numel()} samples of the batch."


def left_out(numbers: np.ndarray, scale: Scale) -> str:
    """A sentence on the numbers that have no place on the axis; empty if all have."""
    counts = {"NaN": np.isnan(numbers).sum(), "infinite": np.isinf(numbers).sum()}
    if scale.logarithmic and not scale.exponents:
        counts["exactly zero"] = (numbers == 0).sum()
        counts["negative"] = ((numbers < 0) & np.isfinite(numbers)).sum()
    parts = []
    for what, count in counts.items():
        if count:
            verb = "is" if count == 1 else "are"
            parts.append(f"{count} of {numbers.size} {verb} {what}")
    return f"Not drawn: {', '.join(parts)}." if parts else ""
