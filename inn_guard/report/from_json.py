"""Reports that `AuditReport.to_json` wrote, read back: text of unknown origin, checked as such."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from inn_guard.report.audit_report import SCHEMA, AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import Finding
from inn_guard.report.verdict import Verdict

__all__ = ["from_json", "load"]

MAX_BYTES = 2**28  #: of a file that is read
LARGEST = 10**18  #: whole number, which counts and seeds never reach

#: settings of a report or of a check that are shown as numbers
_NUMBERS = frozenset(
    ("dimensions", "samples", "of", "limit", "rate_limit", "angle_limit", "length_limit")
)
#: table of a check that is drawn -> columns that hold finite numbers, and others that it needs
_DRAWN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "looks": (("draws", "lost", "rate_low", "rate_high"), ()),
    "attack_curve": (("forward_equivalents",), ("largest_error", "median_error", "broken_samples")),
    "number format": ((), ("number format", "forecast", "measured", "forecast verdict")),
}

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# what the file must hold; msgspec refuses anything else and says where it stands
_Number = float | Literal["nan", "inf", "-inf"]
_Whole = Annotated[int, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
_Row = dict[str, _Whole | float | bool | str | None]
_Use = Literal["density", "sampling", "reconstruction", "gradients", "other_inputs"]


class _Finding(msgspec.Struct):
    verdict: Verdict
    figure: _Number
    limit: _Number
    unit: str
    reason: str
    samples: _Whole
    of: _Whole


class _Result(msgspec.Struct):
    name: str
    verdict: Verdict
    reason: str
    headline: list[str]
    uses: dict[_Use, _Finding] = {}
    values: dict[str, _Number] = {}
    units: dict[str, str] = {}
    per_sample: dict[str, list[Any]] = {}
    measured_mask: dict[str, list[bool]] = {}
    per_layer: list[_Row] = []
    tables: dict[str, list[_Row]] = {}
    settings: dict[str, Any] = {}
    advice: str = ""


class _Report(msgspec.Struct):
    schema: int
    model: str
    results: list[_Result]
    advice: list[str]
    settings: dict[str, Any] = {}
    counted: dict[str, str] | None = None
    asked: list[str] | None = None


class _Schema(msgspec.Struct):
    schema: int


def from_json(text: str) -> AuditReport:
    """The report that `AuditReport.to_json` wrote; NaN and Inf are numbers again.

    Images are not in such a file.

    Args:
        text: the JSON.

    Raises:
        ValueError: if it is not JSON, or not a saved report.
    """
    try:
        schema = msgspec.json.decode(text, type=_Schema).schema
        if schema != SCHEMA:
            raise ValueError(
                f"expected a saved report of schema {SCHEMA}, got schema {schema}: "
                "read it with the version of inn_guard that wrote it"
            )
        return _report(msgspec.json.decode(text, type=_Report))
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"expected a report saved with --json or to_json(): {error}") from None


def _report(saved: _Report) -> AuditReport:
    asked = None
    if saved.asked is not None:
        asked = tuple(saved.asked)
    return AuditReport(
        tuple(map(_result, saved.results)),
        saved.model,
        _settings(saved.settings),
        counted=saved.counted,
        asked=asked,
        advice=tuple(saved.advice),
    )


def _result(saved: _Result) -> AuditResult:
    tables = {}
    for name, rows in saved.tables.items():
        tables[name] = _rows(rows)
    for name, (numbers, others) in _DRAWN.items():
        _check_columns(name, tables.get(name, ()), numbers, others)
    values = {}
    for name, value in saved.values.items():
        values[name] = _number(value)
    per_sample = {}
    for name, entries in saved.per_sample.items():
        per_sample[name] = _tensor(entries)
    masks = {}
    for name, mask in saved.measured_mask.items():
        masks[name] = torch.tensor(mask, dtype=torch.bool)
    uses: dict[str, Finding] = {}
    for use, finding in saved.uses.items():
        uses[use] = _finding(finding)
    return AuditResult(
        saved.name,
        saved.verdict,
        saved.reason,
        uses=uses,
        headline=tuple(saved.headline),
        values=values,
        units=saved.units,
        per_sample=per_sample,
        measured_mask=masks,
        per_layer=_rows(saved.per_layer),
        tables=tables,
        settings=_settings(saved.settings),
        advice=saved.advice,
    )


def _finding(saved: _Finding) -> Finding:
    fields = msgspec.structs.asdict(saved)
    fields["figure"] = _number(saved.figure)
    fields["limit"] = _number(saved.limit)
    return Finding(**fields)


def _rows(saved: list[_Row]) -> tuple[dict[str, Any], ...]:
    rows = []
    for row in saved:
        rows.append({name: _parsed(cell) for name, cell in row.items()})
    return tuple(rows)


def _check_columns(
    table: str,
    rows: tuple[dict[str, Any], ...],
    numbers: tuple[str, ...],
    others: tuple[str, ...],
) -> None:
    """See to it that a table can be drawn.

    ``numbers`` hold finite numbers in every row; ``others`` are there.
    """
    for row in rows:
        for name in (*numbers, *others):
            if name not in row:
                raise ValueError(f"expected the table {table!r} with a column {name!r}")
        for name in numbers:
            if not math.isfinite(_number(row[name])) or row[name] < 0:
                raise ValueError(
                    f"expected positive numbers in {name!r} of {table!r}, got {row[name]!r:.60}"
                )


def _settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: _plain(value) for name, value in saved.items()}
    for name in _NUMBERS & settings.keys():
        if not isinstance(settings[name], (int, float)):
            raise ValueError(
                f"expected a saved report with a number as {name}, got {settings[name]!r:.60}"
            )
    if "rate_limit" in settings and not 0 < settings["rate_limit"] < math.inf:
        raise ValueError(f"expected a positive rate_limit, got {settings['rate_limit']!r:.60}")
    return settings


def _plain(value: Any) -> Any:
    """A setting: "nan" and "inf" stand for numbers, lists for tuples."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, int):
        return msgspec.convert(value, _Whole | bool)
    return _parsed(value)


def _parsed(value: Any) -> Any:
    """The number that "nan", "inf" or "-inf" stands for; anything else as it is."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value


def _number(value: Any) -> float:
    return float(_parsed(msgspec.convert(value, _Number)))


def _tensor(saved: list[Any]) -> Tensor:
    """A list of numbers, or of lists of the same length, as a float64 tensor."""
    try:
        return torch.tensor(_numbers(saved), dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a saved report with numbers per sample: {error}") from None


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_numbers, value))
    return _number(value)


def load(path: str | os.PathLike[str]) -> AuditReport:
    """The report that `AuditReport.to_json` wrote to a file. Images are not in such a file.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than 256 MB, not JSON, or not a saved report.
    """
    if not isinstance(path, (str, os.PathLike)):
        # a number would be taken for an open file, and closed
        raise TypeError(f"expected the path of a saved report; got {path!r:.60}")
    with open(path, encoding="utf-8") as file:
        try:
            # what is no regular file has no size of its own
            text = file.read(MAX_BYTES + 1)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"expected a report saved with to_json(), got no text: {error}"
            ) from None
    if len(text) > MAX_BYTES:
        raise ValueError(f"expected a saved report of at most {MAX_BYTES:,} characters, got more")
    return from_json(text)
