"""``--limits FILE``: the limits of a project, in a file next to its code."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from inn_guard.cli.usage import WrongUsage
from inn_guard.report.limits import Limits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["read_limits"]

MOST_BYTES = 2**20  #: a file of limits has a few lines


def read_limits(path: Path | None) -> Limits | None:
    """The limits in a TOML file: fields of ``Limits``, at its top or in a table ``[limits]``.

    Raises:
        WrongUsage: if it cannot be read, or a name or a value in it is wrong.
    """
    if path is None:
        return None
    values = _table(path)
    known = [field.name for field in dataclasses.fields(Limits)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise WrongUsage(
            f"expected limits out of {', '.join(known)} in {path}; got {', '.join(unknown)}"
        )
    try:
        return Limits(**values)
    except (TypeError, ValueError) as error:
        raise WrongUsage(f"{path}: {error}") from error


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WrongUsage(
            f"there is no file of limits {path}: pass one in TOML, with lines such as density = 0.1"
        )
    try:
        if path.stat().st_size > MOST_BYTES:
            raise WrongUsage(f"expected a short file of limits, got {path} of more than 1 MiB")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongUsage(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise WrongUsage(f"{path} cannot be read as TOML: {error}") from error
    table = content.get("limits", content)
    if not isinstance(table, dict):
        raise WrongUsage(f"expected a table [limits] in {path}, got {table!r:.60}")
    return {name: _as_float(value) for name, value in table.items()}


def _as_float(value: Any) -> Any:
    """TOML tells 1 from 1.0, which are the same limit; what is no number stays as it is."""
    if type(value) is not int:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf
