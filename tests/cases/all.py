"""CASES: every model of the contract, merged from the files of this folder.

``make test`` runs tests over cases on REPRESENTATIVE ones only; ``make thorough`` runs them on all
(tests/README.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import pytest

from tests.cases.case import Case, randomize, seeded

__all__ = ["CASES", "REPRESENTATIVE", "Case", "one_of_each_kind", "randomize", "seeded"]

MODULES = (
    "aef",
    "freia",
    "freia_nets",
    "functions",
    "layers",
    "memcnn",
    "nflows",
    "normflows",
    "zuko",
)

CASES: list[Case] = [
    case for name in MODULES for case in importlib.import_module(f"tests.cases.{name}").CASES
]

#: Of every library one case of each kind of layer, and one of each way in which its adapter takes a
#: model apart: with a context, on images, nested, inverted, split into scales, with an iterative
#: inverse.
REPRESENTATIVE = frozenset(
    {
        "aef/masked autoregressive",
        "aef/inverse autoregressive",
        "aef/residual scale",
        "aef/random",
        "aef/expanded",
        "freia-NICECouplingBlock",
        "freia-GLOWCouplingBlock-image-condition",
        "freia-AffineCouplingOneSided",
        "freia-AllInOneBlock-image",
        "freia-AllInOneBlock-soft",
        "freia-ConditionalAffineTransform",
        "freia-InvAutoAct",
        "freia-LearnedElementwiseScaling",
        "freia-ActNorm-image",
        "freia-HouseholderPerm-fixed",
        "freia-Fixed1x1Conv",
        "freia-HaarDownsampling",
        "freia-Reshape",
        "freia-Split-image",
        "freia-Concat",
        "freia-IResNetLayer",
        "freia-SequenceINN-nested",
        "freia-GraphINN-branches",
        "freia-GraphINN-nested",
        "module-in-context",
        "callables-closures-layers",
        "callables-log-det-apart",
        "callables-reverse-flag",
        "chain-in-context",
        "torch-tanh-cached",
        "torch-stack",
        "torch-compose-inverse",
        "ours/additive images",
        "ours/affine sigmoid",
        "ours/affine clamped",
        "ours/affine checkerboard mask",
        "ours/actnorm images",
        "ours/shuffle",
        "ours/1x1 convolution LU",
        "ours/squeeze",
        "ours/factor out",
        "ours/on remaining",
        "ours/logit",
        "ours/zero padding",
        "ours/injective chain",
        "ours/residual images",
        "ours/neural ODE",
        "ours/residual flow",
        "ours/nested chains",
        "ours/conditional chain",
        "ours/glow flow",
        "memcnn-AdditiveCoupling",
        "memcnn-AffineCoupling-AffineAdapterSigmoid",
        "memcnn-InvertibleModuleWrapper-nested",
        "memcnn-chain",
        "nflows-PointwiseAffineTransform",
        "nflows-AffineCouplingTransform-context",
        "nflows-AffineCouplingTransform-image",
        "nflows-PiecewiseLinearCouplingTransform-tails",
        "nflows-PiecewiseQuadraticCDF",
        "nflows-PiecewiseCubicCouplingTransform",
        "nflows-PiecewiseRationalQuadraticCouplingTransform-unconditional",
        "nflows-MaskedAffineAutoregressiveTransform-context",
        "nflows-LULinear",
        "nflows-OneByOneConvolution",
        "nflows-BatchNorm",
        "nflows-ReversePermutation",
        "nflows-SqueezeTransform",
        "nflows-LogTanh",
        "nflows-CompositeTransform-nested",
        "nflows-MultiscaleCompositeTransform-odd",
        "nflows-Flow-context",
        "normflows-Planar-leaky_relu",
        "normflows-MaskedAffineFlow",
        "normflows-AffineCouplingBlock-channel_inv",
        "normflows-GlowBlock",
        "normflows-MaskedAffineAutoregressive",
        "normflows-Invertible1x1Conv",
        "normflows-LULinearPermute",
        "normflows-CoupledRationalQuadraticSpline-context",
        "normflows-CircularAutoregressiveRationalQuadraticSpline",
        "normflows-PeriodicWrap-inside",
        "normflows-Residual-2d",
        "normflows-Reverse",
        "normflows-ClassCondFlow",
        "normflows-MultiscaleFlow",
        "zuko-GeneralCouplingTransform-context",
        "zuko-MaskedAutoregressiveTransform",
        "zuko-LazyComposedTransform-nested",
        "zuko-Unconditional",
        "zuko-NSF-context",
        "zuko-NCSF",
        "zuko-BPF",
        "zuko-NAF",
        "zuko-MonotonicAffineTransform",
        "zuko-SoftclipTransform",
        "zuko-PermutationTransform",
        "zuko-LULinearTransform",
        "zuko-DependentTransform",
        "zuko-GaussianizationTransform",
    }
)


#: for tests that take long on every case: a third of the representative ones
A_THIRD = frozenset(sorted(REPRESENTATIVE)[::3])


def one_of_each_kind(cases: Iterable[Case], fast: frozenset[str] = REPRESENTATIVE) -> list[Any]:
    """Parameters over cases; ids that are not in ``fast`` are left to ``make thorough``."""
    parameters = []
    for case in cases:
        marks = [] if case.id in fast else [pytest.mark.thorough]
        parameters.append(pytest.param(case, id=case.id, marks=marks))
    return parameters
