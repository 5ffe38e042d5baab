"""Invertible linear maps of the channels, and the Jacobians of linear and of elementwise maps."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian, Map
from inn_guard.core.tensors import per_channel, same_tensor

__all__ = [
    "ChannelMixing",
    "ChannelMixingJacobian",
    "ElementwiseJacobian",
    "InvertibleLinear",
    "LULinear",
    "LinearMapJacobian",
    "PermutationJacobian",
    "mix_channels",
]


CHUNK = 2**18  #: entries that are multiplied at once, so that they stay in a cache


@dataclass(frozen=True)
class _ComputedInverse:
    """Inverse and log-determinant of one weight."""

    weight: Tensor
    inverse: Tensor
    log_abs_det: Tensor


class ChannelMixing(Invertible):
    """z = W x along dimension 1 at every position; log|det J| = positions * log|det W|.

    On vectors (B, C) this is a dense linear layer, on images (B, C, H, W) a 1x1 convolution. W^-1
    and log|det W| are computed in float64 and kept as long as W stays the same.
    """

    _inverse: _ComputedInverse | None = None

    @property
    @abc.abstractmethod
    def weight(self) -> Tensor:
        """The matrix W, (C, C)."""

    @abc.abstractmethod
    def inverse_weight(self) -> Tensor:
        """W^-1, (C, C), computed anew and differentiable; not finite where W is singular."""

    @abc.abstractmethod
    def log_abs_det(self) -> Tensor:
        """log|det W|, a scalar, computed anew and differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """z = W x."""
        return mix_channels(x, self.weight, dims=x.dim())

    def inverse(self, z: Tensor) -> Tensor:
        """x = W^-1 z."""
        if self._needs_graph():
            return mix_channels(z, self.inverse_weight(), dims=z.dim())
        return mix_channels(z, self._computed().inverse, dims=z.dim())

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and positions * log|det W|."""
        return self.forward(x), self._log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -positions * log|det W|."""
        return self.inverse(z), -self._log_det(z)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The Jacobian at x: products with W, W^T, W^-1 and W^-T."""
        with torch.no_grad():
            computed = self._computed()
            return ChannelMixingJacobian.of_weight(x, computed.weight, inverse=computed.inverse)

    def _log_det(self, x: Tensor) -> Tensor:
        positions = x.shape[2:].numel()
        if self._needs_graph():
            return (self.log_abs_det() * positions).expand(len(x))
        return (self._computed().log_abs_det * positions).expand(len(x))

    def _needs_graph(self) -> bool:
        """Whether gradients flow into W: then a stored inverse, which has no graph, is no use."""
        trained = any(parameter.requires_grad for parameter in self.parameters())
        return torch.is_grad_enabled() and trained

    @torch.no_grad()
    def _computed(self) -> _ComputedInverse:
        """W^-1 and log|det W|, computed if W has changed since the last call."""
        weight = self.weight
        # by its entries: a version counter does not see what is written through ``.data``
        if self._inverse is None or not same_tensor(self._inverse.weight, weight):
            self._inverse = _ComputedInverse(
                weight.clone(), self.inverse_weight(), self.log_abs_det()
            )
        return self._inverse


class InvertibleLinear(ChannelMixing):
    """z = W x with W a free matrix; W starts as a random rotation.

    Args:
        channels: size of dimension 1.
        generator: draws the rotation. Default: the global generator, as for all weights.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018),
        section 3.2.
    """

    def __init__(self, channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(
            nn.init.orthogonal_(torch.empty(channels, channels), generator=generator)
        )

    @property
    def weight(self) -> Tensor:
        """The matrix W, (C, C), which is itself the parameter."""
        return self.matrix

    def inverse_weight(self) -> Tensor:
        """W^-1 in float64, rounded; NaN if W is exactly singular."""
        # inv_ex reports singular matrices in ``info`` instead of raising
        inverse, info = torch.linalg.inv_ex(self.matrix.double())
        return torch.where(info == 0, inverse, torch.nan).to(self.matrix.dtype)

    def log_abs_det(self) -> Tensor:
        """log|det W| by LU in float64, rounded."""
        return torch.linalg.slogdet(self.matrix.double()).logabsdet.to(self.matrix.dtype)


class LULinear(ChannelMixing):
    """z = P L (U + diag(s)) x, L unit lower and U strictly upper triangular, s = sign * exp(log_s).

    P and sign are fixed. log|det W| = sum log_s needs no factorisation. W starts as a random
    rotation.

    Args:
        channels: size of dimension 1.
        generator: draws the rotation. Default: the global generator, as for all weights.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018),
        equation 10.
    """

    pivots: Tensor
    sign: Tensor

    def __init__(self, channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        rotation = nn.init.orthogonal_(torch.empty(channels, channels), generator=generator)
        pivots, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("pivots", pivots)
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(diagonal.abs().log())

    @property
    def weight(self) -> Tensor:
        """W = P L (U + diag(s)), (C, C)."""
        lower, upper = self._factors()
        return (self.pivots.double() @ lower @ upper).to(self.log_s.dtype)

    def inverse_weight(self) -> Tensor:
        """W^-1 by two triangular solves in float64, rounded."""
        lower, upper = self._factors()
        right = torch.linalg.solve_triangular(
            lower, self.pivots.double().T, upper=False, unitriangular=True
        )
        return torch.linalg.solve_triangular(upper, right, upper=True).to(self.log_s.dtype)

    def log_abs_det(self) -> Tensor:
        """log|det W|, the sum of log_s: L has a diagonal of ones, P a determinant of +-1."""
        return self.log_s.sum()

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(s), (C, C) each, in float64."""
        identity = torch.eye(len(self.log_s), dtype=torch.float64, device=self.log_s.device)
        diagonal = self.sign.double() * self.log_s.double().exp()
        lower = self.lower.double().tril(-1) + identity
        upper = self.upper.double().triu(1) + torch.diag(diagonal)
        return lower, upper


