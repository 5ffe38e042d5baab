"""An adversary against the bounds: random blocks, altered in random ways, and gradient ascent.

Every configuration takes a supported block with a random network, changes it in a way in which a
rule may read another map than the model computes, and climbs the ratios ||J v|| / ||v|| in a box.
The truth is that of the model's own forward and inverse, by autograd.
"""

# Wrappers of any call have no types of their own.
# ruff: noqa: ANN001, ANN002, ANN003, ANN201, ANN202, ANN204, D102, FBT003

from __future__ import annotations

import copy
import math
import random
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import memcnn
import normflows
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import zuko
from FrEIA import framework
from FrEIA import modules as freia
from nflows import transforms as nflows
from nflows.transforms import autoregressive, nonlinearities
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import inn_guard as ig
from benchmarks.common.runner import Row, collect, main
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.autoregressive import MADE, MaskedAutoregressive
from inn_guard.layers.chain import Chain
from inn_guard.layers.contraction import contractive_mlp
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.linear import InvertibleLinear, LULinear
from inn_guard.layers.ode import FixedStep, NeuralODE, RungeKutta
from inn_guard.layers.partition import Mask
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.residual import Residual
from inn_guard.layers.scales import ClampedScale, ExpScale, SigmoidScale, SoftplusScale
from inn_guard.numerics.intervals import Box

D = 4
HIDDEN = 6
POINTS, STEPS = 16, 8
ROUNDING = 1 + 1e-8  #: of the measured ratios
EVERY, SECONDS = 16, 0.5  #: every so many configurations have a budget, in seconds of work
RESOLVED = 1e-6  #: sigma_min / sigma_max from which float64 gives sigma_min to 1e-9


@dataclass(frozen=True)
class Config:
    """How many configurations are tried."""

    configurations: int = 50_000
    chunk: int = 100  # tried, and written, together
    first: int = 0


PRESETS = {
    "smoke": {"configurations": 20, "chunk": 10},
    "cpu": {},  # the goal: an hour of one core; the committed table holds the first 44,600
}


@dataclass
class Case:
    """A model with a box of its inputs.

    Attributes:
        block: name of the block.
        change: name of the change.
        model: the model.
        lo: lower corner of the box.
        hi: upper corner.
        cleanup: takes back what was changed outside of the model.
    """

    block: str
    change: str
    model: nn.Module
    lo: Tensor
    hi: Tensor
    cleanup: ExitStack = field(default_factory=ExitStack)


# --------------------------------------------------------------------------------------- networks


def pick(*options):
    return random.choice(options)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.ReLU6,
    lambda: nn.ReLU(inplace=pick(True, False)),
    lambda: nn.ELU(pick(-30.0, 0.5, 1.0, 4.0)),
    lambda: nn.CELU(pick(-2.0, 0.5, 1.0, 4.0)),
    lambda: nn.SELU(inplace=pick(True, False)),
    lambda: nn.LeakyReLU(pick(-3.0, 0.01, 5.0)),
    lambda: nn.Softplus(pick(-1.0, 0.3, 5.0), pick(0.1, 3.0, 20.0, 20.0)),
    lambda: nn.Hardtanh(*sorted([random.uniform(-2, 2), random.uniform(-2, 2)])),
    lambda: nn.GELU(approximate="tanh"),
    lambda: nn.PReLU(init=pick(-2.0, 0.25, 3.0)),
    lambda: pick(nn.Mish, nn.Softsign, nn.Hardswish, nn.Tanhshrink, nn.RReLU)(),
    lambda: nn.Dropout(pick(0.0, 0.5)),
    lambda: nn.BatchNorm1d(HIDDEN),
    lambda: nn.LayerNorm(HIDDEN),
    lambda: Steep(),
    lambda: CalledSteep(),
]


class Steep(nn.Tanh):
    """A subclass of an activation that is another function."""

    def forward(self, x):
        return 9 * super().forward(x)


class CalledSteep(nn.Tanh):
    """A subclass that changes what a call of it means."""

    def __call__(self, x):
        return 9 * super().__call__(x)


class Scaled(nn.Linear):
    """A subclass of a linear map that is another one."""

    def forward(self, x):
        return 9 * super().forward(x)


WAYS = ("broadcasts", "changes a view", "changes itself", "joins", "tied", "functional", "constant")


