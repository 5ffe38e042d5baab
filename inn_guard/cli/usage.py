"""What a person typed wrongly, said in one line; and remarks on what was done with what they gave."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from inn_guard.cli.processes import is_first

__all__ = ["WrongUsage", "note", "one_line", "origin", "reported"]

_LENGTH = 300


WRONG_USAGE = 2  # exit code, as of the shell's own commands


class WrongUsage(Exception):
    """What was typed cannot be done: what was expected, what was got, what to type instead."""


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command that answers WrongUsage with one line on standard error and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except WrongUsage as error:
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(WRONG_USAGE) from None

    return run


def note(message: str) -> None:
    """Say something about the input on standard error, so that standard output holds the report alone."""
    if is_first():
        typer.echo(f"note: {one_line(message)}", err=True)


def one_line(message: object) -> str:
    """``message`` without line breaks or control characters, at most 300 characters long."""
    text = " ".join(str(message).split())
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 1]}…"


def origin(error: BaseException) -> str:
    """What was raised and where: ``ValueError: text (net.py, line 3)``."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
