"""One self-contained HTML page of a training run's audits: every number against the step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inn_guard.execution.files import atomic_write
from inn_guard.report.html import environment
from inn_guard.report.plots import Drawing, history
from inn_guard.report.verdict import Verdict

__all__ = ["render_history", "write_history"]

#: quantities that are drawn first, by the last part of their names
FIRST = ("condition_number", "max_angle", "relative_error", "max_error", "coefficient")
_LABELS = tuple(map(str, Verdict))

Row = Mapping[str, Any]


def write_history(
    rows: Iterable[Row], path: str | os.PathLike[str], *, name: str = "Training run"
) -> None:
    """Write the page of `render_history` to ``path``, whole or not at all."""
    text = render_history(rows, name=name)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render_history(rows: Iterable[Row], *, name: str = "Training run") -> str:
    """The page of a run's curves: condition number, gradient angle, error, coefficient first.

        write_history(read_csv("stability.csv"), "stability.html")
        write_history(map(Record.row, records), "stability.html")

    Args:
        rows: one per audit, with the columns step and verdict, as ``Record.row`` and ``read_csv``
            give them.
        name: heading of the page.

    Raises:
        TypeError: if a row is no mapping.
        ValueError: if there are no rows, or one lacks a step or a known verdict.
    """
    audits = sorted(_checked(rows), key=lambda row: int(row["step"]))
    first, rest = _drawings(audits)
    template = environment().get_template("history.html")
    return template.render(
        name=name,
        verdict=_worst(audits),
        findings=_findings(audits),
        first=first,
        rest=rest,
    )


def _checked(rows: Iterable[Row]) -> list[Row]:
    """The rows as a list, if each is one of an audit."""
    if isinstance(rows, (str, os.PathLike)):
        raise TypeError(
            f"expected rows, got the path {os.fspath(rows)!r}: pass read_csv({os.fspath(rows)!r})"
        )
    audits = list(rows)
    if not audits:
        raise ValueError("expected at least one row, got none: the run has no audits")
    for row in audits:
        if not isinstance(row, Mapping):
            raise TypeError(
                f"expected rows as mappings, got a {type(row).__name__}: for records, pass "
                "map(Record.row, records)"
            )
        if "step" not in row or row.get("verdict") not in _LABELS:
            raise ValueError(
                f"expected rows with a step and a verdict, one of {', '.join(_LABELS)}; "
                f"got {dict(row)}"
            )
    return audits


def _verdict(row: Row) -> Verdict:
    return Verdict(row["verdict"])


def _worst(audits: Sequence[Row]) -> Verdict:
    return Verdict.worst(map(_verdict, audits))


def _drawings(audits: Sequence[Row]) -> tuple[list[Drawing], list[Drawing]]:
    """The curves that are asked for most, and the others."""
    names: dict[str, None] = {}
    for row in audits:
        names |= dict.fromkeys(row)
    first: list[Drawing] = []
    rest: list[Drawing] = []
    for name in sorted(names, key=_rank):
        measured = [row for row in audits if name in row]
        if name in ("step", "verdict") or _has_better(name, names, measured):
            continue
        steps = [int(row["step"]) for row in measured]
        values = [row[name] for row in measured]
        failed = [_verdict(row).failed for row in measured]
        drawn = rest
        if _rank(name) < len(FIRST):
            drawn = first
        drawn.append(history(name, steps, values, failed=failed))
    return first, rest


def _rank(name: str) -> int:
    """The place of a quantity among those that are drawn first; one number for all others."""
    quantity = name.rpartition(".")[2].removeprefix("log10_")
    return FIRST.index(quantity) if quantity in FIRST else len(FIRST)


def _has_better(name: str, names: Iterable[str], measured: Sequence[Row]) -> bool:
    """Whether the quantity's log10, or what it is the log10 of, is drawn in its place.

    One of the two is enough: the quantity itself if all its numbers fit floats, else its log10.
    """
    check, _, quantity = name.rpartition(".")
    plain = f"{check}.{quantity.removeprefix('log10_')}"
    logarithm = f"{check}.log10_{quantity.removeprefix('log10_')}"
    if plain not in names or logarithm not in names:
        return False
    fits = True
    for row in measured:
        fits = fits and math.isfinite(row.get(plain, 0.0))
    return fits == (name == logarithm)


def _findings(audits: Sequence[Row]) -> str:
    """How many audits found something, and when the first one did."""
    first, last = audits[0]["step"], audits[-1]["step"]
    if len(audits) == 1:
        return f"One audit, at step {first}. {_worst(audits).sentence}"
    failed = [row["step"] for row in audits if _verdict(row).failed]
    if not failed:
        text = f"{len(audits)} audits between steps {first} and {last}, none with findings."
        if _worst(audits) in (Verdict.MARGINAL, Verdict.UNDECIDED):
            text += f" The worst verdict is {_worst(audits)}."
        return text
    verb = "has" if len(failed) == 1 else "have"
    when = f"the first one at step {failed[0]}"
    if len(failed) == 1:
        when = f"at step {failed[0]}"
    return (
        f"{len(failed)} of {len(audits)} audits {verb} findings, {when}. {_worst(audits).sentence}"
    )
