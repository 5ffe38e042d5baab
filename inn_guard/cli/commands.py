"""The commands of ``inn-guard``. The parts that they join are in the modules next to this one."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from inn_guard.adapters import wrap
from inn_guard.audits import AUDITS, Level
from inn_guard.audits.audited_model import InputRejected
from inn_guard.audits.batch import checked_batch
from inn_guard.audits.run import audit as run_audit
from inn_guard.cli import options
from inn_guard.cli.bench import ANY_OPTION, bench
from inn_guard.cli.data import Rows, read_context, read_data
from inn_guard.cli.draws import USES_OF_DRAWS, advice_on_draws, checks_of_draws, draw
from inn_guard.cli.limits import read_limits
from inn_guard.cli.models import (
    check_name,
    find,
    load_weights,
    make,
    own_dtype,
    parse_arguments,
    save_weights,
)
from inn_guard.cli.output import EXIT_CODES, can_write, exit_code, finish, show, write_file
from inn_guard.cli.processes import is_first, processes
from inn_guard.cli.usage import WrongUsage, exit_on_usage_error, notice
from inn_guard.repair.fine_tuning import AUDITED, stabilize
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.comparison import compare as side_by_side
from inn_guard.report.from_json import load
from inn_guard.report.uses import USES

__all__ = ["app", "exit_code"]

ALL_ROWS = 2**40  #: more than any file has
MOST = 2**63 - 1  #: the largest seed of torch

app = typer.Typer(
    help=f"Audit the numerical stability of invertible neural networks.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


AUDIT_HELP = f"""Measure how stable a model and its inverse are.

\b
  inn-guard audit nets.py:make_flow x.npy --weights flow.pt
  inn-guard audit package.module:Flow x.csv --arg layers=8 --uses density,sampling
  inn-guard audit nets.py:make_flow                          without data

MODEL is package.module:factory or path/to/file.py:factory. Its module is imported, that is, its
code is run. DATA is a .npy, .pt, .csv or .parquet file (samples, ...), or a folder of images of one
size. No code in a file of data or weights is run.

Without DATA the model is audited on its own draws, with z from its base distribution or from
--prior: are they lost, and do they come back?

Under torchrun (torchrun --nproc-per-node 2 -m inn_guard audit ...) the processes share the work,
and the first one writes.

