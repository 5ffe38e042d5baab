"""The flows of the census: each library's default blocks, as its documentation puts them together.

``depth`` counts the blocks that depend on the data: couplings, autoregressive or residual layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import FrEIA.framework
import FrEIA.modules
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import torch
import zuko
from nflows.nn.nets import ResidualNet
from torch import nn

from inn_guard.core.invertible import Invertible
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.autoregressive import maf
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import contractive_mlp
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.linear import InvertibleLinear
from inn_guard.layers.networks import MLP, zero_last
from inn_guard.layers.residual import Residual
from inn_guard.layers.residual_log_det import ExactLogDet, PowerSeries, ResidualLogDet
from inn_guard.models.aef.flow import AutoencoderConfig
from inn_guard.models.aef.model import PartitionAEF
from inn_guard.models.aef.networks import small_nets
from inn_guard.models.glow import GlowConfig, glow_flow
from inn_guard.models.iresnet import IResNetConfig, iresnet, power_series
from inn_guard.models.nif.model import NIF, GaussianNIF
from inn_guard.models.nif.widening import DenseWidening

__all__ = ["FLOWS", "Architecture", "normflows_realnvp", "zuko_flow"]

Shape = tuple[int, ...]  #: of one sample: (features,) or (channels, height, width)
EXACT_UP_TO = 8  #: dimensions; beyond, a log-determinant costs too many products
LATENT = 16  #: dimension of the codes of AEF and NIF


@dataclass(frozen=True)
class Architecture:
    """One kind of flow.

    Attributes:
        library: whose blocks it consists of.
        build: (shape of one sample, depth, width of the networks) -> a fresh model.
        images: whether it takes images as they are; else samples are flattened.
        tables: whether it takes anything but images.
        largest: number of dimensions beyond which it is left out: an autoregressive inverse takes
            one pass per dimension.
    """

    library: str
    build: Callable[[Shape, int, int], nn.Module]
    images: bool = False
    tables: bool = True
    largest: int = 10_000

    def takes(self, shape: Shape) -> bool:
        """Whether the census has this flow on samples of that shape."""
        if len(shape) == 1 and not self.tables:
            return False
        return math.prod(shape) <= self.largest


# -- nflows


def nflows_realnvp(shape: Shape, depth: int, width: int) -> nn.Module:
    """The class SimpleRealNVP."""
    return nflows.flows.SimpleRealNVP(
        math.prod(shape), width, num_layers=depth, num_blocks_per_layer=2
    )


def nflows_maf(shape: Shape, depth: int, width: int) -> nn.Module:
    """The class MaskedAutoregressiveFlow, which is the README's example."""
    return nflows.flows.MaskedAutoregressiveFlow(
        math.prod(shape), width, num_layers=depth, num_blocks_per_layer=2
    )


def nflows_nsf(shape: Shape, depth: int, width: int) -> nn.Module:
    """Rational quadratic couplings with linear tails beyond 3, between reversals."""
    features = math.prod(shape)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(nflows.transforms.ReversePermutation(features))
        layers.append(
            nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
                torch.arange(features) % 2,
                lambda before, after: ResidualNet(before, after, width),
                tails="linear",
                tail_bound=3.0,
            )
        )
    base = nflows.distributions.StandardNormal([features])
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(layers), base)


# -- FrEIA


def _subnet(before: int, after: int, *, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(before, width), nn.ReLU(), nn.Linear(width, after))


def freia_all_in_one(shape: Shape, depth: int, width: int) -> nn.Module:
    """AllInOneBlock with soft permutations, as in the quick start."""
    net = FrEIA.framework.SequenceINN(math.prod(shape))
    for _ in range(depth):
        net.append(
            FrEIA.modules.AllInOneBlock,
            subnet_constructor=partial(_subnet, width=width),
            permute_soft=True,
        )
    return net


def freia_glow(shape: Shape, depth: int, width: int) -> nn.Module:
    """GLOWCouplingBlock and PermuteRandom, as in the tutorial."""
    net = FrEIA.framework.SequenceINN(math.prod(shape))
    for k in range(depth):
        net.append(
            FrEIA.modules.GLOWCouplingBlock, subnet_constructor=partial(_subnet, width=width)
        )
        net.append(FrEIA.modules.PermuteRandom, seed=k)
    return net


# -- normflows


def _normflow(features: int, layers: list[nn.Module]) -> nn.Module:
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features), layers)


def normflows_realnvp(shape: Shape, depth: int, width: int) -> nn.Module:
    """Affine couplings with exponential scales and a learned base, as in the README."""
    features = math.prod(shape)
    kept = math.ceil(features / 2)
    layers: list[nn.Module] = []
    for _ in range(depth):
        net = normflows.nets.MLP([kept, width, width, 2 * (features - kept)], init_zeros=True)
        layers.append(normflows.flows.AffineCouplingBlock(net))
        layers.append(normflows.flows.Permute(features, mode="swap"))
    return _normflow(features, layers)


