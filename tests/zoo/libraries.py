"""Small models of every library and their two directions by the library itself, not inn_guard.

Weights are drawn in float32 from a seed; ``strength`` multiplies them, which is what makes a net
break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import FrEIA.framework
import FrEIA.modules
import memcnn
import nflows.distributions
import normflows as nf
import torch
import zuko
from nflows import flows, transforms
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from tests.cases.case import seeded

D = 4
Pair = tuple[
    Tensor, Tensor | None
]  #: value and log-determinant (B,), None where the library has none


class Library(NamedTuple):
    """A builder of a model, and its two directions on data and on latents."""

    build: Callable[[], nn.Module]
    encode: Callable[[nn.Module, Tensor], Pair]
    decode: Callable[[nn.Module, Tensor], Pair]


def mlp(inputs: int = D // 2, outputs: int = D) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def residual(inputs: int, outputs: int) -> nn.Module:
    return ResidualNet(inputs, outputs, 12, num_blocks=1, activation=torch.tanh)


def mask(k: int) -> Tensor:
    return (torch.arange(D) + k) % 2


def nflows_chain(layer: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: transforms.CompositeTransform([layer(k) for k in range(3)])


def nflows_autoregressive(k: int) -> nn.Module:
    return transforms.MaskedAffineAutoregressiveTransform(
        D, 12, num_blocks=1, activation=torch.tanh
    )


def nflows_spline(k: int) -> nn.Module:
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask(k), residual, num_bins=5, tails="linear", tail_bound=3.0
    )


def freia(block: type, **settings) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = FrEIA.framework.SequenceINN(D)
        for _ in range(3):
            net.append(block, subnet_constructor=lambda i, o: mlp(i, o), **settings)
        return net

    return build


def normalizing_flow(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = [part for _ in range(3) for part in (layer(), nf.flows.Permute(D, "swap"))]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(D), layers)

    return build


def zuko_flow(kind: str, **settings) -> Callable[[], nn.Module]:
    return lambda: getattr(zuko.flows, kind)(
        D, transforms=3, hidden_features=(16,), activation=nn.Tanh, **settings
    )


def memcnn_coupling(kind: str) -> Callable[[], nn.Module]:
    adapter = memcnn.AffineAdapterNaive if kind == "affine" else None
    return lambda: memcnn.create_coupling(
        mlp(outputs=2), mlp(outputs=2), coupling=kind, adapter=adapter
    )


class ByHand(nn.Module):
    """Three affine couplings with exp, written as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Pair:
        total = x.new_zeros(len(x))
        for net in self.nets:
            kept, moved = x.chunk(2, 1)
            log_scale, shift = net(kept).chunk(2, 1)
            x, total = (
                torch.cat([moved * log_scale.exp() + shift, kept], 1),
                total + log_scale.sum(1),
            )
        return x, total

    def inverse(self, z: Tensor) -> Pair:
        total = z.new_zeros(len(z))
        for net in reversed(self.nets):
            moved, kept = z.chunk(2, 1)
            log_scale, shift = net(kept).chunk(2, 1)
            z, total = (
                torch.cat([kept, (moved - shift) * (-log_scale).exp()], 1),
                total - log_scale.sum(1),
            )
        return z, total


def _of_nflows(build: Callable[[], nn.Module]) -> Library:
    return Library(build, lambda m, x: m(x), lambda m, z: m.inverse(z))


def _of_freia(build: Callable[[], nn.Module]) -> Library:
    return Library(
        build, lambda m, x: _per_sample(*m(x)), lambda m, z: _per_sample(*m(z, rev=True))
    )


def _per_sample(value: Tensor, log_det: Tensor | float) -> Pair:
    """A log-determinant that is a plain number holds for every sample."""
    return value, torch.as_tensor(log_det, dtype=value.dtype).expand(len(value))


def _of_normflows(build: Callable[[], nn.Module]) -> Library:
    return Library(
        build, lambda m, x: m.inverse_and_log_det(x), lambda m, z: m.forward_and_log_det(z)
    )


def _of_zuko(build: Callable[[], nn.Module]) -> Library:
    return Library(
        build,
        lambda m, x: m().transform.call_and_ladj(x),
        lambda m, z: m().transform.inv.call_and_ladj(z),
    )


def _of_memcnn(build: Callable[[], nn.Module]) -> Library:
    return Library(build, lambda m, x: (m(x), None), lambda m, z: (m.inverse(z), None))


def _block(**settings) -> Callable[[], nn.Module]:
    outputs = D if settings.get("scale", True) else D // 2
    return lambda: nf.flows.AffineCouplingBlock(
        nf.nets.MLP([D // 2, 16, outputs], leaky=0.1), **settings
    )


def _masked() -> nn.Module:
    return nf.flows.MaskedAffineFlow(
        mask(0).float(), nf.nets.MLP([D, 16, D]), nf.nets.MLP([D, 16, D])
    )


def _nflows_flow() -> nn.Module:
    layers = [
        transforms.LULinear(D, identity_init=False),
        transforms.AffineCouplingTransform(mask(0), residual),
    ]
    return flows.Flow(
        transforms.CompositeTransform(layers), nflows.distributions.StandardNormal([D])
    )


LIBRARIES: dict[str, Library] = {
    "nflows affine": _of_nflows(
        nflows_chain(lambda k: transforms.AffineCouplingTransform(mask(k), residual))
    ),
    "nflows additive": _of_nflows(
        nflows_chain(lambda k: transforms.AdditiveCouplingTransform(mask(k), residual))
    ),
    "nflows spline": _of_nflows(nflows_chain(nflows_spline)),
    "nflows autoregressive": _of_nflows(nflows_chain(nflows_autoregressive)),
    "nflows LU": Library(
        _nflows_flow, lambda m, x: m._transform(x), lambda m, z: m._transform.inverse(z)
    ),
    "FrEIA GLOW": _of_freia(freia(FrEIA.modules.GLOWCouplingBlock)),
    "FrEIA NICE": _of_freia(freia(FrEIA.modules.NICECouplingBlock)),
    "FrEIA AllInOne": _of_freia(freia(FrEIA.modules.AllInOneBlock)),
    "normflows exp": _of_normflows(normalizing_flow(_block())),
    "normflows sigmoid": _of_normflows(normalizing_flow(_block(scale_map="sigmoid"))),
    "normflows additive": _of_normflows(normalizing_flow(_block(scale=False))),
    "normflows masked": _of_normflows(normalizing_flow(_masked)),
    "normflows autoregressive": _of_normflows(
        normalizing_flow(lambda: nf.flows.MaskedAffineAutoregressive(D, 12, num_blocks=1))
    ),
    "zuko NICE": _of_zuko(zuko_flow("NICE")),
    "zuko MAF": _of_zuko(zuko_flow("MAF")),
    "zuko NSF": _of_zuko(zuko_flow("NSF", bins=5)),
    "MemCNN additive": _of_memcnn(memcnn_coupling("additive")),
    "MemCNN affine": _of_memcnn(memcnn_coupling("affine")),
    "by hand": _of_nflows(ByHand),
}


def built(name: str, strength: float) -> nn.Module:
    """A fresh model in eval mode with float32 weights."""
    with seeded(dtype=torch.float32):
        module = LIBRARIES[name].build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.mul_(strength)
    return module
