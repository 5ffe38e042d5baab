"""Singular values of the Jacobian: their range sample by sample, and whole spectra."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from inn_guard.report.formatting import power_of_ten
from inn_guard.report.plots.axis_scale import to_numpy
from inn_guard.report.plots.svg import (
    BAD,
    GRID,
    HIGH,
    INK,
    LOW,
    MUTED,
    Drawing,
    axes,
    decades,
    drawing,
    legend,
)

__all__ = ["full_spectrum", "spectrum_range"]


def spectrum_range(log10_sigma_max: Tensor, log10_sigma_min: Tensor) -> Drawing:
    """The smallest and largest singular value of every sample's Jacobian, by condition number.

    On this logarithmic axis the length of a line is the condition number.

    Args:
        log10_sigma_max: log10 of the largest singular value, shape (B,).
        log10_sigma_min: log10 of the smallest singular value, shape (B,).
    """
    high, low = to_numpy(log10_sigma_max), to_numpy(log10_sigma_min)
    shown = np.isfinite(high) & np.isfinite(low)
    order = np.argsort(high[shown] - low[shown], kind="stable")
    high_shown, low_shown = high[shown][order], low[shown][order]
    rank = np.arange(1, order.size + 1)
    figure, axis = axes()
    width = max(0.5, min(3.0, 120 / max(1, order.size)))
    axis.vlines(rank, low_shown, high_shown, color=GRID, linewidth=width)
    size = float(np.clip(220 / max(1, order.size), 2, 5))
    axis.plot(rank, high_shown, "o", color=HIGH, markersize=size, markeredgewidth=0)
    axis.plot(rank, low_shown, "o", color=LOW, markersize=size, markeredgewidth=0)
    axis.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    axis.set_xlabel("samples, by condition number")
    axis.set_ylabel("singular values of J")
    axis.grid(visible=False, axis="x")
    decades(axis.yaxis)
    legend(axis, ("● largest σ", HIGH), ("● smallest σ", LOW))
    if not order.size:
        where = axis.transAxes
        axis.text(0.5, 0.5, "no finite spectrum to show", color=BAD, ha="center", transform=where)
    caption = _range_caption(high, low, shown)
    return drawing(figure, caption, title="Singular values, sample by sample")


def _range_caption(high: np.ndarray, low: np.ndarray, shown: np.ndarray) -> str:
    """The largest condition number, and how many samples are not drawn."""
    missing = int((~shown).sum())
    left_out = ""
    if missing:
        left_out = (
            f" Not drawn: {missing} of {shown.size}, whose spectrum is not finite or reaches zero."
        )
    if not shown.any():
        return f"{shown.size} samples.{left_out}"
    worst = power_of_ten(float(np.max(high[shown] - low[shown])))
    return f"{shown.size - missing} samples; the largest condition number is {worst}.{left_out}"


def full_spectrum(singular_values: Tensor) -> Drawing:
    """All singular values of each sample's Jacobian, largest first, on a logarithmic axis.

    Args:
        singular_values: shape (B, k), in any order.
    """
    with np.errstate(all="ignore"):
        powers = np.log10(-np.sort(-to_numpy(singular_values), axis=1))
    powers = np.where(np.isfinite(powers), powers, np.nan)
    index = np.arange(1, powers.shape[1] + 1)
    figure, axis = axes()
    opacity = float(np.clip(12 / max(1, len(powers)), 0.08, 0.8))
    axis.plot(index, powers.T, color=LOW, linewidth=0.7, alpha=opacity)
    # an index at which all spectra are zero has no median
    whole = powers[:, ~np.isnan(powers).all(axis=0)]
    axis.plot(index[: whole.shape[1]], np.nanmedian(whole, axis=0), color=INK, linewidth=1.4)
    axis.set_xlabel("index of the singular value")
    axis.set_ylabel("singular value of J")
    decades(axis.yaxis)
    missing = int(np.isnan(powers).any(axis=1).sum())
    caption = f"{len(powers)} samples, a line for each; their median is dark."
    if missing:
        caption += f" {missing} of {len(powers)} spectra hold zeros or are not finite there."
    return drawing(figure, caption, title="All singular values")