def normflows_nsf(shape: Shape, depth: int, width: int) -> nn.Module:
    """Coupled rational quadratic splines between LU layers, as in the example."""
    features = math.prod(shape)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(normflows.flows.CoupledRationalQuadraticSpline(features, 2, width))
        layers.append(normflows.flows.LULinearPermute(features))
    return _normflow(features, layers)


def normflows_maf(shape: Shape, depth: int, width: int) -> nn.Module:
    """Masked affine autoregressive layers between LU layers."""
    features = math.prod(shape)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(normflows.flows.MaskedAffineAutoregressive(features, width, num_blocks=2))
        layers.append(normflows.flows.LULinearPermute(features))
    return _normflow(features, layers)


# -- zuko


def zuko_flow(kind: str, shape: Shape, depth: int, width: int) -> nn.Module:
    """A ready-made flow of ``zuko.flows``."""
    make = getattr(zuko.flows, kind)
    return make(math.prod(shape), transforms=depth, hidden_features=(width, width))


# -- ours


def our_glow(shape: Shape, depth: int, width: int) -> Invertible:
    """ActNorm, an invertible linear map and an affine coupling; of images ``glow_flow``."""
    if len(shape) == 3:
        levels = 2
        config = GlowConfig(levels=levels, blocks=max(1, depth // levels), hidden=width)
        return glow_flow(shape, config=config)
    features = shape[0]

    def network(before: int, after: int) -> nn.Module:
        return zero_last(MLP([before, width, width, after]))

    steps: list[Invertible] = []
    for _ in range(depth):
        steps += [
            ActNorm(features),
            InvertibleLinear(features),
            AffineCoupling.on_halves(features, network),
        ]
    return Chain(*steps)


def our_iresnet(shape: Shape, depth: int, width: int) -> Invertible:
    """ActNorm and contractive residual layers; of images ``iresnet``.

    The log-determinant is exact up to 8 dimensions, beyond it is the estimate of i-ResNets: ten
    terms of the series and one probe, the same at every call in eval mode.
    """
    if len(shape) == 3:
        levels = 2
        config = IResNetConfig(levels, max(1, depth // levels), hidden=width, log_det=power_series)
        return iresnet(shape, config=config)
    features = shape[0]
    steps: list[Invertible] = []
    for k in range(depth):
        log_det: ResidualLogDet = ExactLogDet()
        if features > EXACT_UP_TO:
            log_det = PowerSeries(seed=k << 32)
        network = contractive_mlp([features, width, width, features], coefficient=0.9)
        steps += [ActNorm(features), Residual(network, log_det=log_det)]
    return Chain(*steps)


def our_maf(shape: Shape, depth: int, width: int) -> Invertible:
    """The package's ``maf``."""
    return maf(math.prod(shape), layers=depth, hidden=width)


def our_aef(shape: Shape, depth: int, width: int) -> Invertible:
    """An autoencoder within flows whose core is the centre of the image.

    The data are standardised, so that ActNorm takes the place of the paper's logit. ``depth`` is
    that of the core encoder and of the prior.
    """
    flow = partial(maf, layers=depth, hidden=width)
    config = AutoencoderConfig(
        (shape[0], shape[1], shape[2]),
        LATENT,
        nets=partial(small_nets, channels=(width // 2, width)),
        core_encoder=flow,
        prior=flow,
        preprocessing=lambda channels: [ActNorm(channels)],
    )
    return PartitionAEF(config)


def our_nif(shape: Shape, depth: int, width: int) -> Invertible:
    """Our Glow with a noisy injective flow of 16 dimensions as its prior."""
    dims = math.prod(shape)
    prior = GaussianNIF(DenseWidening(LATENT, dims), (dims,))
    return NIF(our_glow(shape, depth, width), prior)


AUTOREGRESSIVE = 64  #: dimensions

FLOWS: dict[str, Architecture] = {
    "nflows RealNVP": Architecture("nflows", nflows_realnvp),
    "nflows MAF": Architecture("nflows", nflows_maf, largest=AUTOREGRESSIVE),
    "nflows NSF": Architecture("nflows", nflows_nsf),
    "FrEIA AllInOne": Architecture("FrEIA", freia_all_in_one),
    "FrEIA GLOW": Architecture("FrEIA", freia_glow),
    "normflows RealNVP": Architecture("normflows", normflows_realnvp),
    "normflows NSF": Architecture("normflows", normflows_nsf),
    "normflows MAF": Architecture("normflows", normflows_maf, largest=AUTOREGRESSIVE),
    "zuko RealNVP": Architecture("zuko", partial(zuko_flow, "RealNVP")),
    "zuko MAF": Architecture("zuko", partial(zuko_flow, "MAF"), largest=AUTOREGRESSIVE),
    "zuko NSF": Architecture("zuko", partial(zuko_flow, "NSF"), largest=AUTOREGRESSIVE),
    "our Glow": Architecture("inn_guard", our_glow, images=True),
    "our i-ResNet": Architecture("inn_guard", our_iresnet, images=True),
    "our MAF": Architecture("inn_guard", our_maf, largest=AUTOREGRESSIVE),
    "our AEF": Architecture("inn_guard", our_aef, images=True, tables=False),
    "our NIF": Architecture("inn_guard", our_nif, images=True, tables=False),
}
