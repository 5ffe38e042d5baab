"""Rules of the architecture that a parser can check: who imports whom, where libraries come in."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2] / "inn_guard"

#: The packages from the ground up. A module imports its own package and packages before it; imports
#: inside functions count.
PACKAGES = [
    "core",
    "numerics",
    "jacobian",
    "execution",
    "report",
    "layers",
    "adapters",
    "models",
    "exact",
    "memory_saving",
    "lipschitz",
    "audits",
    "training",
    "repair",
    "testing",
    "cli",
]
#: other library -> the parts of the package that may import it
FOREIGN = {
    "nflows": ("adapters/nflows/", "lipschitz/rules/nflows.py", "exact/rules/nflows.py"),
    "FrEIA": ("adapters/freia/", "lipschitz/rules/freia.py", "exact/rules/freia.py"),
    "normflows": (
        "adapters/normflows/",
        "lipschitz/rules/normflows.py",
        "exact/rules/normflows.py",
    ),
    "zuko": ("adapters/zuko/", "lipschitz/rules/zuko.py", "exact/rules/zuko.py"),
    "memcnn": ("adapters/memcnn/", "lipschitz/rules/memcnn.py", "exact/rules/memcnn.py"),
    "pandas": ("report/",),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "tomli": ("cli/",),
    "torchdiffeq": ("layers/ode.py",),
    "lightning": ("training/lightning.py",),
}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

MODULES = {module_name(path): path for path in TREES}


def where(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def executed(node: ast.AST):
    """All nodes below ``node``, without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from executed(child)


def imports(path: pathlib.Path) -> set[str]:
    """Full names of everything that a file imports, inside functions too.

    ``from package import name`` imports the package, or the module of that name inside it.
    """
    found: set[str] = set()
    for node in executed(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


IMPORTS = {path: imports(path) for path in TREES}


def test_nothing_lies_loose_at_the_root():
    loose = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert loose == {"__init__.py", "__main__.py", "py.typed"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == set(PACKAGES)


def test_imports_point_down():
    upward = []
    for path, imported in IMPORTS.items():
        if package(path) in ("__init__", "__main__"):
            continue
        allowed = PACKAGES[: PACKAGES.index(package(path)) + 1]
        if package(path) == PACKAGES[-1]:
            imported = imported - {"inn_guard"}  # the top stands on the whole package
        for name in imported:
            first, _, rest = name.partition(".")
            if first == "inn_guard" and rest.split(".")[0] not in allowed:
                upward.append(f"{where(path)} imports {name}")
    assert upward == []


def test_other_libraries_come_in_through_their_own_files():
    elsewhere = []
    for path, imported in IMPORTS.items():
        for name in imported:
            allowed = FOREIGN.get(name.split(".")[0])
            if allowed is not None and not where(path).startswith(allowed):
                elsewhere.append(f"{where(path)} imports {name}")
    assert elsewhere == []


def test_a_tried_import_only_raises_a_better_error():
    swallowed = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Try):
                continue
            inner = [part for statement in node.body for part in ast.walk(statement)]
            tried = any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in inner)
            if tried and not all(isinstance(h.body[-1], ast.Raise) for h in node.handlers):
                swallowed.append(f"{where(path)}:{node.lineno}")
    assert swallowed == []


def test_there_are_no_import_circles():
    graph = {name: IMPORTS[path] & MODULES.keys() for name, path in MODULES.items()}
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


def test_nothing_is_swallowed_and_no_user_input_is_asserted():
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            if bare or isinstance(node, ast.Assert):
                found.append(f"{where(path)}:{node.lineno}")
    assert found == []


def test_functions_have_names():
    """Two functions called ``_`` replace each other without a word from any linter."""
    nameless = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if getattr(node, "name", "") == "_":
                nameless.append(f"{where(path)}:{node.lineno}")
    assert nameless == []


def test_audits_know_models_by_their_protocol_only():
    """Audits and reports know no library and no model; what takes a user's model knows ``wrap``."""
    makers = tuple(f"inn_guard.{name}" for name in ("layers", "adapters", "models"))
    known = []
    for path, imported in IMPORTS.items():
        if package(path) not in ("audits", "report", "training", "repair"):
            continue
        for name in imported - {"inn_guard.adapters", "inn_guard.adapters.wrap"}:
            if name.startswith(makers):
                known.append(f"{where(path)} imports {name}")
    assert known == []


@pytest.mark.parametrize("face", ["inn_guard", "inn_guard.layers", "inn_guard.models"])
def test_importing_a_face_needs_no_optional_library(face):
    """In a fresh interpreter in which every optional library is missing."""
    optional = [*FOREIGN, "sklearn", "safetensors", "PIL"]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({optional}))"
    program = f"{blocked}; from {face} import *"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT.parent)
