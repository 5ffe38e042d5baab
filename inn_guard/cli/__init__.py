"""The command line: ``inn-guard audit | repair | report | bench``, or ``python -m inn_guard``."""

from __future__ import annotations

import importlib
import sys
import traceback

__all__ = ["FAULT", "main"]

FAULT = 3  #: exit code, so that neither a crash nor a missing package looks like a finding
EXTRA = {"typer": "typer", "safetensors": "safetensors", "PIL": "pillow"}


def main() -> None:
    """Run the command line; a missing package or a fault of inn_guard ends with exit code 3."""
    try:
        # the commands need the extra "cli", which a core install does not have
        commands = importlib.import_module("inn_guard.cli.commands")
    except ModuleNotFoundError as error:
        package = EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(f"inn-guard needs {package}: pip install '.[cli]'", file=sys.stderr)
        sys.exit(FAULT)
    try:
        commands.app()
    except Exception:
        traceback.print_exc()
        sys.exit(FAULT)
