"""Cubes of valid dequantized samples, at any bit depth, range and normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inn_guard.audits.dequantization_attack import Quantization
from inn_guard.audits.dequantization_attack.audit import dequantization_attack
from inn_guard.layers.permutation import Permutation
from inn_guard.report.verdict import Verdict


@given(
    st.integers(1, 10),
    st.floats(-5, 5),
    st.floats(0.1, 10),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_cubes_hold_exactly_the_samples_of_their_integers(bits, low, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    n = torch.randint(2**bits, (3, 4), generator=generator)
    grid = (low + width * (n / 2**bits).double()).to(dtype)
    cubes = Quantization(bits, low, low + width).cubes(grid)
    for x in (
        cubes.lower,
        cubes.upper,
        cubes.centre,
        cubes.uniform(generator),
        cubes.near(grid, 9.0, generator),
    ):
        assert x.dtype == dtype
        assert bool(cubes.contain(x).all())
        place = ((x.double() - low) / (low + width - low)) * 2**bits
        assert bool((place >= n - 1e-6).all())
        assert bool((place <= n + 1 + 1e-6).all())
    below = torch.nextafter(cubes.lower, torch.full_like(cubes.lower, -math.inf))
    above = torch.nextafter(cubes.upper, torch.full_like(cubes.upper, math.inf))
    assert not bool(cubes.contain(below).any())
    assert not bool(cubes.contain(above).any())


def test_the_cube_of_the_paper():
    """x integers, xhat = (x + 0.5) / 2^5, eps = 0.5 / 2^5."""
    cubes = Quantization(5).cubes(torch.tensor([[3.0, 31.0]]) / 32)
    torch.testing.assert_close(cubes.centre, torch.tensor([[3.5, 31.5]]) / 32)
    torch.testing.assert_close(cubes.half, torch.full((1, 2), 0.5 / 32))
    assert cubes.lower.tolist() == [[3 / 32, 31 / 32]]


def test_pixels_over_255_and_normalised_channels():
    pixels = torch.arange(256).reshape(1, 1, 16, 16)
    over_255 = Quantization().cubes((pixels / 255).float())
    assert torch.equal((over_255.lower * 256).round().long().flatten(), pixels.flatten())
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    x = (pixels.expand(1, 2, 16, 16) / 256 - mean.reshape(1, 2, 1, 1)) / std.reshape(1, 2, 1, 1)
    cubes = Quantization(8, (-mean / std).tolist(), ((1 - mean) / std).tolist()).cubes(x)
    back = cubes.centre * std.reshape(1, 2, 1, 1) + mean.reshape(1, 2, 1, 1)
    torch.testing.assert_close(back, (pixels.expand(1, 2, 16, 16) + 0.5) / 256)


def test_ranges_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected x within"):
        Quantization().cubes(torch.tensor([[1.5, 0.2]]))
    with pytest.raises(ValueError, match="low < high"):
        Quantization(8, 1.0, 0.0)
    with pytest.raises(ValueError, match="one per channel"):
        Quantization(8, (0.0, 0.0), (1.0, 1.0)).cubes(torch.zeros(1, 3))
    x = torch.full((2, 3), 0.9, dtype=torch.bfloat16)
    result = dequantization_attack(
        Permutation.reverse(3), x, quantization=Quantization(12, -2e-4, 1.0 - 2e-4)
    )
    assert result.verdict is Verdict.NOT_APPLICABLE
    assert "bfloat16" in result.reason
