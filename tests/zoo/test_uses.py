"""The audit's verdict on each use against the truth by plain formulas, on flows of every library.

The whole table (over 200 flows) is made by ``python -m tests.zoo.table_of_uses``; its committed
copy is benchmarks/results/zoo/uses.csv. Here a few flows run every time, more of them with the
marker ``thorough``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.zoo.flows import FLOWS
from tests.zoo.table_of_uses import rows_of

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "zoo" / "uses.csv"
#: one flow of each library, a sound one, a wrong log-determinant, a rare loss of draws, a lost
#: inverse
QUICK = (
    "nflows affine 4, gain 1, clusters",
    "FrEIA GLOWCouplingBlock 4, gain 3, normal",
    "own log-det + 1 4, gain 1, clusters",
    "own tail beyond 3 4, gain 1, clusters",
    "own inverse x 1.1 4, gain 1, clusters",
)


@pytest.fixture(autouse=True)
def _float32(_float64):
    torch.set_default_dtype(torch.float32)


def check(name: str) -> None:
    wrong = [row for row in rows_of(FLOWS[name]) if row["outcome"] in ("MISS", "FALSE ALARM")]
    assert not wrong


@pytest.mark.parametrize("name", [name for name in QUICK if name in FLOWS])
def test_a_few_flows(name):
    check(name)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in FLOWS if "steps" not in name][::7])
def test_every_seventh_flow(name):
    check(name)


def test_every_quick_name_is_a_flow():
    assert set(QUICK) <= set(FLOWS)


def test_the_committed_table_has_no_miss_and_at_most_one_false_alarm_in_a_hundred_per_use():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["flow"] for row in rows}) >= 200
    for use in ("density", "sampling", "reconstruction", "gradients"):
        outcomes = [row["outcome"] for row in rows if row["use"] == use]
        assert outcomes.count("MISS") == 0
        assert outcomes.count("FALSE ALARM") <= 0.01 * len(outcomes)
        assert outcomes.count("found") >= 20
        assert outcomes.count("passed") >= 20
