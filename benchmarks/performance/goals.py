"""Every figure of the performance claims beside its goal, by one command.

    inn-guard bench performance.goals --preset cpu

Runs the other scripts of this folder, one after the other, with the same preset. Where a table is
in ``benchmarks/results`` already, ``--measured`` reads it instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from benchmarks.common.runner import RESULTS, Row, collect, main, preset


@dataclass(frozen=True)
class Goal:
    """One figure of one script's table.

    Attributes:
        script: of this folder.
        column: of its table; the worst of the rows counts.
        goal: what it should be at least, or at most.
        least: whether the goal is a lower bound.
        rows: column -> value of the rows that count.
    """

    script: str
    column: str
    goal: float
    least: bool
    rows: tuple[tuple[str, object], ...] = ()

    def row(self, table: pd.DataFrame) -> Row:
        """The figure beside its goal; NaN where the table has no such row."""
        chosen = table
        for column, value in self.rows:
            chosen = chosen[chosen[column] == value]
        worst = chosen[self.column].min() if self.least else chosen[self.column].max()
        met = worst >= self.goal if self.least else worst <= self.goal
        return {
            "rows": ", ".join(str(value) for _, value in self.rows),
            "figure": self.column,
            "measured": worst,
            "wanted": "at least" if self.least else "at most",
            "goal": self.goal,
            "met": bool(met),
        }


def audit(case: str, goal: float) -> Goal:
    return Goal("audits", "cost", goal, least=False, rows=(("case", case),))


SAVING = (("peer", "memory_saving"), ("case", "images 48"), ("loss", "z"))
GOALS = (
    Goal("extremes", "ratio", 250, least=True, rows=(("batch", 32),)),
    Goal("extremes", "ratio", 110, least=True, rows=(("batch", 1),)),
    Goal("spectra_promise", "failed_share", 0.01, least=False),
    Goal("full_jacobian", "ratio", 8, least=True, rows=(("claim", "Jacobian"),)),
    Goal("full_jacobian", "ratio", 9, least=True, rows=(("claim", "spectrum"),)),
    Goal("ill_conditioned", "sigma_min_error", 0.01, least=False),
    Goal("memory_saving", "allocated_ratio", 0.31, least=False, rows=SAVING),
    Goal("memory_saving", "time_ratio", 1.5, least=False, rows=SAVING),
    Goal("growth", "time_ratio", 2.2, least=False),
    audit("dry run", 10),
    audit("quick", 200),
    audit("standard", 350),
    audit("full", 2000),
    audit("import", 0.1),
    Goal("looks", "steps_later", 2, least=False),
    Goal("looks", "share", 0.01, least=False),
)
SCRIPTS = tuple(dict.fromkeys(goal.script for goal in GOALS))


@dataclass(frozen=True)
class Config:
    """Which scripts, and whether they are run."""

    scripts: tuple[str, ...] = SCRIPTS
    size: str = "cpu"  # preset of the scripts
    measured: bool = False  # read the tables of an earlier run where there are any


PRESETS = {
    "smoke": {"size": "smoke", "scripts": ("looks",)},
    "cpu": {},
}


def measure(config: Config, name: str) -> Iterable[Row]:
    """A row for each goal of one script."""
    table = RESULTS / f"performance_{name}.csv"
    if config.measured and table.exists():
        found = pd.read_csv(table)
    else:
        script = importlib.import_module(f"benchmarks.performance.{name}")
        found = script.run(preset(script, config.size))
    return [goal.row(found) for goal in GOALS if goal.script == name]


def run(config: Config) -> pd.DataFrame:
    frame = collect(config, config.scripts, measure)
    print(frame.to_string(index=False))
    return frame


if __name__ == "__main__":
    main(__name__)
