"""Rules of MemCNN."""

from __future__ import annotations

from typing import Any

import torch
from memcnn import AdditiveCoupling, AffineCoupling, InvertibleModuleWrapper
from torch import Tensor, nn

from inn_guard.exact.fixed_point import NoExactRule
from inn_guard.exact.rules import families, register
from inn_guard.exact.steps import Affine, Step


@register("two couplings", AdditiveCoupling, AffineCoupling)
def exact_coupling(layer: Any, x: Tensor) -> list[Step]:
    """The first half is transformed given the second, then the second given the new first."""
    # without the wrappers around it
    return _two_sided(layer.block, x)


def _two_sided(module: Any, x: Tensor) -> list[Step]:
    if module.split_dim != 1:
        raise NoExactRule("it splits another dimension than the channels")
    wrappers = [part for part in module.modules() if isinstance(part, InvertibleModuleWrapper)]
    if wrappers:
        raise NoExactRule("its networks hold wrappers that free their inputs")
    first, second = torch.arange(x.shape[1], device=x.device).chunk(2)
    return [
        _half(module, x, module.Fm, second, first),
        _half(module, x, module.Gm, first, second),
    ]


def _half(module: Any, x: Tensor, network: nn.Module, identity: Tensor, changed: Tensor) -> Affine:
    def parameters(known: Tensor) -> tuple[Tensor | None, Tensor]:
        # as the library calls it, without hooks
        raw = network.forward(known.contiguous())
        if type(module) is AdditiveCoupling:
            return None, raw
        return raw[0], raw[1]

    return families.coupling(x, identity, changed, parameters)
