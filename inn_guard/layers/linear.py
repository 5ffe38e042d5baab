"""Invertible linear maps of the channels: dense layers on vectors, 1x1 convolutions on images."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.layers.linear_tangent import ChannelMixingJacobian

__all__ = ["ChannelMixing", "InvertibleLinear", "LULinear"]


@dataclass(frozen=True)
class _Inverted:
    """What was computed for one weight."""

    weight: Tensor
    inverse: Tensor
    log_abs_det: Tensor

    def belongs_to(self, weight: Tensor) -> bool:
        """By its entries: a version counter does not see what is written through ``.data``."""
        same_kind = weight.dtype == self.weight.dtype and weight.device == self.weight.device
        return same_kind and torch.equal(weight, self.weight)


class ChannelMixing(Invertible):
    """z = W x along dimension 1 at every position; log|det J| = positions * log|det W|.

    On vectors (B, C) this is a dense linear layer, on images (B, C, H, W) a 1x1 convolution. W^-1 and log|det W| are
    computed in float64 and kept as long as W stays the same.
    """

    _inverted: _Inverted | None = None

    @property
    @abc.abstractmethod
    def weight(self) -> Tensor:
        """W, (C, C)."""

    @abc.abstractmethod
    def inverse_weight(self) -> Tensor:
        """W^-1, (C, C), computed anew and differentiable; not finite where W is singular."""

    @abc.abstractmethod
    def log_abs_det(self) -> Tensor:
        """log|det W|, a scalar, computed anew and differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """z = W x."""
        return _mix(x, self.weight, dims=x.dim())

    def inverse(self, z: Tensor) -> Tensor:
        """x = W^-1 z."""
        inverse = self.inverse_weight() if self._needs_graph() else self._kept().inverse
        return _mix(z, inverse, dims=z.dim())

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and positions * log|det W|."""
        return self.forward(x), self._log_det(x)

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -positions * log|det W|."""
        return self.inverse(z), -self._log_det(z)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four products with W, W^T, W^-1 and W^-T."""
        with torch.no_grad():
            kept, dims = self._kept(), x.dim()
            return ChannelMixingJacobian(
                output=_mix(x, kept.weight, dims=dims),
                jvp=lambda v: _mix(v, kept.weight, dims=dims),
                vjp=lambda u: _mix(u, kept.weight.T, dims=dims),
                inverse_jvp=lambda u: _mix(u, kept.inverse, dims=dims),
                inverse_vjp=lambda v: _mix(v, kept.inverse.T, dims=dims),
                shape=x.shape,
                weight=kept.weight,
            )

    def _log_det(self, x: Tensor) -> Tensor:
        positions = x[0, 0].numel() if len(x) else 1
        log_abs_det = self.log_abs_det() if self._needs_graph() else self._kept().log_abs_det
        return (log_abs_det * positions).expand(len(x))

    def _needs_graph(self) -> bool:
        return torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.parameters()
        )

    @torch.no_grad()
    def _kept(self) -> _Inverted:
        weight = self.weight
        if self._inverted is None or not self._inverted.belongs_to(weight):
            self._inverted = _Inverted(weight.clone(), self.inverse_weight(), self.log_abs_det())
        return self._inverted


class InvertibleLinear(ChannelMixing):
    """z = W x with W a free matrix; W starts as a random rotation.

    Args:
        channels: size of dimension 1.
        generator: draws the rotation; the global generator unless given, as for all weights.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018), section 3.2.
    """

    def __init__(self, channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(
            nn.init.orthogonal_(torch.empty(channels, channels), generator=generator)
        )

    @property
    def weight(self) -> Tensor:
        """W, (C, C)."""
        return self.matrix

    def inverse_weight(self) -> Tensor:
        """W^-1 in float64, rounded; NaN if W is exactly singular."""
        inverse, info = torch.linalg.inv_ex(self.matrix.double())
        return torch.where(info == 0, inverse, torch.nan).to(self.matrix.dtype)

    def log_abs_det(self) -> Tensor:
        """log|det W| by LU in float64, rounded."""
        return torch.linalg.slogdet(self.matrix.double()).logabsdet.to(self.matrix.dtype)


class LULinear(ChannelMixing):
    """z = P L (U + diag(s)) x: L unit lower, U strictly upper triangular, s = sign * exp(log_s), P and sign fixed.

    log|det W| = sum log_s, without a factorisation. W starts as a random rotation.

    Args:
        channels: size of dimension 1.
        generator: draws the rotation; the global generator unless given, as for all weights.

    References:
        Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal, 2018), equation 10.
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
        """Sum of log_s."""
        return self.log_s.sum()

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.double().tril(-1) + torch.eye(
            len(self.log_s), dtype=torch.float64, device=self.log_s.device
        )
        return lower, self.upper.double().triu(1) + torch.diag(
            self.sign.double() * self.log_s.double().exp()
        )


def _mix(x: Tensor, weight: Tensor, *, dims: int) -> Tensor:
    """W x along dimension 1 of the last ``dims``."""
    if x.shape[1 - dims] != len(weight):
        raise ValueError(f"expected {len(weight)} channels, got {tuple(x.shape)}")
    return functional.linear(x.movedim(1 - dims, -1), weight).movedim(-1, 1 - dims)
