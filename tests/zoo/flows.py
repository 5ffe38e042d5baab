"""FLOWS: default models of the libraries, fresh, trained, scaled until they break; and faulty ones.

Each is known by its chain of layers as plain calls of the library, without inn_guard;
`truth_of_uses` is made from these.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

D = 8
HIDDEN = 32

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
Inverse = Callable[[Tensor], Tensor]
Chain = list[tuple[Forward, Inverse]]


@dataclass(frozen=True)
class Flow:
    """One model.

    Attributes:
        name: library, kind, depth, what was done to it.
        make: () -> the module, with weights of a fixed seed.
        chain: module -> its layers in the direction x -> z, as the library computes them.
        data: (n, seed) -> x.
        base: module -> location and deviation of the base.
        draws: of the base, for the truth; fewer where an inverse takes D passes.
        declared: whether the library's object has a base.
    """

    name: str
    make: Callable[[], nn.Module]
    chain: Callable[[nn.Module], Chain]
    data: Callable[[int, int], Tensor]
    base: Callable[[nn.Module], tuple[Tensor, Tensor]]
    draws: int = 32768
    declared: bool = True


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def clusters(n: int, seed: int) -> Tensor:
    """Sixteen separated Gaussians."""
    centres = torch.randn(16, D, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    chosen = centres[torch.randint(16, (n,), generator=generator)]
    return chosen + 0.05 * torch.randn(n, D, generator=generator)


def heavy(n: int, seed: int) -> Tensor:
    """Rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    length = 3 * torch.rand(n, 1, generator=generator).pow(3)
    return torch.randn(n, D, generator=generator) * length


DATA = {"normal": normal, "clusters": clusters, "heavy": heavy}


def standard(module: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = next(module.parameters()).dtype
    return torch.zeros(D, dtype=dtype), torch.ones(D, dtype=dtype)


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, outputs),
    )


# -- nflows ------------------------------------------------------------------------------------


def nflows_flow(kind: str, depth: int) -> nn.Module:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet

    mask = torch.arange(D) % 2

    def net(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(inputs, outputs, HIDDEN)

    makers = {
        "affine": lambda: transforms.AffineCouplingTransform(mask, net),
        "additive": lambda: transforms.AdditiveCouplingTransform(mask, net),
        "spline": lambda: transforms.PiecewiseRationalQuadraticCouplingTransform(
            mask, net, tails="linear", tail_bound=3.0
        ),
        "MAF": lambda: transforms.MaskedAffineAutoregressiveTransform(D, HIDDEN),
        "IAF": lambda: transforms.InverseTransform(
            transforms.MaskedAffineAutoregressiveTransform(D, HIDDEN)
        ),
    }
    layers = []
    for _ in range(depth):
        mixing = transforms.LULinear(D) if kind == "LU" else transforms.RandomPermutation(D)
        layers += [mixing, makers["affine" if kind == "LU" else kind]()]
    return flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([D]))


def nflows_chain(flow: nn.Module) -> Chain:
    layers = flow._transform._transforms
    return [(layer, lambda z, layer=layer: layer.inverse(z)[0]) for layer in layers]


# -- FrEIA -------------------------------------------------------------------------------------


def freia_flow(kind: str, depth: int) -> nn.Module:
    import FrEIA.framework as framework
    import FrEIA.modules as modules

    net = framework.SequenceINN(D)
    for k in range(depth):
        net.append(getattr(modules, kind), subnet_constructor=perceptron)
        if kind != "AllInOneBlock":
            net.append(modules.PermuteRandom, seed=k)
    return net


def freia_chain(net: nn.Module) -> Chain:
    def forward(block: nn.Module) -> Forward:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            out, log_det = block([x])
            value = torch.as_tensor(log_det, dtype=x.dtype)
            return out[0], value.expand(len(x)) if value.dim() == 0 else value

        return call

    def inverse(block: nn.Module) -> Inverse:
        return lambda z: block([z], rev=True)[0][0]

    return [(forward(block), inverse(block)) for block in net.module_list]


# -- normflows ---------------------------------------------------------------------------------


