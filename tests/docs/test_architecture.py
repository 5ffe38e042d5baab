"""Rules of the architecture that a parser can check: who imports whom, and where other libraries come in."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "inn_guard"
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]

#: The packages from the ground up. A module imports its own package and packages before it; imports inside functions
#: count.
PACKAGES = [
    "core",
    "numerics",
    "jacobian",
    "execution",
    "memory_saving",
    "report",
    "layers",
    "adapters",
    "models",
    "lipschitz",
    "audits",
    "training",
    "cli",
]
#: other library -> the parts of the package that may import it
FOREIGN = {
    "nflows": ("adapters/nflows/", "lipschitz/rules/nflows.py"),
    "FrEIA": ("adapters/freia/", "lipschitz/rules/freia.py"),
    "normflows": ("adapters/normflows/", "lipschitz/rules/normflows.py"),
    "zuko": ("adapters/zuko/", "lipschitz/rules/zuko.py"),
    "memcnn": ("adapters/memcnn/", "lipschitz/rules/memcnn.py"),
    "pandas": ("report/",),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
    "typer": ("cli/",),
    "torchdiffeq": ("layers/ode.py",),
    "lightning": ("training/lightning.py",),
}


def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: pathlib.Path) -> set[str]:
    """Full names of everything a file imports, inside functions too, but not what only a type checker reads."""
    found: set[str] = set()
    for node in executed(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def executed(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from executed(child)


def package(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_nothing_lies_loose_at_the_root():
    loose = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__main__.py", "py.typed"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path):
    name = package(path)
    if name in ("__init__", "__main__"):
        return
    for imported in imports(path):
        first, _, rest = imported.partition(".")
        if first != "inn_guard" or not rest:
            assert first != "inn_guard", f"{path.name} imports the whole package"
            continue
        other = rest.split(".")[0]
        own, theirs = PACKAGES.index(name), PACKAGES.index(other)
        assert theirs <= own, f"{path.relative_to(ROOT)} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_other_libraries_come_in_through_their_own_files(path):
    where = path.relative_to(ROOT).as_posix()
    for imported in imports(path):
        allowed = FOREIGN.get(imported.split(".")[0])
        assert allowed is None or where.startswith(allowed), f"{where} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_import_is_tried(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Try):
            inner = [part for statement in node.body for part in ast.walk(statement)]
            assert not any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in inner), (
                f"line {node.lineno}"
            )


def test_there_are_no_import_circles():
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {
        name: {other for other in imports(path) if other in modules}
        for name, path in modules.items()
    }
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
def test_nothing_is_swallowed_and_no_user_input_is_asserted(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_functions_have_names(path):
    """Two functions called ``_`` replace each other without a word from any linter."""
    for node in ast.walk(tree(path)):
        assert getattr(node, "name", "") != "_", f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_audits_know_models_by_their_protocol_only(path):
    """Audits and reports know no library and no model; what takes a user's model knows ``wrap`` and no more of it."""
    makers = tuple(f"inn_guard.{name}" for name in ("layers", "adapters", "models"))
    known = {imported for imported in imports(path) if imported.startswith(makers)}
    if package(path) in ("audits", "report", "training"):
        assert known <= {"inn_guard.adapters", "inn_guard.adapters.wrap"}


@pytest.mark.parametrize("face", ["inn_guard", "inn_guard.layers", "inn_guard.models"])
def test_importing_a_face_needs_no_optional_library(face):
    """In a fresh interpreter in which every optional library is missing."""
    optional = [*FOREIGN, "sklearn", "safetensors", "PIL"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({optional}))"
    program = f"{blocked}; from {face} import *"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT.parent)


def test_importing_the_package_loads_no_certified_bounds():
    program = "import inn_guard, sys; print([m for m in sys.modules if m.startswith('inn_guard.lipschitz')])"
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=ROOT.parent, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[]"
