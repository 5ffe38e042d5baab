"""What the rules of several libraries share: joined networks, splines in the layout of nflows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn_guard.lipschitz.maps.closed_forms import Pair
from inn_guard.lipschitz.maps.elementary import KnownConstants
from inn_guard.lipschitz.maps.spline_closed_forms import rational_quadratic_spline
from inn_guard.lipschitz.networks.conditioner import trace_network
from inn_guard.lipschitz.networks.graph import Unbounded
from inn_guard.lipschitz.transformers.rational_quadratic import RationalQuadraticSpline

__all__ = [
    "OWN_INPUT",
    "SideBySide",
    "fixed_rational_quadratic",
    "fixed_spline",
    "permutation_matrix",
    "rational_quadratic",
    "returns_input",
    "spline_ends",
    "temperature",
]

OWN_INPUT = "a network that returns its own input, which the block then changes in place"


KNOT_ERROR = 1e-12  #: relative error of slopes between knots computed by a softmax in float64


class SideBySide(nn.Module):
    """Networks as one: their outputs of [x, context] concatenated, times a factor."""

    def __init__(self, *networks: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.factor = factor

    # called by torch.fx, whose proxies are no tensors
    def forward(self, x: Any, context: Any = None) -> Any:
        """[network_1(x, context), network_2(x, context), ...]."""
        if context is not None:
            x = torch.cat([x, context], 1)
        outputs = [network(x) for network in self.networks]
        raw = outputs[0]
        if len(outputs) > 1:
            raw = torch.cat(outputs, 1)
        if self.factor == 1.0:
            return raw
        return raw * self.factor


def returns_input(network: Any) -> bool:
    """Whether what a network returns may be its own input, which libraries then change in place."""
    try:
        return trace_network(network).may_return_input
    except Unbounded:
        # a network that is not understood has no bound anyway
        return False


def permutation_matrix(order: Tensor) -> Tensor:
    """P with (P x)_i = x_order(i)."""
    return torch.eye(len(order), dtype=torch.float64)[order.cpu()]


def spline_ends(block: Any) -> tuple[float, float, bool]:
    """Left end, right end, and whether there are tails."""
    if block.tails == "linear":
        bound = float(block.tail_bound)
        return -bound, bound, True
    return 0.0, 1.0, False


def temperature(network: Any) -> float:
    """By which raw widths and heights are divided: the root of the network's hidden width."""
    hidden_channels = getattr(network, "hidden_channels", 1)
    return math.sqrt(getattr(network, "hidden_features", hidden_channels))


def rational_quadratic(block: Any, network: Any) -> RationalQuadraticSpline:
    """The spline whose raw parameters a network gives."""
    floors = (block.min_bin_width, block.min_bin_height, block.min_derivative)
    ends = spline_ends(block)
    return RationalQuadraticSpline(block.num_bins, *ends, floors, temperature(network))


def fixed_rational_quadratic(block: Any, *, others_pass: bool = False) -> KnownConstants:
    """The spline with the block's own raw parameters.

    Args:
        block: an elementwise spline in the layout of nflows.
        others_pass: whether it acts on some entries only.
    """
    left, right, tails = spline_ends(block)
    widths = (right - left) * _floored(block.unnormalized_widths, block.min_bin_width)
    heights = (right - left) * _floored(block.unnormalized_heights, block.min_bin_height)
    raw = block.unnormalized_derivatives.detach().double()
    derivatives = block.min_derivative + functional.softplus(raw)
    if tails:
        derivatives = functional.pad(derivatives, (1, 1), value=1.0)
    pair = rational_quadratic_spline(widths, heights, derivatives)
    return fixed_spline(pair, left, right, has_identity=tails or others_pass)


def fixed_spline(pair: Pair, left: float, right: float, *, has_identity: bool) -> KnownConstants:
    """A spline of known bounds.

    Args:
        pair: sup f' and 1 / inf f' over the bins.
        left: left end.
        right: right end.
        has_identity: whether it is the identity somewhere: in tails, or for other entries.
    """
    pair = Pair(pair.forward * (1 + KNOT_ERROR), pair.inverse * (1 + KNOT_ERROR))
    if has_identity:
        pair = pair.at_least(1.0)
    return KnownConstants(pair, inside=(left, right))


def _floored(raw: Tensor, floor: float) -> Tensor:
    """Shares of bins, none below ``floor``."""
    shares = raw.detach().double().softmax(-1)
    return floor + (1 - floor * shares.shape[-1]) * shares
