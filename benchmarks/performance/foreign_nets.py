"""The nets of ``performance.foreign``: one for each library and kind of layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import FrEIA.framework
import FrEIA.modules
import memcnn
import nflows.nn.nets
import nflows.transforms
import normflows
import torch
import zuko
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETS", "Net"]

COUPLINGS, OTHERS, CALLABLES = 150, 20, 60  #: least ratios that are wanted


@dataclass(frozen=True)
class Net:
    """A model with data.

    Attributes:
        model: arguments of ``wrap``.
        x: a batch.
        coupling: whether its layers are couplings.
        goal: the least ratio that is wanted.
    """

    model: dict[str, Any]
    x: Tensor
    coupling: bool
    goal: int


def vectors(config: Any) -> Tensor:
    return torch.randn(config.batch, config.features)


def images(config: Any, channels: int = 3) -> Tensor:
    return torch.randn(config.batch, channels, config.size, config.size)


def of_model(
    make: Callable[[Any], nn.Module],
    data: Callable[[Any], Tensor] = vectors,
    *,
    goal: int = COUPLINGS,
) -> Callable[[Any], Net]:
    """A net of a library, perturbed so that nothing starts at zero, and called once."""

    def build(config: Any) -> Net:
        model, x = make(config), data(config)
        with torch.no_grad():
            for parameter in filter(Tensor.is_floating_point, model.parameters()):
                parameter.add_(0.01 * torch.randn_like(parameter))
        return Net({"model": model.eval()}, x, goal == COUPLINGS, goal)

    return build


def mlp(config: Any, inputs: int, outputs: int) -> nn.Module:
    hidden = config.hidden
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, outputs),
    )  # fmt: skip


def convolutions(config: Any, inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, config.hidden, 3, padding=1), nn.ReLU(),
        nn.Conv2d(config.hidden, config.hidden, 1), nn.ReLU(),
        nn.Conv2d(config.hidden, outputs, 3, padding=1),
    )  # fmt: skip


def nflows_chain(kind: str, **settings: Any) -> Callable[[Any], nn.Module]:
    """Layers of nflows on vectors, with permutations in between."""

    def make(config: Any) -> nn.Module:
        layers = []
        for k in range(config.layers):
            mask = nflows.utils.create_alternating_binary_mask(config.features, even=k % 2 == 0)
            net = functools.partial(nflows.nn.nets.ResidualNet, hidden_features=config.hidden)
            layer = getattr(nflows.transforms, kind)
            if "Coupling" in kind:
                layers.append(layer(mask, net, **settings))
            elif "Autoregressive" in kind:
                layers.append(layer(config.features, hidden_features=config.hidden, **settings))
            else:
                layers.append(layer(config.features, **settings))
            layers.append(nflows.transforms.RandomPermutation(config.features))
        return nflows.transforms.CompositeTransform(layers)

    return make


def nflows_images(config: Any) -> nn.Module:
    channels = 12
    layers: list[nn.Module] = [nflows.transforms.SqueezeTransform()]
    for k in range(config.layers):
        mask = nflows.utils.create_alternating_binary_mask(channels, even=k % 2 == 0)
        net = functools.partial(
            nflows.nn.nets.ConvResidualNet, hidden_channels=config.hidden, num_blocks=1
        )
        layers += [
            nflows.transforms.ActNorm(channels),
            nflows.transforms.OneByOneConvolution(channels),
            nflows.transforms.AffineCouplingTransform(mask, net),
        ]
    model = nflows.transforms.CompositeTransform(layers)
    model(images(config))  # its ActNorm takes its scales from the first batch
    return model


def freia_chain(kind: str, **settings: Any) -> Callable[[Any], nn.Module]:
    """Blocks of FrEIA on vectors or images."""

    def make(config: Any) -> nn.Module:
        on_images = settings.get("images", False)
        shape = (12, config.size // 2, config.size // 2) if on_images else (config.features,)
        subnet = functools.partial(convolutions if on_images else mlp, config)
        model = FrEIA.framework.SequenceINN(*shape)
        for _ in range(config.layers):
            model.append(getattr(FrEIA.modules, kind), subnet_constructor=subnet)
            if kind != "AllInOneBlock":
                model.append(FrEIA.modules.PermuteRandom, seed=0)
        return model

    return make


def squeezed_images(config: Any) -> Tensor:
    return torch.randn(config.batch, 12, config.size // 2, config.size // 2)


def normflows_chain(kind: str) -> Callable[[Any], nn.Module]:
    """Flows of normflows on vectors."""

    def make(config: Any) -> nn.Module:
        features, hidden = config.features, config.hidden
        flows: list[nn.Module] = []
        for k in range(config.layers):
            if kind == "AffineCouplingBlock":
                net = normflows.nets.MLP([features // 2, hidden, hidden, features])
                flows += [normflows.flows.AffineCouplingBlock(net)]
                flows += [normflows.flows.Permute(features, mode="shuffle")]
            elif kind == "MaskedAffineFlow":
                mask = torch.arange(features) % 2 == k % 2
                nets = [normflows.nets.MLP([features, hidden, hidden, features]) for _ in range(2)]
                flows += [normflows.flows.MaskedAffineFlow(mask.float(), *nets)]
            elif kind == "CoupledRationalQuadraticSpline":
                flows += [normflows.flows.CoupledRationalQuadraticSpline(features, 1, hidden)]
                flows += [normflows.flows.LULinearPermute(features)]
            else:
                flows += [normflows.flows.MaskedAffineAutoregressive(features, hidden)]
                flows += [normflows.flows.LULinearPermute(features)]
        return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features), flows)

    return make


def normflows_images(config: Any) -> nn.Module:
    shape = (12, config.size // 2, config.size // 2)
    flows = [normflows.flows.GlowBlock(12, config.hidden) for _ in range(config.layers)]
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(shape), flows)
    model.inverse(squeezed_images(config))  # its ActNorm takes its scales from the first batch
    return model


def zuko_flow(kind: str) -> Callable[[Any], nn.Module]:
    """A flow of zuko."""

    def make(config: Any) -> nn.Module:
        hidden = (config.hidden, config.hidden)
        if kind == "MAF":
            return zuko.flows.MAF(config.features, transforms=config.layers, hidden_features=hidden)
        if kind == "NSF":
            return zuko.flows.NSF(config.features, transforms=config.layers, hidden_features=hidden)
        if kind == "spline coupling":
            return zuko.flows.NSF(
                config.features, transforms=config.layers, hidden_features=hidden, passes=2
            )
        return zuko.flows.RealNVP(config.features, transforms=config.layers, hidden_features=hidden)

    return make


def memcnn_chain(config: Any) -> nn.Module:
    layers = []
    for _ in range(config.layers):
        nets = [convolutions(config, 6, 6) for _ in range(2)]
        coupling = memcnn.AdditiveCoupling(*nets)
        layers.append(memcnn.InvertibleModuleWrapper(coupling, keep_input=True))
    return _Reversible(layers)


class _Reversible(nn.Module):
    """MemCNN's wrappers one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z)  # type: ignore[operator]
        return z