{EXIT_CODES}"""


@app.command(help=AUDIT_HELP)
@exit_on_usage_error
def audit(  # noqa: PLR0913  (one parameter for each option)
    words: options.Words = None,
    *,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    arg: options.Arguments = None,
    weights: options.Weights = None,
    context: Annotated[
        Path | None, typer.Option(help="A file like DATA with a row for each sample.")
    ] = None,
    uses: Annotated[
        str, typer.Option(metavar="USE,...", help=f"What counts: out of {options.LISTED_USES}.")
    ] = "",
    limits: options.LimitsFile = None,
    prior: options.Prior = None,
    level: Annotated[Level, typer.Option(help="How much is measured.")] = Level.STANDARD,
    checks: Annotated[
        str, typer.Option(metavar="CHECK,...", help="Checks by name, in place of --level.")
    ] = "",
    html: options.Html = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the report as JSON; 'inn-guard report' reads it.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML, one test case for each use.")
    ] = None,
    details: options.Details = False,
    dtype: Annotated[
        options.Precision | None,
        typer.Option(help="Audit in this dtype. Default: the model's own."),
    ] = None,
    device: options.Device = "cpu",
    samples: Annotated[
        int, typer.Option(min=1, help="How many samples are used, the first ones of the data.")
    ] = 256,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST, help="Seed for model construction and audits.")
    ] = 0,
    memory: Annotated[
        float | None, typer.Option(help="Extra memory per check, in GiB. Default: no limit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and memory, measure nothing.")
    ] = False,
) -> None:
    """Measure how stable a model and its inverse are."""
    # Everything that needs no code of the user's is checked before the model is imported.
    model, data = options.model_and_data(words, model, data)
    check_name(model)
    if prior is not None:
        check_name(prior, "--prior")
    arguments = parse_arguments(arg or [])
    chosen_uses = options.names(uses, "--uses", USES)
    chosen_checks = options.names(checks, "--checks", AUDITS)
    chosen_limits = read_limits(limits)
    place = options.device_named(device)
    limit = options.bytes_of(memory)
    can_write(html, json, junit)
    rows = None if data is None else read_data(data, samples=samples)
    made = make(model, seed=seed, arguments=arguments)
    if weights is not None:
        load_weights(made, weights)
    if isinstance(made, nn.Module):
        made = made.to(place)
        if dtype is not None:
            made = made.to(dtype.dtype)
    like = torch.zeros((), dtype=dtype.dtype if dtype else own_dtype(made), device=place)
    base = None if prior is None else make(prior, seed=seed)
    conditions = _context(context, rows, samples, like)
    if rows is not None:
        x = rows.to(like.dtype).to(place)
    else:
        count = samples if conditions is None else len(conditions)
        x = draw(made, context=conditions, prior=base, samples=count, seed=seed, like=like)
        chosen_uses = chosen_uses or USES_OF_DRAWS
        chosen_checks = chosen_checks or checks_of_draws(level, chosen_uses)
    wrapped = _wrapped(made, x, conditions)
    with processes() as group:
        try:
            report = run_audit(
                wrapped,
                x,
                uses=chosen_uses,
                level=level,
                checks=chosen_checks,
                prior=base,
                limits=chosen_limits,
                seed=seed,
                memory=limit,
                group=group,
                dry_run=dry_run,
            )
        except InputRejected as error:
            raise WrongUsage(str(error)) from error
        if is_first():
            asked = {
                "model": model,
                "arguments": " ".join(arg or []) or None,
                "weights": weights,
                "data": data or f"{len(x)} draws of the model",
                "context": context,
                "prior": prior,
                "limits": limits,
                "seed": seed,
            }
            report = _with_settings(report, asked)
            if data is None:
                report = dataclasses.replace(report, advice=advice_on_draws(report.advice))
            finish(report, details=details, html=html, json=json, junit=junit)
    if dry_run or not is_first():
        raise typer.Exit(0)
    raise typer.Exit(exit_code(report.verdict))


REPAIR_HELP = f"""Fine-tune a model until it is fit for the uses.

\b
  inn-guard repair nets.py:make_flow x.npy --weights flow.pt --uses sampling --out repaired.pt

The loss is the negative log-likelihood, under N(0, I) if the model has no base. For other models
--loss names the function (model, batch) -> scalar that they were trained with. --out gets the state
dict of the best state, also where a use still fails; it is written at once or not at all.

