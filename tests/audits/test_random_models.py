"""audit() on random nets, shapes, dtypes and poisoned values: it never crashes and never changes
the model.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from inn_guard.audits import AUDITS
from inn_guard.audits.run import audit
from inn_guard.core.invertible import Invertible
from inn_guard.layers.chain import Chain
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.verdict import Verdict
from tests.cases.shortened import SHORTENED
from tests.cases.toys import Linear, Warp

POISON = [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e-40, 5e-324, 0.0, 1e300]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Gate(Invertible):
    """z = x exp(a x_0 + b): an elementwise scale that overflows for large x."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        head, tail = x.flatten(1)[:, :1], x.flatten(1)[:, 1:]
        return torch.cat([head, tail * torch.exp(self.a * head)], 1).reshape(x.shape)

    def inverse(self, z: Tensor) -> Tensor:
        head, tail = z.flatten(1)[:, :1], z.flatten(1)[:, 1:]
        return torch.cat([head, tail * torch.exp(-self.a * head)], 1).reshape(z.shape)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self(x), self.a * x.flatten(1)[:, 0] * (x[0].numel() - 1)


class Picky(Gate):
    """Raises outside a domain, as splines do."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool((x.abs() < 3).all()):
            raise ArithmeticError("outside the domain")
        return super().forward(x)


class Flat(Warp):
    """A warp of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).reshape(x.shape)

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z.flatten(1)).reshape(z.shape)


shapes = st.sampled_from([(1,), (2,), (5,), (1, 2, 2), (3, 2, 2)])
poison = st.sampled_from(POISON)
kinds = st.lists(st.sampled_from(["linear", "gate", "warp", "picky"]), min_size=1, max_size=4)


def built(kinds: list[str], size: int, seed: int) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    steps: list[Invertible] = []
    for k, kind in enumerate(kinds):
        if kind == "linear":
            steps.append(Linear(torch.randn(size, size, generator=generator, dtype=torch.float64)))
        elif kind == "warp":
            steps.append(Flat(size, seed + k, iterations=5 + seed % 20))
        else:
            steps.append((Gate if kind == "gate" else Picky)(float(10 ** (seed % 5 - 2))))
    return Chain(*steps)


@st.composite
def patients(draw: st.DrawFn) -> tuple[Chain, Tensor]:
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    batch, seed = draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    size = int(torch.tensor(shape).prod())
    model = built(draw(kinds), size, seed).to_dtype(dtype)
    x = torch.randn(
        batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    for _ in range(draw(st.integers(0, 3))):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(poison)
    parameters = list(model.parameters())
    if draw(st.booleans()) and parameters:
        parameter = parameters[draw(st.integers(0, len(parameters) - 1))].data.view(-1)
        # by way of a tensor, which becomes infinite where a number would be refused as too large
        # for the dtype
        parameter[draw(st.integers(0, parameter.numel() - 1))] = torch.tensor(
            draw(poison), dtype=torch.float64
        )
    return model, x.to(dtype)


def photograph(model: Chain, x: Tensor) -> list[object]:
    parts = [t.detach().flatten().view(torch.uint8).tolist() for t in (*model.parameters(), x)]
    return [*parts, [m.training for m in model.modules()], torch.get_rng_state().tolist()]


def assert_survives(model: Chain, x: Tensor, checks: list[str]) -> AuditReport:
    before = photograph(model, x)
    report = audit(model, x, checks=checks)
    assert photograph(model, x) == before
    assert report.verdict in Verdict
    assert str(report)
    assert report.to_json()
    return report


SLOW_TO_DRAW = [HealthCheck.too_slow]
PATIENT = settings(suppress_health_check=SLOW_TO_DRAW)
#: one example is every audit of one model
EVERY_AUDIT = settings(
    suppress_health_check=SLOW_TO_DRAW, max_examples=max(PATIENT.max_examples // 3, 1)
)


@given(patients())
@EVERY_AUDIT
def test_audit_survives_anything(patient):
    model, x = patient
    assert_survives(model, x, list((AUDITS | SHORTENED).values()))


@given(patients())
@PATIENT
def test_poison_is_never_called_stable(patient):
    model, x = patient
    report = assert_survives(model, x, ["reconstruction"])
    with torch.no_grad():
        try:
            back = model.inverse(model(x))
        except Exception:
            return  # the model's own refusal: a finding or not applicable, and audit() survived it
    started = x.flatten(1).isfinite().all(1)
    lost = started & ~back.flatten(1).isfinite().all(1)
    if bool(lost.any()) or not bool(started.any()):
        assert report.uses["reconstruction"].verdict.failed
