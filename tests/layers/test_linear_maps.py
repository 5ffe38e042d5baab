"""ActNorm, 1x1 convolutions and rearrangements beyond the contract."""

from __future__ import annotations

import copy

import pytest
import torch

from inn_guard.core.invertible import NotApplicable
from inn_guard.jacobian.dense import composed_jacobian
from inn_guard.layers.actnorm import ActNorm
from inn_guard.layers.chain import Chain
from inn_guard.layers.linear import InvertibleLinear, LULinear
from inn_guard.layers.multiscale import FactorOut, OnRemaining
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.preprocessing import Logit
from inn_guard.layers.reshape import Squeeze, ZeroPadding


def test_actnorm_normalises_its_first_training_batch_only():
    layer, x = ActNorm(3), 5 + 7 * torch.randn(16, 3, 4, 4)
    z = layer.train()(x)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(z.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(16, 3, 4, 4))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_actnorm_is_not_initialised_in_evaluation_nor_by_the_inverse_nor_by_one_value():
    layer, x = ActNorm(3), torch.randn(8, 3)
    assert torch.equal(layer.eval()(x), x)
    layer.train().inverse(x)
    layer(x[:1])
    for value in (torch.nan, torch.inf):  # what comes after it would never be finite again
        layer(x.index_fill(0, torch.tensor([2]), value))
    assert not layer.initialized
    layer(x)
    assert bool(layer.initialized)


def test_actnorm_keeps_its_initialisation_in_the_state():
    layer = ActNorm(3).train()
    layer(3 + torch.randn(8, 3))
    copied = ActNorm(3).train()
    copied.load_state_dict(layer.state_dict())
    x = torch.randn(8, 3)
    assert torch.equal(copied(x), layer(x))


def test_a_constant_channel_is_finite():
    layer = ActNorm(2).train()
    assert bool(layer(torch.ones(4, 2)).isfinite().all())


@pytest.mark.parametrize("kind", [InvertibleLinear, LULinear])
def test_one_by_one_convolution_is_the_matrix_at_every_pixel(kind):
    layer, x = kind(4), torch.randn(2, 4, 3, 3)
    W = layer.weight.detach()
    assert torch.allclose(layer(x), torch.einsum("oc,bchw->bohw", W, x), atol=1e-14)
    assert torch.allclose(
        layer.forward_and_log_det(x)[1], 9 * torch.linalg.slogdet(W).logabsdet.expand(2), atol=1e-12
    )


@pytest.mark.parametrize("kind", [InvertibleLinear, LULinear])
def test_the_kept_inverse_follows_every_kind_of_change(kind):
    layer, x = kind(4), torch.randn(5, 4)

    def round_trip(layer, x):
        with torch.no_grad():
            return (layer.inverse(layer(x)) - x).abs().max()

    assert round_trip(layer, x) < 1e-13
    first = next(layer.parameters())
    for change in (
        lambda: torch.optim.SGD(layer.parameters(), 0.1).step(),
        lambda: first.data.mul_(1.5),
        lambda: first.data.copy_(torch.randn_like(first)),
        lambda: layer.load_state_dict(kind(4).state_dict()),
    ):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        change()
        assert round_trip(layer, x) < 1e-9
    assert round_trip(layer.to_dtype(torch.float32), x.float()) < 1e-3


def test_the_inverse_is_computed_once_for_one_weight():
    layer, calls = InvertibleLinear(4), []
    compute = layer.inverse_weight
    layer.inverse_weight = lambda: calls.append(1) or compute()
    with torch.no_grad():
        for _ in range(3):
            layer.inverse(torch.randn(2, 4))
    assert len(calls) == 1


def test_a_singular_weight_is_a_finding():
    layer, x = InvertibleLinear(2), torch.ones(1, 2)
    with torch.no_grad():
        layer.matrix.zero_()
        assert bool(layer.inverse(x).isnan().all())
        assert float(layer.forward_and_log_det(x)[1]) == -torch.inf


def test_lu_inverse_is_that_of_its_weight():
    layer = LULinear(6)
    with torch.no_grad():
        layer.lower.add_(torch.randn(6, 6))
        layer.upper.add_(torch.randn(6, 6))
        layer.log_s.add_(torch.randn(6))
    assert torch.allclose(layer.inverse_weight() @ layer.weight, torch.eye(6), atol=1e-8)
    assert torch.allclose(
        layer.log_abs_det(), torch.linalg.slogdet(layer.weight).logabsdet, atol=1e-10
    )


def test_permutation_is_drawn_from_the_given_generator():
    first, again = (
        Permutation.shuffle(20, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.order, again.order)
    with pytest.raises(ValueError, match="every index"):
        Permutation(torch.tensor([0, 0, 1]))


def test_squeeze_keeps_each_block_together():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    z = Squeeze()(x)
    assert z[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="multiples of 2"):
        Squeeze()(torch.zeros(1, 1, 3, 4))


def test_squeeze_of_no_image_has_a_shape_and_a_gradient():
    x = torch.zeros(0, 3, 4, 6, requires_grad=True)
    empty = Squeeze()(x)
    assert empty.shape == (0, 12, 2, 3)
    assert Squeeze().inverse(empty).shape == x.shape
    (gradient,) = torch.autograd.grad(Squeeze().inverse(empty).sum(), x)
    assert gradient.shape == x.shape


def test_finished_latents_stay_in_front():
    x = torch.randn(2, 4, 2, 2)
    split = FactorOut((4, 2, 2))
    inner = FactorOut(split.remaining_shape())
    chain = Chain(split, OnRemaining(inner, shape=split.remaining_shape(), latent_shape=(8,)))
    z = chain(x)
    assert torch.equal(z[:, :8], x[:, 2:].flatten(1))
    assert torch.equal(z[:, 8:12], x[:, 1:2].flatten(1))
    assert torch.equal(z[:, 12:], x[:, :1].flatten(1))
    assert torch.equal(chain.inverse(z), x)


def test_zero_padding_is_injective_only():
    layer = ZeroPadding(2)
    z = torch.randn(3, 4)
    assert torch.equal(layer(layer.inverse(z)), z)
    assert not layer.bijective
    assert not Chain(layer).bijective
    with pytest.raises(NotApplicable):
        layer.forward_and_log_det(torch.randn(3, 6))


def test_logit_outside_its_domain_is_not_clamped():
    layer = Logit(0.05)
    assert bool(layer(torch.tensor([[2.0]])).isnan().all())
    assert torch.allclose(
        layer.inverse(layer(torch.tensor([[0.0, 1.0]]))), torch.tensor([[0.0, 1.0]])
    )


def test_chain_refuses_what_is_not_invertible_and_is_the_identity_when_empty():
    with pytest.raises(TypeError, match="Invertible"):
        Chain(torch.nn.Linear(2, 2))
    x = torch.randn(2, 3)
    assert torch.equal(Chain()(x), x)
    assert Chain(Chain(), Chain(Chain())).layers() == ()


def test_a_subclass_of_chain_with_its_own_map_is_one_layer_though_it_has_no_steps():
    class Doubled(Chain):
        def forward(self, x):
            return 2 * x

        def inverse(self, z):
            return z / 2

    doubled = Doubled()
    chain = Chain(doubled, Chain(), Permutation.reverse(3))
    assert chain.layers()[0] is doubled
    assert len(chain.layers()) == 2
    x = torch.randn(2, 3)
    J = composed_jacobian(chain, x)
    assert torch.allclose(torch.einsum("bij,bj->bi", J, x), chain(x))
