"""The command line ``inn-guard``, which is also ``python -m inn_guard``."""

from __future__ import annotations

import importlib
import sys
import traceback

__all__ = ["FAULT", "main"]

FAULT = 3  #: exit code, so that neither a crash nor a missing package looks like a finding
DISTRIBUTIONS = {"PIL": "pillow"}  #: module -> what pip calls it, where that differs


def main() -> None:
    """Run the command line; a missing package or a fault of inn_guard ends with exit code 3."""
    try:
        # the commands need the extra "cli", which a core install does not have
        commands = importlib.import_module("inn_guard.cli.commands")
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        package = DISTRIBUTIONS.get(module, module)
        print(f"inn-guard needs {package}: pip install '.[cli]'", file=sys.stderr)
        sys.exit(FAULT)
    try:
        commands.app()
    except Exception:
        traceback.print_exc()
        sys.exit(FAULT)
