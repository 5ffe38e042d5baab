"""What a command leaves behind: the printed report, files, and the exit code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from inn_guard.cli import FAULT
from inn_guard.cli.usage import MissingPackage, WrongUsage, notice
from inn_guard.report.audit_report import AuditReport, Row
from inn_guard.report.comparison import Comparison
from inn_guard.report.verdict import Verdict

__all__ = ["EXIT_CODES", "can_write", "exit_code", "finish", "show", "write_file"]

# \b keeps the line breaks of a paragraph in --help
EXIT_CODES = """\b
Exit codes:
  0  stable or marginal
  1  unstable or non_finite
  2  wrong usage: nothing was measured
  3  nothing was decided (undecided or not applicable), a package is missing,
     or a fault of inn_guard"""

COLOURS = {"ok": "green", "FAILS": "bold red", "marginal": "yellow", "undecided": "yellow"}


def exit_code(verdict: Verdict) -> int:
    """The exit code of a verdict: 0 passed, 1 failed, 3 not decided."""
    if verdict.failed:
        return 1
    if verdict.passed:
        return 0
    return FAULT


def can_write(*paths: Path | None) -> None:
    """Refuse before the audit what would fail after it.

    Raises:
        WrongUsage: if a path is a folder, or lies in a folder that does not exist.
        MissingPackage: if a page is to be written without the libraries for it.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise WrongUsage(f"expected the path of a file in a folder that exists, got {path}")
        if path.suffix == ".html":
            _require_html()


def _require_html() -> None:
    try:
        importlib.import_module("inn_guard.report.html")
    except ModuleNotFoundError as error:
        raise MissingPackage(str(error.name), "report") from error


def finish(
    report: AuditReport,
    *,
    details: bool = False,
    html: Path | None = None,
    json: Path | None = None,
    junit: Path | None = None,
) -> None:
    """Print the report and write the files that were asked for.

    Raises:
        WrongUsage: if one cannot be written.
    """
    if details:
        typer.echo(report.details())
    else:
        show(report)
    for path, writer in ((json, report.to_json), (html, report.to_html), (junit, report.to_junit)):
        write_file(path, writer)


def write_file(path: Path | None, writer: Callable[[Path], object]) -> None:
    """Call ``writer(path)`` and say so; nothing without a path.

    Raises:
        WrongUsage: if it fails for a reason of the file system.
    """
    if path is None:
        return
    try:
        writer(path)
    except OSError as error:
        raise WrongUsage(f"the report above could not be written to {path}: {error}") from error
    notice(f"wrote {path}")


def show(what: AuditReport | Comparison) -> None:
    """Print as tables of the terminal's width; elsewhere as the plain text of ``print``."""
    console = Console(highlight=False)
    if not console.is_terminal:
        typer.echo(str(what))
        return
    if isinstance(what, Comparison):
        console.print(_comparison(what))
        return
    console.print(Text(f"{what.subject}: ").append(what.headline, style="bold"))
    console.print(_findings(what.findings()))
    console.print(_remarks(what.remarks()))
    console.print("details: --details, --html report.html", style="dim")


def _findings(rows: list[Row]) -> Table:
    table = Table("use", "verdict", "finding", box=SIMPLE)
    for row in rows:
        word = row.word or ""
        table.add_row(row.label, Text(word, style=COLOURS.get(word, "")), Text(row.text))
    return table


def _remarks(rows: list[Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(Text(row.label, style="bold"), Text(row.text))
    return table


def _comparison(comparison: Comparison) -> Table:
    head, *rows = comparison.rows()
    table = Table(*head, box=SIMPLE)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
