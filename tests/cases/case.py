"""Case: one model with data, and what it can do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible


class Case(NamedTuple):
    """One entry of the contract.

    ``make()`` returns a fresh model in eval mode and a batch x (B >= 3, *data), both float64, the
    same at every call, with the global random number generators left alone (use ``seeded``).
    Parameters must not be trivial (an identity would pass every test): fill them with ``randomize``
    where a library starts at zero.
    """

    id: str
    make: Callable[[], tuple[Invertible, Tensor]]
    has_log_det: bool = True
    has_inverse_log_det: bool = True
    has_layers: bool = False
    bijective: bool = True
    #: measured absolute error of the round trip that stays in float64: an iterative inverse,
    #: constants in float32
    float64_floor: float = 0.0
    #: measured error of log-determinants that stays in float64 (float32 constants), in nats
    log_det_floor: float = 0.0
    #: why there is a floor; demanded where one is given
    floor_reason: str = ""
    #: name of a test of the contract -> why this case cannot pass it, so that it is not collected
    skips: Mapping[str, str] = MappingProxyType({})

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train: the model is made, which takes milliseconds."""
        return bool(trainable(self.make()[0]))


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]


@contextmanager
def seeded(seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Everything random inside the block comes from ``seed``; the global generators are restored.

    ``dtype`` is the default dtype inside. Foreign libraries are built with float32 and made
    ``.double()`` afterwards, as users do, so that constants which a library bakes in float32 show.
    """
    default = torch.get_default_dtype()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
    np.random.set_state(numpy_state)
    random.setstate(python_state)


def randomize(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Add normal noise of that standard deviation to every parameter, inside a ``seeded`` block."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, dtype=parameter.dtype))
