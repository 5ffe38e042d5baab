"""Which modules may be taken for what their class says."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from inn_guard.core.missing import Missing
from inn_guard.core.readable import (
    RulesByClass,
    class_of_call,
    composes,
    evaluate_weight_norms,
    first_reason,
    is_as_written,
    is_of_library,
    is_plain,
    runs_code_of,
    why_patched,
    why_unreadable,
)


class Renamed(nn.Linear):
    def __init__(self, n: int) -> None:
        super().__init__(n, n)

    def extra_repr(self) -> str:
        return "another"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Calling(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Mixin:
    def forward(self, x):
        return x


class Mixed(Mixin, nn.Linear):
    pass


def test_a_module_of_the_class_itself_is_plain():
    assert is_plain(nn.Linear(2, 2), nn.Linear)
    assert is_plain(Renamed(2), nn.ReLU, nn.Linear)
    assert why_unreadable(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("kind", [Doubled, Calling, Mixed])
def test_a_subclass_that_overrides_something_is_not(kind):
    module = kind(2, 2)
    assert not is_plain(module, nn.Linear)
    assert "overrides" in class_of_call(module, [nn.Linear]).reason
    assert is_plain(module, kind)


def test_another_class_has_no_rule():
    assert class_of_call(nn.Tanh(), [nn.ReLU]) == Missing(
        "no rule is registered for torch.nn.modules.activation.Tanh"
    )


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_a_module_are_reasons(register):
    module = nn.Linear(2, 2)
    handle = getattr(module, register)(lambda *arguments: None)
    assert "hook" in why_patched(module).reason
    handle.remove()
    assert why_patched(module) is None


@pytest.mark.parametrize("register", HOOKS)
def test_global_hooks_are_reasons(register):
    name = register.replace("register_", "register_module_")
    handle = getattr(nn.modules.module, name)(lambda *arguments: None)
    try:
        assert "global" in why_patched(nn.Tanh()).reason
    finally:
        handle.remove()
    assert why_patched(nn.Tanh()) is None


def test_a_method_of_the_instance_is_a_reason():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x
    assert "forward" in why_patched(module).reason
    assert first_reason([nn.Tanh(), module]) == why_patched(module)


def test_a_method_replaced_in_the_class_is_a_reason(monkeypatch):
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x)
    assert "replaced" in class_of_call(nn.Tanh(), [nn.Tanh]).reason


def test_parametrizations_are_reasons_if_their_weight_moves():
    spectral = parametrizations.spectral_norm(nn.Linear(3, 3))
    assert "training mode" in why_unreadable(spectral).reason
    assert why_unreadable(spectral.eval()) is None
    assert why_unreadable(parametrizations.weight_norm(nn.Linear(3, 3))) is None
    assert why_unreadable(parametrizations.orthogonal(nn.Linear(3, 3))) is None
    assert is_plain(spectral, nn.Linear)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, weight):
            self.count += 1
            return weight

    linear = nn.Linear(3, 3)
    parametrize.register_parametrization(linear, "weight", Counting())
    assert "every read" in why_unreadable(linear).reason


def test_rules_are_used_for_their_class_only():
    @RulesByClass
    def describe(why, module):
        return why.reason

    @describe.register
    def describe_linear(module: nn.Linear):
        return "linear"

    assert describe(nn.Linear(1, 1)) == describe(Renamed(1)) == "linear"
    assert "overrides" in describe(Doubled(1, 1))
    assert "no rule" in describe(nn.Tanh())
    assert set(describe.classes) == {nn.Linear}
    assert describe.__name__ == "describe"


def test_methods_that_speak_of_their_own_map():
    class Layer(nn.Module):
        def forward(self, x):
            return x

        def linearize(self, x):
            return 1

    class Other(Layer):
        def forward(self, x):
            return 2 * x

    class Same(Layer):
        pass

    class Both(Other):
        def linearize(self, x):
            return 2

    assert is_as_written(Layer(), "linearize")
    assert is_as_written(Same(), "linearize")
    assert is_as_written(Both(), "linearize")
    assert not is_as_written(Other(), "linearize")
    assert not runs_code_of(Other(), Layer, ["forward"])
    assert runs_code_of(Both(), Layer, ["__call__"])


def test_classes_of_a_library():
    assert is_of_library(nn.Linear(1, 1), "torch")
    assert not is_of_library(Renamed(1), "torch")


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_norms_are_evaluated_as_the_next_call_does(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        linear = norm(nn.Linear(3, 3)).eval()
    with torch.no_grad():
        linear(torch.zeros(1, 3))
        for parameter in linear.parameters():
            parameter.mul_(3)
    model = nn.Sequential(linear)
    evaluated = copy.deepcopy(model)
    evaluate_weight_norms(evaluated)
    assert why_unreadable(evaluated[0]) is None
    x = torch.randn(2, 3)
    expected = model(x)
    torch.testing.assert_close(evaluated(x), expected)
    torch.testing.assert_close(x @ evaluated[0].weight.T + evaluated[0].bias, expected)


def test_a_power_iteration_at_every_call_stays():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)))
    evaluate_weight_norms(model)
    assert "hook" in why_patched(model[0]).reason


def test_composition_is_compared_by_value():
    x = torch.randn(3, 2)
    assert composes(lambda t: 6 * t, [lambda t: 2 * t, lambda t: 3 * t], x)
    assert not composes(lambda t: 6 * t, [lambda t: 2 * t], x)
    assert not composes(lambda t: t[:, :1], [lambda t: t], x)
