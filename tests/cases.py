"""CASES: every model of the contract, merged from the files tests/cases_*.py that exist, each with its own CASES."""

from __future__ import annotations

import importlib
import pathlib

from tests.case import Case, randomize, seeded

__all__ = ["CASES", "Case", "randomize", "seeded"]

CASES: list[Case] = [
    case
    for path in sorted(pathlib.Path(__file__).parent.glob("cases_*.py"))
    for case in importlib.import_module(f"tests.{path.stem}").CASES
]
