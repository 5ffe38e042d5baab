"""Writes docs/libraries.md from the tests that show what a library cannot do.

    python docs/libraries.py

``tests/cases/LIB.py`` holds a table EXCEPTIONS, what -> why, and ``tests/adapters/test_LIB.py``
shows each failure. The tables are parsed, not imported, so that no library has to be installed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "libraries.md"

#: distribution, as in constraints.txt -> stem of its files in tests/cases and tests/adapters
LIBRARIES = {
    "nflows": "nflows",
    "FrEIA": "freia",
    "normflows": "normflows",
    "zuko": "zuko",
    "memcnn": "memcnn",
    "torch": "functions",
}
#: what the contract runs over
TESTED = {
    "nflows": "every transform",
    "FrEIA": "every module",
    "normflows": "every flow",
    "zuko": "every transformation",
    "memcnn": "the couplings",
    "torch": "the transforms in torch.distributions",
}
#: the test file that shows the failures, where it is not named after the cases
SHOWN_IN = {"torch": "callables"}

HEAD = """# What the libraries cannot do

<!-- written by docs/libraries.py from tests/cases/; edit the tables there -->

`tests/core/test_invertible.py` holds every layer of every library to one contract: the inverse
inverts, log-determinants are those of the Jacobian, derivatives are right, a call changes nothing.
The entries below cannot keep it. Each is itself a test that shows the failure.
"""


def failures(path: Path) -> dict[str, str]:
    """What -> why, from the table EXCEPTIONS of one file."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if any(isinstance(target, ast.Name) and target.id == "EXCEPTIONS" for target in targets):
            return _entries(statement.value)
    raise ValueError(f"{path}: expected a table EXCEPTIONS, found none")


def _entries(table: ast.expr) -> dict[str, str]:
    if isinstance(table, ast.Dict):
        return ast.literal_eval(table)
    entries = {}
    for exempt in table.elts:  # Exempt(freia(NAME, ...), test -> why)
        case, reasons = exempt.args
        entries[case.args[0].value] = "; ".join(dict.fromkeys(_reasons(reasons)))
    return entries


def _reasons(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp):
        return [*_reasons(node.left), *_reasons(node.right)]
    if isinstance(node, ast.Call):  # dict.fromkeys(tests, why)
        return [node.args[1].value]
    return [value.value for value in node.values]


def page() -> str:
    """The whole page."""
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    parts = [HEAD]
    for library, stem in LIBRARIES.items():
        version = re.search(rf"^{library}==(\d+\.\d+)", pinned, flags=re.MULTILINE).group(1)
        shown = SHOWN_IN.get(library, stem)
        parts.append(f"\n## {library} {version}\n")
        parts.append(
            f"The contract runs over {TESTED[library]} ([cases](../tests/cases/{stem}.py), "
            f"[failures shown](../tests/adapters/test_{shown}.py)).\n"
        )
        parts.append("| what | why not |\n|---|---|")
        for what, why in failures(ROOT / "tests" / "cases" / f"{stem}.py").items():
            parts.append(f"| {what} | {why} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
