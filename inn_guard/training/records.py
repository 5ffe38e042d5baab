"""Records of a training run's audits, and where they go: a CSV file, TensorBoard, or any function."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from inn_guard.audits import AuditReport
from inn_guard.execution.files import atomic_write

__all__ = ["CsvRecorder", "Record", "ScalarWriter", "TensorBoardRecorder", "read_csv"]

Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Record:
    """One audit inside a training run.

    Attributes:
        step: number of the training step.
        report: what the audit found.
        extra: further numbers of that moment: a coefficient in force, the number of rollbacks so far.
    """

    step: int
    report: AuditReport
    extra: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> Row:
        """Step, verdict, and every number by its name, "audit.quantity" for those of the audits; NaN and Inf stay."""
        measured = {
            f"{r.name}.{name}": float(value)
            for r in self.report.results
            for name, value in r.values.items()
        }
        return {"step": self.step, "verdict": self.report.verdict.label, **measured, **self.extra}


class CsvRecorder:
    """Appends one line per audit to a CSV file, and completes lines that a kill cut short.

    A run that resumes from an older checkpoint meets the same steps again: lines at or after the step that comes first
    are replaced, so that the file is that of an uninterrupted run.

    Args:
        path: the file; continued if it is there. Its folder must exist.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the file is there and is no such table.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"the folder {self.path.absolute().parent} does not exist; create it first"
            )
        self._rows: list[Row] = list(read_csv(self.path)) if self.path.exists() else []
        self._columns: list[str] = []

    def __call__(self, record: Record) -> None:
        """Write one record."""
        row = record.row()
        kept = [old for old in self._rows if int(old["step"]) < record.step]
        # the file as it was found is written anew at the first record: its last line may be half a one
        whole = (
            bool(self._columns) and len(kept) == len(self._rows) and set(row) <= set(self._columns)
        )
        self._rows = [*kept, row]
        if whole:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_text([self._cells(row)]))
            return
        self._columns = list(dict.fromkeys(name for old in self._rows for name in old))
        with atomic_write(self.path) as partial:
            partial.write_text(
                _text([self._columns, *map(self._cells, self._rows)]), encoding="utf-8"
            )

    def _cells(self, row: Row) -> list[object]:
        return [row.get(name, "") for name in self._columns]


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """The rows that a ``CsvRecorder`` wrote: numbers as numbers, cells that were not measured left out.

    A last line that a kill cut short is ignored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such table.
    """
    text = Path(path).read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not lines or lines[0][:2] != ["step", "verdict"]:
        raise ValueError(
            f"expected {path} to begin with the columns step,verdict, as CsvRecorder writes them"
        )
    columns, *rows = lines
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"expected {len(columns)} cells in every line of {path}, one per column")
    return [_parsed(dict(zip(columns, row, strict=True))) for row in rows]


@runtime_checkable
class ScalarWriter(Protocol):
    """What TensorBoard's SummaryWriter can do, as far as it is needed."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number."""
        ...


class TensorBoardRecorder:
    """Logs every number of every audit as the scalar ``prefix/audit/quantity``, and whether the verdict is a finding.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
        prefix: first part of every tag.
    """

    def __init__(self, writer: ScalarWriter, *, prefix: str = "audit") -> None:
        self.writer, self.prefix = writer, prefix

    def __call__(self, record: Record) -> None:
        """Log one record."""
        self.writer.add_scalar(
            f"{self.prefix}/failed", float(record.report.verdict.failed), record.step
        )
        for name, value in record.row().items():
            if not isinstance(value, str) and name != "step":
                self.writer.add_scalar(
                    f"{self.prefix}/{name.replace('.', '/')}", float(value), record.step
                )


def _text(rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _parsed(row: dict[str, str]) -> Row:
    numbers = {
        name: float(cell) for name, cell in row.items() if cell and name not in ("step", "verdict")
    }
    return {"step": int(row["step"]), "verdict": row["verdict"], **numbers}
