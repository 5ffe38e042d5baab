"""Which uses count, and that a verdict is the same by name, by level, by seed and with more
samples.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits import AUDITS
from inn_guard.layers.chain import Chain
from inn_guard.report.result import AuditResult
from inn_guard.report.uses import USES
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Embedding, Linear, Warp, random_chain


def data(batch: int = 8, dimension: int = 6) -> Tensor:
    return torch.randn(batch, dimension, generator=torch.Generator().manual_seed(3))


class LosesDraws(Linear):
    """Its inverse is right at the data and NaN far from them."""

    def __init__(self) -> None:
        super().__init__(torch.eye(6))

    def inverse(self, z: Tensor) -> Tensor:
        return torch.where(z.norm(dim=1, keepdim=True) > 1, math.nan, super().inverse(z))


def near() -> Tensor:
    return 0.1 * data()


def test_a_transform_without_a_base_is_not_judged_by_draws():
    report = ig.audit(LosesDraws(), near(), level="quick")
    assert not report.verdict.failed
    assert not report.uses["sampling"].counted
    assert report.uses["sampling"].verdict is Verdict.UNSTABLE
    assert "not counted" in str(report)


@pytest.mark.parametrize(
    "settings",
    [{"uses": ["sampling"]}, {"uses": "sampling"}, {"prior": lambda n: torch.randn(n, 6)}],
)
def test_draws_count_where_they_are_named_or_a_prior_is_given(settings):
    report = ig.audit(LosesDraws(), near(), level="quick", **settings)
    assert report.uses["sampling"].counted
    assert report.verdict is Verdict.UNSTABLE


def test_only_named_uses_count():
    report = ig.audit(LosesDraws(), near(), level="quick", uses=["density", "reconstruction"])
    assert not report.verdict.failed
    assert [use for use, one in report.uses.items() if one.counted] == ["density", "reconstruction"]


def test_a_named_use_is_measured_at_every_level():
    report = ig.audit(LosesDraws(), near(), level="quick", uses=["other_inputs"])
    assert "out_of_distribution" in report
    assert report.uses["other_inputs"].counted
    assert report.verdict == report.uses["other_inputs"].verdict


def test_other_inputs_count_only_where_they_are_named():
    report = ig.audit(LosesDraws(), near(), checks=["reconstruction", "out_of_distribution"])
    assert not report.uses["other_inputs"].counted


@pytest.mark.parametrize("checks", [[], ["preflight"]])
def test_nothing_measured_is_undecided(checks):
    assert ig.audit(random_chain(), data(), checks=checks).verdict is Verdict.UNDECIDED


def test_nothing_that_applies_is_not_applicable():
    report = ig.audit(Warp(6), data(), checks=["density"])
    assert report.verdict is Verdict.NOT_APPLICABLE
    named = ig.audit(random_chain(), data(), checks=["reconstruction"], uses=["density"])
    assert named.verdict is Verdict.UNDECIDED  # density was asked for, and not measured


def test_a_check_that_decides_no_use_counts_where_it_is_named():
    model = Linear(torch.diag(torch.logspace(0, -15, 6)))
    assert ig.audit(model, data(), checks=["jacobian_spectrum"]).verdict is Verdict.UNSTABLE
    assert not ig.audit(model, model.inverse(data()).detach()).verdict.failed


@pytest.mark.parametrize(
    ("uses", "error"), [(["beauty"], ValueError), ([3], TypeError), ("beauty", ValueError)]
)
def test_unknown_uses_are_refused(uses, error):
    with pytest.raises(error, match="uses"):
        ig.audit(random_chain(), data(), uses=uses)


def test_every_use_is_decided_by_a_check():
    decided = {use for check in AUDITS.values() for use in check.uses}
    assert decided == set(USES)


def test_the_same_by_name_and_by_level():
    for model in (random_chain(depth=1, spread=0.5), Embedding(6, 3)):
        by_level = ig.audit(model, near())
        for name in ("density", "sampling", "reconstruction", "gradient_angle"):
            named = ig.audit(model, near(), checks=[name])
            assert named[name] == by_level[name], name
            assert AUDITS[name](model, near()) == by_level[name], name
        quick = ig.audit(model, near(), level="quick")
        for use, one in quick.uses.items():
            assert one == by_level.uses[use]


def test_the_same_for_the_same_seed():
    model = random_chain(depth=1)
    first, second = (ig.audit(model, data(), seed=4) for _ in range(2))
    assert first.results == second.results
    other = ig.audit(model, data(), seed=5, checks=["sampling"])
    assert other["sampling"] != first["sampling"]


def rotation() -> Chain:
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    return Chain(Linear(turn), Linear(2 * turn))


@pytest.mark.parametrize("more", [1, 8, 60])
def test_more_samples_of_the_same_kind_change_no_verdict(more):
    model = rotation()
    checks = ["density", "log_det", "reconstruction", "gradient_angle"]
    few = ig.audit(model, data(4), checks=checks)
    many = ig.audit(model, data(4 + more), checks=checks)
    for use in ("density", "reconstruction", "gradients"):
        assert few.uses[use].verdict == many.uses[use].verdict


def test_one_bad_sample_among_many_decides():
    class Once(Linear):
        def inverse(self, z: Tensor) -> Tensor:
            x = super().inverse(z)
            return torch.where(x[:, :1] > 100, 0.0, x)

    x = data(300)
    x[200, 0] = 1000
    for batch in (x, x[190:210], x[200:201]):
        report = ig.audit(Once(torch.eye(6)), batch, checks=["reconstruction"])
        assert report.verdict is Verdict.UNSTABLE
        assert report.uses["reconstruction"].samples == len(batch)


def test_calls_of_more_than_one_map_leave_every_use_undecided():
    class Rewrites(Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.matrix.mul_(1.0 + 1e-9)
            return super().forward(x)

    report = ig.audit(Rewrites(torch.eye(6)), data(), level="quick")
    assert all(one.verdict >= Verdict.UNDECIDED for one in report.uses.values())


def test_a_check_of_ones_own_decides_the_use_that_it_names():
    finding = ig.audit(random_chain(), data(), checks=["reconstruction"]).uses["reconstruction"]

    def strict(model, x: Tensor) -> AuditResult:
        return AuditResult(
            "strict",
            Verdict.UNSTABLE,
            "never good enough",
            uses={"reconstruction": finding.finding},
        )

    report = ig.audit(random_chain(), data(), checks=[strict])
    assert report.uses["reconstruction"].check == "strict"
