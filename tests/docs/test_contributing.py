"""The instructions of CONTRIBUTING.md work: its files are written, then its other blocks run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs.blocks import ROOT, blocks

#: packages may have modules in further folders
PROGRAM = """
import importlib, pathlib, sys
folder, program = map(pathlib.Path, sys.argv[1:])
sys.path[:0] = [str(folder), str(pathlib.Path.cwd())]
for init in pathlib.Path.cwd().glob("*/**/__init__.py"):
    package = init.parent.relative_to(pathlib.Path.cwd())
    if (folder / package).is_dir():
        module = importlib.import_module(".".join(package.parts))
        module.__path__.append(str(folder / package))
exec(compile(program.read_text(), str(program), "exec"), {})
"""


def test_the_instructions_work(tmp_path):
    program = "import torch\n"
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if block.file:
            path = tmp_path / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
        else:
            program += block.code + "\n"
    script = tmp_path / "program.py"
    script.write_text(program)
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr


def test_every_kind_of_thing_is_shown():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    kinds = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert kinds == [
        "A layer",
        "An adapter",
        "An audit",
        "A bound rule",
        "A regularizer",
        "An experiment",
    ]
    assert all(
        Path(block.file).suffix == ".py" for block in blocks(ROOT / "CONTRIBUTING.md") if block.file
    )
