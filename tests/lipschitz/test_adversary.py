"""An adversary against the bounds: random blocks, altered in random ways, and gradient ascent.

Every configuration takes a supported block with a random network, changes it in a way in which a
rule may read another map than the model computes, and climbs the ratios ||J v|| / ||v|| in the box.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import memcnn
import normflows
import torch
import torch.nn.functional as F
from FrEIA import framework
from FrEIA import modules as freia
from nflows import transforms as nflows
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import inn_guard as ig
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.scales import ClampedScale, SigmoidScale, SoftplusScale
from inn_guard.numerics.intervals import Box
from tests.cases.trials import trials

D = 4
STEPS = 12
ROUNDING = 1 + 1e-7

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    lambda: nn.ReLU(inplace=random.random() < 0.5),
    lambda: nn.ELU(random.choice([-30.0, 0.5, 1.0, 4.0])),
    lambda: nn.SELU(inplace=random.random() < 0.5),
    lambda: nn.LeakyReLU(random.choice([-3.0, 0.01, 5.0])),
    lambda: nn.Softplus(random.choice([-1.0, 0.3, 5.0]), random.choice([0.1, 3.0, 20.0])),
    lambda: nn.Hardtanh(-0.3, 0.7),
    lambda: nn.Dropout(random.choice([0.0, 0.5])),
    lambda: nn.BatchNorm1d(8),
    lambda: Steep(),
]


class Steep(nn.Tanh):
    """A subclass of an activation that is another function."""

    def forward(self, x):
        return 9 * super().forward(x)


class Scaled(nn.Linear):
    """A subclass of a linear map that is another one."""

    def forward(self, x):
        return 9 * super().forward(x)


class Skip(nn.Module):
    """x -> f(x), used a second time in a sum, which broadcasts or follows a change in place."""

    def __init__(self, n: int, way: str) -> None:
        super().__init__()
        self.linear, self.narrow, self.way = nn.Linear(n, 8), nn.Linear(n, 1), way

    def forward(self, x, context=None):
        y = self.linear(x)
        if self.way == "broadcasts":
            return y + 3 * self.narrow(x)
        if self.way == "changes a view":
            F.relu(y.reshape(-1, 8), inplace=True)
            return y
        if self.way == "changes itself":
            z = y + y
            z += y
            return z + F.leaky_relu(y, -3.0)
        return torch.cat([y], -1)


class WithContext(nn.Module):
    """A network that takes a context, or further arguments with defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, context=None, gain=5.0):
        return gain * self.network(x)


def network(n: int, m: int) -> nn.Module:
    first: nn.Module = nn.Linear(n, 8)
    if random.random() < 0.15:
        first = Skip(n, random.choice(["broadcasts", "changes a view", "changes itself", "joins"]))
    elif random.random() < 0.2:
        first = Scaled(n, 8)
    kinds = ACTIVATIONS
    if random.random() < 0.7:
        kinds = ACTIVATIONS[:8]
    parts = [first, random.choice(kinds)(), random.choice(kinds)(), nn.Linear(8, m)]
    if random.random() < 0.03:
        parts.insert(0, random.choice([nn.ReLU(inplace=True), nn.SELU(inplace=True)]))
    net = nn.Sequential(*parts)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(random.choice([0.3, 1.0, 3.0]))
    return WithContext(net)


def nflows_coupling() -> nn.Module:
    return nflows.AffineCouplingTransform(torch.tensor([0, 1, 0, 1]), network)


def freia_block(kind, **options) -> nn.Module:
    return kind([(D,)], subnet_constructor=network, **options)


def freia_sequence() -> nn.Module:
    sequence = framework.SequenceINN(D)
    sequence.append(freia.GLOWCouplingBlock, subnet_constructor=network, clamp=1.0)
    sequence.append(freia.PermuteRandom, seed=1)
    return sequence


def memcnn_affine(adapter, factor: int) -> nn.Module:
    return memcnn.AffineCoupling(network(2, 2 * factor), network(2, 2 * factor), adapter=adapter)


def normflows_coupling() -> nn.Module:
    scale = random.choice(["exp", "sigmoid", "sigmoid_inv"])
    return normflows.flows.AffineCouplingBlock(network(2, 4), scale_map=scale)


BLOCKS: list[Callable[[], nn.Module]] = [
    lambda: AdditiveCoupling(network(2, 2)),
    lambda: AffineCoupling(network(2, 4), scale=SigmoidScale()),
    lambda: AffineCoupling(network(2, 4), scale=ClampedScale(1.0)),
    lambda: AffineCoupling(network(2, 4), scale=SoftplusScale()),
    lambda: Chain(AdditiveCoupling(network(2, 2)), AffineCoupling(network(2, 4))),
    nflows_coupling,
    lambda: nflows.CompositeTransform([nflows_coupling(), nflows.ReversePermutation(D)]),
    lambda: freia_block(freia.GLOWCouplingBlock, clamp=random.choice([0.5, 2.0])),
    lambda: freia_block(freia.NICECouplingBlock),
    lambda: freia_block(freia.RNVPCouplingBlock, clamp=1.0),
    lambda: freia_block(freia.AllInOneBlock),
    freia_sequence,
    lambda: memcnn.AdditiveCoupling(network(2, 2), network(2, 2)),
    lambda: memcnn_affine(memcnn.AffineAdapterNaive, 1),
    lambda: memcnn_affine(memcnn.AffineAdapterSigmoid, 2),
    normflows_coupling,
]


