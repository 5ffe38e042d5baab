"""The bound rules of normflows, for data -> latent, the inverse of its own forward direction."""

# The name of a rule says what it is: bound_<block>.
# ruff: noqa: D103

from __future__ import annotations

from typing import Any

import torch
from normflows import flows as nf
from normflows.transforms import Logit, Shift
from torch import Tensor, nn

from inn_guard.core.readable import is_of_library
from inn_guard.lipschitz.maps import elementary as maps
from inn_guard.lipschitz.maps.autoregressive import Autoregressive, InverseAutoregressive
from inn_guard.lipschitz.maps.base import BoundedMap, NoRule, bounded_map
from inn_guard.lipschitz.maps.composition import Composition, inverted
from inn_guard.lipschitz.maps.coupling import (
    ByChannel,
    ByMask,
    Coupling,
    blocked_rows,
    interleaved_rows,
)
from inn_guard.lipschitz.maps.residual import Residual
from inn_guard.lipschitz.networks.activations import (
    known_activation,
    scaled,
)
from inn_guard.lipschitz.rules.blocks import (
    OWN_INPUT,
    SideBySide,
    fixed_rational_quadratic,
    permutation_matrix,
    rational_quadratic,
    returns_input,
)
from inn_guard.lipschitz.transformers.affine import (
    Additive,
    Affine,
    InverseSigmoidScale,
    LogScale,
    ShiftedThenScaled,
    SigmoidScaleBounds,
)
from inn_guard.lipschitz.transformers.base import ScaleBounds, Transformer
from inn_guard.numerics.intervals import Interval

FALLING = LogScale(scaled(known_activation(nn.Identity()), -1.0))  #: e^-s
#: factor of data -> latent as a function of the network's raw output, by the name of the scale map
SCALES: dict[str, ScaleBounds] = {
    "exp": FALLING,
    "sigmoid": SigmoidScaleBounds(0.0, 1.0, 2.0),
    "sigmoid_inv": InverseSigmoidScale(2.0),
}
MASKED_AFFINE_SCALE = SigmoidScaleBounds(1e-3, 1.001, 2.0)  #: sigmoid(s + 2) + 1e-3


