"""Every audit leaves model, gradients, input and random states bit for bit as they were.

Checked by its own photograph, not by the code that restores.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inn_guard.audits import AUDITS
from inn_guard.core.invertible import Invertible
from inn_guard.report.result import AuditResult
from tests.cases.all import CASES, Case, one_of_each_kind
from tests.cases.shortened import SHORTENED

ROWS = 2
#: searches and bounds take longest: ``make test`` runs them on one model of every library
LONG = {"dequantization_attack", "lipschitz_bounds", "out_of_distribution"}
FEW = frozenset({"freia-SequenceINN-nested", "nflows-Flow-context", "ours/nested chains"})
ONE_OF_EACH_LIBRARY = FEW | {
    "callables-closures-layers",
    "torch-stack",
    "memcnn-InvertibleModuleWrapper-nested",
    "normflows-GlowBlock",
}
#: layers that write their own buffers, caches or modes when they are called
WITH_STATE = frozenset(
    {
        "freia-ActNorm-image",
        "freia-IResNetLayer",
        "ours/actnorm images",
        "nflows-BatchNorm",
        "nflows-LULinear",
        "normflows-Residual-2d",
        "torch-tanh-cached",
    }
)


def bits(t: Tensor) -> tuple[object, ...]:
    dense = t.detach().to_dense() if t.layout != torch.strided else t.detach()
    return (
        t.dtype,
        tuple(t.shape),
        t.requires_grad,
        dense.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
    )


def plain(value: object, depth: int = 4) -> object:
    """What can be compared: numbers, texts, containers of them; otherwise an object's class."""
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return repr(value)
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, (list, tuple)):
        return [plain(item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item, depth - 1) for key, item in value.items()}
    if (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, type))
        and not callable(value)
    ):
        return {
            key: plain(item, depth - 1)
            for key, item in vars(value).items()
            if not isinstance(item, nn.Module)
        }
    return type(value).__qualname__


def numpy_state() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return (kind, keys.tobytes(), *rest)


def photograph(model: nn.Module, x: Tensor) -> dict[str, object]:
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {
        "tensors": {name: (id(t), t.data_ptr(), *bits(t)) for name, t in tensors},
        "grads": {
            name: None if p.grad is None else (id(p.grad), *bits(p.grad)) for name, p in tensors
        },
        "modes": [module.training for module in model.modules()],
        "modules": [
            (name, id(module)) for name, module in model.named_modules(remove_duplicate=False)
        ],
        "attributes": [
            {key: plain(value) for key, value in vars(m).items() if key[0] != "_"}
            for m in model.modules()
        ],
        "x": (id(x), x._version, *bits(x)),
        "random": (torch.get_rng_state().numpy().tobytes(), numpy_state(), hash(random.getstate())),
        "settings": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_inference_mode_enabled(),
        ),
    }


def patient(case: Case) -> tuple[Invertible, Tensor]:
    """A case in an awkward state: mixed modes, gradients of some parameters, one frozen."""
    model, x = case.make()
    for k, module in enumerate(model.modules()):
        if k % 3 == 2 and not any(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()
        ):
            module.training = True
    for k, parameter in enumerate(model.parameters()):
        if k % 2 == 0:
            parameter.grad = torch.ones_like(parameter)
        elif k % 5 == 1:
            parameter.requires_grad_(False)
    rows = torch.arange(ROWS)
    return model.select(rows), x[rows].clone()


def assert_no_trace(case: Case, names: set[str]) -> None:
    model, x = patient(case)
    before = photograph(model, x)
    for name in sorted(names):
        result = SHORTENED.get(name, AUDITS[name])(model, x)
        assert isinstance(result, AuditResult)
        assert result.name == name
        assert photograph(model, x) == before, name


@pytest.mark.unchecked
@pytest.mark.parametrize("case", one_of_each_kind(CASES, ONE_OF_EACH_LIBRARY | WITH_STATE))
def test_no_audit_leaves_a_trace(case):
    assert_no_trace(case, AUDITS.keys() - LONG)


@pytest.mark.unchecked
@pytest.mark.parametrize("case", one_of_each_kind(CASES, FEW))
def test_no_search_leaves_a_trace(case):
    assert_no_trace(case, LONG)


def test_the_photograph_sees_every_kind_of_change():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.cache = {"value": None}
    x = torch.zeros(2, 2)
    before = photograph(model, x)
    for deed in (
        lambda: model[0].weight.data.mul_(2),
        lambda: model.eval(),
        lambda: model[1].running_mean.add_(1),
        lambda: model[0].bias.requires_grad_(False),
        lambda: setattr(model[0].weight, "grad", torch.ones(2, 2)),
        lambda: model.cache.update(value=torch.ones(1)),
        lambda: torch.rand(1),
        lambda: np.random.rand(),
        lambda: random.random(),
        lambda: x.add_(0),
    ):
        kept = copy.deepcopy(before)
        deed()
        before = photograph(model, x)
        assert before != kept