def normflows_flow(kind: str, depth: int) -> nn.Module:
    import normflows

    def affine(**options: str) -> nn.Module:
        net = normflows.nets.MLP([D // 2, HIDDEN, HIDDEN, D])
        return normflows.flows.AffineCouplingBlock(net, **options)

    makers = {
        "affine": affine,
        "sigmoid": lambda: affine(scale_map="sigmoid"),
        "spline": lambda: normflows.flows.CoupledRationalQuadraticSpline(D, 2, HIDDEN),
        "MAF": lambda: normflows.flows.MaskedAffineAutoregressive(D, HIDDEN),
    }
    blocks = []
    for _ in range(depth):
        blocks += [makers[kind](), normflows.flows.Permute(D, "shuffle")]
    base = normflows.distributions.DiagGaussian(D, trainable=kind == "affine")
    if kind == "affine":  # a base of its own scale
        with torch.no_grad():
            base.log_scale.fill_(math.log(1.5))
    return normflows.NormalizingFlow(base, blocks)


def normflows_chain(flow: nn.Module) -> Chain:
    layers = list(reversed(flow.flows))
    return [(layer.inverse, lambda z, layer=layer: layer(z)[0]) for layer in layers]


def normflows_base(flow: nn.Module) -> tuple[Tensor, Tensor]:
    return flow.q0.loc.detach().flatten(), flow.q0.log_scale.detach().exp().flatten()


# -- zuko --------------------------------------------------------------------------------------


def zuko_flow(kind: str, depth: int) -> nn.Module:
    import zuko

    return getattr(zuko.flows, kind)(D, transforms=depth, hidden_features=(HIDDEN, HIDDEN))


def zuko_chain(flow: nn.Module) -> Chain:
    return [(step.call_and_ladj, step.inv) for step in flow().transform.transforms]


# -- our own layers, and chains with one fault ------------------------------------------------


class Coupling(nn.Module):
    """An affine coupling: z = (x1, x2 exp(s) + t), and what a fault makes of it.

    Args:
        k: number of the layer; even and odd ones change the other half.
        bound: of the log-scale s by tanh; None leaves it free.
    """

    def __init__(self, k: int, bound: float | None = 2.0) -> None:
        super().__init__()
        self.net = perceptron(D // 2, D)
        self.flip = bool(k % 2)
        self.bound = bound
        self.log_det_factor = 1.0
        self.log_det_offset = 0.0
        self.inverse_factor = 1.0

    def _parameters_of(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(kept).chunk(2, dim=1)
        if self.bound is not None:
            log_scale = self.bound * torch.tanh(log_scale)
        return shift, log_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(x)
        shift, log_scale = self._parameters_of(kept)
        z = self._join(kept, changed * log_scale.exp() + shift)
        return z, self.log_det_factor * log_scale.sum(1) + self.log_det_offset

    def inverse(self, z: Tensor) -> Tensor:
        kept, changed = self._split(z)
        shift, log_scale = self._parameters_of(kept)
        x = self._join(kept, (changed - shift) * (-log_scale).exp())
        return self.inverse_factor * x

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.flip else (first, second)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([changed, kept] if self.flip else [kept, changed], dim=1)


class Tail(nn.Module):
    """Identity, but beyond |z_0| > ``start`` the inverse adds a spike that float32 cannot hold."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x - self._spike(x), torch.zeros(len(x), dtype=x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        return z + self._spike(z)

    def _spike(self, t: Tensor) -> Tensor:
        """Of the first entry, added to the second: a coupling."""
        beyond = (t[:, :1].abs() - self.start).clamp(min=0)
        spike = torch.expm1(1e4 * beyond)
        return torch.cat([torch.zeros_like(spike), spike, torch.zeros_like(t[:, 2:])], dim=1)


class OwnFlow(nn.Module):
    """A chain of modules with forward -> (z, log_det) and inverse."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.chain = nn.ModuleList(layers)


def own_chain(flow: nn.Module) -> Chain:
    return [(layer, layer.inverse) for layer in flow.chain]


def own_flow(depth: int, bound: float | None, change: Callable[[OwnFlow], None]) -> nn.Module:
    flow = OwnFlow([Coupling(k, bound) for k in range(depth)])
    change(flow)
    return flow


# -- the list ----------------------------------------------------------------------------------


def seeded(make: Callable[[], nn.Module], gain: float, seed: int) -> Callable[[], nn.Module]:
    """The module with weights of this seed, every linear layer's weights times ``gain``."""

    def made() -> nn.Module:
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        module = make()
        torch.set_rng_state(before)
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    part.weight.mul_(gain)
        return module.eval()

    return made


def _library_flows() -> Iterator[Flow]:
    libraries = {
        "nflows": (
            nflows_flow,
            nflows_chain,
            standard,
            ("affine", "additive", "spline", "MAF", "IAF", "LU"),
        ),
        "FrEIA": (
            freia_flow,
            freia_chain,
            standard,
            ("AllInOneBlock", "GLOWCouplingBlock", "RNVPCouplingBlock", "NICECouplingBlock"),
        ),
        "normflows": (
            normflows_flow,
            normflows_chain,
            normflows_base,
            ("affine", "sigmoid", "spline", "MAF"),
        ),
        "zuko": (zuko_flow, zuko_chain, standard, ("NICE", "MAF", "NSF", "RealNVP")),
    }
    seed = 0
    for library, (make, chain, base, kinds) in libraries.items():
        for kind in kinds:
            for depth, gains in ((4, (1.0, 3.0)), (16, (0.5, 1.0, 2.0)), (48, (1.0, 1.5))):
                for gain in gains:
                    seed += 1
                    data = list(DATA)[seed % 3]
                    slow = "AF" in kind
                    if library == "zuko" and kind in ("MAF", "NSF") and depth == 48:
                        continue
                    yield Flow(
                        f"{library} {kind} {depth}, gain {gain:g}, {data}",
                        seeded(
                            lambda make=make, kind=kind, depth=depth: make(kind, depth), gain, seed
                        ),
                        chain,
                        DATA[data],
                        base,
                        draws=8192 if slow else 32768,
                        declared=library != "FrEIA",
                    )


def _own_flows() -> Iterator[Flow]:
    def nothing(flow: OwnFlow) -> None:
        pass

    def factor(value: float) -> Callable[[OwnFlow], None]:
        return lambda flow: setattr(flow.chain[1], "log_det_factor", value)

    def offset(value: float) -> Callable[[OwnFlow], None]:
        return lambda flow: setattr(flow.chain[0], "log_det_offset", value)

    def inverse(value: float) -> Callable[[OwnFlow], None]:
        return lambda flow: setattr(flow.chain[2], "inverse_factor", value)

    def tail(start: float) -> Callable[[OwnFlow], None]:
        return lambda flow: flow.chain.append(Tail(start))

    faults: dict[str, tuple[float | None, Callable[[OwnFlow], None]]] = {
        "bounded": (2.0, nothing),
        "free": (None, nothing),
        "log-det x 1.5": (2.0, factor(1.5)),
        "log-det x -1": (2.0, factor(-1.0)),
        "log-det + 0.02": (2.0, offset(0.02)),
        "log-det + 1": (2.0, offset(1.0)),
        "inverse x 1.001": (2.0, inverse(1.001)),
        "inverse x 1.1": (2.0, inverse(1.1)),
        "tail beyond 2.5": (2.0, tail(2.5)),  # lost in 1.2 % of the draws
        "tail beyond 3": (2.0, tail(3.0)),  # 0.27 %
        "tail beyond 4": (2.0, tail(4.0)),  # 0.006 %
        "tail beyond 6": (2.0, tail(6.0)),
    }
    for name, (bound, change) in faults.items():
        for depth in (4, 16, 64):
            for gain in (1.0, 2.0):
                seed = 1000 + len(name) * depth
                data = list(DATA)[depth % 3]
                make = seeded(
                    lambda depth=depth, bound=bound, change=change: own_flow(depth, bound, change),
                    gain,
                    seed,
                )
                yield Flow(
                    f"own {name} {depth}, gain {gain:g}, {data}",
                    make,
                    own_chain,
                    DATA[data],
                    standard,
                    declared=False,
                )


def encode(chain: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros(len(x), dtype=x.dtype)
    for forward, _ in chain:
        x, log_det = forward(x)
        total = total + log_det
    return x, total


def decode(chain: Chain, z: Tensor) -> Tensor:
    for _, inverse in reversed(chain):
        z = inverse(z)
    return z


def trained(flow: Flow, steps: int) -> Flow:
    """The same flow after a short training by likelihood on its data."""

    @functools.cache
    def made() -> nn.Module:
        module = flow.make()
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)
        data = flow.data(4096, 1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            x = data[torch.randint(len(data), (128,), generator=generator)]
            z, log_det = encode(flow.chain(module), x)
            location, deviation = flow.base(module)
            loss = (0.5 * ((z - location) / deviation).square().sum(1) - log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            if bool(norm.isfinite()):
                optimizer.step()
        return module.eval()

    name = f"{flow.name}, {steps} steps"
    return dataclasses.replace(flow, name=name, make=lambda: copy.deepcopy(made()))


def _trained_flows(fresh: dict[str, Flow]) -> Iterator[Flow]:
    """One of each kind of the libraries at depth 4, and some at depth 16."""
    for flow in fresh.values():
        library, kind = flow.name.split()[:2]
        shallow = library != "own" and " 4, gain 1," in flow.name
        deep = kind in ("affine", "AllInOneBlock") and " 16, gain 1," in flow.name
        if shallow or deep:
            yield trained(flow, 200)


_FRESH = {flow.name: flow for flow in (*_library_flows(), *_own_flows())}
FLOWS: dict[str, Flow] = {**_FRESH, **{flow.name: flow for flow in _trained_flows(_FRESH)}}


def in_float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()
