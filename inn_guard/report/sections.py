"""Which pictures an audit's section shows: a general set for every audit, and special ones by the audit's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inn_guard.report.plots import (
    Drawing,
    attack_curve,
    forecast_against_measured,
    full_spectrum,
    histogram,
    layer_bars,
    numeric_columns,
    pictures,
    spectrum_range,
)
from inn_guard.report.result import AuditResult

__all__ = ["SPECIAL", "Special", "drawings"]


@dataclass(frozen=True)
class Special:
    """What only one audit's section shows.

    Attributes:
        draw: its pictures, from its result.
        shown: per-sample quantities that are in those pictures and need no histogram of their own.
    """

    draw: Callable[[AuditResult], Iterator[Drawing]]
    shown: frozenset[str] = frozenset()


def drawings(result: AuditResult) -> tuple[Drawing, ...]:
    """Everything there is to see of one result: images first, then special pictures, histograms and layer bars."""
    special = SPECIAL.get(result.name, Special(lambda _: iter(())))
    return (
        *_images(result),
        *special.draw(result),
        *_histograms(result, special.shown),
        *_layers(result),
    )


def _images(result: AuditResult) -> Iterator[Drawing]:
    shown = {
        name: tensor
        for name, tensor in result.images.items()
        if tensor.dim() == 4 and tensor.numel()
    }
    if shown:
        yield pictures(shown)


def _histograms(result: AuditResult, shown: frozenset[str]) -> Iterator[Drawing]:
    for name, values in result.per_sample.items():
        seen = name in shown or _is_said_by_its_twin(result, name)
        if not seen and values.dim() == 1 and values.numel() and not values.is_complex():
            few = result.measured_mask.get(name)
            mask = few if few is not None and few.shape == values.shape else None
            yield histogram(name, values, unit=result.units.get(name, ""), measured_mask=mask)


def _is_said_by_its_twin(result: AuditResult, name: str) -> bool:
    """Of a quantity and its log10, one is enough: the quantity if it fits floats, else the logarithm."""
    plain = name.removeprefix("log10_")
    if plain not in result.per_sample or f"log10_{plain}" not in result.per_sample:
        return False
    values = _examined(result, plain)
    fits = bool((values.isfinite() & (values != 0)).all())
    return fits if name != plain else not fits


def _layers(result: AuditResult) -> Iterator[Drawing]:
    for name in numeric_columns(result.per_layer):
        yield layer_bars(name, result.per_layer, unit=result.units.get(name, ""))


_SPECTRUM_ENDS = frozenset(f"{log}sigma_{end}" for log in ("", "log10_") for end in ("max", "min"))


def _spectrum(result: AuditResult) -> Iterator[Drawing]:
    high, low = (_log10(result, f"sigma_{end}") for end in ("max", "min"))
    if high is not None and low is not None:
        yield spectrum_range(high, low)
    yield from _whole_spectra(result)


def _whole_spectra(result: AuditResult) -> Iterator[Drawing]:
    for values in result.per_sample.values():
        if values.dim() == 2 and values.numel():
            yield full_spectrum(values)


def _log10(result: AuditResult, name: str) -> Tensor | None:
    """log10 of a per-sample quantity: as measured if the audit has it (it may not fit a float), else taken here."""
    if f"log10_{name}" in result.per_sample:
        return _examined(result, f"log10_{name}")
    return _examined(result, name).to(torch.float64).log10() if name in result.per_sample else None


def _examined(result: AuditResult, name: str) -> Tensor:
    """A per-sample quantity of the samples that it was taken from."""
    values, mask = result.per_sample[name], result.measured_mask.get(name)
    return values if mask is None or mask.shape != values.shape else values[mask]


def _forecast(result: AuditResult) -> Iterator[Drawing]:
    rows = result.tables.get("arithmetic", ())
    if rows:
        yield forecast_against_measured(rows, usable=result.settings.get("usable"))


def _attack(result: AuditResult) -> Iterator[Drawing]:
    rows = result.tables.get("attack_curve", ())
    if rows:
        yield attack_curve(rows)


#: audit name -> its special pictures, drawn before the general ones. Add one line for a new kind.
SPECIAL: dict[str, Special] = {
    "jacobian_spectrum": Special(_spectrum, shown=_SPECTRUM_ENDS),
    "full_spectrum": Special(_whole_spectra),
    "precision": Special(_forecast),
    "dequantization_attack": Special(_attack),
}
