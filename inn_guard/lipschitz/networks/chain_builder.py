"""Networks, or whole flows, as chains of linear maps and slopes, dense or on a torus."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inn_guard.lipschitz.lipsdp.chain import Chain, Layer
from inn_guard.lipschitz.networks.activations import Activation
from inn_guard.lipschitz.networks.graph import LinearRearrangement, Unbounded
from inn_guard.numerics.convolution_norm import is_transposed, kernels, paddings, symbol
from inn_guard.numerics.intervals import Interval
from inn_guard.numerics.rounding import Upper, frobenius_norm, gamma, gamma_of, is_finite
from inn_guard.numerics.spectral_norm import exact

__all__ = ["ChainBuilder", "ChainInterpreter", "Linear", "Torus"]

DERIVED = 64  #: roundings allowed to weights that were computed from stored numbers


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
        zero_outside: whether it is zero outside the image; False after a convolution of a
            zero-padded image.
    """

    blocks: dict[int, Tensor]
    channels: int
    error: float = 0.0
    zero_outside: bool = True

    def mapped(self, weight: Tensor, error: float = 0.0) -> Linear:
        """weight @ value; weight (1 or frequencies, rows, channels) is known up to ``error``."""
        size, own = frobenius_norm(weight), self.norm()
        blocks = {}
        rounding = gamma(DERIVED)
        for part, block in self.blocks.items():
            blocks[part] = _product(weight, block)
            rounding = Upper.max(rounding, gamma_of(blocks[part], DERIVED + weight.shape[2]))
        total = (size + error) * self.error + own * error + rounding * size * own
        return Linear(blocks, weight.shape[1], total, self.zero_outside)

    def rows(self, index: Tensor) -> Linear:
        """The channels of an index."""
        blocks = {part: block[:, index] for part, block in self.blocks.items()}
        return replace(self, blocks=blocks, channels=len(index))

    def norm(self) -> Upper:
        """A bound of the Frobenius norm."""
        square = Upper(0.0)
        for block in self.blocks.values():
            norm = frobenius_norm(block)
            square = square + norm * norm
        return square.sqrt()


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
        """The input of the chain."""
        return Linear({0: torch.eye(self.size, dtype=torch.float64)[None]}, self.size)

    def activated(self, x: Linear, lower: Tensor, upper: Tensor) -> Linear:
        """sigma(x) with slopes in [lower, upper], (channels,); zero outside an image."""
        lower, upper = self.slopes(x, lower, upper)
        if not is_finite(lower) or not is_finite(upper):
            raise Unbounded("a slope is not finite")
        state = sum(size for _, size in self.parts)
        keep = torch.eye(state, dtype=torch.float64)[None]
        self.layers.append(Layer(keep, self._matrix(x), lower, upper, x.error))
        return replace(self._named(x, self.parts), zero_outside=True)

    def slopes(self, x: Linear, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes, with zero among them where x must be set to zero outside the image."""
        if self._is_masked(x):
            return lower, upper
        return lower.clamp_max(0), upper.clamp_min(0)

    def reset_state(self, x: Linear) -> Linear:
        """x as the whole state; everything else is dropped."""
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
        """x, set to zero outside the image by a layer of slopes 0 or 1 where needed."""
        if self._is_masked(x):
            return replace(x, zero_outside=True)
        zeros = torch.zeros(x.channels, dtype=torch.float64)
        return self.activated(x, zeros, zeros + 1)

    def _is_masked(self, x: Linear) -> bool:
        return x.zero_outside or self.torus is None or not self.torus.margin

    def finish(self, x: Linear) -> Chain:
        """The chain of output x, without neurons that x does not depend on."""
        return _pruned(Chain(self.size, tuple(self.layers), self._matrix(x), x.error))

    def _matrix(self, x: Linear) -> Tensor:
        frequencies, dtype = 1, torch.float64
        for block in x.blocks.values():
            frequencies = max(frequencies, len(block))
            dtype = torch.promote_types(dtype, block.dtype)
        columns = []
        for part, size in self.parts:
            zeros = torch.zeros(1, x.channels, size, dtype=dtype)
            block = x.blocks.get(part, zeros).to(dtype)
            columns.append(block.expand(frequencies, -1, -1))
        return torch.cat(columns, 2)


class ChainInterpreter:
    """A network's operations as layers of a builder.

    Args:
        builder: the layers are appended to it.
        preactivations: the input of each activation, for local slopes; empty for global ones.
    """

    def __init__(
        self, builder: ChainBuilder, preactivations: dict[str, Interval] | None = None
    ) -> None:
        self.builder = builder
        self.preactivations = preactivations or {}

    def linear(self, x: Linear, weight: Tensor, bias: Tensor | None) -> Linear:
        """W x, on vectors."""
        if self.builder.torus is not None:
            raise Unbounded("a dense layer on an image")
        return x.mapped(exact(weight)[None])

    def convolution(self, x: Linear, module: Any) -> Linear:
        """One matrix per frequency."""
        torus = self.builder.torus
        if torus is None:
            raise Unbounded("a convolution on a vector")
        before, after = _checked_geometry(module, torus)
        blocks, error = [], Upper(0.0)
        for kernel in kernels(module):
            block, own = symbol(kernel, torus.grid, before)
            blocks.append(block)
            error = error + own
        matrix = blocks[0]
        if len(blocks) > 1:
            matrix = _block_diagonal(blocks)
        if max(*before, *after) == 0:
            return x.mapped(matrix, error)
        y = self.builder.masked(x).mapped(matrix, error)
        if torus.margin:
            return replace(y, zero_outside=False)
        return y

    def activate(self, x: Linear, function: Activation, node: str) -> Linear:
        """A layer with slopes over the preactivations' box, or over the real line."""
        if node in self.preactivations:
            slopes = function.slope(self.preactivations[node])
            flat = slopes.map(lambda end: end.reshape(x.channels, -1))
            return self.builder.activated(x, flat.lo.amin(1), flat.hi.amax(1))
        low, high = function.slopes()
        ones = torch.ones(x.channels, dtype=torch.float64)
        return self.builder.activated(x, low * ones, high * ones)

    def rescale(self, x: Linear, scale: Tensor, shift: Tensor) -> Linear:
        """diag(scale) x; a shift does not change the Jacobian."""
        values = exact(scale) * torch.ones(x.channels, dtype=torch.float64)
        return x.mapped(torch.diag(values)[None])

    def add(self, x: Linear, y: Linear) -> Linear:
        """The sum of two values."""
        if x.channels != y.channels:
            raise Unbounded("a sum that broadcasts channels")
        blocks = dict(x.blocks)
        for part, block in y.blocks.items():
            blocks[part] = blocks[part] + block if part in blocks else block
        error = Upper(x.error) + y.error + gamma(DERIVED) * (x.norm() + y.norm())
        return Linear(blocks, x.channels, error, x.zero_outside and y.zero_outside)

    def concatenate(self, parts: list[Linear], *, last: bool = False) -> Linear:
        """The channels of all parts."""
        names = {name for part in parts for name in part.blocks}
        sizes = dict(self.builder.parts)
        blocks = {name: _stacked(name, parts, sizes[name]) for name in names}
        channels, square, zero_outside = 0, Upper(0.0), True
        for part in parts:
            channels += part.channels
            square = square + Upper(part.error) * part.error
            zero_outside = zero_outside and part.zero_outside
        return Linear(blocks, channels, square.sqrt(), zero_outside)

    def flatten(self, x: Linear) -> Linear:
        """The same value, on vectors only."""
        if self.builder.torus is not None:
            raise Unbounded("an image is flattened")
        return x

    def rearrange(self, x: Linear, move: LinearRearrangement) -> Linear:
        """Not in a chain: that would need a matrix over pixels."""
        raise Unbounded("entries are moved, repeated or averaged")

    def constant(self, value: Tensor, like: Linear) -> Linear:
        """No blocks: the value does not depend on the state."""
        return Linear({}, value.shape[1])


def _checked_geometry(module: Any, torus: Torus) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The paddings before and after, of a convolution that keeps the size of the torus's images."""
    before, after = paddings(module)
    if is_transposed(module) or set(module.stride) != {1} or len(before) != len(torus.size):
        raise Unbounded("a convolution that changes the image size")
    for axis, (left, right) in enumerate(zip(before, after, strict=True)):
        if left + right != module.dilation[axis] * (module.kernel_size[axis] - 1):
            raise Unbounded("a convolution that changes the image size")
    wanted = "circular"
    if torus.margin:
        wanted = "zeros"
    largest = max(*before, *after)
    if largest > 0 and module.padding_mode != wanted:
        raise Unbounded(f"{module.padding_mode} padding")
    if torus.margin and largest > torus.margin:
        raise Unbounded("a padding larger than the torus's margin")
    return before, after


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    return torch.stack([torch.block_diag(*parts) for parts in zip(*blocks, strict=True)])


def _stacked(name: int, parts: list[Linear], size: int) -> Tensor:
    """The rows of all parts that depend on one part of the state, zeros where a part does not."""
    frequencies, dtype = 1, torch.float64
    for part in parts:
        if name in part.blocks:
            frequencies = max(frequencies, len(part.blocks[name]))
            dtype = torch.promote_types(dtype, part.blocks[name].dtype)
    rows = []
    for part in parts:
        zeros = torch.zeros(1, part.channels, size, dtype=dtype)
        block = part.blocks.get(name, zeros).to(dtype)
        rows.append(block.expand(frequencies, -1, -1))
    return torch.cat(rows, 1)


def _product(weight: Tensor, block: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, block.dtype)
    return weight.to(dtype) @ block.to(dtype)


def _pruned(chain: Chain) -> Chain:
    """Without neurons and inputs that nothing depends on, and without layers that do nothing."""
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
    live = [layer for layer in reversed(layers) if not _does_nothing(layer)]
    return Chain(len(needed), tuple(live), output, chain.error)


def _does_nothing(layer: Layer) -> bool:
    return not len(layer.lower) and not layer.error and _is_identity(layer.keep)


def _is_identity(matrix: Tensor) -> bool:
    return matrix.shape[1] == matrix.shape[2] and bool((matrix == torch.eye(matrix.shape[1])).all())


def _columns(*matrices: Tensor) -> Tensor:
    """Indices of the columns with a nonzero entry in a matrix; the first if there is none."""
    used = torch.zeros(matrices[0].shape[2], dtype=torch.bool)
    for matrix in matrices:
        used |= (matrix != 0).any(0).any(0)
    if not bool(used.any()):
        return torch.zeros(1, dtype=torch.long)
    return used.nonzero().flatten()
