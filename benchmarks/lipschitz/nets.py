"""The networks that are bounded: 2-D flows trained on a checkerboard, and a convolutional flow on images."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
from torch import Tensor, nn

import inn_guard as ig
from inn_guard.core.invertible import Invertible
from inn_guard.execution import deadline
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.networks import MLP, ConvNet
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.reshape import Squeeze
from inn_guard.layers.scales import SigmoidScale, squashed_sigmoid

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
    """An MLP as nflows calls it; raw widths and heights are divided by the root of ``hidden_features``."""

    hidden_features = 16

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The MLP; there is no context."""
        return super().forward(x)


def block(kind: Kind, hidden: int) -> Invertible:
    sizes = [1, hidden, hidden]
    if kind is Kind.ADDITIVE:
        return AdditiveCoupling(_quiet(MLP([*sizes, 1], activation=nn.SiLU)))
    if kind is Kind.AFFINE:
        return AffineCoupling(
            _quiet(MLP([*sizes, 2], activation=nn.SiLU)),
            scale=SigmoidScale(lower=1e-3, upper=1.001),
        )
    if kind is Kind.AFFINE_HALF:
        return AffineCoupling(
            _quiet(MLP([*sizes, 2], activation=nn.SiLU)), scale=squashed_sigmoid()
        )
    return ig.wrap(
        PiecewiseRationalQuadraticCouplingTransform(
            [0, 1], lambda n, m: _quiet(SplineNet([n, hidden, hidden, m], activation=nn.SiLU)),
            num_bins=5, tails="linear", tail_bound=BOX + 0.5,
        )
    )  # fmt: skip


def _quiet(net: MLP) -> MLP:
    with torch.no_grad():
        net[-1].weight.mul_(0.5)
        net[-1].bias.zero_()
    return net


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    first = torch.rand(count, generator=generator) * 4 - 2
    second = (
        torch.rand(count, generator=generator)
        - torch.randint(0, 2, (count,), generator=generator) * 2.0
    )
    return 2 * torch.stack([first, second + first.floor() % 2], 1)


def toy(
    kind: Kind, *, blocks: int = 16, hidden: int = 128, steps: int = 200, seed: int = 0
) -> Chain:
    """Trained by maximum likelihood; the last layer, a diagonal, is dropped afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = Chain(
            *(part for _ in range(blocks) for part in (block(kind, hidden), Permutation.reverse(2)))
        )
    generator = torch.Generator().manual_seed(seed)
    _train(flow, lambda: checkerboard(256, generator), steps)
    return flow.double().eval().requires_grad_(requires_grad=False)


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


def images(count: int, generator: torch.Generator) -> Tensor:
    """Smooth synthetic images in [0, 1], (count, 3, 32, 32)."""
    coarse, fine = (torch.randn(count, 3, n, n, generator=generator) for n in (8, 16))
    smooth = sum(
        w * F.interpolate(t, size=32, mode="bicubic", align_corners=False)
        for w, t in ((1, coarse), (0.3, fine))
    )
    return torch.sigmoid(smooth).clamp(0, 1)


def conv_flow(
    *, affine: bool = False, blocks: int = 16, hidden: int = 128, steps: int = 40, seed: int = 0
) -> Chain:
    """3 x 32 x 32, squeezed to 12 x 16 x 16; couplings with 3x3 - 1x1 - 3x3 networks of ELU, halves exchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[Invertible] = [Squeeze()]
        for _ in range(blocks):
            net = ConvNet(6, hidden, 12 if affine else 6, activation=nn.ELU)
            with torch.no_grad():
                net[-1].weight.mul_(0.5)
            coupling = (
                AffineCoupling(net, scale=squashed_sigmoid()) if affine else AdditiveCoupling(net)
            )
            layers += [coupling, Permutation(torch.cat([torch.arange(6, 12), torch.arange(6)]))]
        flow = Chain(*layers)
    generator = torch.Generator().manual_seed(seed)
    _train(flow, lambda: images(8, generator) - 0.5, steps)
    return flow.double().eval().requires_grad_(requires_grad=False)
