from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.performance.measurement import peak_allocated
from inn_guard.layers.chain import Chain
from inn_guard.layers.coupling import AffineCoupling
from inn_guard.layers.networks import MLP
from inn_guard.layers.permutation import Permutation
from inn_guard.memory_saving import memory_saving

FEATURES, HIDDEN, BATCH = 8, 64, 256


def deep(blocks):
    """Wide networks on narrow data: activations have 16 times the size of a state."""
    torch.manual_seed(0)
    layers = []
    for _ in range(blocks):
        network = MLP([FEATURES // 2, HIDDEN, HIDDEN, FEATURES])
        nn.init.uniform_(network[-1].weight, -0.01, 0.01)
        layers += [AffineCoupling(network), Permutation.reverse(FEATURES)]
    return Chain(*layers)


def peak_beside_gradients(blocks, make):
    model, x = deep(blocks), torch.randn(BATCH, FEATURES)
    f, parameters = make(model), list(model.parameters())

    def step():
        z, log_det = f.forward_and_log_det(x)
        torch.autograd.grad((z.square().sum(1) - log_det).mean(), parameters)

    step()
    return peak_allocated(step) - sum(p.numel() * p.element_size() for p in parameters)


def test_the_meter_counts_bytes():
    held = torch.ones(1000)

    def step():
        a = torch.ones(100_000)
        b = a + 1
        del a
        return b + held.sum()

    assert peak_allocated(step) == pytest.approx(2 * 800_000, abs=1000)


@pytest.mark.thorough
def test_peak_memory_does_not_grow_with_depth_up_to_64_blocks():
    ours = [peak_beside_gradients(blocks, memory_saving) for blocks in (8, 64)]
    assert ours[1] <= 1.15 * ours[0]


def test_peak_memory_does_not_grow_with_depth():
    ours = [peak_beside_gradients(blocks, memory_saving) for blocks in (8, 16)]
    assert ours[1] <= 1.02 * ours[0]
    stored = [peak_beside_gradients(blocks, lambda model: model) for blocks in (8, 16)]
    assert stored[1] > 1.8 * stored[0]
    assert ours[1] < 0.25 * stored[1]


@pytest.mark.thorough
def test_a_guard_holds_nine_numbers_a_sample_and_layer_and_a_few_states():
    def guarded(model):
        return memory_saving(model, guard=1e-3)

    fingerprint, state = (8 * BATCH * numbers for numbers in (9, FEATURES))
    few, many = (peak_beside_gradients(blocks, guarded) for blocks in (8, 32))
    more_layers, more_states = 2 * 32 - 2 * 8, math.ceil(64**0.5) - math.ceil(16**0.5)
    assert many - few <= 1.05 * (more_layers * fingerprint + more_states * state)
    unguarded = peak_beside_gradients(8, memory_saving)
    assert few - unguarded <= 1.05 * (16 * fingerprint + (4 + 2) * state)


def test_nothing_stays_behind():
    """Graphs hold no states after their backward pass; dropped graphs are freed without one."""
    model, x = deep(4), torch.randn(BATCH, FEATURES)
    saving, kept = memory_saving(model, guard=1e-3), []

    def step():
        z, log_det = saving.forward_and_log_det(x)
        loss = (z.square().sum(1) - log_det).mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        kept.append(loss)
        saving(x)

    step()
    assert peak_allocated(lambda: [step() for _ in range(3)]) < 1.05 * peak_allocated(step)
    assert len(kept) == 5
