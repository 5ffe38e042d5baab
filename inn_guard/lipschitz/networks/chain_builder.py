"""Building chains: a network, or a whole flow, read as layers of linear maps and slopes, dense or on a torus."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.lipschitz.lipsdp.chain import Chain, Layer
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Unbounded
from inn_guard.numerics.convolution_norm import is_transposed, kernels, paddings, symbol
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import UNIT, up
from inn_guard.numerics.spectral_norm import exact

__all__ = ["ChainBuilder", "ChainReading", "Linear", "Torus"]

DERIVED = 64 * UNIT  #: relative error of weights that are products of stored numbers


@dataclass(frozen=True)
class Torus:
    """The circular grid on which zero-padded images of ``size`` pixels are convolved.

    Attributes:
        size: pixels of the image.
        margin: pixels added, at least the largest padding; 0 for circular convolutions.
    """

    size: tuple[int, ...]
    margin: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Pixels of the torus."""
        return tuple(n + self.margin for n in self.size)


@dataclass(frozen=True)
class Linear:
    """A value that is linear in the builder's state.

    Attributes:
        blocks: state part -> matrix (1 or frequencies, channels, size of the part).
        channels: number of rows.
        error: Frobenius norm of what is not known about each frequency's matrix.
        zero_outside: whether it is zero outside the image; False after a convolution of a zero-padded image.
    """

    blocks: dict[int, Tensor]
    channels: int
    error: float = 0.0
    zero_outside: bool = True

    def mapped(self, weight: Tensor, error: float = 0.0) -> Linear:
        """weight @ value, (1 or frequencies, rows, channels), known up to ``error``."""
        size, own = _norm(weight), self.norm()
        blocks = {part: _product(weight, block) for part, block in self.blocks.items()}
        total = up((size + error) * self.error + error * own + DERIVED * size * own, 8)
        return Linear(blocks, weight.shape[1], total, self.zero_outside)

    def rows(self, index: Tensor) -> Linear:
        """Some channels."""
        blocks = {part: block[:, index] for part, block in self.blocks.items()}
        return replace(self, blocks=blocks, channels=len(index))

    def norm(self) -> float:
        """A bound of the Frobenius norm."""
        return up(math.sqrt(sum(_norm(block) ** 2 for block in self.blocks.values())), 8)


