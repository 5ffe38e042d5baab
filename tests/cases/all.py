"""CASES: every model of the contract, merged from the files of this folder that have a CASES of their own."""

from __future__ import annotations

import importlib

from tests.cases.case import Case, randomize, seeded

__all__ = ["CASES", "Case", "randomize", "seeded"]

MODULES = (
    "aef",
    "freia",
    "freia_nets",
    "functions",
    "layers",
    "memcnn",
    "nflows",
    "normflows",
    "zuko",
)

CASES: list[Case] = [
    case for name in MODULES for case in importlib.import_module(f"tests.cases.{name}").CASES
]