class Skip(nn.Module):
    """A first layer whose value is used twice, in a sum that broadcasts, or changed in place."""

    def __init__(self, n: int, way: str) -> None:
        super().__init__()
        self.linear, self.narrow, self.way = nn.Linear(n, HIDDEN), nn.Linear(n, 1), way
        self.square = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("shift", torch.randn(HIDDEN))

    def forward(self, x, context=None):
        y = self.linear(x)
        if self.way == "broadcasts":
            return y + 3 * self.narrow(x)
        if self.way == "changes a view":
            F.relu(y.reshape(-1, HIDDEN), inplace=True)
            return y
        if self.way == "changes itself":
            z = y + y
            z += y
            return z + F.leaky_relu(y, -3.0)
        if self.way == "tied":
            return self.square(torch.tanh(self.square(y)))
        if self.way == "functional":
            return F.linear(F.elu(y, alpha=2.0), 2 * self.square.weight, self.shift)
        if self.way == "constant":
            return y + self.shift
        return torch.cat([y], -1)


class WithContext(nn.Module):
    """A network that takes a context, or further arguments with defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, context=None, gain=5.0):
        return gain * self.network(x)


class CalledWithGain(nn.Module):
    """A network whose call is not its forward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x, context=None):
        return self.network(x)

    def __call__(self, x, context=None):
        return 8 * super().__call__(x)


