"""Certificates against the truth: matrix norms in 40 digits, convolutions and subnetworks against dense matrices."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath
import pandas as pd
import torch
from torch import Tensor, nn

from inn_guard.layers.networks import MLP
from inn_guard.lipschitz.building import ChainBuilder
from inn_guard.lipschitz.chains import Chain
from inn_guard.lipschitz.conditioners import Effort, bound_chain, read
from inn_guard.lipschitz.convolution import convolution_norm
from inn_guard.lipschitz.intervals import Box
from inn_guard.lipschitz.recursion import certify, fast_multipliers
from inn_guard.lipschitz.spectral import spectral_norm

RESULTS = Path(__file__).parents[1] / "results" / "lipschitz_rigour.csv"
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
    """How much is measured."""

    matrices: int = 10_000
    kernels: int = 2_000
    networks: int = 2_000
    large: int = 3

    @classmethod
    def smoke(cls) -> Config:
        """Seconds."""
        return cls(matrices=20, kernels=10, networks=20, large=0)

    @classmethod
    def paper(cls) -> Config:
        """What the committed table holds."""
        return cls()


def integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def matrices(count: int) -> dict[str, float]:
    """Random sizes, scales and, every third, an orthogonal matrix; the truth in 40 digits."""
    generator, below, excess = torch.Generator().manual_seed(0), 0, 0.0
    mpmath.mp.dps = 40
    for trial in range(count):
        rows, columns = integer(generator, 1, 4), integer(generator, 1, 4)
        A = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        A = (
            torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
            if trial % 3 == 0
            else A
        )
        A = A * 10 ** float(torch.empty(()).uniform_(-6, 6, generator=generator))
        M = mpmath.matrix(A.tolist())
        truth = mpmath.sqrt(max(mpmath.eigsy(M.T * M, eigvals_only=True)))
        bound = spectral_norm(A)
        below += bound < truth
        excess = max(excess, float(bound / truth - 1))
    return {"trials": count, "violations": below, "worst ratio": 1 + excess}


def kernels(count: int) -> dict[str, float]:
    """Random channels, windows, strides, dilations, groups and zero paddings against dense matrices."""
    generator, below, done, ratios = torch.Generator().manual_seed(1), 0, 0, []
    while done < count:
        groups, k, stride = integer(generator, 1, 2), integer(generator, 1, 5), integer(generator, 1, 3)
        dilation = integer(generator, 1, 2) if stride == 1 else 1
        window, padding = dilation * (k - 1) + 1, integer(generator, 0, k // 2)
        n = integer(generator, max(window, 4), max(window, 9))
        inner, outer = (groups * integer(generator, 1, 3) for _ in range(2))
        module = nn.Conv2d(inner, outer, k, stride, padding, dilation, groups, bias=False, dtype=torch.float64)
        weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
        module.weight = nn.Parameter(weight.abs() if done % 3 == 0 else weight)
        basis = torch.eye(inner * n * n, dtype=torch.float64).reshape(-1, inner, n, n)
        with torch.no_grad():
            truth = float(torch.linalg.matrix_norm(module(basis).flatten(1), 2))
        bound = convolution_norm(module, (n, n))
        below += bound < truth * (1 - 1e-12)
        ratios.append(bound / truth)
        done += 1
    return {
        "trials": count,
        "violations": below,
        "median ratio": sorted(ratios)[count // 2],
        "worst ratio": max(ratios),
    }


def large_kernels(count: int) -> dict[str, float]:
    """Layers of usual size against the lower bound of 300 power iterations."""
    worst, seconds = 1.0, 0.0
    for inner, outer, n, stride in ((3, 128, 32, 1), (64, 64, 32, 1), (6, 128, 16, 1), (64, 64, 32, 2))[: count + 1]:
        torch.manual_seed(3)
        module = nn.Conv2d(inner, outer, 3, stride, 1, bias=False, dtype=torch.float64)
        nn.init.normal_(module.weight, std=1 / math.sqrt(9 * inner))
        x = torch.randn(1, inner, n, n, dtype=torch.float64)
        for _ in range(300):
            (x,) = torch.autograd.functional.vjp(module, x, module(x))[1:]
            x = (x / x.norm()).detach()
        lower = float(module(x).norm().detach())
        begun = time.process_time()
        worst, seconds = max(worst, convolution_norm(module, (n, n)) / lower), max(seconds, time.process_time() - begun)
    return {"trials": count + 1, "violations": 0, "worst ratio": worst, "CPU seconds": round(seconds, 2)}


def networks(count: int) -> dict[str, float]:
    """Random small networks of eight activations, global and local slopes, against slope vertices and Jacobians."""
    generator, below, ratios = torch.Generator().manual_seed(2), 0, []
    torch.manual_seed(2)
    for trial in range(count):
        sizes = [integer(generator, 1, 5) for _ in range(integer(generator, 3, 5))]
        net = MLP(sizes, activation=ACTIVATIONS[trial % len(ACTIVATIONS)]).double()
        box = Box(-torch.ones(sizes[0]), torch.ones(sizes[0])) if trial % 2 else Box.everywhere(sizes[:1])
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=1.0, generator=generator)
        builder = ChainBuilder(sizes[0])
        chain = builder.finish(read(net, box).into(builder, builder.start()))
        bound = bound_chain(chain, Effort(steps=3 * (trial % 4 == 0))).bound
        truth = max(_vertex(chain, generator) for _ in range(8))
        x = torch.rand(4, sizes[0], generator=generator, dtype=torch.float64) * 2 - 1
        J = torch.func.vmap(torch.func.jacrev(net))(x)
        truth = max(truth, float(torch.linalg.matrix_norm(J, 2).max().detach()))
        below += bound < truth * (1 - 1e-12)
        ratios.append(bound / truth if truth > 0 else 1.0)
    return {
        "trials": count,
        "violations": below,
        "median ratio": sorted(ratios)[count // 2],
        "worst ratio": max(ratios),
    }


def _vertex(chain: Chain, generator: torch.Generator) -> float:
    slopes: list[Tensor] = []
    for layer in chain.layers:
        up = torch.rand(len(layer.lower), generator=generator) < 0.5
        slopes.append(torch.where(up, layer.upper, layer.lower))
    return float(torch.linalg.matrix_norm(chain.jacobian(slopes), 2))


def tightness(count: int) -> list[dict[str, object]]:
    """128-wide networks: the optimised recursion over the norm product, and over ECLipsE-Fast."""
    rows = []
    cases = [
        ([16, 128, 128, 16], nn.ReLU),
        ([16, 128, 128, 16], nn.ELU),
        ([16, 128, 128, 16], nn.SiLU),
        ([64, 128, 128, 64], nn.ReLU),
    ]
    for sizes, activation in cases[: count + 1]:
        torch.manual_seed(0)
        net = MLP(sizes, activation=activation).double()
        for module in net:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        reading = read(net, Box.everywhere(sizes[:1]))
        builder = ChainBuilder(sizes[0])
        chain = builder.finish(reading.into(builder, builder.start()))
        begun = time.process_time()
        bound = bound_chain(chain, Effort(steps=100, seconds=60.0)).bound
        seconds = time.process_time() - begun
        rows.append(
            {
                "what": f"{'-'.join(map(str, sizes))} {activation.__name__}",
                "bound/norm product": bound / reading.product(),
                "bound/ECLipsE-Fast": bound / certify(chain, fast_multipliers(chain)), "CPU seconds": round(seconds, 1),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def run(config: Config) -> pd.DataFrame:
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name, measure, count in (
        ("convolutions of usual size against 300 power iterations", large_kernels, config.large),
        ("convolutions against dense matrices", kernels, config.kernels),
        ("matrix certificates against 40 digits", matrices, config.matrices),
        ("subnetworks against slope vertices", networks, config.networks),
    ):
        begun = time.process_time()
        rows.append({"what": name, "CPU seconds": 0.0, **measure(count)})
        rows[-1]["total CPU seconds"] = round(time.process_time() - begun, 1)
        print(rows[-1], flush=True)
    return pd.DataFrame(rows + tightness(config.large))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, nothing written")
    config = Config.smoke() if parser.parse_args().smoke else Config.paper()
    frame = run(config)
    print(frame.to_string())
    if config == Config.paper():
        frame.to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()
