"""Records of the audits in a training run: to CSV, TensorBoard, W&B, MLflow, Lightning loggers."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from inn_guard.execution.files import atomic_write
from inn_guard.report.audit_report import AuditReport

__all__ = [
    "CsvRecorder",
    "MetricsRecorder",
    "Record",
    "ScalarWriter",
    "TensorBoardRecorder",
    "read_csv",
    "scalars",
]

Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Record:
    """One audit in a training run.

    Attributes:
        step: number of the training step.
        report: the report of the audit.
        extra: further numbers at that step: the current coefficient, the number of rollbacks.
    """

    step: int
    report: AuditReport
    extra: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> Row:
        """The step, the verdict and every number by name, those of checks as "check.quantity".

        NaN and Inf stay as they are.
        """
        row: Row = {"step": self.step, "verdict": self.report.verdict.label}
        for result in self.report.results:
            for name, value in result.values.items():
                row[f"{result.name}.{name}"] = float(value)
        row.update(self.extra)
        return row


class CsvRecorder:
    """Appends one line per audit to a CSV file; a line that a kill cut short is dropped.

    A run that resumes from an older checkpoint repeats steps: lines at or after the repeated step
    are replaced, so that the file is that of an uninterrupted run.

    Args:
        path: the file; it is continued if it exists. Its folder must exist.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the file exists and is not such a table.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"the folder {self.path.absolute().parent} does not exist; create it first"
            )
        self._rows: list[Row] = []
        if self.path.exists():
            self._rows = read_csv(self.path)
        self._columns: list[str] = []

    def __call__(self, record: Record) -> None:
        """Write the record as one line; rewrite the file if steps repeat or columns are new."""
        row = record.row()
        kept = [old for old in self._rows if int(old["step"]) < record.step]
        # The first record rewrites the file that was found, because its last line may be cut short.
        is_first = not self._columns
        repeats_steps = len(kept) < len(self._rows)
        has_new_columns = not set(row) <= set(self._columns)
        self._rows = [*kept, row]
        if not (is_first or repeats_steps or has_new_columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_as_csv([self._cells(row)]))
            return
        columns: dict[str, None] = {}
        for old in self._rows:
            columns.update(dict.fromkeys(old))
        self._columns = list(columns)
        with atomic_write(self.path) as partial:
            lines: list[Sequence[object]] = [self._columns, *map(self._cells, self._rows)]
            partial.write_text(_as_csv(lines), encoding="utf-8")

    def _cells(self, row: Row) -> list[object]:
        return [row.get(name, "") for name in self._columns]


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """The rows that a ``CsvRecorder`` wrote, with numbers as floats and without empty cells.

    A last line that a kill cut short is ignored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a table.
    """
    text = Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(complete)))
    if not lines or lines[0][:2] != ["step", "verdict"]:
        raise ValueError(
            f"expected {path} to begin with the columns step,verdict, as CsvRecorder writes them"
        )
    columns, *rows = lines
    parsed = []
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"expected {len(columns)} cells in every line of {path}, one a column")
        parsed.append(_parsed(dict(zip(columns, row, strict=True))))
    return parsed


@runtime_checkable
class ScalarWriter(Protocol):
    """The part of TensorBoard's SummaryWriter that a TensorBoardRecorder needs."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number under this tag at this step."""
        ...


class TensorBoardRecorder:
    """Logs every number of every audit as the scalar ``prefix/check/quantity``.

    ``prefix/failed`` is 1 if the verdict is unstable or non_finite, else 0.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
        prefix: first part of every tag.

    Raises:
        TypeError: if the writer has no ``add_scalar``.
    """

    def __init__(self, writer: ScalarWriter, *, prefix: str = "audit") -> None:
        if not isinstance(writer, ScalarWriter):
            raise TypeError(
                f"expected a SummaryWriter, got {writer!r}: pass "
                "torch.utils.tensorboard.SummaryWriter(folder)"
            )
        self.writer = writer
        self.prefix = prefix

    def __call__(self, record: Record) -> None:
        """Log every number of the record at its step."""
        for tag, value in scalars(record, self.prefix).items():
            self.writer.add_scalar(tag, value, record.step)


class MetricsRecorder:
    """Hands every number of every audit, by ``prefix/check/quantity``, to a function that logs.

        ig.MetricsRecorder(wandb.init().log)
        ig.MetricsRecorder(mlflow.log_metrics)
        ig.MetricsRecorder(trainer.logger.log_metrics)  # any logger of Lightning

    ``prefix/failed`` is 1 if the verdict is unstable or non_finite, else 0. The page of the report
    is kept, too, with ``artifact=run.log_artifact`` of a W&B run or ``mlflow.log_artifact``.

    Args:
        log: called as ``log({name: number}, step=step)``.
        prefix: first part of every name.
        artifact: called with the path of the report as HTML, which is removed afterwards. Default:
            no page is made.

    Raises:
        TypeError: if ``log`` or ``artifact`` cannot be called.
    """

    def __init__(
        self,
        log: Callable[..., object],
        *,
        prefix: str = "audit",
        artifact: Any = None,
    ) -> None:
        if not callable(log):
            raise TypeError(
                f"expected a function that logs, got {log!r}: pass its method, such as run.log or "
                "logger.log_metrics"
            )
        if artifact is not None and not callable(artifact):
            raise TypeError(
                f"expected a function that keeps a file, got {artifact!r}: pass its method, such "
                "as run.log_artifact or mlflow.log_artifact"
            )
        self.log = log
        self.prefix = prefix
        self.artifact = artifact

    def __call__(self, record: Record) -> None:
        """Log the numbers of the record at its step, and its page."""
        self.log(scalars(record, self.prefix), step=record.step)
        if self.artifact is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / f"{self.prefix.replace('/', '_')}_{record.step}.html"
            record.report.to_html(page)
            self.artifact(str(page))


def scalars(record: Record, prefix: str) -> dict[str, float]:
    """The numbers of a record by tag: ``prefix/failed`` and ``prefix/check/quantity``."""
    tagged = {f"{prefix}/failed": float(record.report.verdict.failed)}
    for name, value in record.row().items():
        if not isinstance(value, str) and name != "step":
            tagged[f"{prefix}/{name.replace('.', '/')}"] = float(value)
    return tagged


def _as_csv(rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _parsed(row: dict[str, str]) -> Row:
    """One line of the file as a row: numbers as floats, empty cells left out."""
    parsed: Row = {"step": int(row["step"]), "verdict": row["verdict"]}
    for name, cell in row.items():
        if cell and name not in parsed:
            parsed[name] = float(cell)
    return parsed
