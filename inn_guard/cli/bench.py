"""``inn-guard bench``: the experiments of the papers, which only a clone of the repository has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import inn_guard
from inn_guard.cli.usage import MissingPackage, WrongUsage, exit_on_usage_error, notice

__all__ = ["ANY_OPTION", "bench"]

#: all options after the name, --help too, belong to the experiment
ANY_OPTION: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}
TABLE = Path("benchmarks") / "common" / "experiments.py"
USAGE = """Usage: inn-guard bench NAME [--preset smoke|cpu|paper] [--data-root FOLDER]
                             [--out FOLDER]

Without NAME, the list. `inn-guard bench NAME --help` names further options. Results of the preset
cpu (the default) go to benchmarks/results, of smoke to runs. Interrupted runs resume.
"""


@exit_on_usage_error
def bench(
    words: Annotated[
        list[str] | None, typer.Argument(help="An experiment and its options.", metavar="NAME")
    ] = None,
) -> None:
    """Run an experiment of the papers, or list them.

    The preset smoke takes seconds, cpu minutes, and paper needs a GPU.
    """
    name, *options = words or [""]
    with _importable(_clone()):
        experiments = importlib.import_module("benchmarks.common.experiments")
        if name in ("", "--help", "-h"):
            typer.echo(f"{USAGE}\n{experiments.listing()}")
            return
        script = _script(experiments, name)
        runner = importlib.import_module("benchmarks.common.runner")
        runner.main(script.__name__, argv=options)


def _script(experiments: Any, name: str) -> Any:
    if name.startswith("-"):
        raise WrongUsage(
            f"expected the name of an experiment before its options, got {name}; "
            "inn-guard bench lists them"
        )
    try:
        return experiments.find(name).module
    except LookupError as error:
        raise WrongUsage(str(error)) from error
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("benchmarks", "inn_guard")):
            raise
        raise MissingPackage(error.name or name, "all") from error


def _clone() -> Path:
    """The clone that this package runs from, else the one in the current folder."""
    own = Path(inn_guard.__file__).parents[1]
    for place in (own, Path.cwd()):
        if not (place / TABLE).is_file() or not (place / "inn_guard").is_dir():
            continue
        if place != own:
            notice(
                f"the experiments are those of {place}, inn_guard is the installed "
                f"{inn_guard.__version__}"
            )
        return place
    raise WrongUsage(
        "the experiments are not part of the installed package: clone the repository and run "
        "inn-guard bench in it"
    )


@contextmanager
def _importable(place: Path) -> Iterator[None]:
    """``place`` on the search path, also that of worker processes started in the block."""
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
