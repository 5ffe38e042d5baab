"""Cases of the autoregressive layers and of autoencoders within flows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inn_guard.invertible import Invertible
from inn_guard.layers.autoregressive import MADE, Inverted, MaskedAutoregressive, iaf, maf
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.scales import ExpScale
from tests.case import Case, randomize, seeded

BATCH = 4


def case(name: str, build: Callable[[], Invertible], draw: Callable[[], Tensor], **abilities) -> Case:
    """Parameters are moved off their initial values, so that no layer is trivial."""

    def make() -> tuple[Invertible, Tensor]:
        with seeded():
            model = build().double()
            randomize(model, 0.1)
            return model.eval(), draw().double()

    return Case(f"aef/{name}", make, **abilities)


def vectors(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, size)


def made(size: int, **settings) -> Invertible:
    return MaskedAutoregressive(MADE(size, hidden=12), **settings)


CASES = [
    case("masked autoregressive", lambda: made(5), vectors(5)),
    case("masked autoregressive exp", lambda: made(5, scale=ExpScale()), vectors(5)),
    case("masked autoregressive of one", lambda: made(1), vectors(1)),
    case("inverse autoregressive", lambda: Inverted(made(5)), vectors(5)),
    case("inverted linear", lambda: Inverted(InvertibleLinear(5)), vectors(5)),
    case("maf", lambda: maf(4, layers=3, hidden=12, blocks=1), vectors(4), has_layers=True),
    case("iaf", lambda: iaf(4, layers=2, hidden=12, blocks=1), vectors(4), has_layers=True),
]
