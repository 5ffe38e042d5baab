"""The commands of ``inn-guard``. The parts that they join are in the modules next to this one."""

from __future__ import annotations

import dataclasses
import enum
import importlib
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
from inn_guard.cli import FAULT
from inn_guard.cli.bench import ANY_OPTION, bench
from inn_guard.cli.data import Rows, read_context, read_data
from inn_guard.cli.models import (
    check_name,
    find,
    load_weights,
    make,
    own_dtype,
    parse_arguments,
    save_weights,
)
from inn_guard.cli.processes import is_first, processes
from inn_guard.cli.usage import WrongUsage, exit_on_usage_error, notice
from inn_guard.repair.fine_tuning import AUDITED, stabilize
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.from_json import load
from inn_guard.report.uses import USES
from inn_guard.report.verdict import Verdict

__all__ = ["app", "exit_code"]

# \b keeps the line breaks of a paragraph in --help
EXIT_CODES = """\b
Exit codes:
  0  stable or marginal
  1  unstable or non_finite
  2  wrong usage: nothing was measured
  3  nothing was decided (undecided or not applicable), or a fault of inn_guard"""

ALL_ROWS = 2**40  #: more than any file has

app = typer.Typer(
    help=f"Audit the numerical stability of invertible neural networks.\n\n{EXIT_CODES}",
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
        """The torch.dtype of this name."""
        return getattr(torch, self.value)


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

MODEL is package.module:factory or path/to/file.py:factory; its module is imported, that is, its
code is run. DATA is a .npy, .pt or .csv file (samples, ...), or a folder of images of one size.

Under torchrun (torchrun --nproc-per-node 2 -m inn_guard audit ...) the processes share the work,
and the first one writes.

{EXIT_CODES}"""


@app.command(help=AUDIT_HELP)
@exit_on_usage_error
def audit(  # noqa: PLR0913  (one parameter for each option)
    words: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL DATA", show_default=False)
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="MODEL, as an option.")] = None,
    data: Annotated[Path | None, typer.Option(help="DATA, as an option.")] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of the factory; repeatable."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file, or a torch file of tensors.")
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="A .npy, .pt or .csv file with a row for each sample.")
    ] = None,
    uses: Annotated[
        str, typer.Option(metavar="USE,...", help=f"What counts: out of {', '.join(USES)}.")
    ] = "",
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="The distribution of z, if the model declares none."
        ),
    ] = None,
    level: Annotated[Level, typer.Option(help="How much is measured.")] = Level.STANDARD,
    checks: Annotated[
        str, typer.Option(metavar="CHECK,...", help="Checks by name, in place of --level.")
    ] = "",
    html: Annotated[Path | None, typer.Option(help="Write the report as one web page.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the report as JSON; 'inn-guard report' reads it.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML, one test case for each use.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Audit in this dtype. Default: the model's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="Audit on this device: cpu, cuda, cuda:1.")] = "cpu",
    samples: Annotated[
        int, typer.Option(min=1, help="How many samples of the data are used, the first ones.")
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed for model construction and audits.")] = 0,
    memory: Annotated[
        float | None, typer.Option(help="Extra memory per check, in GiB. Default: no limit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and memory, measure nothing.")
    ] = False,
) -> None:
    """Measure how stable a model and its inverse are."""
    # Everything that needs no code of the user's is checked before the model is imported.
    model, data = _model_and_data(words or [], model, data)
    check_name(model)
    arguments = parse_arguments(arg or [])
    chosen_uses = _names(uses, "--uses", USES)
    chosen_checks = _names(checks, "--checks", AUDITS)
    place = _device(device)
    limit = _bytes(memory)
    _can_write(html, json, junit)
    rows = read_data(data, samples=samples)
    made = make(model, seed=seed, arguments=arguments)
    if weights is not None:
        load_weights(made, weights)
    if isinstance(made, nn.Module):
        made = made.to(place)
        if dtype is not None:
            made = made.to(dtype.dtype)
    wanted = own_dtype(made)
    if dtype is not None:
        wanted = dtype.dtype
    x = rows.to(wanted).to(place)
    base = None
    if prior is not None:
        base = make(prior, seed=seed)
    wrapped = _wrapped(made, x, _context(context, rows, wanted, place))
    with processes() as group:
        try:
            report = run_audit(
                wrapped,
                x,
                uses=chosen_uses,
                level=level,
                checks=chosen_checks,
                prior=base,
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
                "data": data,
                "context": context,
                "prior": prior,
                "seed": seed,
            }
            _finish(_with_settings(report, asked), html=html, json=json, junit=junit)
    if dry_run or not is_first():
        raise typer.Exit(0)
    raise typer.Exit(exit_code(report.verdict))


REPAIR_HELP = f"""Fine-tune a model until it is fit for the uses.

\b
  inn-guard repair nets.py:make_flow x.npy --weights flow.pt --uses sampling --out repaired.pt

The loss is the negative log-likelihood if the model has a base distribution. For other models
--loss names the function (model, batch) -> scalar that they were trained with. --out gets the state
dict of the best state, also where a use still fails; it is written at once or not at all.

{EXIT_CODES}"""


@app.command(help=REPAIR_HELP)
@exit_on_usage_error
def repair(  # noqa: PLR0913  (one parameter for each option)
    words: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL DATA", show_default=False)
    ] = None,
    *,
    model: Annotated[str | None, typer.Option(help="MODEL, as an option.")] = None,
    data: Annotated[Path | None, typer.Option(help="DATA, as an option.")] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An argument of the factory; repeatable."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file, or a torch file of tensors.")
    ] = None,
    uses: Annotated[
        str, typer.Option(metavar="USE,...", help=f"What must pass: out of {', '.join(USES)}.")
    ] = "",
    loss: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="A function (model, batch) -> loss.")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="The distribution of z, if the model declares none."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the repaired weights: .pt, .pth or .safetensors.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write before and after as one page.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps at most.")] = 200,
    every: Annotated[int, typer.Option(min=1, help="Steps between two audits.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 5e-4,
    device: Annotated[str, typer.Option(help="Train on this device: cpu, cuda, cuda:1.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Fine-tune a model until it is fit for the uses."""
    model, data = _model_and_data(words or [], model, data)
    check_name(model)
    if loss is not None:
        check_name(loss, "--loss")
    arguments = parse_arguments(arg or [])
    chosen_uses = _names(uses, "--uses", USES)
    place = _device(device)
    _can_write(out, html)
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
    if html is not None:
        steady.to_html(html)
        notice(f"wrote {html}")
    raise typer.Exit(exit_code(steady.verdict))


@app.command()
@exit_on_usage_error
def report(
    saved: Annotated[
        Path, typer.Argument(help="A file that 'inn-guard audit --json' or to_json() wrote.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report as one web page.")] = None,
) -> None:
    """Show a saved report again. Exit code: 0 if it could be read, else 2."""
    _can_write(html)
    try:
        read = load(saved)
    except (OSError, ValueError) as error:
        raise WrongUsage(f"{saved} cannot be shown: {error}") from error
    _finish(read, html=html)


app.command(context_settings=ANY_OPTION)(bench)


def _model_and_data(words: list[str], model: str | None, data: Path | None) -> tuple[str, Path]:
    """Both from the arguments, or from the options of the same names."""
    left = list(words)
    if model is None and left:
        model = left.pop(0)
    if data is None and left:
        data = Path(left.pop(0))
    if model is None or data is None:
        raise WrongUsage("expected MODEL and DATA: inn-guard audit package.module:factory x.npy")
    if left:
        raise WrongUsage(f"expected MODEL and DATA, got more: {' '.join(left)}")
    return model, data


def _names(text: str, option: str, known: Any) -> list[str] | None:
    """The names between the commas; None if there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise WrongUsage(f"expected {option} out of {', '.join(known)}; got {', '.join(unknown)}")
    return names or None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise WrongUsage(f"expected a --device of this machine, got {name!r}: {first}") from error
    return device


def _bytes(memory: float | None) -> float | None:
    if memory is None:
        return None
    if not 0 < memory < float("inf"):
        raise WrongUsage(f"expected --memory as a positive number of GiB, got {memory:g}")
    return memory * 2**30


def _context(
    path: Path | None, rows: Rows, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    if path is None:
        return None
    return read_context(path, rows=rows, dtype=dtype).to(device)


def _wrapped(model: Any, x: Tensor, context: Tensor | None) -> Any:
    """The model ready for `audit()`; a model or data that do not fit are wrong usage."""
    try:
        wrapped = wrap(model, context=context)
        checked_batch(wrapped, x)
    except (TypeError, ValueError) as error:
        raise WrongUsage(str(error)) from error
    return wrapped


def _can_write(*paths: Path | None) -> None:
    """Refuse before the audit what would fail after it."""
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
        raise WrongUsage(f"--html needs {error.name}: pip install '.[report]'") from error


def _with_settings(report: AuditReport, asked: dict[str, Any]) -> AuditReport:
    """The report with what was asked for on the command line among its settings."""
    settings = dict(report.settings)
    for name, value in asked.items():
        if isinstance(value, Path):
            value = str(value)
        if value is not None:
            settings[name] = value
    return dataclasses.replace(report, settings=settings)


def _finish(
    report: AuditReport,
    *,
    html: Path | None = None,
    json: Path | None = None,
    junit: Path | None = None,
) -> None:
    typer.echo(str(report))
    files = ((json, report.to_json), (html, report.to_html), (junit, report.to_junit))
    for path, write in files:
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            raise WrongUsage(f"the report above could not be written to {path}: {error}") from error
        notice(f"wrote {path}")


def exit_code(verdict: Verdict) -> int:
    """The exit code of a verdict: 0 passed, 1 failed, 3 not decided."""
    if verdict.failed:
        return 1
    if verdict.passed:
        return 0
    return FAULT
