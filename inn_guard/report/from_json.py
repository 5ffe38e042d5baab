"""Reports that `AuditReport.to_json` wrote, read back: text of unknown origin, checked as such."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from inn_guard.report.audit_report import SCHEMA, AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import USES, Finding
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
_VERDICTS = dict(zip(map(str, Verdict), Verdict, strict=True))


def from_json(text: str) -> AuditReport:
    """The report that `AuditReport.to_json` wrote; NaN and Inf are numbers again.

    Images are not in such a file.

    Args:
        text: the JSON.

    Raises:
        ValueError: if it is not JSON, or not a saved report.
    """
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
        return _report(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected a report saved with --json or to_json(), got text that is not JSON: {error}"
        ) from None
    except RecursionError:
        raise ValueError(
            "expected a report saved with --json or to_json(), got JSON nested too deeply"
        ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(
        f"expected a report saved with --json or to_json(), got the bare word {name}, which is "
        "not JSON"
    )


def _report(content: Any) -> AuditReport:
    saved = _mapping(content, "the file")
    schema = _field(saved, "schema", int)
    if schema != SCHEMA:
        raise ValueError(
            f"expected a saved report of schema {SCHEMA}, got schema {schema}: "
            "read it with the version of inn_guard that wrote it"
        )
    counted, asked = saved.get("counted"), saved.get("asked")
    if counted is not None:
        counted = _each(saved, "counted", _text)
    if asked is not None:
        asked = _texts(saved, "asked")
    results = []
    for row in _field(saved, "results", list):
        results.append(_result(_mapping(row, "results")))
    return AuditReport(
        tuple(results),
        _field(saved, "model", str),
        _settings(_mapping(saved.get("settings", {}), "settings")),
        counted=counted,
        asked=asked,
        advice=_texts(saved, "advice"),
    )


def _result(row: Mapping[str, Any]) -> AuditResult:
    tables = _each(row, "tables", _rows)
    for name, (numbers, others) in _DRAWN.items():
        _check_columns(name, tables.get(name, ()), numbers, others)
    return AuditResult(
        _field(row, "name", str),
        _verdict(row),
        _field(row, "reason", str),
        uses=_uses(row),
        headline=_texts(row, "headline"),
        values=_each(row, "values", _number),
        units=_each(row, "units", _text),
        per_sample=_each(row, "per_sample", _tensor),
        measured_mask=_each(row, "measured_mask", _mask),
        per_layer=_rows(row.get("per_layer", [])),
        tables=tables,
        settings=_settings(_mapping(row.get("settings", {}), "settings")),
        advice=_text(row.get("advice", "")),
    )


def _uses(row: Mapping[str, Any]) -> dict[str, Finding]:
    found = {}
    for use, finding in _mapping(row.get("uses", {}), "uses").items():
        if use not in USES:
            raise ValueError(f"expected uses out of {', '.join(USES)}; got {use!r}")
        content = _mapping(finding, "a finding")
        found[use] = Finding(
            _verdict(content),
            _number(content.get("figure")),
            _number(content.get("limit")),
            _field(content, "unit", str),
            _field(content, "reason", str),
            _field(content, "samples", int),
            _field(content, "of", int),
        )
    return found


def _verdict(row: Mapping[str, Any]) -> Verdict:
    label = _field(row, "verdict", str)
    if label not in _VERDICTS:
        raise ValueError(f"expected a verdict out of {', '.join(_VERDICTS)}; got {label!r}")
    return _VERDICTS[label]


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return tuple(map(_text, _field(row, name, list)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a saved report with text, got {value!r:.60}")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"expected a saved report; in {where}, got {type(value).__name__} where names and "
            "values belong"
        )
    return value


def _field(row: Mapping[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    # in JSON true is no number, in Python it is an int
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(
            f"expected a saved report with {name!r} as {kind.__name__}, got {value!r:.60}"
        )
    return value


def _each(row: Mapping[str, Any], name: str, read: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: read(value) for key, value in _mapping(row.get(name, {}), name).items()}


def _rows(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        raise ValueError(f"expected a saved report with a list of rows, got {value!r:.60}")
    rows = []
    for row in value:
        cells = {key: _plain(value) for key, value in _mapping(row, "a row of a table").items()}
        if any(isinstance(cell, (tuple, dict)) for cell in cells.values()):
            raise ValueError(
                f"expected a saved report with a number or text in every cell, got {row!r:.60}"
            )
        rows.append(cells)
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


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: _plain(value) for key, value in values.items()}
    for name in _NUMBERS & settings.keys():
        _number(settings[name])
    if "rate_limit" in settings and not 0 < _number(settings["rate_limit"]) < math.inf:
        raise ValueError(f"expected a positive rate_limit, got {settings['rate_limit']!r:.60}")
    return settings


def _plain(value: Any) -> Any:
    """A setting or a cell: "nan" and "inf" stand for numbers, lists for tuples."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError("expected a saved report with whole numbers of at most 18 digits")
    return _parsed(value)


def _parsed(value: Any) -> Any:
    """The number that "nan", "inf" or "-inf" stands for; anything else as it is."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return value


def _number(value: Any) -> float:
    number = _parsed(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"expected a saved report with a number, got {value!r:.60}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError("expected a saved report with numbers that fit a float64") from None


def _mask(value: Any) -> Tensor:
    if not isinstance(value, list) or set(map(type, value)) - {bool}:
        raise ValueError(
            f"expected a saved report with a list of true and false, got {value!r:.60}"
        )
    return torch.tensor(value, dtype=torch.bool)


def _tensor(value: Any) -> Tensor:
    """A list of numbers, or of lists of the same length, as a float64 tensor."""
    try:
        return torch.tensor(_numbers(value), dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
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
