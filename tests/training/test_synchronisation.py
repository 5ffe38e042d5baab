"""No step of a training loop reads a number from the device: each would wait for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.partition import Halves
from inn_guard.memory_saving import memory_saving
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.regularizer_hook import RegularizerHook
from inn_guard.training.regularizers import (
    AdaptiveCoefficient,
    FiniteDifferences,
    NormalizingFlowLoss,
)


class Reads(TorchDispatchMode):
    """Counts what a GPU must be waited for: numbers read, truth values, shapes that depend on data.

    ``item``, ``bool`` and ``tolist`` are one operation below.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else ""
        if name in self.WAITING and not self._of_generator(args):
            self.found.append(name)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _of_generator(args) -> bool:
        """States of generators lie on the CPU whatever the device is."""
        return all(arg.dtype == torch.uint8 for arg in args if isinstance(arg, Tensor))


def chain() -> Chain:
    torch.manual_seed(0)
    halves = [Halves(swapped=k % 2 == 1) for k in range(4)]
    return Chain(*(AffineCoupling(MLP([3, 8, 6]), partition=part) for part in halves))


REGULARIZERS = {
    "finite differences": FiniteDifferences(1e-3),
    "forward": FiniteDifferences(1e-3, direction="forward"),
    "on a share": FiniteDifferences(1e-3, fraction=0.5),
    "at draws": FiniteDifferences(1.0, direction="inverse", at="prior"),
    "published": FiniteDifferences.published(1e-3),
    "likelihood": NormalizingFlowLoss(1e-3),
    "adaptive": AdaptiveCoefficient(NormalizingFlowLoss(1.0), target=10.0),
}
#: whether a draw was lost decides which passes are run
LOGARITHM = FiniteDifferences(1.0, direction="inverse", at="prior", form="log")


def reads_of_a_step(model, regularizer) -> list[str]:
    hook = RegularizerHook(model, regularizer, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(8, 6)

    def step() -> None:
        z = model(x)
        (z.square().mean() + hook(x, z=z)).backward()
        optimizer.step()

    step()  # a first batch is checked
    with Reads() as reads:
        step()
    return reads.found


@pytest.mark.parametrize("saving", [False, True], ids=["stored", "memory-saving"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularized_step_reads_nothing(name, saving):
    model = memory_saving(chain()) if saving else chain()
    assert reads_of_a_step(model, REGULARIZERS[name]) == []


def test_the_logarithmic_form_reads_once():
    assert len(reads_of_a_step(chain(), LOGARITHM)) == 1


def test_a_step_between_audits_reads_nothing():
    model, x = chain(), torch.randn(8, 6)
    hook = AuditHook(model, every=10)
    assert hook(x) is not None
    with Reads() as reads:
        assert hook(x) is None
    assert reads.found == []


def test_reads_are_counted():
    with Reads() as reads:
        torch.ones(1).item()
        bool(torch.ones(1) > 0)
        torch.ones(3).nonzero()
    assert len(reads.found) == 3