{EXIT_CODES}"""


@app.command(help=REPAIR_HELP)
@exit_on_usage_error
def repair(  # noqa: PLR0913  (one parameter for each option)
    words: options.Words = None,
    *,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    arg: options.Arguments = None,
    weights: options.Weights = None,
    uses: Annotated[
        str, typer.Option(metavar="USE,...", help=f"What must pass: out of {options.LISTED_USES}.")
    ] = "",
    loss: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="A function (model, batch) -> loss.")
    ] = None,
    limits: options.LimitsFile = None,
    prior: options.Prior = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the repaired weights: .pt, .pth or .safetensors.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write before and after as one page.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps at most.")] = 200,
    every: Annotated[int, typer.Option(min=1, help="Steps between two audits.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 5e-4,
    device: options.Device = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Seed of everything random.")] = 0,
) -> None:
    """Fine-tune a model until it is fit for the uses."""
    model, data = options.model_and_data(words, model, data)
    if data is None:
        raise WrongUsage(
            "expected MODEL and DATA: a model is repaired on the data it was trained on"
        )
    check_name(model)
    if loss is not None:
        check_name(loss, "--loss")
    if prior is not None:
        check_name(prior, "--prior")
    arguments = parse_arguments(arg or [])
    chosen_uses = options.names(uses, "--uses", USES)
    place = options.device_named(device)
    chosen_limits = read_limits(limits)
    can_write(out, html)
    rows = read_data(data, samples=ALL_ROWS)
    made = make(model, seed=seed, arguments=arguments)
    if weights is not None:
        load_weights(made, weights)
    if not isinstance(made, nn.Module):
        raise WrongUsage(f"repair needs a torch.nn.Module, but {model} is a {type(made).__name__}")
    made = made.to(place)
    x = rows.to(own_dtype(made)).to(place)
    try:
        steady = stabilize(
            made,
            DataLoader(TensorDataset(x), batch_size=batch_size, shuffle=True),
            loss=None if loss is None else find(loss),
            uses=chosen_uses,
            prior=None if prior is None else make(prior, seed=seed),
            limits=chosen_limits,
            x=x[:AUDITED],
            steps=steps,
            every=every,
            learning_rate=learning_rate,
            seed=seed,
        )
    except (TypeError, ValueError) as error:
        raise WrongUsage(str(error)) from error
    typer.echo(str(steady))
    if out is not None:
        save_weights(steady.model, out)
        notice(f"wrote the weights after {steady.kept_step} steps to {out}")
    write_file(html, steady.to_html)
    raise typer.Exit(exit_code(steady.verdict))


@app.command()
@exit_on_usage_error
def report(
    saved: Annotated[
        Path, typer.Argument(help="A file that 'inn-guard audit --json' or to_json() wrote.")
    ],
    *,
    html: options.Html = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML, one test case for each use.")
    ] = None,
    details: options.Details = False,
) -> None:
    """Show a saved report again. Exit code: 0 if it could be read, else 2."""
    can_write(html, junit)
    finish(_read(saved), details=details, html=html, junit=junit)


@app.command()
@exit_on_usage_error
def compare(
    saved: Annotated[
        list[Path],
        typer.Argument(help="Files that 'inn-guard audit --json' or to_json() wrote."),
    ],
    *,
    html: options.Html = None,
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse",
            help="End with exit code 1 if a use that counts and passes in the first report does "
            "not pass in another.",
        ),
    ] = False,
) -> None:
    """Put saved reports next to each other, use by use.

    Exit code: 0 if they could be read, else 2; with --fail-if-worse 1 if one is worse than the
    first.
    """
    can_write(html)
    reports = [_read(path) for path in saved]
    comparison = side_by_side(dict(zip(_different_names(saved), reports, strict=True)))
    show(comparison)
    write_file(html, comparison.to_html)
    if fail_if_worse and _lost_uses(reports[0], reports[1:]):
        raise typer.Exit(1)


app.command(context_settings=ANY_OPTION)(bench)


def _read(path: Path) -> AuditReport:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise WrongUsage(
            f"{path} cannot be shown: {error}; pass a report that `inn-guard audit --json` wrote"
        ) from error


def _different_names(paths: list[Path]) -> list[str]:
    """What files are called in a table: as short as they differ, else numbered."""
    for names in ([path.stem for path in paths], [str(path) for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [f"{k}: {path}" for k, path in enumerate(paths, start=1)]


def _lost_uses(before: AuditReport, others: list[AuditReport]) -> list[str]:
    """The uses that count and pass before, once for each of the others in which they do not."""
    lost = []
    for name, use in before.uses.items():
        if not use.counted or not use.verdict.passed:
            continue
        for other in others:
            after = other.uses.get(name)
            if after is None or not after.verdict.passed:
                lost.append(name)
    return lost


def _context(path: Path | None, rows: Rows | None, samples: int, like: Tensor) -> Tensor | None:
    if path is None:
        return None
    return read_context(path, rows=rows, samples=samples, dtype=like.dtype).to(like.device)


def _wrapped(model: Any, x: Tensor, context: Tensor | None) -> Any:
    """The model ready for `audit()`; a model or data that do not fit are wrong usage."""
    try:
        wrapped = wrap(model, context=context, x=x)
        checked_batch(wrapped, x)
    except (TypeError, ValueError) as error:
        raise WrongUsage(str(error)) from error
    return wrapped


def _with_settings(report: AuditReport, asked: dict[str, Any]) -> AuditReport:
    """The report with what was asked for on the command line among its settings."""
    settings = dict(report.settings)
    for name, value in asked.items():
        if isinstance(value, Path):
            value = str(value)
        if value is not None:
            settings[name] = value
    return dataclasses.replace(report, settings=settings)
