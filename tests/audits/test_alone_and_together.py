"""What checks share makes them faster and changes no figure: alone, together, at any level."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ResidualNet
from nflows.transforms import AffineCouplingTransform, CompositeTransform, RandomPermutation
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.audits import checks_of_level
from inn_guard.report.result import AuditResult


def flow() -> nn.Module:
    """Two blocks that lose some draws, so that what is explained is compared, too."""
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for _ in range(2):
        steps.append(RandomPermutation(4))
        steps.append(
            AffineCouplingTransform(torch.arange(4) % 2, lambda n, m: ResidualNet(n, m, 8))
        )
    made = Flow(CompositeTransform(steps), StandardNormal([4])).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2.5)
    return made


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=generator, dtype=torch.float32)


def plain(value: Any) -> Any:
    """The same in a form that compares by value, NaN equal to itself."""
    if isinstance(value, Tensor):
        return [str(value.dtype), plain(value.tolist())]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return value


def assert_same(one: AuditResult, other: AuditResult) -> None:
    first, second = plain(one), plain(other)
    # a setting says which level it is due to
    for named in (first, second):
        named["settings"].pop("why_at_most", None)
    for name in first:
        assert first[name] == second[name], f"{one.name}: {name}"


def compared(level: str) -> None:
    model, x = flow(), data()
    together = ig.audit(model, x, level=level, progress=False)
    for check in checks_of_level(level):
        alone = ig.audit(model, x, checks=[dataclasses.replace(check)], level=level, progress=False)
        assert_same(alone[check.name], together[check.name])


def test_quick_checks_answer_alone_as_they_do_together():
    compared("quick")


@pytest.mark.thorough
def test_standard_checks_answer_alone_as_they_do_together():
    compared("standard")


@pytest.mark.thorough
def test_a_check_answers_at_a_quick_level_as_at_the_standard_one():
    model, x = flow(), data()
    quick = ig.audit(model, x, level="quick", progress=False)
    standard = ig.audit(model, x, progress=False)
    for result in quick:
        assert_same(result, standard[result.name])


def test_a_check_called_by_itself_answers_as_in_an_audit():
    model, x = ig.wrap(flow()), data()
    report = ig.audit(model, x, level="quick", progress=False)
    for check in checks_of_level("quick"):
        assert_same(check(model, x), report[check.name])
