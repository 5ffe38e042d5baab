"""Jacobians of foreign layers whose structure is known, and a check that they are right."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inn_guard.core.layer_jacobian import (
    INEXACT,
    ROUNDING,
    Castable,
    LayerJacobian,
    Map,
    cast_where_large,
    random_vectors,
    select_from_all,
)
from inn_guard.core.missing import Missing
from inn_guard.core.readable import RulesByClass
from inn_guard.core.tensors import norms
from inn_guard.jacobian.factored import Factored, factored
from inn_guard.jacobian.network import NetworkJacobian, select_rows_of
from inn_guard.jacobian.recorded import recorded_network
from inn_guard.layers.coupling import CouplingJacobian
from inn_guard.layers.linear import (
    ChannelMixingJacobian,
    ElementwiseJacobian,
    PermutationJacobian,
)
from inn_guard.layers.partition import Partition

__all__ = [
    "ChainJacobian",
    "EntrywiseJacobian",
    "Features",
    "PermutedOutputs",
    "SelectedOutputs",
    "WeightedParameters",
    "channel_mixing_jacobian",
    "coupling_jacobian",
    "coupling_network",
    "elementwise_coupling_jacobian",
    "entrywise_jacobian",
    "identity_transformed",
    "is_jacobian_of",
    "known_jacobian",
    "permutation_jacobian",
    "spline_coupling_jacobian",
]


FEW_PASSES = 4  #: passes of an inverse up to which substituting is faster than factorising


@RulesByClass
def known_jacobian(
    why: Missing, module: nn.Module, x: Tensor, context: Any
) -> LayerJacobian | None:
    """The Jacobian at x of a foreign module by its class; None if its structure is not known."""
    return None


def is_jacobian_of(jacobian: LayerJacobian, forward: Map, x: Tensor) -> bool:
    """Whether the output and J^T u, for a random u, are those of ``forward`` by autograd.

    Args:
        jacobian: what a layer's class promises at x.
        forward: the layer itself.
        x: the point, (B, *data).
    """
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        z = forward(leaf)
    if z.shape != jacobian.output.shape or not z.requires_grad:
        return False
    (u,) = random_vectors(jacobian.output)
    (expected,) = torch.autograd.grad(z, leaf, u)
    return _close(jacobian.output, z.detach()) and _close(jacobian.vjp(u), expected)


def _close(actual: Tensor, expected: Tensor) -> bool:
    # nothing iterates here, so rounding alone may differ; INEXACT is a ceiling for half precisions
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * math.sqrt(expected[0].numel())
    tolerance = min(INEXACT, rounding)
    return bool((norms(actual - expected) <= tolerance * norms(expected)).all())


class Features:
    """A partition of channels (features) by their indices.

    Args:
        identity: indices of the identity part along dimension 1.
        transformed: the other indices.
    """

    def __init__(self, identity: Tensor, transformed: Tensor) -> None:
        self.identity, self.transformed = identity, transformed
        self._order = torch.cat([identity, transformed]).argsort()

    def split(self, x: Tensor, *, dims: int) -> tuple[Tensor, Tensor]:
        """(identity part, transformed part) of x; its last ``dims`` dimensions are (B, C, ...)."""
        dim = x.dim() + 1 - dims
        return x.index_select(dim, self.identity), x.index_select(dim, self.transformed)

    def join(self, identity: Tensor, transformed: Tensor, *, dims: int) -> Tensor:
        """The x that splits into ``identity`` and ``transformed``."""
        dim = identity.dim() + 1 - dims
        return torch.cat([identity, transformed], dim=dim).index_select(dim, self._order)

    def restrict(self, parameter: Tensor, *, neutral: float) -> Tensor:
        """The parameter itself: it has entries for the transformed part only."""
        return parameter


class PermutedOutputs:
    """The Jacobian of a network with output [s, t], as that of [factor * t, s].

    Args:
        network: the Jacobian of [s, t].
        factor: of t.
    """

    def __init__(self, network: NetworkJacobian, *, factor: float = 1.0) -> None:
        self._network, self._factor = network, factor
        self._dim = 1 - network.output.dim()
        self.output = self._permuted(network.output)

    def select(self, rows: Tensor) -> PermutedOutputs | None:
        """The Jacobian at these rows; None where the network cannot select them."""
        network = select_rows_of(self._network, rows)
        return None if network is None else PermutedOutputs(network, factor=self._factor)

    def in_dtype(self, dtype: torch.dtype) -> PermutedOutputs | None:
        """The Jacobian whose network multiplies in ``dtype``; None if it cannot."""
        if not isinstance(self._network, Castable):
            return None
        network = self._network.in_dtype(dtype)
        return None if network is None else PermutedOutputs(network, factor=self._factor)

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return self._permuted(self._network.jvp(v))

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        shift, h = u.chunk(2, dim=self._dim)
        return self._network.vjp(torch.cat([h, self._factor * shift], dim=self._dim))

    def _permuted(self, raw: Tensor) -> Tensor:
        h, shift = raw.chunk(2, dim=self._dim)
        return torch.cat([self._factor * shift, h], dim=self._dim)


class SelectedOutputs:
    """The Jacobian of a network, as that of its output channels in another order.

    Args:
        network: the Jacobian.
        order: new channel i is old channel order[i], along dimension 1.
    """

    def __init__(self, network: NetworkJacobian, order: Tensor) -> None:
        self._network = network
        self._order = order
        self._back = order.argsort()
        self._dim = 1 - network.output.dim()
        self.output = network.output.index_select(self._dim, order)

    def select(self, rows: Tensor) -> SelectedOutputs | None:
        """The Jacobian at these rows; None where the network cannot select them."""
        network = select_rows_of(self._network, rows)
        return None if network is None else SelectedOutputs(network, self._order)

    def in_dtype(self, dtype: torch.dtype) -> SelectedOutputs | None:
        """The Jacobian whose network multiplies in ``dtype``; None if it cannot."""
        if not isinstance(self._network, Castable):
            return None
        network = self._network.in_dtype(dtype)
        return None if network is None else SelectedOutputs(network, self._order)

    @classmethod
    def deinterleaved(cls, network: NetworkJacobian) -> SelectedOutputs:
        """The Jacobian of [t_1, s_1, t_2, s_2, ...] as that of [t, s]."""
        channels = torch.arange(network.output.shape[1], device=network.output.device)
        return cls(network, torch.cat([channels[0::2], channels[1::2]]))

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        return self._network.jvp(v).index_select(self._dim, self._order)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        return self._network.vjp(u.index_select(self._dim, self._back))


class WeightedParameters:
    """The Jacobian of sum_p weight_ip theta_ip, with parameters theta that a network computes.

    So each entry i of a coupling's transformed part depends on its own parameters, as in splines.

    Args:
        network: the Jacobian of theta, (B, entries * parameters, ...), those of an entry together.
        weight: of every parameter, (B, entries, parameters, ...).
    """

    def __init__(self, network: NetworkJacobian, weight: Tensor) -> None:
        self._network, self._weight = network, weight
        self._dim = 1 - network.output.dim()
        self.output = weight.new_empty(()).expand(weight.shape[:2] + weight.shape[3:])

    def select(self, rows: Tensor) -> WeightedParameters | None:
        """The Jacobian at these rows; None where the network cannot select them."""
        network = select_rows_of(self._network, rows)
        return None if network is None else WeightedParameters(network, self._weight[rows])

    def in_dtype(self, dtype: torch.dtype) -> WeightedParameters | None:
        """The Jacobian whose network multiplies in ``dtype``; None if it cannot."""
        if not isinstance(self._network, Castable):
            return None
        network = self._network.in_dtype(dtype)
        return None if network is None else WeightedParameters(network, self._weight.to(dtype))

    def jvp(self, v: Tensor) -> Tensor:
        """J v, (..., B, *out)."""
        parameters = self._network.jvp(v).unflatten(self._dim, self._weight.shape[1:3])
        return (parameters * self._weight).sum(self._dim)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u, (..., B, *in)."""
        weighted = u.unsqueeze(self._dim) * self._weight
        return self._network.vjp(weighted.flatten(self._dim - 1, self._dim))


