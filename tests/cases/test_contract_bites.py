"""The contract fails on models that break it: every test of it is shown one that it must catch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from inn_guard.core.invertible import Invertible
from tests.cases.case import Case
from tests.core import test_invertible as contract

# the contract's own fixture
from tests.core.test_invertible import _default_dtype_as_at_home  # noqa: F401


class Scale(Invertible):
    """z = s * x, done right; the classes below each spoil one thing."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64))

    def forward(self, x):
        return self.s * x

    def inverse(self, z):
        return z / self.s

    def forward_and_log_det(self, x):
        return self.forward(x), self.s.abs().log().sum().expand(len(x))

    def inverse_and_log_det(self, z):
        return self.inverse(z), -self.s.abs().log().sum().expand(len(z))

    def layers(self):
        return (Opaque(self),)


class Opaque(Scale):
    def __init__(self, whole):
        super().__init__()
        self.s = whole.s

    def layers(self):
        return ()


class InexactInverse(Scale):
    def inverse(self, z):
        return z / self.s + 1e-12


class WrongSign(Scale):
    def forward_and_log_det(self, x):
        z, log_det = super().forward_and_log_det(x)
        return z, -log_det


class ForgottenSign(Scale):
    def inverse_and_log_det(self, z):
        x, log_det = super().inverse_and_log_det(z)
        return x, -log_det


class InfiniteLikelihood(Scale):
    def log_prob(self, x):
        return super().log_prob(x) / 0


class LayersTwice(Scale):
    def layers(self):
        return (Opaque(self), Opaque(self))


class DetachedParameter(Scale):
    def forward(self, x):
        return self.s.detach() * x


class DetachedInverse(Scale):
    def inverse(self, z):
        return z.detach() / self.s + (z - z.detach())


class SharedOnCopy(Scale):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class BatchCoupled(Scale):
    def forward(self, x):
        return self.s * x + x.mean(0)

    def inverse(self, z):
        return (z - (z / (1 + 1 / self.s) / self.s).mean(0)) / self.s


class WritesIntoInput(Scale):
    def forward(self, x):
        if x.requires_grad or torch.is_grad_enabled():
            return super().forward(x)
        return x.mul_(self.s)


class Counts(Scale):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class SinglePrecision(Scale):
    def forward(self, x):
        return super().forward(x.float().to(x.dtype))


class StaysDouble(Scale):
    def to_dtype(self, dtype):
        return copy.deepcopy(self)


def case_of(kind, **abilities):
    def make():
        generator = torch.Generator().manual_seed(0)
        return kind(), torch.randn(4, 3, generator=generator, dtype=torch.float64)

    return Case(kind.__name__, make, has_layers=True, **abilities)


def unseeded():
    return Scale(), torch.randn(4, 3, dtype=torch.float64)


BITES = [
    (contract.test_inverse_of_forward_is_the_identity, case_of(InexactInverse)),
    (contract.test_forward_of_inverse_is_the_identity, case_of(InexactInverse)),
    (
        contract.test_the_floor_of_the_inverse_is_a_measured_one,
        case_of(Scale, float64_floor=1e-6, floor_reason="none"),
    ),
    (contract.test_log_det_is_that_of_the_autograd_jacobian, case_of(WrongSign)),
    (contract.test_log_dets_of_the_two_directions_cancel, case_of(ForgottenSign)),
    (contract.test_log_prob_is_one_finite_number_per_sample, case_of(InfiniteLikelihood)),
    (contract.test_layers_compose_in_both_directions, case_of(LayersTwice)),
    (contract.test_log_dets_of_layers_add_up_in_both_directions, case_of(LayersTwice)),
    (contract.test_float32_agrees_with_float64, case_of(StaysDouble)),
    (contract.test_in_dtype_converts_a_copy_and_leaves_the_original_alone, case_of(StaysDouble)),
    (contract.test_gradients_reach_the_input_of_the_inverse, case_of(DetachedInverse)),
    (contract.test_deep_copy_is_equal_and_independent, case_of(SharedOnCopy)),
    (contract.test_samples_do_not_depend_on_the_batch, case_of(BatchCoupled)),
    (contract.test_a_call_changes_neither_input_nor_model, case_of(WritesIntoInput)),
    (contract.test_a_call_changes_neither_input_nor_model, case_of(Counts)),
    (contract.test_linearization_has_the_products_of_the_dense_jacobian, case_of(LayersTwice)),
    (
        contract.test_case_is_deterministic_and_leaves_the_global_generator_alone,
        Case("unseeded", unseeded),
    ),
    (contract.test_inverse_of_forward_is_the_identity, case_of(SinglePrecision)),
]


@pytest.mark.parametrize(("test", "case"), BITES, ids=lambda value: getattr(value, "id", ""))
def test_the_contract_catches(test, case):
    with pytest.raises(AssertionError):
        test(case)


def test_the_contract_catches_a_parameter_without_gradient():
    contract.test_gradients_reach_the_parameters(case_of(Scale), "forward")
    with pytest.raises((AssertionError, RuntimeError)):
        contract.test_gradients_reach_the_parameters(case_of(DetachedParameter), "forward")


def test_every_test_of_the_contract_is_shown_to_bite_and_passes_what_is_right():
    tests = {name: value for name, value in vars(contract).items() if name.startswith("test_")}
    shown = {test.__name__ for test, _ in BITES} | {"test_gradients_reach_the_parameters"}
    assert set(tests) == shown
    for name in shown - {
        "test_gradients_reach_the_parameters",
        "test_the_floor_of_the_inverse_is_a_measured_one",
    }:
        tests[name](case_of(Scale))
