"""The layers of invertible networks, each an `Invertible` with closed-form Jacobian products.

A coupling layer says what it keeps (a partition), how it scales (a scale function) and by which
network. The neural ODE needs torchdiffeq and is imported from its own file,
``inn_guard.layers.ode``.

>>> import torch
>>> layer = AffineCoupling.on_halves(4, lambda kept, out: MLP([kept, 16, out]))
>>> x = torch.ones(2, 4)
>>> torch.allclose(layer.inverse(layer(x)), x)
True
"""

from inn_guard.layers.actnorm import ActNorm, Diagonal
from inn_guard.layers.autoregressive import MADE, MaskedAutoregressive, iaf, maf
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import (
    Contraction,
    LipSwish,
    contractive,
    contractive_conv_net,
    contractive_mlp,
)
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling, Coupling
from inn_guard.layers.fixed_point import FixedPoint
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import InvertibleLinear, LULinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.networks import MLP, Conditional, ConvNet, zero_last
from inn_guard.layers.partition import Halves, Leading, Mask, Partition
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.reshape import Flatten, Squeeze, ZeroPadding
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import (
    ExactLogDet,
    PowerSeries,
    ResidualLogDet,
    RussianRoulette,
)
from inn_guard.layers.scales import (
    ClampedScale,
    ExpScale,
    ScaleFunction,
    SigmoidScale,
    SoftplusScale,
    squashed_sigmoid,
)

__all__ = [
    "MADE",
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Chain",
    "ClampedScale",
    "Conditional",
    "Contraction",
    "ConvNet",
    "Coupling",
    "Diagonal",
    "ExactLogDet",
    "ExpScale",
    "FactorOut",
    "FixedPoint",
    "Flatten",
    "Halves",
    "InverseLayer",
    "InvertibleLinear",
    "LULinear",
    "Leading",
    "LipSwish",
    "Logit",
    "Mask",
    "MaskedAutoregressive",
    "OnRemaining",
    "Partition",
    "Permutation",
    "PowerSeries",
    "Residual",
    "ResidualLogDet",
    "RussianRoulette",
    "ScaleFunction",
    "SigmoidScale",
    "SoftplusScale",
    "Squeeze",
    "ZeroPadding",
    "contractive",
    "contractive_conv_net",
    "contractive_mlp",
    "iaf",
    "maf",
    "squashed_sigmoid",
    "zero_last",
]
