"""The house rules that a parser can check: who imports whom, where foreign libraries come in, how long things are."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "inn_guard"
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]

#: from the ground up; a module may import its own package and packages of lower floors. Neighbours on one floor do not
#: know each other, except that adapters build on layers.
FLOORS = [
    {"tangent", "files", "allocation"},
    {"invertible", "network_tangent"},
    {"dense_tangent", "dense_network", "untouched"},
    {"linearization", "composed_jacobian"},
    {"lanczos"},
    {"footprint"},
    {"distributed"},
    {"jacobian", "lipschitz", "reversible", "amplification", "rounding_forecast", "inverse_differences"},
    {"log_determinant"},
    {"layers"},
    {"adapters"},
    {"models"},
    {"audits", "regularizers", "checkpoint", "metrics"},
    {"auditing"},
    {"hooks", "report", "training", "recorders"},
    {"actions"},
    {"audit_hook"},
    {"integrations"},
    {"cli"},
]
#: foreign library -> the only parts of the package that may import it at module level
FOREIGN = {
    "nflows": {"adapters/nflows.py", "adapters/bounds_nflows.py", "adapters/tangents_nflows.py"},
    "FrEIA": {"adapters/freia.py", "adapters/freia_graph.py", "adapters/bounds_freia.py", "adapters/tangents_freia.py"},
    "normflows": {
        "adapters/normflows",
        "adapters/bounds_normflows.py",
        "adapters/tangents_normflows.py",
    },
    "zuko": {"adapters/zuko.py", "adapters/bounds_zuko.py", "adapters/tangents_zuko.py"},
    "memcnn": {"adapters/memcnn.py", "adapters/bounds_memcnn.py", "adapters/tangents_memcnn.py"},
    "pandas": {"report/"},
    "matplotlib": {"report/"},
    "jinja2": {"report/"},
    "typer": {"cli/", "cli.py"},
    "torchdiffeq": {"layers/ode.py"},
    "lightning": {"integrations/"},
}


def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports when it is imported itself; imports inside functions and for typing are not."""
    found: set[str] = set()
    for node in module_level(tree(path).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_level(body):
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for inner in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from module_level(getattr(node, inner, []))


def part(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    (level,) = [level for level, parts in enumerate(FLOORS) if name in parts]
    return level


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_part_has_its_floor_and_imports_point_down(path):
    name = part(path)
    if name in ("__init__", "__main__"):
        return
    own = floor(name)
    for imported in imports(path):
        if not imported.startswith("inn_guard."):
            continue
        other = imported.split(".")[1]
        is_part = (ROOT / other).is_dir() or (ROOT / f"{other}.py").exists()
        assert not is_part or other == name or floor(other) < own, f"{path.name} ({name}) imports {imported}"


def test_the_floors_name_nothing_twice():
    parts = [name for names in FLOORS for name in names]
    assert len(parts) == len(set(parts))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_foreign_libraries_come_in_through_their_own_files(path):
    where = path.relative_to(ROOT).as_posix()
    for imported in imports(path):
        allowed = FOREIGN.get(imported.split(".")[0])
        assert allowed is None or any(where.startswith(place) for place in allowed), f"{where} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_import_is_tried(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Try):
            inner = [part for statement in node.body for part in ast.walk(statement)]
            assert not any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in inner), f"line {node.lineno}"


def test_there_are_no_import_cycles():
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        for other in graph[name] - {name}:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert lines_of_code(node) <= 60, f"{node.name} has {lines_of_code(node)} lines"
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [argument.arg for argument in named if argument.arg not in ("self", "cls")]
            options = part(path) == "cli"  # typer makes every parameter a command-line option
            assert options or len(parameters) <= 6, f"{node.name} takes {parameters}"


def lines_of_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    body = node.body[1:] if documented else node.body
    return 0 if not body else (node.end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_nothing_is_swallowed_and_no_user_input_is_asserted(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in line {node.lineno}"


def test_no_file_is_a_drawer_for_odds_and_ends():
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common", "misc", "tools"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_makers_and_users_meet_only_in_invertible(path):
    """Audits, regularizers and reports know no model; what takes a user's model knows wrap() and no more of it."""
    makers = ("layers", "adapters", "models")
    known = {imported for imported in imports(path) if imported.startswith(tuple(f"inn_guard.{m}" for m in makers))}
    if part(path) in ("audits", "regularizers", "report"):
        assert not known
    if part(path) in ("hooks", "audit_hook", "auditing", "training"):
        assert known <= {"inn_guard.adapters", "inn_guard.adapters.wrap"}


@pytest.mark.parametrize("face", ["inn_guard", "inn_guard.layers", "inn_guard.models"])
def test_importing_a_face_needs_no_optional_library(face):
    """In a fresh interpreter in which every optional library is missing."""
    optional = [*FOREIGN, "sklearn", "scipy", "safetensors", "PIL"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({optional}))"
    subprocess.run([sys.executable, "-c", f"{blocked}; from {face} import *"], check=True, cwd=ROOT.parent)