def some(model: nn.Module, kind: type = nn.Module) -> nn.Module:
    """A random module inside, or the model itself where there is none of this kind."""
    return random.choice([part for part in model.modules() if isinstance(part, kind)] or [model])


def add_hook(model: nn.Module) -> None:
    def double(module, arguments, output):
        return 2 * output if isinstance(output, Tensor) else None

    some(model).register_forward_hook(double)


def add_input_hook(model: nn.Module) -> None:
    def double(module, arguments):
        return (2 * arguments[0], *arguments[1:]) if isinstance(arguments[0], Tensor) else None

    some(model, nn.Linear).register_forward_pre_hook(double)


def patch_forward(model: nn.Module) -> None:
    part = some(model, nn.Linear)
    own = part.forward
    part.forward = lambda x: 7 * own(x)


def override_forward(model: nn.Module) -> None:
    """Give the whole model a subclass with another forward."""
    kind = type(model)

    def forward(self, *arguments, **options):
        result = kind.forward(self, *arguments, **options)
        if isinstance(result, Tensor):
            return 7 * result
        value, *rest = result
        if isinstance(value, Tensor):
            return (7 * value, *rest)
        return (tuple(7 * part for part in value), *rest)

    model.__class__ = type(f"Sevenfold{kind.__name__}", (kind,), {"forward": forward})


def add_parametrization(model: nn.Module) -> None:
    part = some(model, nn.Linear)
    if isinstance(part, nn.Linear):
        norm = random.choice([parametrizations.weight_norm, parametrizations.spectral_norm])
        norm(part)


def add_old_norm(model: nn.Module) -> None:
    part = some(model, nn.Linear)
    if isinstance(part, nn.Linear):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            random.choice([nn.utils.weight_norm, nn.utils.spectral_norm])(part)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(random.choice([0.2, 5.0]))


def nothing(model: nn.Module) -> None:
    pass


CHANGES: list[Callable[[nn.Module], None]] = [
    *[nothing] * 8,
    add_hook,
    add_input_hook,
    patch_forward,
    override_forward,
    add_parametrization,
    add_old_norm,
]


def jacobians(model, x: Tensor) -> Tensor:
    # a copy: operations in place must not write into a leaf
    z = model(x.clone()).flatten(1)
    rows = []
    for output in z.unbind(1):
        (row,) = torch.autograd.grad(output.sum(), x, create_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, 1)


def sampled(model, width: float) -> tuple[float, float]:
    """The largest ratios by differences: autograd refuses some operations in place."""
    x = width * (2 * torch.rand(64, D) - 1)
    step = 1e-6 * width
    with torch.no_grad():
        columns = [(model(x + step * e) - model(x - step * e)) / (2 * step) for e in torch.eye(D)]
    sigma = torch.linalg.svdvals(torch.stack(columns, 2))
    sigma = sigma[sigma[:, -1] > 1e-4 * sigma[:, 0]]
    if not len(sigma):
        return 0.0, 0.0
    # less the error of the differences
    return float(sigma[:, 0].max()) * (1 - 1e-4), float(1 / sigma[:, -1].min()) * (1 - 1e-4)


def climbed(model, width: float) -> tuple[float, float]:
    """The largest sigma_max and 1 / sigma_min found in the box by gradient ascent."""
    try:
        return ascended(model, width)
    except RuntimeError:
        return sampled(model, width)


def ascended(model, width: float) -> tuple[float, float]:
    x = width * (2 * torch.rand(24, D) - 1)
    most = least = 0.0
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        J = jacobians(model, x)
        sigma = torch.linalg.svdvals(J)
        most = max(most, float(sigma[:, 0].max()))
        # smaller ones may be nothing but rounding
        known = sigma[:, -1] > 1e-10 * sigma[:, 0]
        if bool(known.any()):
            least = max(least, float(1 / sigma[known, -1].min()))
        if not J.requires_grad:
            break
        # half of the points climb the largest singular value, half descend the smallest one
        goal = sigma[:12, 0].log().sum() - sigma[12:, -1].log().sum()
        (gradient,) = torch.autograd.grad(goal, x, allow_unused=True)
        if gradient is None or not bool(gradient.isfinite().all()):
            break
        size = gradient.norm(dim=1, keepdim=True).clamp_min(1e-30)
        x = (x + 0.2 * width * gradient / size).clamp(-width, width)
    return most, least


def configuration(seed: int) -> tuple[nn.Module, float]:
    random.seed(seed)
    torch.manual_seed(seed)
    model = random.choice(BLOCKS)()
    if random.random() < 0.6:
        model.eval()
    random.choice(CHANGES)(model)
    return model, 10 ** random.uniform(-3, 1)


@trials(4, 400)
def test_no_ratio_climbs_above_a_bound(trials):
    below = []
    for seed in range(trials):
        model, width = configuration(seed)
        box = Box(torch.full((D,), -width), torch.full((D,), width))
        bounds = ig.lipschitz_bounds(model, box, seconds=0.2)
        if min(bounds.forward, bounds.inverse) == float("inf"):
            continue
        forward, inverse = climbed(ig.wrap(model).to_dtype(torch.float64), width)
        if forward > bounds.forward * ROUNDING or inverse > bounds.inverse * ROUNDING:
            below.append((seed, bounds, forward, inverse))
    assert not below
