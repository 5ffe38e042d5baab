"""Every notebook runs, stays small, shows what it drew, and uses the public interface only."""

from __future__ import annotations

import ast
import importlib
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from tests.cases.trials import first

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
PUBLIC = {"inn_guard", "inn_guard.layers", "inn_guard.models"}
LARGEST = 200_000  # bytes

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def pictures(notebook):
    return [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_audit_a_flow",
        "02_stabilize_training",
        "03_four_papers",
        "04_repair_a_trained_flow",
    ]


@pytest.mark.parametrize("path", first(0, NOTEBOOKS), ids=lambda path: path.stem)
def test_runs_and_draws_as_often_as_its_committed_copy(path, tmp_path):
    committed, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    NotebookClient(notebook, timeout=None, kernel_name="python3").execute(cwd=str(tmp_path))
    assert len(pictures(notebook)) == len(pictures(committed)) > 0


@by_name
def test_committed_outputs_are_whole_and_small(path):
    assert path.stat().st_size < LARGEST
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            assert not any(output.output_type == "error" for output in cell.outputs)


@by_name
def test_only_public_names_are_typed(path):
    source = "\n".join(
        cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert {
                alias.name for alias in node.names if alias.name.startswith("inn_guard")
            } <= PUBLIC
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("inn_guard"):
            assert node.module in PUBLIC
            assert {alias.name for alias in node.names} <= set(
                importlib.import_module(node.module).__all__
            )
