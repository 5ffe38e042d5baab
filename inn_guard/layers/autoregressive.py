"""Masked affine autoregressive layers: MADE, masked and inverse autoregressive flows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from inn_guard.core.invertible import Invertible
from inn_guard.core.layer_jacobian import LayerJacobian
from inn_guard.jacobian.network import NetworkJacobian, linearize_module, linearize_network
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.inverted import InverseLayer
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.scales import ScaleFunction, SoftplusScale

__all__ = ["MADE", "MaskedAutoregressive", "iaf", "maf"]


class _Masked(nn.Module):
    """A parametrization: zero where the mask is False."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class _Skip(nn.Module):
    """h + ReLU - linear - ReLU - linear (h), the last one starting near zero."""

    def __init__(self, degrees: Tensor) -> None:
        super().__init__()
        mask = degrees[:, None] >= degrees
        first = _masked_linear(degrees, mask)
        second = _masked_linear(degrees, mask)
        _start_small(second)
        self.branch = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.branch(h)


class MADE(nn.Sequential):
    """A network (B, D) -> (B, outputs * D) whose values obey an order of the features.

    Values i, D + i, 2 D + i, ... of the output depend on x_1 ... x_{i-1} only.

    A masked linear map, pre-activated residual blocks of two masked linear maps with ReLU, a masked
    linear map. Hidden unit j has degree 1 + j mod (D - 1), and weights go from lower or equal
    degrees to higher ones.

    Args:
        features: D.
        hidden: width of every hidden layer.
        blocks: residual blocks.
        outputs: values per feature.

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain, Gregor, Murray,
        Larochelle, 2015).

    >>> MADE(3, hidden=8)(torch.zeros(5, 3)).shape
    torch.Size([5, 6])
    """

    def __init__(self, features: int, *, hidden: int, blocks: int = 2, outputs: int = 2) -> None:
        if min(features, hidden, outputs) < 1 or blocks < 0:
            raise ValueError(
                "expected positive sizes, "
                f"got {features} features, {hidden} hidden, {outputs} outputs"
            )
        inputs = torch.arange(1, features + 1)
        # a single feature depends on none: its hidden units have degree 0 and see no input
        degrees = torch.arange(hidden) % max(1, features - 1) + min(1, features - 1)
        last = _masked_linear(degrees, inputs.repeat(outputs)[:, None] > degrees)
        _start_small(last)
        skips = [_Skip(degrees) for _ in range(blocks)]
        super().__init__(_masked_linear(inputs, degrees[:, None] >= inputs), *skips, last)


