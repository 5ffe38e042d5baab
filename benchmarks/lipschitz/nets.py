"""The networks that are bounded: 2-D flows of a checkerboard, and a convolutional flow."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor, nn

import inn_guard as ig
from benchmarks.common.runner import Row, collect
from inn_guard.core.invertible import Invertible
from inn_guard.execution import deadline
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Squeeze
from inn_guard.layers.scales import SigmoidScale, squashed_sigmoid
from inn_guard.numerics.intervals import Box

BOX = 4.0


@contextmanager
def processor_time() -> Iterator[None]:
    """One thread, and budgets in seconds of the processor: a busy machine changes no result."""
    before, threads = deadline.now, torch.get_num_threads()
    deadline.now = time.process_time
    torch.set_num_threads(1)
    try:
        yield
    finally:
        deadline.now = before
        torch.set_num_threads(threads)


class Kind(enum.Enum):
    """The couplings of the 2-D flows."""

    ADDITIVE = "additive"
    AFFINE = "affine"
    AFFINE_HALF = "affine (0.5, 1)"
    SPLINE = "rational-quadratic spline"


class SplineNet(MLP):
    """An MLP for nflows, which divides widths and heights by the root of ``hidden_features``."""

    hidden_features = 16

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The MLP; there is no context."""
        return super().forward(x)


def block(kind: Kind, hidden: int) -> Invertible:
    """One coupling of two dimensions."""
    if kind is Kind.SPLINE:
        return ig.wrap(
            PiecewiseRationalQuadraticCouplingTransform(
                [0, 1],
                lambda n, m: _quiet(SplineNet([n, hidden, hidden, m], activation=nn.SiLU)),
                num_bins=5,
                tails="linear",
                tail_bound=BOX + 0.5,
            )
        )
    outputs = 2
    if kind is Kind.ADDITIVE:
        outputs = 1
    net = _quiet(MLP([1, hidden, hidden, outputs], activation=nn.SiLU))
    if kind is Kind.ADDITIVE:
        return AdditiveCoupling(net)
    if kind is Kind.AFFINE:
        return AffineCoupling(net, scale=SigmoidScale(lower=1e-3, upper=1.001))
    return AffineCoupling(net, scale=squashed_sigmoid())


def _quiet(net: MLP) -> MLP:
    with torch.no_grad():
        net[-1].weight.mul_(0.5)
        net[-1].bias.zero_()
    return net


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Samples (count, 2) of a checkerboard on [-4, 4]^2."""
    first = torch.rand(count, generator=generator) * 4 - 2
    second = torch.rand(count, generator=generator)
    second = second - torch.randint(0, 2, (count,), generator=generator) * 2.0
    return 2 * torch.stack([first, second + first.floor() % 2], 1)


def box() -> Box:
    """[-4, 4]^2, which holds the checkerboard."""
    corner = BOX * torch.ones(2)
    return Box(-corner, corner)


def toy(
    kind: Kind, *, blocks: int = 16, hidden: int = 128, steps: int = 200, seed: int = 0
) -> Chain:
    """Trained by maximum likelihood; the last layer, a diagonal, is dropped afterwards."""
    layers: list[Invertible] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(blocks):
            layers += [block(kind, hidden), Permutation.reverse(2)]
        flow = Chain(*layers)
    generator = torch.Generator().manual_seed(seed)
    _train(flow, lambda: checkerboard(256, generator), steps)
    return flow.double().eval().requires_grad_(requires_grad=False)


def collect_by_kind(config: Any, measure: Callable[[Any, Kind], Iterable[Row]]) -> pd.DataFrame:
    """Rows of every kind of flow that the configuration names, timed on the processor."""
    with processor_time():
        frame = collect(config, {name: Kind[name] for name in config.kinds}, measure)
    return frame.drop(columns="case")


def _train(flow: Chain, batch: Callable[[], Tensor], steps: int) -> None:
    scale = Diagonal(flow(batch()[:1]).shape[1])
    model = Chain(flow, scale)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        x = batch()
        loss = -model.log_prob(x).mean() / x[0].numel()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()


def images(count: int, generator: torch.Generator, size: int = 32) -> Tensor:
    """Smooth synthetic images in [0, 1], (count, 3, size, size)."""
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    fine = torch.randn(count, 3, size // 2, size // 2, generator=generator)
    smooth = _enlarged(coarse, size) + 0.3 * _enlarged(fine, size)
    return torch.sigmoid(smooth).clamp(0, 1)


def _enlarged(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False)


def conv_flow(
    *,
    affine: bool = False,
    blocks: int = 16,
    hidden: int = 128,
    steps: int = 40,
    seed: int = 0,
    size: int = 32,
) -> Chain:
    """A flow on 3 x size x size, squeezed to 12 channels.

    Its couplings have networks of 3x3, 1x1 and 3x3 convolutions with ELU; a permutation after each
    exchanges the halves.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[Invertible] = [Squeeze()]
        for _ in range(blocks):
            net = ConvNet(6, hidden, 6 * (1 + affine), activation=nn.ELU)
            with torch.no_grad():
                net[-1].weight.mul_(0.5)
            coupling: Invertible = AdditiveCoupling(net)
            if affine:
                coupling = AffineCoupling(net, scale=squashed_sigmoid())
            layers += [coupling, Permutation(torch.cat([torch.arange(6, 12), torch.arange(6)]))]
        flow = Chain(*layers)
    generator = torch.Generator().manual_seed(seed)
    _train(flow, lambda: images(8, generator, size) - 0.5, steps)
    return flow.double().eval().requires_grad_(requires_grad=False)
