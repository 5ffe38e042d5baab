"""The register of rules: every rule has a name of its own, and no class has two."""

from __future__ import annotations

import ast
import collections
import pathlib

import pytest

from inn_guard.lipschitz import rules

MODULES = [path for path in pathlib.Path(rules.__path__[0]).glob("*.py") if path.stem != "__init__"]


def registered_classes(function: ast.FunctionDef) -> list[str]:
    """The classes in a rule's decorators, or in its first annotation."""
    classes = []
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(".register"):
            classes += [ast.unparse(argument) for argument in decorator.args]
        elif ast.unparse(decorator).endswith(".register"):
            classes.append(ast.unparse(function.args.args[0].annotation))
    return classes


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_rule_replaces_another(path):
    functions = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    names = collections.Counter(function.name for function in functions)
    classes = collections.Counter(name for f in functions for name in registered_classes(f))
    assert "_" not in names
    assert not [name for name, count in (names + classes).items() if count > 1]