class _Step(nn.Module):
    """Activation norm, 1x1 convolution and affine coupling, with a running objective."""

    def __init__(self, config: Any, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(0.1 * torch.randn(channels))
        self.log_scale = nn.Parameter(0.1 * torch.randn(channels))
        self.mixing = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.network = convolutions(config, channels // 2, channels)

    def forward_(self, x: Tensor, objective: Any) -> tuple[Tensor, Any]:
        shape, pixels = x.shape, x.shape[2] * x.shape[3]
        x = (x.flatten(2) + self.shift[:, None]) * self.log_scale[:, None].exp()
        x = functional.conv2d(x.view(shape), self.mixing[..., None, None])
        objective = objective + pixels * (self.log_scale.sum() + self.mixing.det().abs().log())
        first, second = x.chunk(2, dim=1)
        shift, scale = self._shift_and_scale(first)
        objective = objective + scale.log().flatten(1).sum(1)
        return torch.cat([first, (second + shift) * scale], dim=1), objective

    def reverse_(self, z: Tensor, objective: Any) -> tuple[Tensor, Any]:
        first, second = z.chunk(2, dim=1)
        shift, scale = self._shift_and_scale(first)
        z = torch.cat([first, second / scale - shift], dim=1)
        z = functional.conv2d(z, self.mixing.inverse()[..., None, None])
        z = z.flatten(2) * (-self.log_scale[:, None]).exp() - self.shift[:, None]
        return z.reshape(first.shape[0], -1, *first.shape[2:]), objective

    def _shift_and_scale(self, first: Tensor) -> tuple[Tensor, Tensor]:
        h = self.network(first)
        return h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)


class _Squeeze(nn.Module):
    """Blocks of 2 x 2 pixels become channels."""

    def forward_(self, x: Tensor, objective: Any) -> tuple[Tensor, Any]:
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return x.reshape(b, 4 * c, h // 2, w // 2), objective

    def reverse_(self, z: Tensor, objective: Any) -> tuple[Tensor, Any]:
        b, c, h, w = z.shape
        z = z.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return z.reshape(b, c // 4, 2 * h, 2 * w), objective


class OfficialGlow(nn.Module):
    """A Glow of the official code's shape and calls: no layer is inverted by ``inverse``."""

    def __init__(self, config: Any, *, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for _ in range(2):
            channels *= 4
            layers.append(_Squeeze())
            layers += [_Step(config, channels) for _ in range(depth)]
        self.layers = nn.ModuleList(layers)

    def forward_(self, x: Tensor, objective: Any) -> tuple[Tensor, Any]:
        """z and the objective plus the log-determinant."""
        for layer in self.layers:
            x, objective = layer.forward_(x, objective)  # type: ignore[operator]
        return x, objective

    def reverse_(self, z: Tensor, objective: Any) -> tuple[Tensor, Any]:
        """x and the objective."""
        for layer in reversed(self.layers):
            z, objective = layer.reverse_(z, objective)  # type: ignore[operator]
        return z, objective


def official_glow(config: Any) -> Net:
    """It as two functions, of which nothing is known."""
    glow = OfficialGlow(config, depth=config.layers).eval()
    model = {
        "encode": lambda x: glow.forward_(x, 0.0)[0],
        "decode": lambda z: glow.reverse_(z, 0.0)[0],
    }
    x = torch.randn(config.batch, 3, config.official_size, config.official_size)
    return Net(model, x, coupling=True, goal=CALLABLES)


NETS: dict[str, Callable[[Any], Net]] = {
    "official Glow as two callables": official_glow,
    "nflows AffineCouplingTransform": of_model(nflows_chain("AffineCouplingTransform")),
    "nflows AdditiveCouplingTransform": of_model(nflows_chain("AdditiveCouplingTransform")),
    "nflows rational-quadratic coupling": of_model(
        nflows_chain("PiecewiseRationalQuadraticCouplingTransform", tails="linear", tail_bound=3.0)
    ),
    "nflows image couplings": of_model(nflows_images, images),
    "nflows MaskedAffineAutoregressiveTransform": of_model(
        nflows_chain("MaskedAffineAutoregressiveTransform"), goal=OTHERS
    ),
    "nflows LULinear": of_model(nflows_chain("LULinear"), goal=OTHERS),
    "FrEIA GLOWCouplingBlock": of_model(freia_chain("GLOWCouplingBlock")),
    "FrEIA RNVPCouplingBlock": of_model(freia_chain("RNVPCouplingBlock")),
    "FrEIA NICECouplingBlock": of_model(freia_chain("NICECouplingBlock")),
    "FrEIA AllInOneBlock": of_model(freia_chain("AllInOneBlock")),
    "FrEIA GLOWCouplingBlock on images": of_model(
        freia_chain("GLOWCouplingBlock", images=True), squeezed_images
    ),
    "normflows AffineCouplingBlock": of_model(normflows_chain("AffineCouplingBlock")),
    "normflows MaskedAffineFlow": of_model(normflows_chain("MaskedAffineFlow")),
    "normflows CoupledRationalQuadraticSpline": of_model(
        normflows_chain("CoupledRationalQuadraticSpline")
    ),
    "normflows GlowBlock on images": of_model(normflows_images, squeezed_images),
    "normflows MaskedAffineAutoregressive": of_model(
        normflows_chain("MaskedAffineAutoregressive"), goal=OTHERS
    ),
    "zuko RealNVP": of_model(zuko_flow("RealNVP")),
    "zuko spline coupling": of_model(zuko_flow("spline coupling")),
    "zuko MAF": of_model(zuko_flow("MAF"), goal=OTHERS),
    "zuko NSF": of_model(zuko_flow("NSF"), goal=OTHERS),
    "MemCNN AdditiveCoupling on images": of_model(memcnn_chain, squeezed_images),
}
