"""Glow and the toy nets: the papers' sizes, initial state, trainability."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from inn_guard.layers.coupling import AdditiveCoupling, AffineCoupling
from inn_guard.layers.linear import LULinear
from inn_guard.layers.multiscale import OnRemaining
from inn_guard.layers.permutation import Permutation
from inn_guard.layers.scales import squashed_sigmoid
from inn_guard.models.glow import (
    CIFAR_CLASSIFIER,
    CIFAR_FLOW,
    FLOW_GAN,
    GlowConfig,
    glow_classifier,
    glow_flow,
    projection_head,
)
from inn_guard.models.iresnet import IResNetConfig, checkerboard_residual_flow, iresnet
from inn_guard.models.toy import checkerboard_net, regression_net


@pytest.mark.thorough
def test_the_papers_sizes():
    affine = glow_classifier()
    additive = glow_classifier(config=GlowConfig(3, 16, 128, AdditiveCoupling.on_halves))
    count = {
        name: sum(p.numel() for p in net.parameters())
        for name, net in [("affine", affine), ("additive", additive)]
    }
    assert count == {"affine": 8_407_104, "additive": 6_082_656}
    assert sum(isinstance(layer, AffineCoupling) for layer in affine.layers()) == 48
    assert (CIFAR_FLOW.levels, CIFAR_FLOW.blocks, CIFAR_FLOW.hidden) == (3, 32, 512)
    assert (FLOW_GAN.levels, FLOW_GAN.blocks, FLOW_GAN.hidden) == (3, 8, 128)
    assert (CIFAR_CLASSIFIER.levels, CIFAR_CLASSIFIER.blocks, CIFAR_CLASSIFIER.hidden) == (
        3,
        16,
        128,
    )
    assert len(checkerboard_net().layers()) == len(checkerboard_residual_flow().layers()) == 100


@pytest.mark.parametrize(
    "config",
    [
        GlowConfig(2, 2, 8),
        GlowConfig(2, 2, 8, AdditiveCoupling.on_halves, LULinear),
        GlowConfig(
            1,
            2,
            8,
            partial(AffineCoupling.on_halves, scale=squashed_sigmoid()),
            Permutation.reverse,
        ),
        GlowConfig(
            2, 1, 8, mixing=partial(Permutation.shuffle, generator=torch.Generator().manual_seed(0))
        ),
    ],
    ids=["affine", "additive lu", "squashed reverse", "shuffle"],
)
@pytest.mark.parametrize("make", [glow_classifier, glow_flow])
def test_a_training_step_lowers_the_loss_and_keeps_the_inverse(make, config):
    model, x = (
        make((3, 8, 8), config=config).train(),
        torch.randn(16, 3, 8, 8) * torch.rand(3, 1, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        loss = -model.log_prob(x).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    z = model.eval()(x)
    assert z.shape == (16, 192)
    assert torch.allclose(model.inverse(z), x, atol=1e-8)


def test_projection_head_is_batch_norm_relu_linear():
    head = projection_head(192, 10)
    assert [type(module).__name__ for module in head] == ["BatchNorm1d", "ReLU", "Linear"]
    assert head(torch.randn(4, 192)).shape == (4, 10)


def test_finished_latents_of_the_flow_do_not_see_later_levels():
    model, x = glow_flow((2, 8, 8), config=GlowConfig(2, 1, 4)).eval(), torch.randn(2, 2, 8, 8)
    z = model(x)
    finished = z.shape[1] // 2
    changed = torch.cat([z[:, :finished], torch.randn_like(z[:, finished:])], dim=1)
    again = model(model.inverse(changed))
    assert torch.allclose(again, changed, atol=1e-10)
    level = [layer for layer in model.layers() if isinstance(layer, OnRemaining)]
    assert level
    assert all(layer.size == finished for layer in level)


def test_odd_sizes_are_named():
    with pytest.raises(ValueError, match="fewer levels"):
        glow_classifier((3, 6, 6), config=GlowConfig(2, 1, 4))
    with pytest.raises(ValueError, match="positive sizes"):
        GlowConfig(0, 1, 1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        IResNetConfig(coefficient=1.0)
    with pytest.raises(ValueError, match="positive sizes"):
        IResNetConfig(levels=0)
    with pytest.raises(ValueError, match="fewer levels"):
        iresnet((3, 6, 6), config=IResNetConfig(2, 1, 4))


def test_regression_net_and_iresnet_train_one_step():
    net, x = regression_net(blocks=2, hidden=8).train(), torch.randn(16, 2)
    (net(x) - 1).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    residual = iresnet((1, 4, 4), config=IResNetConfig(1, 2, 4)).train()
    (-residual.log_prob(torch.randn(4, 1, 4, 4)).mean()).backward()
    assert all(p.grad is not None for p in residual.parameters())
    seeds = {layer.log_det.seed for layer in residual.layers() if hasattr(layer, "log_det")}
    assert len(seeds) == 2
