"""Every rule of nflows against sampled Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from nflows import transforms as nf
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms.autoregressive import (
    MaskedPiecewiseCubicAutoregressiveTransform,
    MaskedPiecewiseLinearAutoregressiveTransform,
    MaskedPiecewiseQuadraticAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.nonlinearities import (
    PiecewiseLinearCDF,
    PiecewiseQuadraticCDF,
    PiecewiseRationalQuadraticCDF,
)
from nflows.transforms.normalization import ActNorm, BatchNorm
from nflows.transforms.orthogonal import HouseholderSequence
from nflows.transforms.qr import QRLinear
from nflows.transforms.splines.quadratic import quadratic_spline, unconstrained_quadratic_spline
from nflows.transforms.svd import SVDLinear

import inn_guard as ig
from inn_guard.lipschitz.maps.base import NoRule, bounded_map
from inn_guard.lipschitz.rules import nflows as bounds_nflows  # noqa: F401 - registers the rules
from inn_guard.lipschitz.transformers.quadratic import QuadraticSpline
from inn_guard.numerics.intervals import Box, Interval
from tests.cases.trials import first, trials
from tests.lipschitz.soundness import assert_sound

MASK = [1, 0, 1, 0]


def net(inner: int, outer: int) -> ResidualNet:
    return ResidualNet(inner, outer, 8, num_blocks=1, activation=torch.nn.functional.silu)


def conv_net(inner: int, outer: int) -> ConvResidualNet:
    return ConvResidualNet(inner, outer, 4, num_blocks=1)


LOCAL = {
    "additive": lambda: nf.AdditiveCouplingTransform(MASK, net),
    "affine": lambda: nf.AffineCouplingTransform(MASK, net),
    "linear spline": lambda: nf.PiecewiseLinearCouplingTransform(
        MASK, net, num_bins=4, tails="linear", tail_bound=2.0
    ),
    "quadratic": lambda: nf.PiecewiseQuadraticCouplingTransform(
        MASK, net, num_bins=4, tails="linear", tail_bound=2.0
    ),
    "quadratic of two bins": lambda: nf.PiecewiseQuadraticCouplingTransform(
        MASK, net, num_bins=2, tails="linear", tail_bound=2.0
    ),
    "quadratic autoregressive": lambda: MaskedPiecewiseQuadraticAutoregressiveTransform(
        4, 8, num_bins=3, tails="linear", tail_bound=2.0
    ),
    "rational quadratic": lambda: nf.PiecewiseRationalQuadraticCouplingTransform(
        MASK, net, num_bins=4, tails="linear", tail_bound=2.0
    ),
    "affine autoregressive": lambda: nf.MaskedAffineAutoregressiveTransform(4, 8),
    "rational quadratic autoregressive": lambda: (
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            4, 8, num_bins=4, tails="linear", tail_bound=2.0
        )
    ),
    "leaky relu": lambda: nf.LeakyReLU(0.2),
    "tanh": lambda: nf.Tanh(),
    "sigmoid": lambda: nf.Sigmoid(1.5),
    "rational quadratic cdf": lambda: PiecewiseRationalQuadraticCDF(
        [4], tails="linear", tail_bound=2.0
    ),
    "quadratic cdf": lambda: PiecewiseQuadraticCDF([4], tails="linear", tail_bound=2.0),
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

FRAGILE = {
    "linear spline",
    "affine autoregressive",
    "quadratic autoregressive",
    "rational quadratic autoregressive",
}


def shaken(transform: torch.nn.Module, std: float) -> torch.nn.Module:
    for parameter in transform.parameters():
        torch.nn.init.normal_(parameter, std=std)
    for name, buffer in transform.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(0.7)
    return transform.eval()


@trials(1, 4)
@pytest.mark.parametrize("name", first(12, LOCAL))
def test_vectors_on_boxes(name, trials):
    for trial in range(trials):
        layer = ig.wrap(shaken(LOCAL[name](), 0.1 + 0.2 * trial))
        size = 1.5 if trial % 2 else 3.0
        box = Box(-size * torch.ones(4), 0.7 * size * torch.ones(4))
        # intervals of large networks are wide: a softmax without floors, or an M-matrix, may
        # then prove nothing
        assert_sound(layer, box, finite=trial == 0 or name not in FRAGILE)


@pytest.mark.parametrize(
    "name", ["additive", "leaky relu", "actnorm", "batch norm", "lu", "permutation"]
)
def test_global_bounds(name):
    layer = ig.wrap(shaken(LOCAL[name](), 0.5))
    bounds = assert_sound(layer, Box.everywhere((4,)))
    assert bounds.is_global


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.PiecewiseLinearCouplingTransform(MASK, net, num_bins=4),
        lambda: nf.PiecewiseRationalQuadraticCouplingTransform(MASK, net, num_bins=4),
        lambda: nf.PiecewiseQuadraticCouplingTransform(MASK, net, num_bins=4),
        lambda: MaskedPiecewiseQuadraticAutoregressiveTransform(4, 8, num_bins=3),
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


BROKEN = {
    "naive linear",
    "qr",
}  # nflows inverts them by functions that torch has dropped, or warns of


@pytest.mark.parametrize("name", first(5, sorted(LOCAL.keys() - BROKEN - {"tanh", "sigmoid"})))
def test_inverted_transforms_on_boxes(name):
    inverse = ig.wrap(nf.InverseTransform(shaken(LOCAL[name](), 0.2))).layers()[0]
    bounds = assert_sound(inverse, Box(-1.5 * torch.ones(4), torch.ones(4)))
    described = bounded_map(inverse.block, inverse)
    box = Box(-torch.ones(4), torch.ones(4))
    assert described.preimage(described.image(box)).bounded
    assert math.isfinite(bounds.forward)


def test_what_cannot_be_undone_says_so():
    inverse = ig.wrap(nf.InverseTransform(nf.Tanh())).layers()[0]
    bounds = assert_sound(inverse, Box(-0.9 * torch.ones(4), 0.9 * torch.ones(4)), finite=False)
    assert bounds.forward == math.inf
    assert bounds.reason == "its images of the box are not known to be bounded"


@pytest.mark.parametrize(
    "make",
    [
        lambda: nf.PiecewiseCubicCouplingTransform(MASK, net, num_bins=3),
        lambda: MaskedPiecewiseCubicAutoregressiveTransform(3, 4, 8),
    ],
)
def test_what_has_no_rule_is_unknown_with_a_reason(make):
    layer = ig.wrap(make())
    described = bounded_map(layer.block, layer)
    assert isinstance(described, NoRule)
    assert type(layer.block).__name__ in described.reason
    assert "slope" in described.reason


@pytest.mark.thorough
@trials(2, 6)
@pytest.mark.parametrize("tails", [True, False])
def test_enclosures_of_quadratic_splines(tails, trials):
    """Values and derivatives in x and in every raw parameter against autograd through nflows."""
    torch.manual_seed(int(tails))
    for bins in (2, 3, 5):
        spline = QuadraticSpline(bins, -2.0, 2.0, tails=tails, temperatures=(1.5, 0.7))
        options = (
            {"tails": "linear", "tail_bound": 2.0}
            if tails
            else {"left": -2, "right": 2, "bottom": -2, "top": 2}
        )
        function = unconstrained_quadratic_spline if tails else quadratic_spline
        for trial in range(trials):
            centre = torch.randn(spline.count, 40, dtype=torch.float64) * 1.5
            width, size = 0.5 * (trial % 3) * torch.rand_like(centre), 2.5 if tails else 1.9
            x = ((torch.rand(40, dtype=torch.float64) * 2 - 1) * size).requires_grad_()
            reach = 0.1 * (trial % 4) * torch.rand(40, dtype=torch.float64)
            raw = (centre + (2 * torch.rand_like(centre) - 1) * width).requires_grad_()
            y, _ = function(x, raw[:bins].T / 1.5, raw[bins:].T / 0.7, **options)
            by_x, by_raw = torch.autograd.grad(y.sum(), (x, raw))
            box = Interval((x - reach).detach(), (x + reach).detach())
            box = box if tails else Interval(box.lo.clamp_min(-2), box.hi.clamp_max(2))
            theta = [Interval(c - w, c + w) for c, w in zip(centre, width, strict=True)]
            found = [
                spline.value(box, theta),
                spline.slope(box, theta),
                *spline.sensitivities(box, theta),
            ]
            truth = [y.detach(), by_x, *by_raw]
            found += spline.log_sensitivities(box, theta)
            truth += [part / by_x for part in by_raw]
            for enclosure, true in zip(found, truth, strict=True):
                slack = 1e-9 * (1 + true.abs())
                assert bool(((enclosure.lo <= true + slack) & (true - slack <= enclosure.hi)).all())


def test_affine_couplings_have_no_global_bound():
    layer = ig.wrap(shaken(LOCAL["affine"](), 0.5))
    bounds = assert_sound(layer, Box.everywhere((4,)), finite=False)
    assert bounds.forward == math.inf
    assert "unbounded" in bounds.reason