def mix_channels(x: Tensor, weight: Tensor, *, dims: int) -> Tensor:
    """W x along the channels: dimension 1 of the last ``dims`` dimensions of x.

    Raises:
        ValueError: if W has another number of rows than x has channels.
    """
    if x.shape[1 - dims] != len(weight):
        raise ValueError(f"expected {len(weight)} channels, got {tuple(x.shape)}")
    return functional.linear(x.movedim(1 - dims, -1), weight).movedim(-1, 1 - dims)


@dataclass
class LinearMapJacobian:
    """The Jacobian of z = A x + b: the four products with A, the same at every x.

    Vectors may carry leading dimensions more than x.
    """

    output: Tensor
    jvp: Map
    vjp: Map
    inverse_jvp: Map
    inverse_vjp: Map
    shape: torch.Size  #: of x, (B, *data)

    def multiply(self, matrix: Tensor) -> Tensor:
        """A M for a matrix M (dim x, K), at a batch of one."""
        columns = self.jvp(matrix.T.reshape(-1, *self.shape))
        return columns.reshape(len(columns), -1).T.contiguous()


@dataclass
class ChannelMixingJacobian(LinearMapJacobian):
    """The Jacobian of a matrix that is applied to the channels."""

    weight: Tensor

    @classmethod
    def of_weight(
        cls, x: Tensor, weight: Tensor, *, inverse: Tensor, shift: Tensor | None = None
    ) -> ChannelMixingJacobian:
        """The Jacobian at x of z = W x + b over the channels, at every position.

        Args:
            x: (B, C, *positions).
            weight: W, (C, C).
            inverse: W^-1.
            shift: b, (C,). Default: none.
        """
        dims = x.dim()
        output = mix_channels(x, weight, dims=dims)
        if shift is not None:
            output = output + per_channel(shift, x)
        return cls(
            output=output,
            jvp=lambda v: mix_channels(v, weight, dims=dims),
            vjp=lambda u: mix_channels(u, weight.T, dims=dims),
            inverse_jvp=lambda u: mix_channels(u, inverse, dims=dims),
            inverse_vjp=lambda v: mix_channels(v, inverse.T, dims=dims),
            shape=x.shape,
            weight=weight,
        )

    def select(self, rows: Tensor) -> ChannelMixingJacobian:
        """The same products; the output of these rows."""
        return dataclasses.replace(self, output=self.output[rows])

    def multiply(self, matrix: Tensor) -> Tensor:
        """The weight applied to the channels of every column of M (dim x, K); in place."""
        matrix = matrix.contiguous()
        channels = len(self.weight)
        width = max(1, CHUNK // channels)
        # in place and in blocks: a second matrix of this size may not fit into memory
        for columns in matrix.view(channels, -1).split(width, dim=1):
            columns.copy_(self.weight @ columns)
        return matrix


@dataclass
class PermutationJacobian(LinearMapJacobian):
    """The Jacobian of a map that only moves entries: z_i = x_rows(i), within one flat sample."""

    rows: Tensor  #: the index in x of every entry of z, (D,)

    @classmethod
    def of_moves(
        cls, x: Tensor, forward: Map, inverse: Map, *, output: Tensor | None = None
    ) -> PermutationJacobian:
        """The Jacobian at x of a map that only moves entries.

        Args:
            x: (B, *data).
            forward: moves the entries of vectors with any leading dimensions.
            inverse: moves them back.
            output: F(x). Default: ``forward(x)``.
        """
        # where the numbers 0, 1, ... end up tells which entry each output takes
        numbered = torch.arange(x[0].numel(), device=x.device).reshape(1, *x.shape[1:])
        return cls(
            forward(x) if output is None else output,
            jvp=forward,
            vjp=inverse,
            inverse_jvp=inverse,
            inverse_vjp=forward,
            shape=x.shape,
            rows=forward(numbered).flatten(),
        )

    def select(self, rows: Tensor) -> PermutationJacobian:
        """The same products; the output of these rows."""
        return dataclasses.replace(self, output=self.output[rows])

    def multiply(self, matrix: Tensor) -> Tensor:
        """The rows of M (dim x, K) in their new order."""
        return matrix.index_select(0, self.rows)


class ElementwiseJacobian:
    """The Jacobian of an elementwise map: multiplication by its derivative, or division by it.

    Args:
        output: F(x).
        derivative: F'(x), of a shape that broadcasts to that of x.
    """

    def __init__(self, output: Tensor, derivative: Tensor) -> None:
        self.output, self.derivative = output.detach(), derivative.detach()

    def select(self, rows: Tensor) -> ElementwiseJacobian:
        """The Jacobian of these rows."""
        # a derivative that is the same for all samples has a batch of one, or no such dimension
        same_dims = self.derivative.dim() == self.output.dim()
        if same_dims and len(self.derivative) == len(self.output):
            return ElementwiseJacobian(self.output[rows], self.derivative[rows])
        return ElementwiseJacobian(self.output[rows], self.derivative)

    def multiply(self, matrix: Tensor) -> Tensor:
        """The rows of M (dim x, K) times the derivative, at a batch of one; in place."""
        return matrix.mul_(self.derivative.expand_as(self.output).reshape(-1, 1))

    def jvp(self, v: Tensor) -> Tensor:
        """J v = F' v, elementwise."""
        return v * self.derivative

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u = F' u, elementwise."""
        return u * self.derivative

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u = u / F', elementwise."""
        return u / self.derivative

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v = v / F', elementwise."""
        return v / self.derivative
