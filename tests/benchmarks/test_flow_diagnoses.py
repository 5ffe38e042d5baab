"""Codes that a density misses, and inverses that overflow, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.injflow.codes import Codes, fitted_mixture, shape_of_codes
from benchmarks.nif.overflow import overflow
from inn_guard.layers.actnorm import Diagonal
from inn_guard.layers.chain import Chain
from inn_guard.layers.reshape import Flatten


def described(draw):
    train, test = (draw(np.random.default_rng(seed), 4000) for seed in (1, 2))
    codes = Codes(train, test)
    return codes, shape_of_codes(codes, fitted_mixture(train, 0))


def normal(generator, count):
    return generator.normal(size=(count, 3)) @ np.array([[1.0, 0, 0], [2, 3, 0], [0, 0, 5]])


def two_clusters(generator, count):
    return generator.normal(size=(count, 2)) + 8 * generator.integers(0, 2, size=(count, 1))


def test_normal_codes_gain_nothing_by_a_mixture_and_have_a_normal_kurtosis():
    _, shape = described(normal)
    assert abs(shape["mixture_gain_nats"]) < 0.05
    assert shape["mardia_kurtosis"] == pytest.approx(1, abs=0.05)


def test_two_clusters_gain_what_their_entropies_say():
    _, shape = described(two_clusters)
    # one Gaussian: covariance I + 16 (1, 1)^T (1, 1), determinant 33; two: ln 2 nats for the label
    assert shape["mixture_gain_nats"] == pytest.approx(math.log(33) / 2 - math.log(2), abs=0.05)


def test_whitened_distances_do_not_depend_on_the_codes_scale_and_shear():
    codes, _ = described(normal)
    matrix = np.array([[2.0, 1, 0], [0, 1, 3], [1, 0, 7]])
    sheared = Codes(codes.train @ matrix, codes.test @ matrix)
    here, there = codes.nearest(codes.test[:50]), sheared.nearest(codes.test[:50] @ matrix)
    assert torch.allclose(here, there, rtol=1e-6)
    white = codes.whitened(codes.train)
    assert torch.allclose(torch.cov(white.T), torch.eye(3, dtype=torch.float64), atol=1e-6)


def test_the_layer_whose_inverse_overflows_is_named_with_its_inputs_size():
    tiny, huge = Diagonal(4), Diagonal(4)
    with torch.no_grad():
        tiny.log_scale.fill_(math.log(1e-200))
        huge.log_scale.fill_(math.log(1e-150))
    flow = Chain(tiny, huge, Flatten((4,)))
    row = overflow(flow, torch.full((3, 4), 2.0), torch.ones(5, 4))
    assert row["overflow_layer"].startswith("0 ")
    assert row["overflow_samples"] == 3
    assert row["overflow_input"] == pytest.approx(2e150)
    assert row["overflow_input_on_data"] == pytest.approx(1e-200)
    assert (
        overflow(Chain(Flatten((4,))), torch.ones(3, 4), torch.ones(5, 4))["overflow_layer"] == ""
    )
