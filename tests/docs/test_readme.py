"""The README's examples run as they stand, one after the other, and what it points to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("nflows")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_links_and_files_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    places = re.findall(r"`((?:inn_guard|benchmarks|tests|notebooks)/[\w/.]+)`", README)
    missing = [name for name in {*targets, *places} if not _exists(name)]
    assert not missing


def _exists(name: str) -> bool:
    """Of a file or folder; a name of capitals (LIB, SCRIPT) stands for any, and notebooks are named without suffix."""
    placeholder = re.search(r"[A-Z]{3,}", name.removesuffix(".md"))
    return bool(placeholder) or (ROOT / name).exists() or (ROOT / f"{name}.ipynb").exists()