class MaskedAutoregressive(Invertible):
    """z_i = x_i * g(s_i(x_1 ... x_{i-1})) + t_i(x_1 ... x_{i-1}); log|det J| = sum_i log g(s_i).

    J is lower triangular. Forward is one pass of the network; the inverse finds one entry after the
    other, in D passes.

    Args:
        network: a MADE or another network (B, D) -> (B, 2 D), first t, then s, with that
            dependence.
        scale: g. Default: 0.001 + softplus(s).

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017).
    """

    def __init__(self, network: nn.Module, *, scale: ScaleFunction | None = None) -> None:
        super().__init__()
        self.network = network
        self.scale: ScaleFunction = SoftplusScale(lower=1e-3) if scale is None else scale

    def forward(self, x: Tensor) -> Tensor:
        """z = x * g(s(x)) + t(x)."""
        shift, h = self.network(x).chunk(2, dim=1)
        return x * self.scale.value(h) + shift

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and sum_i log g(s_i), (B,)."""
        shift, h = self.network(x).chunk(2, dim=1)
        return x * self.scale.value(h) + shift, self.scale.log(h).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """x, entry by entry: x_i = (z_i - t_i) / g(s_i)."""
        return self._solve(z)[0]

    def inverse_and_log_det(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and -sum_i log g(s_i), (B,)."""
        x, h = self._solve(z)
        return x, -self.scale.log(h).sum(1)

    def linearize(self, x: Tensor) -> LayerJacobian:
        """The four products from one evaluation of the network; J^-1 by triangular solves."""
        return AutoregressiveJacobian(self, x.detach())

    def _solve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x and s, (B, D) each, found entry by entry."""
        known = [z[:, :0]]
        h = z  # the loop replaces it, unless D = 0
        for i in range(z.shape[1]):
            # the network sees the entries found so far; entry i of its output depends on no others
            unknown = torch.zeros_like(z[:, i:])
            shift, h = self.network(torch.cat([*known, unknown], dim=1)).chunk(2, dim=1)
            entry = slice(i, i + 1)
            known.append((z[:, entry] - shift[:, entry]) / self.scale.value(h[:, entry]))
        return torch.cat(known, dim=1), h


class AutoregressiveJacobian:
    """J = diag(g) + diag(x g') ds/dx + dt/dx, lower triangular; J^-1 by substitution.

    Args:
        layer: the layer.
        x: the point, (B, D).
    """

    def __init__(self, layer: MaskedAutoregressive, x: Tensor) -> None:
        with torch.no_grad():
            self._network = linearize_network(layer.network, x)
            shift, h = self._network.output.chunk(2, dim=1)
            self._scale = layer.scale.value(h)
            self._gain = x * layer.scale.slope(h)
            self.output = x * self._scale + shift
        self._jacobian: Tensor | None = None

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (..., B, D) -> (..., B, D)."""
        shift, h = self._network.jvp(v).chunk(2, dim=-1)
        return v * self._scale + self._gain * h + shift

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (..., B, D) -> (..., B, D)."""
        return u * self._scale + self._network.vjp(torch.cat([u, self._gain * u], dim=-1))

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u by forward substitution, (B, D) -> (B, D)."""
        return self._solve_triangle(self._dense(), u, upper=False)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v by back substitution, (B, D) -> (B, D)."""
        return self._solve_triangle(self._dense().mT, v, upper=True)

    def _dense(self) -> Tensor:
        """The Jacobian as a matrix, (B, D, D), computed once: row i is J^T e_i."""
        if self._jacobian is None:
            size = self.output.shape[1]
            identity = torch.eye(size, dtype=self.output.dtype, device=self.output.device)
            rows = self.vjp(identity[:, None].expand(-1, len(self.output), -1))
            self._jacobian = rows.transpose(0, 1)
        return self._jacobian

    @staticmethod
    def _solve_triangle(triangle: Tensor, right: Tensor, *, upper: bool) -> Tensor:
        return torch.linalg.solve_triangular(triangle, right.unsqueeze(-1), upper=upper).squeeze(-1)


def maf(features: int, *, layers: int = 4, hidden: int = 256, blocks: int = 2) -> Chain:
    """A masked autoregressive flow (B, D) -> (B, D).

    Data -> latent takes one pass of each layer, the inverse D passes.

    Between two layers there are an ActNorm and a reversal of the order. Without the reversal the
    Jacobian of the whole flow would still be triangular.

    Args:
        features: D.
        layers: number of MADE layers; the defaults are those of autoencoders within flows.
        hidden: width of their hidden layers.
        blocks: residual blocks of each layer.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017).
        Deterministic Training of Generative Autoencoders Using Invertible Layers (Silvestri, Roos,
        Ambrogioni, 2023), appendix D.2.
    """
    steps: list[Invertible] = []
    for k in range(layers):
        if k > 0:
            steps += [ActNorm(features), Permutation.reverse(features)]
        steps.append(MaskedAutoregressive(MADE(features, hidden=hidden, blocks=blocks)))
    return Chain(*steps)


def iaf(features: int, *, layers: int = 4, hidden: int = 256, blocks: int = 2) -> InverseLayer:
    """An inverse autoregressive flow (B, D) -> (B, D): the inverse of ``maf``.

    Latent -> data takes one pass of each layer, the density D passes.

    Args:
        features: D.
        layers: number of MADE layers.
        hidden: width of their hidden layers.
        blocks: residual blocks of each.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma, Salimans,
        Jozefowicz, Chen, Sutskever, Welling, 2016).
    """
    return InverseLayer(maf(features, layers=layers, hidden=hidden, blocks=blocks))


def _masked_linear(inputs: Tensor, mask: Tensor) -> nn.Module:
    """A linear map of ``len(inputs)`` values with ``mask`` (out, in) on its weight."""
    return parametrize.register_parametrization(
        nn.Linear(len(inputs), len(mask)), "weight", _Masked(mask)
    )


@torch.no_grad()
def _start_small(linear: nn.Module) -> None:
    """Draw weights and biases from [-1e-3, 1e-3], so that the map starts near zero."""
    for parameter in linear.parameters():
        parameter.uniform_(-1e-3, 1e-3)


class _SkipJacobian:
    """I + B, with B the Jacobian of the branch."""

    def __init__(self, branch: NetworkJacobian, h: Tensor) -> None:
        self._branch, self.output = branch, h + branch.output

    def jvp(self, v: Tensor) -> Tensor:
        return v + self._branch.jvp(v)

    def vjp(self, u: Tensor) -> Tensor:
        return u + self._branch.vjp(u)


@linearize_module.register
def _linearize_skip(module: _Skip, x: Tensor) -> NetworkJacobian:
    return _SkipJacobian(linearize_module(module.branch, x), x)
