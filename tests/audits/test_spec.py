"""AuditSpec: checks by name, alone, with settings, from functions, and what they do with errors."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import Tensor

import inn_guard as ig
from inn_guard.audits import AUDITS, AuditSpec, Level, audit_check, checks_of_level
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.core.missing import NotApplicable
from inn_guard.execution.parallel import SERIAL
from inn_guard.report.limits import Limits
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Linear, random_chain


def data() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_a_check_alone_is_the_check_of_an_audit():
    model, x = random_chain(), data()
    limits = Limits(reconstruction=1e-3)
    alone = reconstruction(model, x, batch_size=2, seed=3, limits=limits, parallel=SERIAL)
    check = reconstruction.with_settings(batch_size=2)
    assert alone == ig.audit(model, x, checks=[check], seed=3, limits=limits)["reconstruction"]


@pytest.mark.parametrize("check", AUDITS.values(), ids=AUDITS)
def test_every_check_declares_itself(check):
    assert check.question.endswith("?")
    assert check.cost is not None
    assert inspect.getdoc(check) == inspect.getdoc(check.function)
    assert check.__name__ == check.name
    assert check.level in Level
    assert check in checks_of_level(check.level)


def test_of_one_name_the_own_setting_of_a_check_is_meant():
    box = ig.Box.everywhere((6,))
    result = AUDITS["lipschitz_bounds"](random_chain(), data(), domain=box)
    assert result.settings["scope"] == "on the unbounded box"


def test_unknown_settings_are_refused_with_those_there_are():
    with pytest.raises(TypeError, match="no setting 'size'; its settings are batch_size"):
        reconstruction(random_chain(), data(), size=3)
    with pytest.raises(TypeError, match="its settings are none"):
        AUDITS["density"].with_settings(draws=3)


def test_settings_are_shown_and_kept():
    check = reconstruction.with_settings(batch_size=3)
    assert repr(check) == "reconstruction(batch_size=3)"
    assert check.all_settings() == {"batch_size": 3}
    assert reconstruction.all_settings() == {"batch_size": 128}
    of_partial = AuditSpec.of(functools.partial(reconstruction, batch_size=3))
    assert of_partial.settings == check.settings
    with pytest.raises(TypeError, match="by keyword"):
        AuditSpec.of(functools.partial(reconstruction, 3))


def test_a_plain_function_is_a_check():
    def mine(model, x: Tensor, *, power: int = 1) -> AuditResult:
        """How large is x?"""
        x.mul_(0)  # its own copy
        return AuditResult("mine", Verdict.STABLE, "measured", values={"power": float(power)})

    check = AuditSpec.of(mine)
    assert check.name == "mine"
    assert check.question == "How large is x?"
    x = data()
    result = check(random_chain(), x, power=2)
    assert result.values["power"] == 2
    assert torch.equal(x, data())
    for wrong in (3, int, "reconstruction"):
        with pytest.raises(TypeError, match="by name or as functions"):
            AuditSpec.of(wrong)


@pytest.mark.parametrize(
    ("deed", "verdict"),
    [
        (lambda: NotApplicable("cannot be asked"), Verdict.NOT_APPLICABLE),
        (lambda: KeyError("mine"), None),
    ],
)
def test_errors_of_checks(deed, verdict):
    @audit_check(question="Does it raise?", uses=("density",))
    def raising(context) -> AuditResult:
        raise deed()

    if verdict is None:
        with pytest.raises(KeyError, match="mine"):
            raising(random_chain(), data())
        return
    result = raising(random_chain(), data())
    assert result.verdict is verdict
    assert result.uses["density"].verdict is verdict
    assert result.reason == "cannot be asked"


def test_errors_of_the_model_are_findings_about_the_uses_of_the_check():
    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("no way")

    result = reconstruction(Broken(torch.eye(6)), data())
    assert result.verdict is Verdict.UNSTABLE
    assert result.uses["reconstruction"].verdict is Verdict.UNSTABLE
    assert "ArithmeticError: no way" in result.reason
    assert "outside of the audit" in result.advice


def test_who_shares_samples():
    assert AUDITS["sampling"].is_shared
    assert not AUDITS["precision"].is_shared
    from inn_guard.audits.dequantization_attack import Restarts, SpectralAscent

    attack = AUDITS["dequantization_attack"]
    assert not attack.is_shared
    shared = attack.with_settings(strategy=Restarts(2, SpectralAscent(budget=10)))
    assert shared.is_shared


def test_the_mode_of_the_caller_is_set_aside():
    modes = []

    @audit_check(question="In which mode does it run?")
    def looks(context) -> AuditResult:
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return AuditResult("looks", Verdict.STABLE, "")

    with torch.no_grad(), torch.autocast("cpu"):
        looks(random_chain(), data())
        assert not torch.is_grad_enabled()
    assert modes == [(True, False)]
