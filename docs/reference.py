"""Which names the reference documents, read from the sources: nothing has to be installed."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: page of the reference -> its title and the modules whose ``__all__`` it documents
PAGES = {
    "inn_guard": ("inn_guard", ("inn_guard",)),
    "checks": ("Checks", ()),
    "attacks": ("Attacks", ("inn_guard.audits.dequantization_attack",)),
    "layers": ("Layers", ("inn_guard.layers",)),
    "models": ("Models", ("inn_guard.models",)),
    "lightning": ("Lightning", ("inn_guard.training.lightning",)),
    "execution": (
        "Processes and memory",
        ("inn_guard.execution.parallel", "inn_guard.execution.memory"),
    ),
}
#: decorator of the function that is a check
CHECK_DECORATOR = "audit_check"


def documented(page: str) -> list[str]:
    """Full names of what one page documents, each where it is defined."""
    names = [name for module in PAGES[page][1] for name in public(module)]
    if page == "checks":
        names += checks()
    return list(dict.fromkeys(names))


def public(module: str) -> list[str]:
    """The names in ``__all__`` of a module, each with the module that defines it."""
    exported: list[str] = []
    for statement in _tree(module).body:
        if isinstance(statement, ast.Assign) and "__all__" in _targets(statement):
            exported = ast.literal_eval(statement.value)
    return [defined(module, name) for name in exported]


def defined(module: str, name: str) -> str:
    """``module.name``, followed through imports to the module that defines it."""
    for statement in _tree(module).body:
        if not isinstance(statement, ast.ImportFrom):
            continue
        for alias in statement.names:
            if (alias.asname or alias.name) == name and _path(statement.module or ""):
                return defined(statement.module or "", alias.name)
    return f"{module}.{name}"


def checks() -> list[str]:
    """Every function under the decorator of checks."""
    found = []
    for path in sorted((ROOT / "inn_guard" / "audits").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and CHECK_DECORATOR in _decorators(node):
                found.append(f"{module}.{node.name}")
    return found


def _decorators(node: ast.FunctionDef) -> list[str]:
    names = []
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        names.append(ast.unparse(called))
    return names


def _targets(statement: ast.Assign) -> list[str]:
    return [target.id for target in statement.targets if isinstance(target, ast.Name)]


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    if path is None:
        raise ValueError(f"expected a module of this repository, got {module}")
    return ast.parse(path.read_text(encoding="utf-8"))


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None
