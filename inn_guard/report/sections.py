"""Which figures a check's section shows, each with a sentence on what to see."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from inn_guard.report.formatting import is_number
from inn_guard.report.plots import (
    Drawing,
    attack_curve,
    forecast_against_measured,
    full_spectrum,
    histogram,
    layer_bars,
    looks,
    numeric_columns,
    pictures,
    row_bars,
    spectrum_range,
    standalone,
)
from inn_guard.report.result import AuditResult

__all__ = ["FIGURES", "drawings", "figures"]

Figures = Callable[[AuditResult], Iterator[Drawing]]


def drawings(result: AuditResult) -> tuple[Drawing, ...]:
    """The figures of one result: those of its check, or all possible ones of an unknown check."""
    return tuple(FIGURES.get(result.name, _everything)(result))


def figures(results: Iterable[AuditResult]) -> dict[str, str]:
    """The text of an SVG file for each figure, by check and title: density_error_of_log_p_x."""
    found: dict[str, str] = {}
    for result in results:
        for drawing in drawings(result):
            words = re.findall(r"\w+", f"{result.name} {drawing.title}".lower())
            name = "_".join(words)
            while name in found:  # figures of one check may have the same title
                name += "_"
            found[name] = standalone(drawing)
    return found


def _density(result: AuditResult) -> Iterator[Drawing]:
    yield from _histogram(
        result,
        "error",
        title="Error of log p(x)",
        see="Samples to the right of the limit have a wrong likelihood.",
    )


def _log_det(result: AuditResult) -> Iterator[Drawing]:
    yield from _histogram(
        result,
        "error",
        title="Error of the log-determinant",
        see="Samples to the right of the limit show that the formula is another one.",
    )


def _sampling(result: AuditResult) -> Iterator[Drawing]:
    rows = result.tables.get("looks", ())
    if rows and "rate_limit" in result.settings:
        figure = looks(rows, limit=result.settings["rate_limit"])
        see = "Draws are usable once the whole interval (blue) lies left of the limit."
        yield dataclasses.replace(figure, see=see)


def _reconstruction(result: AuditResult) -> Iterator[Drawing]:
    yield from _histogram(
        result,
        "relative_error",
        title="Worst entry of each round trip",
        see="Samples to the right of the limit do not come back.",
    )
    if result.verdict.failed:
        yield from _histogram(
            result,
            "float64_error",
            title="The same round trips in a float64 copy",
            see="If these lie left of the limit, rounding is the cause, and more precision helps.",
        )
    yield from _images(result, "Magenta, or a reconstruction unlike its original, is a lost image.")


def _gradient_angle(result: AuditResult) -> Iterator[Drawing]:
    if result.per_layer:
        figure = layer_bars(
            "angle",
            result.per_layer,
            unit=result.units.get("angle", ""),
            limit=result.settings.get("angle_limit"),
            title="Angle between memory-saving and true gradient, by layer",
        )
        see = (
            "Errors grow from the last layer to the first, since the inverse runs backwards. The "
            "verdict holds the angle of all parameters together against the limit."
        )
        yield dataclasses.replace(figure, see=see)


def _other_inputs(result: AuditResult) -> Iterator[Drawing]:
    rows = result.tables.get("families", ())
    if rows:
        labels = []
        values = np.full(len(rows), np.nan)
        for place, row in enumerate(rows):
            labels.append(str(row.get("family", "")))
            if is_number(row.get("max_error")):
                values[place] = float(row["max_error"])
        figure = row_bars(
            "max_error",
            labels,
            values,
            unit=result.units.get("max_error", ""),
            limit=result.settings.get("limit"),
            title="Largest error of each family of inputs",
        )
        see = "Right of the limit the inverse is lost; the table says which families decide."
        yield dataclasses.replace(figure, see=see)


def _spectrum(result: AuditResult) -> Iterator[Drawing]:
    high, low = _log10(result, "sigma_max"), _log10(result, "sigma_min")
    if high is not None and low is not None:
        see = "A line is as long as the condition number: the longer, the more rounding can grow."
        yield dataclasses.replace(spectrum_range(high, low), see=see)
    yield from _full_spectrum(result)


def _full_spectrum(result: AuditResult) -> Iterator[Drawing]:
    for values in result.per_sample.values():
        if values.dim() == 2 and values.numel():
            see = "A steep end on the right holds the directions in which the inverse loses digits."
            yield dataclasses.replace(full_spectrum(values), see=see)


def _layer_blame(result: AuditResult) -> Iterator[Drawing]:
    if result.per_layer:
        figure = layer_bars(
            "digits_lost",
            result.per_layer,
            unit=result.units.get("digits_lost", ""),
            title="Decimal digits lost in each layer",
        )
        see = "The peaks are the layers to bound or replace first."
        yield dataclasses.replace(figure, see=see)


def _precision(result: AuditResult) -> Iterator[Drawing]:
    rows = result.tables.get("number format", ())
    if rows:
        see = "A format works where its dot lies left of its limit."
        yield dataclasses.replace(forecast_against_measured(rows), see=see)


def _lipschitz_bounds(result: AuditResult) -> Iterator[Drawing]:
    for direction in ("forward", "inverse"):
        name = f"upper_{direction}"
        if name in numeric_columns(result.per_layer):
            figure = layer_bars(
                name, result.per_layer, title=f"Certified bound of each layer, {direction}"
            )
            see = "The product over all layers bounds the whole map; the largest cost most."
            yield dataclasses.replace(figure, see=see)


def _attack(result: AuditResult) -> Iterator[Drawing]:
    rows = result.tables.get("attack_curve", ())
    if rows:
        figure = attack_curve(rows, limit=result.settings.get("limit"))
        see = "A curve that still rises at its end would rise further with more passes."
        yield dataclasses.replace(figure, see=see)
    yield from _images(result, "Every image of the attack is a valid dequantization.")


def _nothing(result: AuditResult) -> Iterator[Drawing]:
    return iter(())


def _everything(result: AuditResult) -> Iterator[Drawing]:
    """A histogram of every quantity per sample, bars of every column of layers."""
    yield from _images(result, "")
    for name in result.per_sample:
        if not _has_better(result, name):
            yield from _histogram(result, name, title="", see="", with_limit=False)
    yield from _full_spectrum(result)
    for name in numeric_columns(result.per_layer):
        yield layer_bars(name, result.per_layer, unit=result.units.get(name, ""))


#: check -> its figures. Add one line for a new check.
FIGURES: dict[str, Figures] = {
    "preflight": _nothing,
    "dry_run": _nothing,
    "density": _density,
    "log_det": _log_det,
    "sampling": _sampling,
    "reconstruction": _reconstruction,
    "gradient_angle": _gradient_angle,
    "out_of_distribution": _other_inputs,
    "jacobian_spectrum": _spectrum,
    "full_spectrum": _full_spectrum,
    "layer_blame": _layer_blame,
    "precision": _precision,
    "lipschitz_bounds": _lipschitz_bounds,
    "dequantization_attack": _attack,
}


def _histogram(
    result: AuditResult, name: str, *, title: str, see: str, with_limit: bool = True
) -> Iterator[Drawing]:
    """A histogram of one quantity per sample; none if there are no real numbers to draw.

    ``with_limit`` draws the limit that the result's settings name.
    """
    values = result.per_sample.get(name)
    if values is None or values.dim() != 1 or not values.numel() or values.is_complex():
        return
    # a check written by a user may give a mask that does not fit
    mask = result.measured_mask.get(name)
    if mask is not None and mask.shape != values.shape:
        mask = None
    limit = None
    if with_limit:
        limit = result.settings.get("limit")
    # checks name the unit of a quantity, or only that of its maximum
    unit = result.units.get(name, result.units.get(f"max_{name}", ""))
    figure = histogram(name, values, unit=unit, measured_mask=mask, limit=limit, title=title)
    yield dataclasses.replace(figure, see=see)


def _images(result: AuditResult, see: str) -> Iterator[Drawing]:
    """The images of a result as one figure; none if it has none."""
    shown = {}
    for name, tensor in result.images.items():
        if tensor.dim() == 4 and tensor.numel():
            shown[name] = tensor
    if shown:
        yield dataclasses.replace(pictures(shown), see=see)


def _has_better(result: AuditResult, name: str) -> bool:
    """Whether the quantity's log10, or what it is the log10 of, is drawn in its place.

    One of the two is enough: the quantity itself if all its values fit floats, else its log10.
    """
    plain = name.removeprefix("log10_")
    if plain not in result.per_sample or f"log10_{plain}" not in result.per_sample:
        return False
    values = _examined(result, plain)
    fits = bool((values.isfinite() & (values != 0)).all())
    return fits == (name != plain)


def _log10(result: AuditResult, name: str) -> Tensor | None:
    """log10 of a quantity per sample; the measured one if there is one, since it always fits."""
    if f"log10_{name}" in result.per_sample:
        return _examined(result, f"log10_{name}")
    if name in result.per_sample:
        return _examined(result, name).to(torch.float64).log10()
    return None


def _examined(result: AuditResult, name: str) -> Tensor:
    """A per-sample quantity of the samples that it was taken from."""
    values, mask = result.per_sample[name], result.measured_mask.get(name)
    if mask is None or mask.shape != values.shape:
        return values
    return values[mask]
