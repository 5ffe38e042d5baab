"""Certificates against the truth: matrix norms in 40 digits, dense matrices of networks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.common.runner import Row, collect, main
from inn_guard.layers.networks import MLP
from inn_guard.lipschitz.lipsdp.chain import Chain
from inn_guard.lipschitz.lipsdp.multipliers import fast_multipliers
from inn_guard.lipschitz.lipsdp.recursion import certify
from inn_guard.lipschitz.networks.chain_builder import ChainBuilder
from inn_guard.lipschitz.networks.conditioner import SearchBudget, analyse, bound_chain
from inn_guard.numerics.convolution_norm import convolution_norm
from inn_guard.numerics.intervals import Box
from inn_guard.numerics.spectral_norm import spectral_norm

WIDE_KERNELS = ((3, 128, 32, 1), (64, 64, 32, 1), (6, 128, 16, 1), (64, 64, 32, 2))
WIDE_NETWORKS = (
    ([16, 128, 128, 16], nn.ReLU), ([16, 128, 128, 16], nn.ELU), ([16, 128, 128, 16], nn.SiLU),
    ([64, 128, 128, 64], nn.ReLU),
)  # fmt: skip
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.LeakyReLU(0.1),
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
]


@dataclass(frozen=True)
class Config:
    """How many cases of each kind are measured."""

    matrices: int = 10_000
    kernels: int = 2_000  # of convolutions
    networks: int = 10_000
    wide: int = 4  # convolutions, and networks, of usual size
    chunk: int = 500  # cases that are measured, and written, together


PRESETS = {
    "smoke": {"matrices": 20, "kernels": 10, "networks": 20, "wide": 0, "chunk": 10},
    "cpu": {},  # what the committed table holds: three minutes of one core
}


@dataclass(frozen=True)
class Trials:
    """Certificates over true values: how often below one, and every ratio."""

    violations: int
    ratios: list[float]


def integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def matrices(count: int, seed: int) -> Trials:
    """Random sizes, scales and, every third, an orthogonal matrix; the truth in 40 digits."""
    generator, below, ratios = torch.Generator().manual_seed(seed), 0, []
    mpmath.mp.dps = 40
    for trial in range(count):
        rows, columns = integer(generator, 1, 8), integer(generator, 1, 8)
        A = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        if trial % 3 == 0:
            square = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
            A = torch.linalg.qr(square).Q
        A = A * 10 ** float(torch.empty(()).uniform_(-6, 6, generator=generator))
        M = mpmath.matrix(A.tolist())
        truth = mpmath.sqrt(max(mpmath.eigsy(M.T * M, eigvals_only=True)))
        bound = spectral_norm(A)
        below += bound < truth
        ratios.append(1 + float(bound / truth - 1))
    return Trials(below, ratios)


def kernels(count: int, seed: int) -> Trials:
    """Random convolutions of all kinds against dense matrices."""
    generator, below, ratios = torch.Generator().manual_seed(seed), 0, []
    for trial in range(count):
        groups = integer(generator, 1, 2)
        k = integer(generator, 1, 5)
        stride, dilation = integer(generator, 1, 3), 1
        if stride == 1:
            dilation = integer(generator, 1, 2)
        window, padding = dilation * (k - 1) + 1, integer(generator, 0, k // 2)
        n = integer(generator, max(window, 4), max(window, 9))
        inner = groups * integer(generator, 1, 3)
        outer = groups * integer(generator, 1, 3)
        module = nn.Conv2d(
            inner, outer, k, stride, padding, dilation, groups, bias=False, dtype=torch.float64
        )
        weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
        if trial % 3 == 0:
            weight = weight.abs()
        module.weight = nn.Parameter(weight)
        basis = torch.eye(inner * n * n, dtype=torch.float64).reshape(-1, inner, n, n)
        with torch.no_grad():
            truth = float(torch.linalg.matrix_norm(module(basis).flatten(1), 2))
        bound = convolution_norm(module, (n, n))
        below += bound < truth * (1 - 1e-12)
        ratios.append(bound / truth)
    return Trials(below, ratios)


def wide_kernel(case: tuple[int, int, int, int]) -> Trials:
    """A layer of usual size against the lower bound of 300 power iterations."""
    inner, outer, n, stride = case
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = nn.Conv2d(inner, outer, 3, stride, 1, bias=False, dtype=torch.float64)
        nn.init.normal_(module.weight, std=1 / math.sqrt(9 * inner))
        x = torch.randn(1, inner, n, n, dtype=torch.float64)
    for _ in range(300):
        (x,) = torch.autograd.functional.vjp(module, x, module(x))[1:]
        x = (x / x.norm()).detach()
    ratio = convolution_norm(module, (n, n)) / float(module(x).norm().detach())
    return Trials(int(ratio < 1 - 1e-12), [ratio])


def networks(count: int, seed: int) -> Trials:
    """Random small networks of eight activations against slope vertices and Jacobians."""
    generator, below, ratios = torch.Generator().manual_seed(seed), 0, []
    for trial in range(count):
        sizes = [integer(generator, 1, 5) for _ in range(integer(generator, 3, 5))]
        net = MLP(sizes, activation=ACTIVATIONS[trial % len(ACTIVATIONS)]).double()
        box = Box.everywhere(sizes[:1])
        if trial % 2:
            box = Box(-torch.ones(sizes[0]), torch.ones(sizes[0]))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=1.0, generator=generator)
        builder = ChainBuilder(sizes[0])
        chain = builder.finish(analyse(net, box).append_to(builder, builder.start()))
        bound = bound_chain(chain, SearchBudget(steps=3 * (trial % 4 == 0))).bound
        truth = max(_vertex(chain, generator) for _ in range(8))
        x = torch.rand(4, sizes[0], generator=generator, dtype=torch.float64) * 2 - 1
        J = torch.func.vmap(torch.func.jacrev(net))(x)
        truth = max(truth, float(torch.linalg.matrix_norm(J, 2).max().detach()))
        below += bound < truth * (1 - 1e-12)
        ratios.append(bound / truth if truth > 0 else 1.0)
    return Trials(below, ratios)


def _vertex(chain: Chain, generator: torch.Generator) -> float:
    slopes: list[Tensor] = []
    for layer in chain.layers:
        up = torch.rand(len(layer.lower), generator=generator) < 0.5
        slopes.append(torch.where(up, layer.upper, layer.lower))
    return float(torch.linalg.matrix_norm(chain.jacobian(slopes), 2))


def tightness(sizes: list[int], activation: Callable[[], nn.Module]) -> Row:
    """The optimised recursion over the norm product, and over ECLipsE-Fast."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MLP(sizes, activation=activation).double()
        for module in net:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
    reading = analyse(net, Box.everywhere(sizes[:1]))
    builder = ChainBuilder(sizes[0])
    chain = builder.finish(reading.append_to(builder, builder.start()))
    bound = bound_chain(chain, SearchBudget(steps=100, seconds=60.0)).bound
    fast = certify(chain, fast_multipliers(chain))
    return {"bound/norm product": bound / reading.product(), "bound/ECLipsE-Fast": bound / fast}


