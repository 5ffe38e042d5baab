"""Errors of usage, said in one line, and notices about what was done with the input."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from inn_guard.cli import FAULT
from inn_guard.cli.processes import is_first

__all__ = [
    "MissingPackage",
    "WrongUsage",
    "error_location",
    "exit_on_usage_error",
    "notice",
    "one_line",
]

LENGTH = 300
WRONG_USAGE = 2  # exit code, as of the shell's own commands


class WrongUsage(Exception):
    """The command cannot be carried out: what was expected, what came, what to pass instead."""


class MissingPackage(Exception):
    """The command needs a package that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"inn-guard needs {package}: pip install '.[{extra}]'")


def exit_on_usage_error(command: Callable[..., None]) -> Callable[..., None]:
    """A command that answers its errors with one line on standard error and an exit code.

    The code is 2 after WrongUsage and errors of the file system, 3 after MissingPackage.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (WrongUsage, OSError) as error:
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(WRONG_USAGE) from None
        except MissingPackage as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(FAULT) from None

    return run


def notice(message: str) -> None:
    """Say something about the input on standard error; standard output holds the report alone."""
    if is_first():
        typer.echo(f"note: {one_line(message)}", err=True)


def one_line(message: object) -> str:
    """``message`` without line breaks and control characters, at most 300 characters long."""
    characters = []
    for character in " ".join(str(message).split()):
        if not character.isprintable():
            character = "\ufffd"
        characters.append(character)
    text = "".join(characters)
    if len(text) > LENGTH:
        text = f"{text[: LENGTH - 1]}…"
    return text


def error_location(error: BaseException) -> str:
    """The error with the place that raised it: ``ValueError: text (net.py, line 3)``."""
    said = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return said
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