def scaled_weights(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(pick(0.1, 1.0, 1.0, 3.0))
    return net


def network(n: int, m: int) -> nn.Module:
    first: nn.Module = nn.Linear(n, HIDDEN)
    chance = random.random()
    if chance < 0.12:
        first = Skip(n, random.choice(WAYS))
    elif chance < 0.18:
        first = Scaled(n, HIDDEN)
    kinds = ACTIVATIONS
    if random.random() < 0.75:
        kinds = ACTIVATIONS[:11]
    parts = [first, random.choice(kinds)(), nn.Linear(HIDDEN, m)]
    if random.random() < 0.3:
        parts.insert(2, random.choice(kinds)())
    if random.random() < 0.03:
        parts.insert(0, pick(nn.ReLU(inplace=True), nn.SELU(inplace=True), nn.Identity()))
    net = scaled_weights(nn.Sequential(*parts))
    if random.random() < 0.02:
        return CalledWithGain(net)
    return WithContext(net)


def convolutions(n: int, m: int) -> nn.Module:
    """A network on small images, of odd paddings, strides, dilations and groups."""
    mode = pick("zeros", "zeros", "circular", "reflect", "replicate")
    size = pick(1, 3)
    first = nn.Conv2d(n, 2, size, padding=size // 2, padding_mode=mode, groups=1)
    last: nn.Module = nn.Conv2d(2, m, 3, padding="same", padding_mode=mode)
    way = random.random()
    if way < 0.2:
        last = nn.Sequential(nn.Conv2d(2, 2, 1, stride=2), nn.ConvTranspose2d(2, m, 3, stride=1))
    elif way < 0.4 and mode == "zeros":
        last = nn.ConvTranspose2d(2, m, 3, padding=1, dilation=1)
    elif way < 0.5 and m == 2:
        last = nn.Conv2d(2, m, 3, padding=2, dilation=2, groups=2)
    return scaled_weights(nn.Sequential(first, random.choice(ACTIVATIONS[:11])(), last))


class Field(nn.Module):
    """The right-hand side of an equation."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(d, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, d))

    def forward(self, t, x):
        return self.network(x)


# ----------------------------------------------------------------------------------------- blocks


def freia_block(d: int, kind, **options) -> nn.Module:
    return kind([(d,)], subnet_constructor=network, **options)


def freia_sequence(d: int) -> nn.Module:
    sequence = framework.SequenceINN(d)
    sequence.append(freia.GLOWCouplingBlock, subnet_constructor=network, clamp=1.0)
    sequence.append(freia.PermuteRandom, seed=1)
    return sequence


def freia_actnorm(d: int) -> nn.Module:
    block = freia.ActNorm([(d,)])
    block.init_on_next_batch = False
    return block


def memcnn_affine(d: int, adapter, factor: int) -> nn.Module:
    n = d // 2
    return memcnn.AffineCoupling(network(n, n * factor), network(n, n * factor), adapter=adapter)


def alternating(d: int) -> Tensor:
    """0, 1, 0, 1, ..."""
    return torch.arange(d) % 2


def nflows_coupling(d: int) -> nn.Module:
    return nflows.AffineCouplingTransform(alternating(d), network)


def nflows_spline(d: int, kind, **options) -> nn.Module:
    ends = {"tails": "linear", "tail_bound": pick(0.5, 2.0)}
    return kind(alternating(d), network, num_bins=2, **ends, **options)


def zuko_flow(d: int, kind, **options) -> nn.Module:
    flow = kind(d, transforms=1, hidden_features=(HIDDEN,), **options)
    return scaled_weights(flow)


def normflows_spline(d: int, kind) -> nn.Module:
    return scaled_weights(kind(d, 1, HIDDEN, num_bins=2, tail_bound=pick(0.5, 2.0)))


def random_matrices(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(pick(0.0, 0.3, 3.0) * torch.randn_like(parameter))
    return module


def masked_affine(d: int) -> nn.Module:
    s, t = nn.Linear(d, d), nn.Linear(d, d)
    return normflows.flows.MaskedAffineFlow(alternating(d).double(), t, s)


#: from the entries of a sample to a block
Blocks = dict[str, Callable[[int], nn.Module]]

CHEAP: Blocks = {
    "own additive": lambda d: AdditiveCoupling(network(d // 2, d // 2)),
    "own sigmoid": lambda d: AffineCoupling(
        network(d // 2, d), scale=SigmoidScale(pick(0.0, 0.5), 1.0, pick(0.0, 2.0))
    ),
    "own clamped": lambda d: AffineCoupling(network(d // 2, d), scale=ClampedScale(pick(0.3, 2.0))),
    "own softplus": lambda d: AffineCoupling(network(d // 2, d), scale=SoftplusScale()),
    "own exp": lambda d: AffineCoupling(network(d // 2, d), scale=ExpScale()),
    "own mask": lambda d: AdditiveCoupling(network(d, d), partition=Mask(alternating(d).bool())),
    "own chain": lambda d: Chain(
        AdditiveCoupling(network(d // 2, d // 2)), AffineCoupling(network(d // 2, d))
    ),
    "own twice the same": lambda d: twice(AdditiveCoupling(network(d // 2, d // 2))),
    "own inverse": lambda d: InverseLayer(
        AffineCoupling(network(d // 2, d), scale=SigmoidScale(0.5))
    ),
    "own linear": lambda d: random_matrices(InvertibleLinear(d)),
    "own LU": lambda d: random_matrices(LULinear(d)),
    "own diagonal": lambda d: random_matrices(Diagonal(d)),
    "own logit": lambda d: Chain(
        Logit(pick(1e-6, 0.05)), AdditiveCoupling(network(d // 2, d // 2))
    ),
    "own residual": lambda d: Residual(contractive_mlp([d, HIDDEN, d], coefficient=0.7)),
    "own ODE": lambda d: NeuralODE(
        Field(d),
        duration=pick(0.2, 1.0),
        solver=FixedStep(pick(1, 4), random.choice([*RungeKutta])),
    ),
    "nflows affine": nflows_coupling,
    "nflows additive": lambda d: nflows.AdditiveCouplingTransform(alternating(d), network),
    "nflows composite": lambda d: nflows.CompositeTransform(
        [nflows_coupling(d), nflows.ReversePermutation(d)]
    ),
    "nflows LU": lambda d: random_matrices(nflows.LULinear(d, using_cache=pick(True, False))),
    "nflows QR": lambda d: random_matrices(nflows.QRLinear(d, num_householder=2)),
    "nflows SVD": lambda d: random_matrices(nflows.SVDLinear(d, num_householder=2)),
    "nflows naive": lambda d: random_matrices(nflows.NaiveLinear(d)),
    "nflows permutation": lambda d: nflows.RandomPermutation(d),
    "nflows leaky": lambda d: nflows.LeakyReLU(pick(0.01, 0.5)),
    "nflows tanh": lambda d: nflows.CompositeTransform([nonlinearities.Tanh(), nflows_coupling(d)]),
    "nflows logit": lambda d: nonlinearities.Logit(eps=pick(1e-6, 0.2)),
    "FrEIA GLOW": lambda d: freia_block(d, freia.GLOWCouplingBlock, clamp=pick(-1.0, 0.5, 2.0)),
    "FrEIA NICE": lambda d: freia_block(d, freia.NICECouplingBlock),
    "FrEIA RNVP": lambda d: freia_block(
        d, freia.RNVPCouplingBlock, clamp=1.0, clamp_activation="TANH"
    ),
    "FrEIA GIN": lambda d: freia_block(
        d, freia.GINCouplingBlock, clamp=1.0, clamp_activation="SIGMOID"
    ),
    "FrEIA one-sided": lambda d: freia_block(d, freia.AffineCouplingOneSided, clamp=1.0),
    "FrEIA all in one": lambda d: freia_block(
        d,
        freia.AllInOneBlock,
        reverse_permutation=pick(True, False),
        permute_soft=pick(True, False),
        gin_block=pick(True, False, False),
        learned_householder_permutation=pick(0, 0, 2),
    ),
    "FrEIA sequence": freia_sequence,
    "FrEIA actnorm": lambda d: random_matrices(freia_actnorm(d)),
    "FrEIA scaling": lambda d: random_matrices(freia.LearnedElementwiseScaling([(d,)])),
    "FrEIA automatic": lambda d: random_matrices(freia.InvAutoAct([(d,)])),
    "memcnn additive": lambda d: memcnn.AdditiveCoupling(
        network(d // 2, d // 2), network(d // 2, d // 2)
    ),
    "memcnn naive": lambda d: memcnn_affine(d, memcnn.AffineAdapterNaive, 1),
    "memcnn sigmoid": lambda d: memcnn_affine(d, memcnn.AffineAdapterSigmoid, 2),
    "normflows affine": lambda d: normflows.flows.AffineCouplingBlock(
        network(d // 2, d), scale_map=pick("exp", "sigmoid", "sigmoid_inv")
    ),
    "normflows masked": masked_affine,
    "normflows matrix": lambda d: random_matrices(normflows.flows.InvertibleAffine(d, pick(True))),
    "normflows LU": lambda d: random_matrices(normflows.flows.LULinearPermute(d)),
}
DEAR: Blocks = {
    "nflows spline": lambda d: nflows_spline(d, nflows.PiecewiseRationalQuadraticCouplingTransform),
    "nflows quadratic": lambda d: nflows_spline(d, nflows.PiecewiseQuadraticCouplingTransform),
    "nflows linear spline": lambda d: nflows_spline(d, nflows.PiecewiseLinearCouplingTransform),
    "nflows MAF": lambda d: scaled_weights(
        autoregressive.MaskedAffineAutoregressiveTransform(d, HIDDEN, num_blocks=1)
    ),
    "own MAF": lambda d: scaled_weights(MaskedAutoregressive(MADE(d, hidden=HIDDEN, blocks=1))),
    "normflows spline": lambda d: normflows_spline(
        d, normflows.flows.CoupledRationalQuadraticSpline
    ),
    "normflows MAF": lambda d: scaled_weights(
        normflows.flows.MaskedAffineAutoregressive(d, HIDDEN, num_blocks=1)
    ),
    "zuko coupling": lambda d: zuko_flow(d, zuko.flows.NICE),
    "zuko MAF": lambda d: zuko_flow(d, zuko.flows.MAF),
    "zuko spline": lambda d: zuko_flow(d, zuko.flows.NSF, bins=2),
    "images": lambda d: AdditiveCoupling(convolutions(1, 1)),
    "images of more channels": lambda d: AffineCoupling(
        convolutions(2, 4), scale=pick(SigmoidScale(0.5), ClampedScale(1.0))
    ),
}


def twice(block: nn.Module) -> nn.Module:
    return Chain(block, block)


# ---------------------------------------------------------------------------------------- changes


def some(model: nn.Module, kind: type = nn.Module) -> nn.Module:
    """A random module inside, or the model itself where there is none of this kind."""
    return random.choice([part for part in model.modules() if isinstance(part, kind)] or [model])


def doubled(value):
    if isinstance(value, Tensor):
        return 2 * value
    if isinstance(value, tuple) and value:
        return (doubled(value[0]), *value[1:])
    return value


def nothing(case: Case) -> None:
    """No change."""


def hook(case: Case) -> None:
    some(case.model).register_forward_hook(lambda module, args, output: doubled(output))


def input_hook(case: Case) -> None:
    some(case.model, nn.Linear).register_forward_pre_hook(lambda module, args: doubled(args))


def backward_hook(case: Case) -> None:
    some(case.model).register_full_backward_hook(lambda module, grads, outputs: None)


def global_hook(case: Case) -> None:
    def double_linear(module, args, output):
        return 2 * output if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(double_linear)
    case.cleanup.callback(handle.remove)


def patched_forward(case: Case) -> None:
    part = some(case.model, nn.Linear)
    own = part.forward
    part.forward = lambda x, *rest, **options: doubled(own(x, *rest, **options))


def patched_method(case: Case) -> None:
    """Any method of a block replaced in the instance."""
    names = ("_scale_and_shift", "_coupling_transform_forward", "_permute", "_affine", "_coupling1")
    for part in case.model.modules():
        for name in names:
            if hasattr(part, name):
                own = getattr(part, name)
                setattr(part, name, lambda *a, _own=own, **k: doubled(_own(*a, **k)))
                return


def patched_class(case: Case) -> None:
    kind = type(some(case.model, nn.Linear))
    own = kind.forward

    def forward(self, x, *rest, **options):
        return doubled(own(self, x, *rest, **options))

    kind.forward = forward
    case.cleanup.callback(setattr, kind, "forward", own)


def overridden_forward(case: Case) -> None:
    """The whole model, or a part of it, of a subclass with another forward."""
    part = pick(case.model, some(case.model))
    kind = type(part)

    def forward(self, *arguments, **options):
        return doubled(kind.forward(self, *arguments, **options))

    part.__class__ = type(f"Doubled{kind.__name__}", (kind,), {"forward": forward})


def overridden_call(case: Case) -> None:
    part = some(case.model)
    kind = type(part)

    def call(self, *arguments, **options):
        return doubled(kind.__call__(self, *arguments, **options))

    part.__class__ = type(f"Called{kind.__name__}", (kind,), {"__call__": call})


class Tripled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 3 * weight


def parametrization(case: Case) -> None:
    part = some(case.model, nn.Linear)
    if not isinstance(part, nn.Linear):
        return
    norm = pick(parametrizations.weight_norm, parametrizations.spectral_norm, None)
    if norm is None:
        parametrize.register_parametrization(part, "weight", Tripled())
    else:
        norm(part)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(pick(0.2, 5.0))


def old_norm(case: Case) -> None:
    part = some(case.model, nn.Linear)
    if not isinstance(part, nn.Linear) or not isinstance(part.weight, nn.Parameter):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pick(nn.utils.weight_norm, nn.utils.spectral_norm)(part)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(pick(0.2, 5.0))


def pruning(case: Case) -> None:
    part = some(case.model, nn.Linear)
    if isinstance(part, nn.Linear):
        prune.random_unstructured(part, "weight", 0.5)
        with torch.no_grad():
            part.weight_orig.mul_(4)


def attribute(case: Case) -> None:
    """A plain attribute that decides the map."""
    for part in case.model.modules():
        for name in ("clamp", "tail_bound", "negative_slope", "alpha", "beta", "eps"):
            value = vars(part).get(name)
            if isinstance(value, float) and random.random() < 0.5:
                setattr(part, name, value * pick(0.5, 3.0))


def buffer(case: Case) -> None:
    """A buffer of another value, as after loading a damaged state."""
    buffers = [b for b in case.model.buffers() if b.numel()]
    if buffers:
        chosen = random.choice(buffers)
        chosen.set_(chosen.clone())
        if chosen.is_floating_point():
            chosen.mul_(pick(0.5, 2.0))
        else:
            chosen.copy_(chosen.flatten()[0].clone())


def tied_weights(case: Case) -> None:
    linear = [part for part in case.model.modules() if type(part) is nn.Linear]
    for part in linear[1:]:
        if part.weight.shape == linear[0].weight.shape:
            part.weight = linear[0].weight


def half_precision(case: Case) -> None:
    case.model.to(pick(torch.float16, torch.bfloat16, torch.float32))


def bad_number(case: Case) -> None:
    with torch.no_grad():
        parameter = random.choice([*case.model.parameters()] or [torch.zeros(1)])
        parameter.flatten()[:1] = pick(math.nan, math.inf, 0.0)


def steep(case: Case) -> None:
    with torch.no_grad():
        for parameter in some(case.model).parameters():
            if parameter.is_floating_point():
                parameter.mul_(pick(1e-3, 30.0))


def copied(case: Case) -> None:
    case.model = copy.deepcopy(case.model)


CHANGES: list[Callable[[Case], None]] = [
    *[nothing] * 10,
    *[steep] * 3,
    *(hook, input_hook, backward_hook, global_hook, patched_forward, patched_method, patched_class),
    *(overridden_forward, overridden_call, parametrization, old_norm, pruning, attribute, buffer),
    *(tied_weights, half_precision, bad_number, copied),
]


# ------------------------------------------------------------------------------------------ truth


def jacobians(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # a copy: operations in place must not write into a leaf
    z = function(x.clone()).flatten(1)
    rows = []
    for output in z.unbind(1):
        (row,) = torch.autograd.grad(output.sum(), x, create_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack(rows, 1).flatten(2)


def sampled(model, points: Tensor, width: float) -> tuple[float, float]:
    """The largest ratios by differences: autograd refuses some operations in place."""
    x, step = points.flatten(1), 1e-6 * width
    columns = []
    with torch.no_grad():
        for e in torch.eye(x.shape[1]):
            ends = [(x + sign * step * e).view_as(points) for sign in (1, -1)]
            columns.append((model(ends[0]) - model(ends[1])).flatten(1) / (2 * step))
    sigma = torch.linalg.svdvals(torch.stack(columns, 2).nan_to_num(0, 0, 0))
    # less the error of the differences
    return float(sigma[:, 0].max()) * (1 - 1e-3), 0.0


def climbed(model, lo: Tensor, hi: Tensor) -> tuple[float, float]:
    """The largest sigma_max and 1 / sigma_min found in the box by gradient ascent."""
    width = hi - lo
    unit = torch.rand(POINTS, *lo.shape)
    points = torch.where(width.isfinite(), lo + unit * width, 3 * torch.randn_like(unit))
    points[:2] = torch.where(width.isfinite(), torch.stack([lo, hi]), points[:2])
    scale = torch.where(width.isfinite(), width, torch.ones_like(width))
    try:
        return ascended(model, points, lo, hi, scale)
    except RuntimeError:
        return sampled(model, points, float(scale.max().clamp_min(1e-3)))


def ascended(model, x: Tensor, lo: Tensor, hi: Tensor, scale: Tensor) -> tuple[float, float]:
    most = least = 0.0
    steps = STEPS
    if lo.numel() > D:
        steps = 2
    for _ in range(steps):
        x = torch.minimum(torch.maximum(x, lo), hi).detach().requires_grad_()
        J = jacobians(model, x)
        known = J.isfinite().flatten(1).all(1)
        if not bool(known.any()):
            break
        sigma = torch.linalg.svdvals(J[known])
        most = max(most, float(sigma[:, 0].max()))
        resolved = sigma[:, -1] > RESOLVED * sigma[:, 0]
        if bool(resolved.any()):
            least = max(least, float(1 / sigma[resolved, -1].min()))
        if not J.requires_grad:
            break
        # half of the points climb the largest singular value, half descend the smallest one
        goal = sigma[::2, 0].log().sum() - sigma[1::2, -1].log().sum()
        (gradient,) = torch.autograd.grad(goal, x, allow_unused=True)
        if gradient is None or not bool(gradient.isfinite().all()):
            break
        size = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
        x = x + 0.2 * scale * gradient / size.reshape(-1, *[1] * lo.dim())
    return most, max(least, of_inverse(model, x, lo, hi, scale))


def of_inverse(model, x: Tensor, lo: Tensor, hi: Tensor, scale: Tensor) -> float:
    """The largest ||J^-1|| by autograd of the inverse, which sees directions that J nearly loses.

    Of points in the box to which the inverse leads back: there its Jacobian is that of J^-1.
    """
    try:
        x = torch.minimum(torch.maximum(x, lo), hi).detach()
        z = model(x.clone()).detach().requires_grad_()
        with torch.no_grad():
            back = model.inverse(z.clone())
        home = (back - x).abs() <= 1e-6 * scale
        home &= (back >= lo) & (back <= hi)
        rows = home.flatten(1).all(1)
        if not bool(rows.any()):
            return 0.0
        K = jacobians(model.inverse, z)[rows]
        K = K[K.isfinite().flatten(1).all(1)]
        if not len(K):
            return 0.0
        return float(torch.linalg.matrix_norm(K, 2).max())
    except (RuntimeError, NotImplementedError, ValueError):
        return 0.0


# -------------------------------------------------------------------------------------------- run


def configuration(
    seed: int, change: Callable[[Case], None] | None = None, entries: int = D
) -> Case:
    """A random model with a random box, changed in one way, or in a random one."""
    random.seed(seed)
    torch.manual_seed(seed)
    # FrEIA draws its permutations and rotations from numpy
    np.random.seed(seed % 2**32)
    blocks = CHEAP
    if random.random() < 0.2:
        blocks = DEAR
    name = random.choice([*blocks])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = blocks[name](entries)
    shape = (entries,)
    if name.startswith("images"):
        shape = (2, 3, 3)
        if name != "images":
            shape = (4, 2, 2)
    if random.random() < 0.7:
        model.eval()
    centre = pick(0.0, 0.0, 0.0, 0.4, 3.0) * torch.randn(shape)
    if "logit" in name:
        centre = 0.5 + torch.zeros(shape)
    radius = torch.full(shape, 10 ** random.uniform(-4, 1))
    if "logit" in name:
        radius = radius.clamp_max(0.499999)
    odd = random.random()
    if odd < 0.05:
        radius[::2] = 0
    elif odd < 0.1:
        radius = radius * 0
    elif odd < 0.15:
        radius = radius + math.inf
    change = change or random.choice(CHANGES)
    case = Case(name, change.__name__, model, centre - radius, centre + radius)
    change(case)
    return case


#: what may come of a configuration
OUTCOMES = (
    "not built",
    "sound",
    "no bound",
    "internal error",
    "below the truth",
    "refused",
    "crash",
)


def outcome(seed: int) -> tuple[str, str, str, float]:
    """Block, change, what came of it, and bound over the largest ratio found (forward).

    Most have no budget, which is the least work; some have one, which recursions and branch and
    bound need.
    """
    seconds = 0.0
    if seed % EVERY == EVERY - 1:
        seconds = SECONDS
    try:
        case = configuration(seed)
    except (RuntimeError, TypeError, KeyError, ValueError):
        # a library refuses some combinations
        return "none", "none", "not built", math.nan
    with case.cleanup, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = ig.wrap(case.model)
            bounds = ig.lipschitz_bounds(model, Box(case.lo, case.hi), seconds=seconds)
        except (ValueError, TypeError, ig.NotApplicable):
            return case.block, case.change, "refused", math.nan
        except Exception:
            return case.block, case.change, "crash", math.nan
        if "internal error" in bounds.reason:
            return case.block, case.change, "internal error", math.nan
        if min(bounds.forward, bounds.inverse) == math.inf:
            return case.block, case.change, "no bound", math.nan
        torch.manual_seed(seed)
        forward, inverse = climbed(model.to_dtype(torch.float64), case.lo, case.hi)
    below = forward > bounds.forward * ROUNDING or inverse > bounds.inverse * ROUNDING
    ratio = bounds.forward / forward if forward > 0 else math.nan
    if below:
        return case.block, case.change, "below the truth", ratio
    return case.block, case.change, "sound", ratio


def measure(config: Config, seeds: range) -> list[Row]:
    """One row for every configuration that is not sound, and the counts of all."""
    begun, rows = time.process_time(), []
    torch.set_num_threads(1)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for seed in seeds:
            block, change, came, ratio = outcome(seed)
            rows.append(
                {"seed": seed, "block": block, "change": change, "outcome": came, "ratio": ratio}
            )
    finally:
        torch.set_default_dtype(default)
    rows[-1]["CPU seconds"] = time.process_time() - begun
    return rows


def run(config: Config) -> pd.DataFrame:
    stop = config.first + config.configurations
    seeds = {}
    for start in range(config.first, stop, config.chunk):
        seeds[f"from seed {start}"] = range(start, min(start + config.chunk, stop))
    return table(collect(config, seeds, measure))


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Outcomes by block, then by change, then of all."""
    groups = []
    for column in ("block", "change"):
        for name, group in rows.groupby(column, sort=False):
            groups.append((f"{column}: {name}", group))
    groups.append(("all", rows))
    lines = []
    for name, group in groups:
        line: Row = {"what": name, "configurations": len(group)}
        for came in OUTCOMES:
            line[came] = int((group["outcome"] == came).sum())
        line["median bound / found"] = group["ratio"].median()
        lines.append(line)
    return pd.DataFrame(lines)


if __name__ == "__main__":
    main(__name__)
