"""Methods that raise halfway, over every check and hook: no later call finds what they left."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.audits import AUDITS
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.memory_saving import memory_saving
from tests.cases.shortened import SHORTENED

FOUND_DIRTY: list[str] = []  #: calls that began in a state which another one had left

#: which calls raise: name of the method, and when
WHEN = {
    "inverse": lambda t: True,
    "inverse of some": lambda t: bool((t.flatten(1)[:, 0] > 0.5).any()),
    "forward_and_log_det": lambda t: True,
    "inverse_and_log_det": lambda t: True,
    "log_prob": lambda t: True,
    "layers": lambda t: True,
    "forward in float64": lambda t: t.dtype == torch.float64,
    "inverse in float64": lambda t: t.dtype == torch.float64,
    "forward in forward mode": lambda t: torch.autograd.forward_ad._current_level >= 0,
    "inverse in forward mode": lambda t: torch.autograd.forward_ad._current_level >= 0,
    "inverse with gradients": lambda t: torch.is_grad_enabled(),
    "forward far away": lambda t: bool((t.abs() > 4).any()),
}


class Halfway(Invertible):
    """A coupling with a flag, a cache, a buffer, a mode and random numbers, which some calls leave
    in disorder when they raise.
    """

    def __init__(self, broken: str, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.coupling = AffineCoupling(MLP([2, 8, 4]))
        self.broken, self.error = broken, error
        self.sampling = False
        self.cache: dict[str, Tensor] = {}
        self.register_buffer("calls", torch.zeros(()))

    def _enter(self, name: str, t: Tensor) -> None:
        dirty = self.sampling or self.cache or self.calls.item() != 0
        if dirty or self.coupling.training != self.training:
            FOUND_DIRTY.append(name)
        wanted, _, _ = self.broken.partition(" ")
        if wanted == name and WHEN[self.broken](t):
            self.sampling = True
            self.cache["keys"] = t
            self.calls += 1
            self.coupling.training = not self.training
            torch.rand(3)
            raise self.error("halfway")

    def forward(self, x: Tensor) -> Tensor:
        self._enter("forward", x)
        return self.coupling(x)

    def inverse(self, z: Tensor) -> Tensor:
        self._enter("inverse", z)
        return self.coupling.inverse(z)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._enter("forward_and_log_det", x)
        return self(x), self.coupling.forward_and_log_det(x)[1]

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self._enter("inverse_and_log_det", z)
        return self.inverse(z), self.coupling.inverse_and_log_det(z)[1]

    def log_prob(self, x: Tensor) -> Tensor:
        self._enter("log_prob", x)
        return super().log_prob(x)

    def layers(self) -> tuple[Invertible, ...]:
        self._enter("layers", torch.zeros(1, 1))
        return ()


def data() -> Tensor:
    return 0.4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).float()


def photograph(model: nn.Module) -> tuple[object, ...]:
    parts = []
    for module in model.modules():
        parts.append((type(module).__name__, module.training))
        if isinstance(module, Halfway):
            parts.append((module.sampling, dict(module.cache), module.calls.item()))
    return (*parts, torch.get_rng_state().tolist())


@pytest.fixture(autouse=True)
def _clean() -> None:
    FOUND_DIRTY.clear()


LONG = {"rare_event_sampling", "out_of_distribution"}
CHECKS = [
    pytest.param(name, marks=pytest.mark.thorough if name in LONG else ())
    for name in AUDITS
    if name != "lipschitz_bounds"
]


def alone(broken: str) -> Invertible:
    return Halfway(broken, KeyError)


def first_of_two(broken: str) -> Invertible:
    return Chain(Halfway(broken), Halfway("none"))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("make", [first_of_two, pytest.param(alone, marks=pytest.mark.thorough)])
def test_no_check_goes_on_with_what_a_broken_call_has_left(check, make):
    for broken in WHEN:
        model = make(broken).float().eval()
        before = photograph(model)
        SHORTENED.get(check, AUDITS[check])(model, data())
        assert photograph(model) == before, broken
        assert not FOUND_DIRTY, (broken, FOUND_DIRTY[:3])


@pytest.mark.parametrize("broken", sorted(WHEN))
def test_looks_during_training_leave_no_trace(broken):
    model = Chain(Halfway(broken), Halfway("none")).float()
    watch = ig.AuditHook(model, data(), every=1)
    before = photograph(model)
    watch()
    assert photograph(model) == before
    assert not FOUND_DIRTY


@pytest.mark.parametrize(
    "broken",
    [
        "inverse in float64",
        "forward in float64",
        pytest.param("inverse of some", marks=pytest.mark.thorough),
    ],
)
def test_repairs_leave_no_trace(broken):
    model = Chain(Halfway(broken), Halfway("none")).float().eval()
    before = photograph(model)
    with contextlib.suppress(ig.NotApplicable, RuntimeError):
        ig.raise_precision(model, data(), uses=["reconstruction"])
    assert photograph(model) == before
    assert not FOUND_DIRTY


@pytest.mark.parametrize("broken", ["inverse", "inverse with gradients", "forward_and_log_det"])
def test_wrapping_and_memory_saving_leave_no_trace(broken):
    model = Chain(Halfway(broken), Halfway("none")).float()
    before = photograph(model)
    saving = memory_saving(ig.wrap(model))
    with torch.no_grad():
        saving(data())
    assert photograph(model) == before
    saving(data())  # compares the layers, of which some raise
    assert photograph(model) == before
    assert not FOUND_DIRTY