@bounded_map.register
def bound_affine_coupling(block: nf.AffineCouplingBlock, layer: Any) -> BoundedMap:
    split, coupling, _ = block.flows
    if not all(is_of_library(part, "normflows") for part in block.flows):
        return NoRule("a coupling block with a part of the user's own")
    if split.mode not in ("channel", "channel_inv") or coupling.scale_map not in SCALES:
        return NoRule(f"a coupling split by {split.mode}, or with a scale map of the user's own")
    # without a scale data -> latent is x - t
    network: nn.Module = SideBySide(coupling.param_map, factor=-1.0)
    transformer: Transformer = Additive()
    if coupling.scale:
        network = coupling.param_map
        transformer = ShiftedThenScaled(SCALES[coupling.scale_map])  # type: ignore[index]

    def make(box: Interval) -> BoundedMap:
        channels = box.shape[0]
        halves = ByChannel.halves(channels, (channels + 1) // 2)
        if split.mode == "channel_inv":
            halves = halves.swapped
        rows = interleaved_rows(len(halves.change), transformer.count)
        return Coupling(halves, network, transformer, rows)

    return maps.ShapeDependent(make, (network,))


@bounded_map.register
def bound_masked_affine(block: nf.MaskedAffineFlow, layer: Any) -> BoundedMap:
    mask, parts = block.b[0].detach().cpu(), dict(block.named_children())
    if not bool(((mask == 0) | (mask == 1)).all()) or "t" not in parts:
        return NoRule(
            "a masked affine flow whose mask is not of zeros and ones, or without a translation"
        )
    network = SideBySide(parts["t"], factor=-1.0)
    transformer: Transformer = Additive()
    if "s" in parts:
        network = SideBySide(parts["t"], parts["s"])
        transformer = ShiftedThenScaled(FALLING)
    return Coupling(
        ByMask(mask > 0), network, transformer, blocked_rows(len(mask), transformer.count)
    )


@bounded_map.register
def bound_rational_quadratic_coupling(
    block: nf.CoupledRationalQuadraticSpline, layer: Any
) -> BoundedMap:
    inner = block.prqct
    parts = (inner, inner.unconditional_transform)
    if not all(is_of_library(part, "normflows") for part in parts):
        return NoRule("a spline coupling of the user's own")
    if inner.tails not in ("linear", None) or isinstance(inner.tail_bound, Tensor):
        return NoRule("a spline with circular tails, or with bounds of its own for every entry")
    if returns_input(inner.transform_net):
        return NoRule(OWN_INPUT)
    spline = rational_quadratic(inner, inner.transform_net)
    split = ByChannel(inner.identity_features.cpu(), inner.transform_features.cpu())
    if not split.is_partition:
        return NoRule("kept and changed entries that are no partition")
    rows = interleaved_rows(len(split.change), spline.count)
    coupling = Coupling(split, inner.transform_net, spline, rows, layer.context)
    # kept entries go through a spline of their own
    kept = fixed_rational_quadratic(inner.unconditional_transform, others_pass=True)
    return Composition((coupling, kept))


@bounded_map.register
def bound_rational_quadratic_autoregressive(
    block: nf.AutoregressiveRationalQuadraticSpline, layer: Any
) -> BoundedMap:
    inner = block.mprqat
    if not is_of_library(inner, "normflows"):
        return NoRule("an autoregressive spline of the user's own")
    network = inner.autoregressive_net
    spline = rational_quadratic(inner, network)
    entries = network.final_layer.out_features // spline.count
    rows = interleaved_rows(entries, spline.count)
    split = ByChannel.all_of(entries)
    return Autoregressive(Coupling(split, network, spline, rows, layer.context))


@bounded_map.register
def bound_masked_affine_autoregressive(
    block: nf.MaskedAffineAutoregressive, layer: Any
) -> BoundedMap:
    split, rows = ByChannel.all_of(block.features), interleaved_rows(block.features, 2)
    affine = Affine(MASKED_AFFINE_SCALE, order=(1, 0))
    coupling = Coupling(split, block.autoregressive_net, affine, rows, layer.context)

    def entry_inverse(x: Interval, theta: list[Interval]) -> Interval:
        s, t = theta
        return (x - t) / MASKED_AFFINE_SCALE.value(s)

    return InverseAutoregressive(Autoregressive(coupling), entry_inverse)


@bounded_map.register(nf.ActNorm)
@bounded_map.register(nf.AffineConstFlow)
def bound_constant_affine(block: Any, layer: Any) -> BoundedMap:
    if not bool(getattr(block, "data_dep_init_done", True)):
        return NoRule("ActNorm will be initialised by its next batch; call the model on data first")
    if block.s.dim() > 2 and block.s[0, 0].numel() > 1:
        return NoRule("scales that differ from pixel to pixel")
    scale = (-block.s.detach().double()).exp().reshape(-1)
    return maps.Diagonal(scale, -block.t.detach().double().reshape(-1) * scale)


@bounded_map.register
def bound_permutation(block: nf.Permute, layer: Any) -> BoundedMap:
    order = None
    if block.mode == "shuffle":
        order = block.inv_perm.cpu()
    return maps.Rearrangement(lambda x: block.inverse(x)[0], order)


@bounded_map.register
def bound_squeeze(block: nf.Squeeze, layer: Any) -> BoundedMap:
    return maps.Rearrangement(lambda x: block.inverse(x)[0])


def _why_no_factors(block: Any) -> str:
    """Why the block's inverse is not that of its factors; "" if it is."""
    if not block.use_lu:
        return ""
    # the inverse transposes the permutation and multiplies by the signs
    identity = torch.eye(len(block.P)).to(block.P)
    if torch.equal(block.P @ block.P.T, identity) and bool((block.sign_S.abs() == 1).all()):
        return ""
    return "its P is no permutation, or its signs are not of size 1"


@bounded_map.register
def bound_invertible_affine(block: nf.InvertibleAffine, layer: Any) -> BoundedMap:
    why = _why_no_factors(block)
    if why:
        return NoRule(why)
    # data -> latent is x W
    return maps.LinearMap.product(*[factor.T for factor in reversed(_factors(block))])


@bounded_map.register
def bound_invertible_1x1_convolution(block: nf.Invertible1x1Conv, layer: Any) -> BoundedMap:
    why = _why_no_factors(block)
    if why:
        return NoRule(why)
    return maps.LinearMap.product(*_factors(block))


def _factors(block: Any) -> list[Tensor]:
    """The matrices whose product is W, data -> latent."""
    if not block.use_lu:
        return [block.W.detach()]
    lower = block.L.detach().tril(-1) + block.eye
    diagonal = torch.diag(block.sign_S * block.log_S.detach().exp())
    return [block.P, lower, block.U.detach().triu(1) + diagonal]


@bounded_map.register
def bound_lu_linear_permute(block: nf.LULinearPermute, layer: Any) -> BoundedMap:
    linear = block.linear
    if not all(is_of_library(part, "normflows") for part in (linear, block.permutation)):
        return NoRule("a linear map with a part of the user's own")
    lower, upper = linear._create_lower_upper()
    order = permutation_matrix(block.permutation._permutation)
    return maps.LinearMap.product(lower, upper, order, shift=linear.bias.detach())


@bounded_map.register
def bound_residual(block: nf.Residual, layer: Any) -> BoundedMap:
    residual = Residual(block.iresblock.nnet)
    if block.reverse:
        return residual
    return inverted(residual)


@bounded_map.register
def bound_logit(block: Logit, layer: Any) -> BoundedMap:
    return maps.LogitMap(float(block.alpha))


@bounded_map.register
def bound_shift(block: Shift, layer: Any) -> BoundedMap:
    one = torch.tensor(1.0, dtype=torch.float64)
    return maps.Diagonal(one, one * float(block.shift))
