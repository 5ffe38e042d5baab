"""What `import inn_guard` loads, and that every public name is there when it is used."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest

import inn_guard as ig

ROOT = Path(ig.__file__).parents[1]
#: takes as long as a tenth of torch, or more
HEAVY = (
    "jaxtyping",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "scipy",
    "sympy",
    "torch",
    "tqdm",
    "inn_guard.adapters",
    "inn_guard.audits",
    "inn_guard.lipschitz",
)


def loaded_by(statement: str) -> set[str]:
    """The modules that a new process has after this statement."""
    script = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert not done.returncode, done.stderr
    return set(done.stdout.split())


def test_the_import_loads_nothing_heavy():
    assert not loaded_by("import inn_guard") & set(HEAVY)


def test_an_audit_loads_no_bounds_and_no_plots():
    loaded = loaded_by("import inn_guard; inn_guard.audit")
    assert "inn_guard.audits" in loaded
    assert not loaded & {"matplotlib", "pandas", "scipy", "inn_guard.lipschitz"}


@pytest.mark.parametrize("name", ig.__all__)
def test_every_name_is_there(name):
    namespace: dict[str, object] = {}
    exec(f"from inn_guard import {name}", namespace)
    assert namespace[name] is getattr(ig, name)
    assert name in dir(ig)


def test_functions_come_before_packages_of_the_same_name():
    for package in ("exact", "memory_saving"):
        importlib.import_module(f"inn_guard.{package}")
    assert isinstance(ig.exact, types.FunctionType)
    assert isinstance(ig.memory_saving, types.FunctionType)
    assert isinstance(ig.layers, types.ModuleType)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ig.nothing  # noqa: B018


def test_public_classes_are_pickled_by_their_own_modules():
    assert pickle.loads(pickle.dumps(ig.Limits)) is ig.Limits
    assert pickle.loads(pickle.dumps(ig.Verdict.STABLE)) is ig.Verdict.STABLE


def test_functions_that_use_the_package_can_be_sent_to_other_processes():
    cloudpickle = pytest.importorskip("cloudpickle")
    assert pickle.loads(pickle.dumps(ig)) is ig
    assert copy.deepcopy([ig])[0] is ig
    function = cloudpickle.loads(cloudpickle.dumps(lambda: ig.Limits().density))
    assert function() == ig.Limits().density