class ChainBuilder:
    """Collects the layers of a chain while values are computed.

    Args:
        size: channels of the input.
        torus: where convolutions act, or None for vectors.
    """

    def __init__(self, size: int, torus: Torus | None = None) -> None:
        self.torus = torus
        self.parts: list[tuple[int, int]] = [(0, size)]
        self.layers: list[Layer] = []
        self.size = size

    def start(self) -> Linear:
        """The input."""
        return Linear({0: torch.eye(self.size, dtype=torch.float64)[None]}, self.size)

    def activated(self, x: Linear, lower: Tensor, upper: Tensor) -> Linear:
        """sigma(x) with slopes in [lower, upper], (channels,); on a torus it is zero outside the image."""
        lower, upper = self.slopes(x, lower, upper)
        if not bool((lower.isfinite() & upper.isfinite()).all()):
            raise Unbounded("a slope is not finite")
        state = sum(size for _, size in self.parts)
        keep = torch.eye(state, dtype=torch.float64)[None]
        self.layers.append(Layer(keep, self._matrix(x), lower, upper, x.error))
        return replace(self._named(x, self.parts), zero_outside=True)

    def slopes(self, x: Linear, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes with zero among them where x must be set to zero outside the image; what is zero stays so anyhow."""
        if x.zero_outside or self.torus is None or not self.torus.margin:
            return lower, upper
        return lower.clamp_max(0), upper.clamp_min(0)

    def reset_state(self, x: Linear) -> Linear:
        """x as the whole state: everything else is forgotten."""
        matrix = self._matrix(x)
        none = torch.zeros(0, dtype=torch.float64)
        self.layers.append(Layer(matrix, matrix[:1, :0], none, none, x.error))
        return self._named(x, [])

    def _named(self, x: Linear, others: list[tuple[int, int]]) -> Linear:
        name = len(self.layers)
        self.parts = [*others, (name, x.channels)]
        return Linear(
            {name: torch.eye(x.channels, dtype=torch.float64)[None]},
            x.channels,
            zero_outside=x.zero_outside,
        )

    def masked(self, x: Linear) -> Linear:
        """x, set to zero outside the image: a layer of slopes 0 or 1 where that is not so already."""
        if x.zero_outside or self.torus is None or not self.torus.margin:
            return replace(x, zero_outside=True)
        return self.activated(
            x,
            torch.zeros(x.channels, dtype=torch.float64),
            torch.ones(x.channels, dtype=torch.float64),
        )

    def finish(self, x: Linear) -> Chain:
        """The chain whose result is x, without neurons that x does not depend on."""
        return _pruned(Chain(self.size, tuple(self.layers), self._matrix(x), x.error))

    def _matrix(self, x: Linear) -> Tensor:
        frequencies = max([len(block) for block in x.blocks.values()], default=1)
        dtype = (
            torch.complex128
            if any(block.is_complex() for block in x.blocks.values())
            else torch.float64
        )
        columns = []
        for part, size in self.parts:
            block = x.blocks.get(part, torch.zeros(1, x.channels, size, dtype=torch.float64))
            columns.append(block.to(dtype).expand(frequencies, -1, -1))
        return torch.cat(columns, 2)


class ChainReading:
    """A network's operations as layers of a builder.

    Args:
        builder: where the layers go.
        seen: what goes into each activation, for local slopes; empty for global ones.
    """

    def __init__(self, builder: ChainBuilder, seen: dict[str, Interval] | None = None) -> None:
        self.builder = builder
        self.seen = seen or {}

    def linear(self, x: Linear, weight: Tensor, bias: Tensor | None) -> Linear:
        """W x."""
        if self.builder.torus is not None:
            raise Unbounded("a dense layer on an image")
        return x.mapped(exact(weight)[None])

    def convolution(self, x: Linear, module: Any) -> Linear:
        """One matrix per frequency."""
        torus = self.builder.torus
        if torus is None:
            raise Unbounded("a convolution on a vector")
        before, after = _checked_geometry(module, torus)
        parts = kernels(module)
        weights = [symbol(part, torus.grid, before) for part in parts]
        if len(parts) > 1:
            weights = [
                (
                    _block_diagonal([w for w, _ in weights]),
                    math.sqrt(len(weights)) * max(e for _, e in weights),
                )
            ]
        matrix, error = weights[0]
        spreads = max(*before, *after) > 0
        x = self.builder.masked(x) if spreads else x
        y = x.mapped(matrix, error)
        return replace(y, zero_outside=False) if spreads and torus.margin else y

    def activate(self, x: Linear, function: Activation, place: str) -> Linear:
        """A layer with slopes over the box that was seen, or global ones."""
        if place in self.seen:
            slopes = function.slope(self.seen[place])
            flat = slopes.map(lambda t: t.reshape(x.channels, -1))
            return self.builder.activated(x, flat.lo.amin(1), flat.hi.amax(1))
        low, high = function.slopes()
        ones = torch.ones(x.channels, dtype=torch.float64)
        return self.builder.activated(x, low * ones, high * ones)

    def rescale(self, x: Linear, scale: Tensor, shift: Tensor) -> Linear:
        """diag(scale) x."""
        values = exact(scale) * torch.ones(x.channels, dtype=torch.float64)
        return x.mapped(torch.diag(values)[None])

    def add(self, x: Linear, y: Linear) -> Linear:
        """x + y."""
        if x.channels != y.channels:
            raise Unbounded("a sum that broadcasts channels")
        blocks = dict(x.blocks)
        for part, block in y.blocks.items():
            blocks[part] = blocks[part] + block if part in blocks else block
        rounding = DERIVED * (x.norm() + y.norm())
        return Linear(
            blocks,
            x.channels,
            up(x.error + y.error + rounding, 2),
            x.zero_outside and y.zero_outside,
        )

    def concatenate(self, parts: list[Linear]) -> Linear:
        """One above the other."""
        names = {name for part in parts for name in part.blocks}
        sizes = dict(self.builder.parts)
        blocks = {
            name: torch.cat(
                _filled([part.blocks.get(name) for part in parts], parts, sizes[name]), 1
            )
            for name in names
        }
        error = up(math.sqrt(sum(part.error**2 for part in parts)), 4)
        return Linear(
            blocks,
            sum(part.channels for part in parts),
            error,
            all(part.zero_outside for part in parts),
        )

    def flatten(self, x: Linear) -> Linear:
        """The same, on vectors only."""
        if self.builder.torus is not None:
            raise Unbounded("an image is flattened")
        return x

    def rearrange(self, x: Linear, move: LinearRearrangement) -> Linear:
        """Not in a chain."""
        raise Unbounded("entries are moved, repeated or averaged")

    def constant(self, value: Tensor, like: Linear) -> Linear:
        """No dependence on the state."""
        return Linear({}, value.shape[1])


def _checked_geometry(module: Any, torus: Torus) -> tuple[tuple[int, ...], tuple[int, ...]]:
    before, after = paddings(module)
    same = all(
        a + b == d * (k - 1)
        for a, b, k, d in zip(before, after, module.kernel_size, module.dilation, strict=True)
    )
    if (
        is_transposed(module)
        or set(module.stride) != {1}
        or not same
        or len(before) != len(torus.size)
    ):
        raise Unbounded("a convolution that changes the image size")
    wanted = "zeros" if torus.margin else "circular"
    if max(*before, *after) > 0 and module.padding_mode != wanted:
        raise Unbounded(f"{module.padding_mode} padding")
    if torus.margin and max(*before, *after) > torus.margin:
        raise Unbounded("a padding larger than the torus's margin")
    return before, after


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    return torch.stack([torch.block_diag(*parts) for parts in zip(*blocks, strict=True)])


def _filled(blocks: list[Tensor | None], parts: list[Linear], size: int) -> list[Tensor]:
    """Every part's block, zeros where it has none, all with as many frequencies and of one type."""
    present = [block for block in blocks if block is not None]
    frequencies, dtype = max(len(block) for block in present), present[0].dtype
    for block in present:
        dtype = torch.promote_types(dtype, block.dtype)
    full = [
        torch.zeros(1, part.channels, size, dtype=dtype) if block is None else block.to(dtype)
        for block, part in zip(blocks, parts, strict=True)
    ]
    return [block.expand(frequencies, -1, -1) for block in full]


def _product(weight: Tensor, block: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, block.dtype)
    return weight.to(dtype) @ block.to(dtype)


def _norm(matrix: Tensor) -> float:
    return (
        up(float(torch.linalg.matrix_norm(matrix).max()) * (1 + 1e-12), 2)
        if matrix.numel()
        else 0.0
    )


def _pruned(chain: Chain) -> Chain:
    """Without neurons, and inputs, that nothing depends on, and without layers that do nothing."""
    needed = _columns(chain.output)
    output, layers = chain.output[:, :, needed], []
    for layer in reversed(chain.layers):
        k = layer.keep.shape[1]
        hidden = needed[needed >= k] - k
        keep, weight = layer.keep[:, needed[needed < k]], layer.weight[:, hidden]
        used = _columns(keep, weight)
        keep, weight = keep[:, :, used], weight[:, :, used]
        layers.append(Layer(keep, weight, layer.lower[hidden], layer.upper[hidden], layer.error))
        needed = used
    live = [
        layer
        for layer in reversed(layers)
        if len(layer.lower) or layer.error or not _is_identity(layer.keep)
    ]
    return Chain(len(needed), tuple(live), output, chain.error)


def _is_identity(matrix: Tensor) -> bool:
    return matrix.shape[1] == matrix.shape[2] and bool((matrix == torch.eye(matrix.shape[1])).all())


def _columns(*matrices: Tensor) -> Tensor:
    """Indices of the columns with a nonzero entry in one of them; the first where there is none."""
    used = (
        torch.stack([(matrix != 0).any(0).any(0) for matrix in matrices]).any(0).nonzero().flatten()
    )
    return used if len(used) else torch.zeros(1, dtype=torch.long)