class ChainJacobian:
    """The Jacobian of a composition of maps.

    Args:
        jacobians: of the maps, each at its own input; the map that is applied first comes first.
    """

    def __init__(self, jacobians: Sequence[LayerJacobian]) -> None:
        self._jacobians = tuple(jacobians)
        self.output = self._jacobians[-1].output

    def select(self, rows: Tensor) -> ChainJacobian | None:
        """The Jacobian of these rows; None where one of the maps cannot select them."""
        chosen = select_from_all(self._jacobians, rows)
        return None if chosen is None else ChainJacobian(chosen)

    def in_dtype(self, dtype: torch.dtype) -> ChainJacobian | None:
        """The composition with its large products in ``dtype``; None where it has none."""
        jacobians = cast_where_large(self._jacobians, dtype)
        return None if jacobians is None else ChainJacobian(jacobians)

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        for jacobian in self._jacobians:
            v = jacobian.jvp(v)
        return v

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (B, *latent) -> (B, *data)."""
        for jacobian in reversed(self._jacobians):
            u = jacobian.vjp(u)
        return u

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        for jacobian in reversed(self._jacobians):
            u = jacobian.inverse_jvp(u)
        return u

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        for jacobian in self._jacobians:
            v = jacobian.inverse_vjp(v)
        return v


def coupling_jacobian(
    x: Tensor, network: NetworkJacobian, partition: Partition, scale: Map | None
) -> CouplingJacobian:
    """The Jacobian at x of z1 = x1, z2 = x2 * g(s) + t.

    Args:
        x: the point, (B, C, ...).
        network: the Jacobian of [t, s] at the identity part x1, or of t alone.
        partition: splits x and z.
        scale: g, elementwise; None where it is one.
    """
    dims = x.dim()
    identity, transformed = partition.split(x, dims=dims)
    if scale is None:
        z = partition.join(identity, transformed + network.output, dims=dims)
        return CouplingJacobian(z, network, partition)
    shift, h = network.output.chunk(2, dim=1)
    # a library gives its scale without the derivative, which autograd finds elementwise
    leaf = h.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = scale(leaf)
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    value = value.detach()
    z = partition.join(identity, transformed * value + shift, dims=dims)
    return CouplingJacobian(z, network, partition, scale=value, gain=transformed * slope)


def elementwise_coupling_jacobian(
    x: Tensor,
    network: NetworkJacobian,
    partition: Partition,
    transform: Callable[[Tensor, Tensor], Tensor],
) -> CouplingJacobian | None:
    """The Jacobian at x of z1 = x1, z2_i = h(x2_i; theta_i(x1)), as of a spline coupling.

    Args:
        x: the point, (B, C, ...).
        network: the Jacobian of theta at x1, (B, entries * parameters, ...), those of an entry
            together.
        partition: splits x and z.
        transform: (x2, theta) -> z2, the library's own.

    Returns:
        None if the network's outputs are not a whole number for each entry.
    """
    dims = x.dim()
    identity, transformed = partition.split(x, dims=dims)
    found = _slopes(transformed, network, transform)
    if found is None:
        return None
    value, parameters, slope = found
    z = partition.join(identity, value, dims=dims)
    return CouplingJacobian(z, parameters, partition, scale=slope)


class EntrywiseJacobian:
    """The Jacobian of z_i = h(x_i; theta_i(x)), where theta_i depends on earlier entries only.

    J = diag(slope) + A, with A = the weighted Jacobian of the parameters. A vanishes after as many
    powers as the layer's inverse takes passes. So J^-1 u is the last of v = (u - A v) / slope,
    repeated as often; where that is many times, a dense J is factorised instead.

    Args:
        output: z.
        parameters: A.
        slope: the derivative of h by its first argument.
        passes: of the layer's inverse.
    """

    def __init__(
        self, output: Tensor, parameters: WeightedParameters, slope: Tensor, passes: int
    ) -> None:
        self.output = output
        self._parameters, self._slope, self._passes = parameters, slope, passes

    def select(self, rows: Tensor) -> EntrywiseJacobian | None:
        """The Jacobian of these rows; None where the network's cannot select them."""
        parameters = self._parameters.select(rows)
        if parameters is None:
            return None
        clone = copy.copy(self)
        vars(clone).pop("_factored", None)
        if "_factored" in vars(self) and self._factored is not None:
            vars(clone)["_factored"] = self._factored.select(rows)
        clone.output, clone._parameters = self.output[rows], parameters
        clone._slope = self._slope[rows]
        return clone

    def jvp(self, v: Tensor) -> Tensor:
        """J v: (B, *data) -> (B, *latent)."""
        return torch.addcmul(self._parameters.jvp(v), v, self._slope)

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u: (B, *latent) -> (B, *data)."""
        return torch.addcmul(self._parameters.vjp(u), u, self._slope)

    def inverse_jvp(self, u: Tensor) -> Tensor:
        """J^-1 u: (B, *latent) -> (B, *data)."""
        if self._passes > FEW_PASSES and self._factored is not None:
            return self._factored.run(u)
        return self._substituted(u, self._parameters.jvp)

    def inverse_vjp(self, v: Tensor) -> Tensor:
        """J^-T v: (B, *data) -> (B, *latent)."""
        if self._passes > FEW_PASSES and self._factored is not None:
            return self._factored.run_transposed(v)
        return self._substituted(v, self._parameters.vjp)

    def _substituted(self, right: Tensor, product: Map) -> Tensor:
        solution = right / self._slope
        for _ in range(self._passes - 1):
            solution = (right - product(solution)) / self._slope
        return solution

    @functools.cached_property
    def _factored(self) -> Factored | None:
        return factored(self)


def entrywise_jacobian(
    x: Tensor,
    network: NetworkJacobian,
    transform: Callable[[Tensor, Tensor], Tensor],
    *,
    passes: int,
) -> EntrywiseJacobian | None:
    """The Jacobian at x of z_i = h(x_i; theta_i(x)), as of an autoregressive layer.

    Args:
        x: the point, (B, D).
        network: the Jacobian of theta at x, (B, D * parameters), those of an entry together.
        transform: (x, theta) -> z, the library's own.
        passes: of the layer's inverse.

    Returns:
        None if the network's outputs are not a whole number for each entry.
    """
    found = _slopes(x, network, transform)
    if found is None:
        return None
    output, parameters, slope = found
    return EntrywiseJacobian(output, parameters, slope, passes)


def _slopes(
    transformed: Tensor,
    network: NetworkJacobian,
    transform: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, WeightedParameters, Tensor] | None:
    """h(x_i; theta_i), the weighted Jacobian of its parameters, and its derivative by x_i."""
    entries = transformed.shape[1]
    several, left = divmod(network.output.shape[1], entries)
    if left:
        return None
    # every entry depends on itself and its own parameters: one backward pass has all derivatives
    leaves = [t.detach().clone().requires_grad_() for t in (transformed, network.output)]
    with torch.enable_grad():
        value = transform(*[leaf.clone() for leaf in leaves])
    slope, weight = torch.autograd.grad(value, leaves, torch.ones_like(value))
    parameters = WeightedParameters(network, weight.unflatten(1, (entries, several)))
    return value.detach(), parameters, slope


def identity_transformed(
    coupling: CouplingJacobian, partition: Partition, transform: Map | None
) -> LayerJacobian:
    """The Jacobian of a coupling after which the identity part, too, is mapped elementwise.

    Args:
        coupling: the Jacobian without that.
        partition: splits its output.
        transform: of the identity part; None if there is none.
    """
    if transform is None:
        return coupling
    identity, transformed = partition.split(coupling.output, dims=coupling.output.dim())
    leaf = identity.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = transform(leaf.clone())
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    dims = coupling.output.dim()
    z = partition.join(value.detach(), transformed, dims=dims)
    slopes = partition.join(slope, torch.ones_like(transformed), dims=dims)
    return ChainJacobian([coupling, ElementwiseJacobian(z, slopes)])


def permutation_jacobian(
    x: Tensor, order: Tensor, *, dim: int = 1, back: Tensor | None = None
) -> PermutationJacobian:
    """The Jacobian at x of z = x.index_select(dim, order).

    Args:
        x: the point, (B, *data).
        order: every index of that dimension once.
        dim: a dimension of x.
        back: the inverse order. Default: computed.
    """
    inverse_order = order.argsort() if back is None else back
    from_the_end = dim - x.dim()

    def forward(v: Tensor) -> Tensor:
        return v.index_select(v.dim() + from_the_end, order)

    def inverse(u: Tensor) -> Tensor:
        return u.index_select(u.dim() + from_the_end, inverse_order)

    return PermutationJacobian.of_moves(x, forward, inverse)


def channel_mixing_jacobian(
    x: Tensor, weight: Tensor, shift: Tensor | None = None
) -> ChannelMixingJacobian:
    """The Jacobian at x of z = W x + b over the channels, at every position."""
    # of a singular W the inverse is not finite or wrong, which the checks of its products find
    inverse = torch.linalg.inv_ex(weight).inverse
    return ChannelMixingJacobian.of_weight(x, weight, inverse=inverse, shift=shift)


def coupling_network(module: Any, x: Tensor, context: Any) -> tuple[NetworkJacobian, Features]:
    """The network of a coupling with the attributes of nflows' couplings, and its parts.

    Args:
        module: with ``identity_features``, ``transform_features`` and ``transform_net``.
        x: input, (B, *data).
        context: what the network takes beside its features.
    """
    partition = Features(module.identity_features, module.transform_features)
    identity, _ = partition.split(x, dims=x.dim())
    network = recorded_network(
        lambda features: module.transform_net(features, context),
        identity,
        module=module.transform_net,
    )
    return network, partition


def spline_coupling_jacobian(module: Any, x: Tensor, context: Any) -> LayerJacobian | None:
    """Of a spline coupling of nflows, or of the port of it in normflows.

    Its identity part may go through splines of its own.
    """
    network, partition = coupling_network(module, x, context)

    def transform(transformed: Tensor, parameters: Tensor) -> Tensor:
        return module._coupling_transform_forward(transformed, parameters)[0]

    jacobian = elementwise_coupling_jacobian(x, network, partition, transform)
    unconditional = module.unconditional_transform
    if jacobian is None or unconditional is None:
        return jacobian
    return identity_transformed(jacobian, partition, lambda x1: unconditional(x1, context)[0])
