"""Every rule of nflows against sampled Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from nflows import transforms as nf
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms.autoregressive import (
    MaskedPiecewiseLinearAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.nonlinearities import PiecewiseLinearCDF, PiecewiseRationalQuadraticCDF
from nflows.transforms.normalization import ActNorm, BatchNorm
from nflows.transforms.orthogonal import HouseholderSequence
from nflows.transforms.qr import QRLinear
from nflows.transforms.svd import SVDLinear

import inn_guard as ig
from inn_guard.adapters import bounds_nflows  # noqa: F401 - registers the rules
from inn_guard.lipschitz.intervals import Box
from inn_guard.lipschitz.maps import Unknown, bounded_map
from tests.lipschitz.soundness import assert_sound

MASK = [1, 0, 1, 0]


def net(inner: int, outer: int) -> ResidualNet:
    return ResidualNet(inner, outer, 8, num_blocks=1, activation=torch.nn.functional.silu)


def conv_net(inner: int, outer: int) -> ConvResidualNet:
    return ConvResidualNet(inner, outer, 4, num_blocks=1)


LOCAL = {
    "additive": lambda: nf.AdditiveCouplingTransform(MASK, net),
    "affine": lambda: nf.AffineCouplingTransform(MASK, net),
    "linear spline": lambda: nf.PiecewiseLinearCouplingTransform(MASK, net, num_bins=4, tails="linear", tail_bound=2.0),
    "rational quadratic": lambda: nf.PiecewiseRationalQuadraticCouplingTransform(
        MASK, net, num_bins=4, tails="linear", tail_bound=2.0
    ),
    "affine autoregressive": lambda: nf.MaskedAffineAutoregressiveTransform(4, 8),
    "rational quadratic autoregressive": lambda: MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        4, 8, num_bins=4, tails="linear", tail_bound=2.0
    ),
    "leaky relu": lambda: nf.LeakyReLU(0.2),
    "tanh": lambda: nf.Tanh(),
    "sigmoid": lambda: nf.Sigmoid(1.5),
    "rational quadratic cdf": lambda: PiecewiseRationalQuadraticCDF([4], tails="linear", tail_bound=2.0),
    "linear cdf": lambda: PiecewiseLinearCDF([4], tails="linear", tail_bound=2.0),
    "actnorm": lambda: ActNorm(4),
    "batch norm": lambda: BatchNorm(4).eval(),
    "naive linear": lambda: nf.NaiveLinear(4),
    "lu": lambda: nf.LULinear(4, identity_init=False),
    "qr": lambda: QRLinear(4, 2),
    "svd": lambda: SVDLinear(4, 2, identity_init=False),
    "householder": lambda: HouseholderSequence(4, 3),
    "permutation": lambda: nf.RandomPermutation(4),
    "reverse": lambda: nf.ReversePermutation(4),
    "identity": lambda: nf.IdentityTransform(),
    "pointwise affine": lambda: nf.PointwiseAffineTransform(torch.tensor(0.5), torch.tensor(2.0)),
}

FRAGILE = {"linear spline", "affine autoregressive", "rational quadratic autoregressive"}


def shaken(transform: torch.nn.Module, std: float) -> torch.nn.Module:
    for parameter in transform.parameters():
        torch.nn.init.normal_(parameter, std=std)
    for name, buffer in transform.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(0.7)
    return transform.eval()


@pytest.mark.parametrize("name", LOCAL)
def test_vectors_on_boxes(name):
    for trial in range(4):
        layer = ig.wrap(shaken(LOCAL[name](), 0.1 + 0.2 * trial))
        size = 1.5 if trial % 2 else 3.0
        box = Box(-size * torch.ones(4), 0.7 * size * torch.ones(4))
        # intervals of large networks are wide: a softmax without floors, or an M-matrix, may then prove nothing
        assert_sound(layer, box, finite=trial == 0 or name not in FRAGILE)


@pytest.mark.parametrize("name", ["additive", "leaky relu", "actnorm", "batch norm", "lu", "permutation"])
def test_global_bounds(name):
    layer = ig.wrap(shaken(LOCAL[name](), 0.5))
    bounds = assert_sound(layer, Box.everywhere((4,)))
    assert bounds.is_global


@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.PiecewiseLinearCouplingTransform(MASK, net, num_bins=4),
        lambda: nf.PiecewiseRationalQuadraticCouplingTransform(MASK, net, num_bins=4),
        lambda: MaskedPiecewiseLinearAutoregressiveTransform(4, 4, 8),
        lambda: MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 8, num_bins=4),
    ],
)
def test_splines_without_tails(make):
    layer = ig.wrap(shaken(make(), 0.2))
    assert_sound(layer, Box(0.05 * torch.ones(4), 0.95 * torch.ones(4)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.AdditiveCouplingTransform(MASK, conv_net),
        lambda: nf.AffineCouplingTransform(MASK, conv_net),
        lambda: nf.PiecewiseRationalQuadraticCouplingTransform(
            MASK, conv_net, num_bins=3, tails="linear", tail_bound=2.0
        ),
        lambda: nf.OneByOneConvolution(4, identity_init=False),
        lambda: nf.SqueezeTransform(),
        lambda: ActNorm(4),
    ],
)
def test_images(make):
    layer = ig.wrap(shaken(make(), 0.3))
    assert_sound(layer, Box(-torch.ones(4, 4, 4), torch.ones(4, 4, 4)), count=10)


def test_inverted_transforms_hold_where_the_map_is_global():
    layer = ig.wrap(nf.InverseTransform(nf.LULinear(4, identity_init=False))).layers()[0]
    assert_sound(layer, Box.everywhere((4,)))


def test_what_has_no_rule_is_unknown_with_a_reason():
    layer = ig.wrap(nf.PiecewiseCubicCouplingTransform(MASK, net, num_bins=3))
    described = bounded_map(layer.block, layer)
    assert isinstance(described, Unknown)
    assert "PiecewiseCubicCouplingTransform" in described.reason


def test_affine_couplings_have_no_global_bound():
    layer = ig.wrap(shaken(LOCAL["affine"](), 0.5))
    bounds = assert_sound(layer, Box.everywhere((4,)), finite=False)
    assert bounds.forward == math.inf
    assert "unbounded" in bounds.reason