def cases(config: Config) -> dict[str, Callable[[], Trials | Row]]:
    """Name of the line of the table it belongs to, and number -> what measures it."""
    found: dict[str, Callable[[], Trials | Row]] = {}
    for name, measure, count in (
        ("matrix certificates against 40 digits", matrices, config.matrices),
        ("convolutions against dense matrices", kernels, config.kernels),
        ("subnetworks against slope vertices", networks, config.networks),
    ):
        for k, start in enumerate(range(0, count, config.chunk)):
            trials = min(config.chunk, count - start)
            found[f"{name}:{k}"] = functools.partial(measure, trials, seed=k)
    for kernel in WIDE_KERNELS[: config.wide]:
        inner, outer, n, stride = kernel
        layer = f"convolution {inner}x{outer}x3x3 on {n} pixels, stride {stride}"
        found[f"{layer} against 300 power iterations:0"] = functools.partial(wide_kernel, kernel)
    for sizes, activation in WIDE_NETWORKS[: config.wide]:
        name = f"{'-'.join(map(str, sizes))} {activation.__name__}"
        found[f"{name}:0"] = functools.partial(tightness, sizes, activation)
    return found


def measure(config: Config, case: Callable[[], Trials | Row]) -> list[Row]:
    """What was found, and the processor time it took."""
    begun = time.process_time()
    row = case()
    if isinstance(row, Trials):
        row = vars(row)
    return [{**row, "CPU seconds": time.process_time() - begun}]


def run(config: Config) -> pd.DataFrame:
    torch.set_num_threads(1)
    chunks = collect(config, cases(config), measure)
    rows = []
    for name, group in chunks.groupby(chunks["case"].str.rsplit(":", n=1).str[0], sort=False):
        row: Row = {"what": name, "CPU seconds": round(group["CPU seconds"].sum(), 1)}
        if group["violations"].notna().all():
            ratios = group["ratios"].explode().astype(float)
            row |= {"trials": len(ratios), "violations": int(group["violations"].sum())}
            row |= {"least excess": ratios.min() - 1, "median ratio": ratios.median()}
            row["worst excess"] = ratios.max() - 1
        else:
            row |= group.iloc[0][["bound/norm product", "bound/ECLipsE-Fast"]].to_dict()
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main(__name__)
