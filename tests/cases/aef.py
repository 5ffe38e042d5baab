"""Cases of the autoregressive layers and of autoencoders within flows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from inn_guard.core.invertible import Invertible
from inn_guard.layers.autoregressive import MADE, MaskedAutoregressive, iaf, maf
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.scales import ExpScale
from inn_guard.models.aef.flow import AutoencoderConfig, ResidualScale, logit_actnorm, no_flow
from inn_guard.models.aef.model import (
    LinearAEF,
    PartitionAEF,
    center_core,
    corner_core,
    random_core,
)
from inn_guard.models.aef.networks import big_nets, small_nets
from tests.cases.case import Case, randomize, seeded

BATCH = 4


def case(
    name: str, build: Callable[[], Invertible], draw: Callable[[], Tensor], **abilities
) -> Case:
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


IMAGE = (1, 4, 4)
SMALL = AutoencoderConfig(
    shape=IMAGE,
    latent=3,
    nets=partial(small_nets, channels=(3, 4)),
    core_encoder=partial(maf, layers=2, hidden=8, blocks=1),
    prior=partial(maf, layers=2, hidden=8, blocks=1),
    preprocessing=partial(logit_actnorm, alpha=0.05),
)
COLOUR = AutoencoderConfig(
    shape=(2, 4, 4),
    latent=4,
    nets=partial(big_nets, blocks=1, smallest=2),
    core_encoder=no_flow,
    prior=no_flow,
    preprocessing=partial(logit_actnorm, alpha=0.05),
)


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(BATCH, *shape)


def any_core(shape, latent):
    return random_core(shape, latent, generator=torch.Generator().manual_seed(3))


def expanded() -> Tensor:
    return torch.cat([torch.randn(BATCH, 3), torch.rand(BATCH, 16)], 1)


CASES = [
    case("masked autoregressive", lambda: made(5), vectors(5)),
    case("masked autoregressive exp", lambda: made(5, scale=ExpScale()), vectors(5)),
    case("masked autoregressive of one", lambda: made(1), vectors(1)),
    case("inverse autoregressive", lambda: InverseLayer(made(5)), vectors(5)),
    case("inverted linear", lambda: InverseLayer(InvertibleLinear(5)), vectors(5)),
    case("maf", lambda: maf(4, layers=3, hidden=12, blocks=1), vectors(4), has_layers=True),
    case("iaf", lambda: iaf(4, layers=2, hidden=12, blocks=1), vectors(4), has_layers=True),
    case("residual scale", lambda: ResidualScale(3), vectors(5)),
    case("center", lambda: PartitionAEF(SMALL, center_core), images(*IMAGE), has_layers=True),
    case("corner", lambda: PartitionAEF(SMALL, corner_core), images(*IMAGE), has_layers=True),
    case("random", lambda: PartitionAEF(SMALL, any_core), images(*IMAGE), has_layers=True),
    case(
        "big nets, no flows", lambda: PartitionAEF(COLOUR), images(*COLOUR.shape), has_layers=True
    ),
    case("expanded", lambda: LinearAEF(SMALL).joint, expanded, has_layers=True),
]
