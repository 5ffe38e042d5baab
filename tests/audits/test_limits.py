"""Limits: what may be set, and that every check holds its figure against the limit it is given."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits.density import density
from inn_guard.audits.gradient_angle import gradient_angle
from inn_guard.audits.log_det import log_det
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.audits.sampling import sampling
from inn_guard.layers.chain import Chain
from inn_guard.report.limits import Limits
from tests.cases.toys import Linear


class Off(Linear):
    """The inverse and the log-determinant of the identity are off by a known amount."""

    def __init__(self, by: float) -> None:
        super().__init__(torch.eye(3))
        self.by = by

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z) * (1 + self.by)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward_and_log_det(x)
        return z, log_det + self.by


def data() -> Tensor:
    return torch.randn(16, 3)


@pytest.mark.parametrize("check", [reconstruction, log_det], ids=lambda check: check.name)
@pytest.mark.parametrize(
    ("share", "verdict"), [(0.05, "stable"), (0.5, "marginal"), (1.5, "unstable")]
)
def test_a_figure_is_held_against_its_limit(check, share, verdict):
    limit = 0.04
    limits = Limits(reconstruction=limit, density=limit)
    x = torch.ones(16, 3)  # every entry's own size is its unit
    result = check(Off(share * limit), x, limits=limits)
    (finding,) = result.uses.values()
    assert result.verdict == verdict
    assert finding.limit == limit
    assert finding.figure == pytest.approx(share * limit, rel=1e-6)


def test_the_limit_of_a_draw_is_in_units_of_the_base():
    for draw, lost in ((0.02, 0), (0.005, 64)):
        result = sampling(Off(0.0), data(), draws=64, limits=Limits(draw=draw), prior=_far)
        assert result.values["lost_draws"] == 0
        wrong = sampling(Shifted(0.01), data(), draws=64, limits=Limits(draw=draw), prior=_far)
        assert wrong.values["lost_draws"] == lost


class Shifted(Off):
    """F(F^-1(z)) - z = ``by`` times the deviation of the prior below."""

    def inverse(self, z: Tensor) -> Tensor:
        return Linear.inverse(self, z) + 7 * self.by


def _far(n: int) -> Tensor:
    return 100 + 7 * torch.randn(n, 3)


def test_limits_of_gradients():
    model, x = Chain(Off(0.0), Off(0.3), Off(0.0)), data()
    strict = gradient_angle(model, x)
    assert strict.verdict == "unstable"
    wide = Limits(gradient_angle=90.0, gradient_length=10.0)
    assert gradient_angle(model, x, limits=wide).verdict == "marginal"


def test_marginal_begins_at_a_share_of_the_limit():
    limits = Limits(marginal=1.0)
    assert reconstruction(Off(0.009), torch.ones(16, 3), limits=limits).verdict == "stable"


def test_audit_hands_limits_on():
    report = ig.audit(Off(0.05), torch.ones(16, 3), limits=Limits(reconstruction=0.1, density=1.0))
    assert report.uses["reconstruction"].limit == 0.1
    assert report.uses["density"].limit == 1.0
    assert not report.uses["reconstruction"].verdict.failed
    assert density(Off(0.05), torch.ones(16, 3), limits=Limits(density=1.0)).settings["limit"] == 1


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", True])
def test_what_is_no_limit_is_refused(name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        Limits(**{name: value})


def test_a_dtype_is_not_held_to_more_than_it_holds():
    assert Limits().round_trip(torch.float32) == 0.01
    assert Limits().round_trip(torch.bfloat16) == 8 * torch.finfo(torch.bfloat16).eps
    x = torch.ones(16, 3, dtype=torch.bfloat16)

    class Half(Off):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0

        def inverse(self, z: Tensor) -> Tensor:
            return z * 1.05

    assert reconstruction(Half(0.0).bfloat16(), x).verdict == "marginal"
    assert reconstruction(Half(0.0).float(), x.float()).verdict == "unstable"
