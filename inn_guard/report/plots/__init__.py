"""Figures: arrays of numbers in, a `Drawing` with SVG out. One file for each kind."""

from inn_guard.report.plots.attack_curve import attack_curve
from inn_guard.report.plots.curve import history
from inn_guard.report.plots.forecast import forecast_against_measured
from inn_guard.report.plots.histogram import histogram
from inn_guard.report.plots.images import pictures
from inn_guard.report.plots.layer_bars import layer_bars, numeric_columns, row_bars
from inn_guard.report.plots.looks import looks
from inn_guard.report.plots.spectrum import full_spectrum, spectrum_range
from inn_guard.report.plots.svg import Drawing, standalone

__all__ = [
    "Drawing",
    "attack_curve",
    "forecast_against_measured",
    "full_spectrum",
    "histogram",
    "history",
    "layer_bars",
    "looks",
    "numeric_columns",
    "pictures",
    "row_bars",
    "spectrum_range",
    "standalone",
]
