"""One self-contained HTML page of a training run's audits: every number that was recorded, against the step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from inn_guard.execution.files import atomic_write
from inn_guard.report.html import environment
from inn_guard.report.plots import Drawing, history
from inn_guard.report.result import Verdict

__all__ = ["render_history", "write_history"]

#: quantities that are drawn first, by the last part of their names
FIRST = ("condition_number", "max_angle", "relative_error", "max_error", "coefficient")
_VERDICTS = {verdict.label: verdict for verdict in Verdict}

Row = Mapping[str, Any]


def write_history(
    rows: Iterable[Row], path: str | os.PathLike[str], *, name: str = "Training run"
) -> None:
    """Write the page of `render_history` to ``path``, whole or not at all."""
    text = render_history(rows, name=name)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def render_history(rows: Iterable[Row], *, name: str = "Training run") -> str:
    """Curves of a run: condition number, gradient angle, error and coefficient first, then everything else.

        write_history(read_csv("stability.csv"), "stability.html")
        write_history((record.row() for record in records), "stability.html")

    Args:
        rows: one per audit, with the columns step and verdict, as ``Record.row`` and ``read_csv``
            give them.
        name: heading of the page.

    Raises:
        ValueError: if there are no rows, or one lacks a step or a known verdict.
    """
    audits = sorted(_checked(rows), key=lambda row: int(row["step"]))
    verdict = Verdict.worst([_VERDICTS[row["verdict"]] for row in audits])
    first, rest = _split(list(_curves(audits)))
    return (
        environment()
        .get_template("history.html")
        .render(
            name=name,
            audits=audits,
            verdict=verdict,
            findings=_findings(audits),
            first=first,
            rest=rest,
        )
    )


def _checked(rows: Iterable[Row]) -> list[Row]:
    audits = list(rows)
    if not audits:
        raise ValueError("expected at least one row, got none: the run has no audits")
    for row in audits:
        if "step" not in row or row.get("verdict") not in _VERDICTS:
            raise ValueError(
                f"expected rows with a step and a verdict out of {', '.join(_VERDICTS)}; got {dict(row)}"
            )
    return audits


def _curves(audits: Sequence[Row]) -> Iterator[tuple[str, Drawing]]:
    names = dict.fromkeys(name for row in audits for name in row if name not in ("step", "verdict"))
    for name in names:
        measured = [row for row in audits if name in row]
        if _is_said_by_its_twin(name, names, measured):
            continue
        failed = [_VERDICTS[row["verdict"]].failed for row in measured]
        steps, values = ([row[key] for row in measured] for key in ("step", name))
        yield name, history(name, steps, values, failed=failed)


def _is_said_by_its_twin(name: str, names: Iterable[str], measured: Sequence[Row]) -> bool:
    """Of a quantity and its log10, one is enough: the quantity where all its numbers fit floats, else the logarithm."""
    audit, _, quantity = name.rpartition(".")
    plain = f"{audit}.{quantity.removeprefix('log10_')}"
    logarithm = f"{audit}.log10_{quantity.removeprefix('log10_')}"
    if plain not in names or logarithm not in names:
        return False
    fits = all(math.isfinite(row[plain]) for row in measured if plain in row)
    return fits if name == logarithm else not fits


def _split(curves: list[tuple[str, Drawing]]) -> tuple[list[Drawing], list[Drawing]]:
    """The curves that are asked for most, and the others."""

    def rank(name: str) -> int:
        quantity = name.rpartition(".")[2].removeprefix("log10_")
        return FIRST.index(quantity) if quantity in FIRST else len(FIRST)

    ranked = sorted(curves, key=lambda curve: rank(curve[0]))
    return (
        [drawing for name, drawing in ranked if rank(name) < len(FIRST)],
        [drawing for name, drawing in ranked if rank(name) == len(FIRST)],
    )


def _findings(audits: Sequence[Row]) -> str:
    failed = [row["step"] for row in audits if _VERDICTS[row["verdict"]].failed]
    if not failed:
        return f"{len(audits)} audits between steps {audits[0]['step']} and {audits[-1]['step']}, none with findings."
    return (
        f"{len(failed)} of {len(audits)} audits have findings, the first one at step {failed[0]}."
    )
