"""What the README says of speed is what performance.goals reads from the committed tables."""

from __future__ import annotations

import pathlib

import pandas as pd
import pytest

from benchmarks.performance import goals

ROOT = pathlib.Path(__file__).parents[2]
MEASURED = [
    goal for goal in goals.GOALS if (goals.RESULTS / f"performance_{goal.script}.csv").exists()
]


def measured(goal: goals.Goal) -> float:
    return goal.row(pd.read_csv(goals.RESULTS / f"performance_{goal.script}.csv"))["measured"]


@pytest.mark.parametrize("goal", MEASURED, ids=lambda goal: f"{goal.script} {goal.column}")
def test_every_goal_finds_its_rows_in_the_committed_table(goal):
    assert measured(goal) == measured(goal), f"no row of {goal.rows}"  # NaN where there is none


def test_the_readme_says_of_memory_saving_what_was_measured():
    memory, time = (goal for goal in goals.GOALS if goal.script == "memory_saving")
    assert (memory.column, time.column) == ("allocated_ratio", "time_ratio")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = (
        f"Memory-saving training needs {measured(memory):.2f} times the memory of stored "
        f"activations and {measured(time):.2f} times the time"
    )
    assert said in text
