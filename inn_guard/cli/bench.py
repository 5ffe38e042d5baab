"""``inn-guard bench``: the papers' experiments, which live in a clone of the repository beside this package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import inn_guard
from inn_guard.cli.usage import WrongUsage, note, reported

__all__ = ["ANY_OPTION", "bench"]

#: everything behind the name, --help too, belongs to the experiment
ANY_OPTION: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}
TABLE = Path("benchmarks") / "experiments.py"
USAGE = """Usage: inn-guard bench NAME [--preset smoke|cpu|paper] [--data-root FOLDER] [--out FOLDER] [further options]

Without NAME, the list. `inn-guard bench NAME --help` names the further options. Results of the preset cpu (the default)
go to benchmarks/results, of smoke to runs. A run that was killed goes on where it stood when it is typed again.
"""


@reported
def bench(
    words: Annotated[
        list[str] | None, typer.Argument(help="An experiment and its options.", metavar="NAME")
    ] = None,
) -> None:
    """Run one experiment of the papers, or list them: smoke in seconds, cpu in minutes, paper on a GPU."""
    name, *options = words or [""]
    with _importable(_place()):
        experiments = importlib.import_module("benchmarks.common.experiments")
        if name in ("", "--help", "-h"):
            typer.echo(f"{USAGE}\n{experiments.listing()}")
            return
        script = _script(experiments, name)
        runner = importlib.import_module("benchmarks.common.runner")
        runner.main(script.Config, script.run, getattr(script, "draw", None), argv=options)


def _script(experiments: Any, name: str) -> Any:
    if name.startswith("-"):
        raise WrongUsage(
            f"expected the name of an experiment before its options, got {name}; type: inn-guard bench"
        )
    try:
        return experiments.find(name).module
    except LookupError as error:
        raise WrongUsage(str(error)) from error
    except ModuleNotFoundError as error:
        raise WrongUsage(
            f'{name} needs {error.name}; type: pip install "inn-guard[all]"'
        ) from error


def _place() -> Path:
    """The clone that this package runs from, else the one in the current folder."""
    own = Path(inn_guard.__file__).parents[1]
    places = [
        place
        for place in (own, Path.cwd())
        if (place / TABLE).is_file() and (place / "inn_guard").is_dir()
    ]
    if not places:
        raise WrongUsage(
            "the experiments are not part of the installed package: clone the repository and type inn-guard bench in it"
        )
    if places[0] != own:
        note(
            f"the experiments are those of {places[0]}, inn_guard is the installed {inn_guard.__version__}"
        )
    return places[0]


@contextmanager
def _importable(place: Path) -> Iterator[None]:
    """``place`` on the search path, also that of worker processes started within."""
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
