"""Cases of our own layers and models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import contractive_conv_net, contractive_mlp
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import InvertibleLinear, LULinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.networks import MLP, Conditional, ConvNet
from inn_guard.layers.ode import FixedStep, NeuralODE
from inn_guard.layers.partition import Mask
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.reshape import Flatten, Squeeze, ZeroPadding
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import ExactLogDet
from inn_guard.layers.scales import (
    ClampedScale,
    ExpScale,
    ScaleFunction,
    SigmoidScale,
    squashed_sigmoid,
)
from inn_guard.models.glow import GlowConfig, glow_classifier, glow_flow
from inn_guard.models.iresnet import IResNetConfig, checkerboard_residual_flow, iresnet
from inn_guard.models.toy import checkerboard_net, regression_net
from tests.cases.case import Case, randomize, seeded

BATCH = 4
IMAGE = (4, 4, 4)
VECTOR = (5,)


def case(name: str, build: Callable[[], Invertible], shape: tuple[int, ...], **abilities) -> Case:
    """Parameters are moved off their initial values, so that no layer is trivial."""

    def make() -> tuple[Invertible, Tensor]:
        with seeded():
            model = build()
            model = build().double()
            randomize(model, 0.1)
            return model.eval(), torch.randn(BATCH, *shape, dtype=torch.float64)

    return Case(f"ours/{name}", make, **abilities)


def mlp(kept: int, out: int) -> nn.Module:
    return MLP([kept, 16, out], activation=nn.SiLU)


def convnet(kept: int, out: int) -> nn.Module:
    return ConvNet(kept, 8, out)


def affine(scale: ScaleFunction) -> Invertible:
    return AffineCoupling.on_halves(VECTOR[0], mlp, scale=scale)


def masked_affine() -> Invertible:
    checkerboard = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    return AffineCoupling(ConvNet(4, 8, 8, activation=nn.ELU), partition=Mask(checkerboard))


def conditional() -> Invertible:
    chain = Chain(
        AffineCoupling(Conditional(MLP([3 + 2, 16, 4]))),
        Permutation.reverse(5),
        Chain(ActNorm(5), AdditiveCoupling(Conditional(MLP([3 + 2, 16, 2])))),
    )
    return chain.with_context(torch.randn(BATCH, 2))


def nested() -> Invertible:
    inner = Chain(Diagonal(5), Permutation.shuffle(5, generator=torch.Generator().manual_seed(1)))
    return Chain(Chain(), inner, Chain(affine(SigmoidScale()), inner), LULinear(5))


def injective() -> Invertible:
    return Chain(InvertibleLinear(5), ZeroPadding(2), AdditiveCoupling.on_halves(3, mlp))


def preprocessed() -> tuple[Invertible, Tensor]:
    with seeded():
        return Logit(0.05), torch.rand(BATCH, 5, dtype=torch.float64)


def swish_trunk() -> Invertible:
    return glow_classifier(
        (3, 4, 4), config=GlowConfig(2, 1, 8, partial(AffineCoupling.on_halves, scale=ExpScale()))
    )


def additive_flow() -> Invertible:
    config = GlowConfig(2, 2, 8, AdditiveCoupling.on_halves, LULinear)
    return glow_flow((2, 4, 4), config=config)


class Field(nn.Module):
    """f(t, x) = net([x, t])."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.net = MLP([features + 1, 16, features], activation=nn.Tanh)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand(len(x), 1)], 1))


def exact_iresnet() -> Invertible:
    return iresnet((1, 2, 4), config=IResNetConfig(1, 2, 4, log_det=lambda seed: ExactLogDet()))


DISCRETISED = {
    "float64_floor": 2e-8,
    "log_det_floor": 5e-8,
    "floor_reason": "8 steps of Runge-Kutta, error of order 8^-4; backward they are not the exact "
    "inverse",
}

CASES = [
    case("additive", lambda: AdditiveCoupling.on_halves(5, mlp), VECTOR),
    case("additive swapped", lambda: AdditiveCoupling.on_halves(5, mlp, swapped=True), VECTOR),
    case("additive images", lambda: AdditiveCoupling.on_halves(4, convnet), IMAGE),
    case("affine sigmoid", lambda: affine(SigmoidScale()), VECTOR),
    case("affine squashed sigmoid", lambda: affine(squashed_sigmoid()), VECTOR),
    case("affine exp", lambda: affine(ExpScale()), VECTOR),
    case("affine clamped", lambda: affine(ClampedScale()), VECTOR),
    case("affine images", lambda: AffineCoupling.on_halves(4, convnet), IMAGE),
    case("affine checkerboard mask", masked_affine, IMAGE),
    case("actnorm", lambda: ActNorm(5), VECTOR),
    case("actnorm images", lambda: ActNorm(4), IMAGE),
    case("reverse", lambda: Permutation.reverse(5), VECTOR),
    case(
        "shuffle", lambda: Permutation.shuffle(4, generator=torch.Generator().manual_seed(1)), IMAGE
    ),
    case("linear", lambda: InvertibleLinear(5), VECTOR),
    case("1x1 convolution", lambda: InvertibleLinear(4), IMAGE),
    case("1x1 convolution LU", lambda: LULinear(4), IMAGE),
    case("squeeze", Squeeze, IMAGE),
    case("flatten", lambda: Flatten(IMAGE), IMAGE),
    case("factor out", lambda: FactorOut((3, 2, 2)), (3, 2, 2)),
    case("on remaining", lambda: OnRemaining(InvertibleLinear(2), shape=(2, 3)), (8,)),
    Case("ours/logit", preprocessed),
    case(
        "zero padding",
        lambda: ZeroPadding(2),
        VECTOR,
        bijective=False,
        has_log_det=False,
        has_inverse_log_det=False,
    ),
    case(
        "injective chain",
        injective,
        VECTOR,
        bijective=False,
        has_layers=True,
        has_log_det=False,
        has_inverse_log_det=False,
    ),
    case("residual", lambda: Residual(contractive_mlp([5, 16, 5], coefficient=0.9)), VECTOR),
    case(
        "residual images", lambda: Residual(contractive_conv_net(2, 4, coefficient=0.9)), (2, 3, 3)
    ),
    case("neural ODE", lambda: NeuralODE(Field(5), solver=FixedStep(8)), VECTOR, **DISCRETISED),
    case("iresnet", exact_iresnet, (1, 2, 4), has_layers=True),
    case(
        "residual flow",
        lambda: checkerboard_residual_flow(blocks=4, hidden=8),
        (2,),
        has_layers=True,
    ),
    case("nested chains", nested, VECTOR, has_layers=True),
    case("conditional chain", conditional, VECTOR, has_layers=True),
    case("glow classifier", swish_trunk, (3, 4, 4), has_layers=True),
    case("glow flow", additive_flow, (2, 4, 4), has_layers=True),
    case("checkerboard net", lambda: checkerboard_net(blocks=4, hidden=8), (2,), has_layers=True),
    case("regression net", lambda: regression_net(blocks=3, hidden=8), (2,), has_layers=True),
]
