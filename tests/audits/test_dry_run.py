"""The estimate: passes against counted ones, nothing run, and what it says of memory and
processes.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits import AUDITS, AuditSpec, Level, checks_of_level
from inn_guard.audits.dry_run import dry_run
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.core.layer_jacobian import AutogradJacobian
from tests.cases.toys import Linear

DIMENSION = 40
COUNTS: Counter[str] = Counter()  # not in the model: an audit restores whatever a model counts


class Counted(Linear):
    """Counts samples in every pass; what a linearization does by itself is not counted as forward
    or inverse.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.inside = False

    def forward(self, x: Tensor) -> Tensor:
        self._add("forward", x)
        return super().forward(x)

    def inverse(self, z: Tensor) -> Tensor:
        self._add("inverse", z)
        return super().inverse(z)

    def forward_and_log_det(self, x: Tensor):
        return self(x), torch.linalg.slogdet(self.matrix).logabsdet.expand(len(x))

    def linearize(self, x: Tensor):
        self._add("linearize", x)
        return CountedJacobian(self, x)

    def _add(self, kind: str, t: Tensor) -> None:
        if not self.inside:
            COUNTS[kind] += len(t)


class CountedJacobian:
    def __init__(self, model: Counted, x: Tensor) -> None:
        self.model = model
        with self:
            self.plain = AutogradJacobian(model.forward, model.inverse, x)
        self.output = self.plain.output

    def __enter__(self):
        self.model.inside = True

    def __exit__(self, *_):
        self.model.inside = False

    def _product(self, product, v: Tensor) -> Tensor:
        COUNTS["product"] += v.numel() // DIMENSION
        with self:
            return product(v)

    def jvp(self, v):
        return self._product(self.plain.jvp, v)

    def vjp(self, u):
        return self._product(self.plain.vjp, u)

    def inverse_jvp(self, u):
        return self._product(self.plain.inverse_jvp, u)

    def inverse_vjp(self, v):
        return self._product(self.plain.inverse_vjp, v)


def counted() -> Counted:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float32)
    return Counted(torch.diag(torch.linspace(0.5, 3, DIMENSION)).float() + 0.02 * noise)


def data(batch: int = 12) -> Tensor:
    return torch.randn(
        batch, DIMENSION, generator=torch.Generator().manual_seed(2), dtype=torch.float32
    )


#: the dense references of log_det and full_spectrum differentiate the forward pass itself: their
#: rows cannot be counted
UNCOUNTED = {
    "log_det": ("product",),
    "full_spectrum": ("product", "linearize"),
    "gradient_angle": ("linearize", "product"),
}


@pytest.mark.parametrize(
    "name",
    [
        "preflight",
        "density",
        "sampling",
        "reconstruction",
        "log_det",
        "out_of_distribution",
        "jacobian_spectrum",
        "layer_blame",
        "precision",
    ],
)
def test_passes_are_within_a_factor_of_three_of_those_counted(name):
    model, x = counted(), data()
    report = ig.audit(model, x, checks=[name], dry_run=True)
    (row,) = [row for row in report["dry_run"].tables["cost"] if row["check"] == name]
    COUNTS.clear()
    AUDITS[name](model, x)
    measured = COUNTS
    assert sum(measured.values())
    for kind, count in measured.items():
        if kind in UNCOUNTED.get(name, ()):
            continue
        assert row[kind] / 3 <= count <= 3 * row[kind], (
            f"{kind}: counted {count}, estimated {row[kind]}"
        )


def test_nothing_is_audited_and_every_check_of_a_level_has_an_estimate():
    report = ig.audit(counted(), data(), level="full", dry_run=True)
    assert report.names == ("dry_run",)
    result = report["dry_run"]
    assert [row["check"] for row in result.tables["cost"]] == [
        check.name for check in checks_of_level(Level.FULL)
    ]
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in result.tables["cost"])
    assert result.values["seconds"] == pytest.approx(
        sum(row["seconds"] for row in result.tables["cost"])
    )
    assert "estimate" in result.reason
    assert "nothing was measured" in result.reason
    assert all(check.cost is not None for check in AUDITS.values())


def test_more_samples_cost_more_and_a_budget_bounds_the_estimate():
    few, many = (
        ig.audit(counted(), data(n), checks=[reconstruction], dry_run=True)["dry_run"]
        for n in (8, 64)
    )
    rows = [result.tables["cost"][1] for result in (few, many)]
    assert 7 <= rows[1]["inverse"] / rows[0]["inverse"] <= 8
    wide = ig.audit(counted(), data(64), checks=["jacobian_spectrum"], dry_run=True)[
        "dry_run"
    ].values["bytes"]
    tight = ig.audit(
        counted(), data(64), checks=["jacobian_spectrum"], dry_run=True, memory=wide / 4
    )["dry_run"]
    assert tight.values["bytes"] <= wide / 4


def test_settings_of_a_check_count():
    small = functools.partial(AUDITS["jacobian_spectrum"], samples=2)
    rows = ig.audit(counted(), data(), checks=[small, "jacobian_spectrum"], dry_run=True)[
        "dry_run"
    ].tables["cost"]
    assert rows[2]["product"] == 6 * rows[1]["product"]


def test_an_unknown_check_has_no_estimate():
    def mine(model, x):
        raise AssertionError("a dry run runs no check")

    result = ig.audit(counted(), data(), checks=[mine], dry_run=True)["dry_run"]
    assert "mine no estimate" in result.reason


def estimated(model, x, checks, processes):
    spec = AuditSpec("dry_run", "What would it cost?", dry_run)
    return spec(model, x, checks=checks, processes=processes)


def test_processes_share_the_samples_of_what_can_be_shared():
    model, x, checks = counted(), data(), [AUDITS["jacobian_spectrum"], AUDITS["precision"]]
    alone, two = (estimated(model, x, checks, processes=n).tables["cost"] for n in (1, 2))
    assert two[0]["bytes"] < alone[0]["bytes"]
    assert two[1]["bytes"] == alone[1]["bytes"]


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'dryrun'"):
        ig.audit(counted(), data(), dryrun=True)
    with pytest.raises(ValueError, match="expected memory as a positive number of bytes"):
        ig.audit(counted(), data(), memory=-1)
