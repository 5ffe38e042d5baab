"""No test is lost between `make test` and `make thorough`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.all import CASES, MODULES, REPRESENTATIVE, one_of_each_kind
from tests.core import test_invertible as contract

ROOT = Path(__file__).parents[2]
TESTS = [value for name, value in vars(contract).items() if name.startswith("test_")]


def test_cases_have_different_ids_and_representative_ones_exist():
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))
    assert set(ids) >= REPRESENTATIVE


@pytest.mark.parametrize("module", MODULES)
def test_every_library_is_represented(module):
    own = {case.id for case in importlib.import_module(f"tests.cases.{module}").CASES}
    assert own & REPRESENTATIVE


def test_a_test_over_cases_gets_all_of_them_and_only_representative_ones_unmarked():
    parameters = one_of_each_kind(CASES)
    assert [parameter.values[0] for parameter in parameters] == CASES
    unmarked = {parameter.id for parameter in parameters if not parameter.marks}
    assert unmarked == REPRESENTATIVE


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_a_case_leaves_out_only_what_it_declares(test):
    for case in CASES:
        lacks = [ability for ability in getattr(test, "needs", ()) if not getattr(case, ability)]
        declared = test.__name__ in case.skips or lacks
        assert contract.applies(test, case) != bool(declared)


@pytest.mark.thorough
def test_both_selections_together_are_every_test():
    everything, fast, rest = (collected(marks) for marks in ("", "not thorough", "thorough"))
    assert len(everything) > 9000
    assert not fast & rest
    assert fast | rest == everything


def collected(marks: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    told = subprocess.run(
        [*command, "-m", marks], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {line for line in told.stdout.splitlines() if "::" in line}
