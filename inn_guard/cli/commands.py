"""The commands of ``inn-guard``; each only joins parts that stand elsewhere.

Exit codes: 0 stable, 1 unstable or non_finite, 2 wrong usage (or nothing could be asked of the model), 3 a fault of
inn_guard itself. A crash thereby never looks like a finding.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from inn_guard.adapters import wrap
from inn_guard.audits import AUDITS, LEVELS, Audit, AuditReport, Level, Verdict
from inn_guard.audits.audited_model import InputRejected, checked_batch
from inn_guard.audits.run import audit as run_audit
from inn_guard.cli.bench import ANY_OPTION, bench
from inn_guard.cli.data import load_context, load_data
from inn_guard.cli.models import load_weights, make_model, own_dtype
from inn_guard.cli.processes import is_first, processes
from inn_guard.cli.usage import WrongUsage, note, reported

__all__ = ["app", "main"]

EXIT_CODES = {
    Verdict.STABLE: 0,
    Verdict.UNSTABLE: 1,
    Verdict.NON_FINITE: 1,
    Verdict.NOT_APPLICABLE: 2,
}
CRASHED = 3

app = typer.Typer(
    help="Audit the numerical stability of invertible neural networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Precision(str, enum.Enum):
    """The dtypes that a model can be audited in."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        """torch's name for it."""
        return getattr(torch, self.value)


def main() -> None:
    """Run the command line; whatever was not foreseen ends with its traceback and exit code 3."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(CRASHED)


def _print_version(wanted: bool) -> bool:  # noqa: FBT001
    if wanted:
        typer.echo(f"inn_guard {version('inn_guard')}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    *,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
@reported
def audit(  # noqa: PLR0913  (one parameter for each option)
    model: Annotated[
        str,
        typer.Option(help="package.module:factory. Imports that module, that is, runs its code."),
    ],
    data: Annotated[
        Path, typer.Option(help="A .npy file (samples, ...), or a folder of images of one size.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file, or a torch file of tensors.")
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="A .npy file with a row for each sample.")
    ] = None,
    level: Annotated[Level, typer.Option(help="How much is measured.")] = Level.STANDARD,
    checks: Annotated[
        str, typer.Option(help="Audits by name, with commas between, in place of --level.")
    ] = "",
    html: Annotated[Path | None, typer.Option(help="Write the report as one web page.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the report as JSON; 'inn-guard report' reads it.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Audit in this dtype; the model's own if not given.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="How many samples of the data are used, the first ones.")
    ] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the factory's and of the audits' random numbers.")
    ] = 0,
    *,
    memory: Annotated[
        float | None, typer.Option(help="GiB that a check may hold beside model and data.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and memory, measure nothing.")
    ] = False,
) -> None:
    """Measure how stable a model and its inverse are. Exit code: 0 stable, 1 unstable or non_finite, 2 wrong usage.

    Under torchrun (torchrun --nproc-per-node 2 -m inn_guard audit ...) the processes share the work; the first writes.
    """
    if memory is not None and not 0 < memory < float("inf"):
        raise WrongUsage(f"expected --memory as a positive number of GiB, got {memory:g}")
    chosen = _checks(checks, level, seed)
    _can_write(html, json)
    made = make_model(model, seed=seed)
    if weights is not None:
        load_weights(made, weights)
    if dtype is not None and isinstance(made, nn.Module):
        made = made.to(dtype.dtype)
    wanted = own_dtype(made) if dtype is None else dtype.dtype
    rows = load_data(data, samples=samples, dtype=wanted)
    given = None if context is None else load_context(context, rows=rows, dtype=wanted)
    wrapped = _wrapped(made, rows.tensor, given)
    asked = {"model": model, "weights": weights, "data": data, "context": context, "seed": seed}
    named = {
        key: value if isinstance(value, int) else str(value)
        for key, value in asked.items()
        if value is not None
    }
    how = {"level": level.value} if not checks else {"checks": checks}
    limit = None if memory is None else memory * 2**30
    with processes() as group:
        try:
            report = run_audit(
                wrapped, rows.tensor, checks=chosen, memory=limit, dry_run=dry_run, group=group
            )
        except InputRejected as error:
            raise WrongUsage(str(error)) from error
        if is_first():
            _finish(
                dataclasses.replace(report, settings={**report.settings, **how, **named}),
                html,
                json,
            )
    raise typer.Exit(0 if dry_run or not is_first() else EXIT_CODES[report.verdict])


@app.command()
@reported
def report(
    saved: Annotated[
        Path, typer.Argument(help="A file that 'inn-guard audit --json' or to_json() wrote.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report as one web page.")] = None,
) -> None:
    """Show a saved report again. Exit code: 0 if it could be read, 2 if not."""
    _can_write(html)
    from_json = _report_package().from_json
    try:
        read = from_json(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WrongUsage(f"{saved} cannot be shown: {error}") from error
    _finish(read, html, None)


app.command(context_settings=ANY_OPTION)(bench)


def _checks(names: str, level: Level, seed: int) -> Sequence[Audit]:
    """The chosen audits, each with the seed if it draws random numbers."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in AUDITS]:
        raise WrongUsage(f"expected --checks out of {', '.join(AUDITS)}; got {', '.join(unknown)}")
    chosen = [AUDITS[name] for name in wanted] or list(LEVELS[level].values())
    return [functools.partial(audit, seed=seed) if _draws(audit) else audit for audit in chosen]


def _draws(audit: Audit) -> bool:
    return "seed" in inspect.signature(audit).parameters


def _wrapped(model: Any, x: torch.Tensor, context: torch.Tensor | None) -> Any:
    """The model ready for `audit()`; what is wrong with it or with the data is a matter of usage."""
    try:
        wrapped = wrap(model, context=context)
        checked_batch(wrapped, x)
    except (TypeError, ValueError) as error:
        raise WrongUsage(str(error)) from error
    return wrapped


def _can_write(*paths: Path | None) -> None:
    """Refuse before the measuring what would fail after it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise WrongUsage(f"expected the path of a file in a folder that exists, got {path}")
        if path is not None and path.suffix == ".html":
            _report_package()


def _report_package() -> Any:
    try:
        return importlib.import_module("inn_guard.report")
    except ImportError as error:
        raise WrongUsage(str(error)) from error


def _finish(report: AuditReport, html: Path | None, json: Path | None) -> None:
    typer.echo(str(report))
    for path, write in ((json, report.to_json), (html, report.to_html)):
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            raise WrongUsage(f"the report above could not be written to {path}: {error}") from error
        note(f"wrote {path}")
