"""The command line: ``inn-guard audit | report | bench``, also as ``python -m inn_guard``."""

from inn_guard.cli.commands import app, main

__all__ = ["app", "main"]
