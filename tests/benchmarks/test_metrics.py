"""Metrics against closed forms, scipy's matrix square root and sums over all pixel values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.distributions import Normal

from benchmarks.common.metrics import (
    FeatureExtractor,
    add_noise,
    bits_per_dimension,
    dequantize,
    feature_error,
    frechet_distance,
    gaussian_frechet_distance,
    inception,
    reconstruction_error,
)

FLAT = FeatureExtractor("pixels", lambda images: images.flatten(1), batch_size=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_dequantized_pixels_lie_in_their_own_cells_uniformly():
    pixels = torch.arange(256, dtype=torch.uint8).expand(400, 256)
    x = dequantize(pixels, generator=generator())
    assert x.dtype == torch.float32
    assert bool((x >= 0).all())
    assert bool((x < 1).all())
    within = x.double() * 256 - pixels
    assert within.min() >= -1e-12
    # two float32 roundings of numbers up to 256
    assert within.max() <= 1 + 256 * 2**-23
    quarters = (within * 4).long().clamp(max=3).flatten().bincount() / within.numel()
    assert torch.allclose(
        quarters, torch.full((4,), 0.25), atol=5 * math.sqrt(0.25 * 0.75 / within.numel())
    )
    assert torch.equal(x, dequantize(pixels, generator=generator()))


def test_the_largest_pixel_never_becomes_one():
    pixels = torch.full((1000, 1000), 255, dtype=torch.uint8)
    assert dequantize(pixels, generator=generator()).max() < 1


def test_fewer_levels():
    x = dequantize(torch.arange(17, dtype=torch.uint8)[None], generator=generator(), levels=17)
    assert torch.equal((x * 17).long()[0], torch.arange(17))
    assert bits_per_dimension(torch.zeros(1), dims=3, levels=17).item() == pytest.approx(
        math.log2(17), rel=1e-12
    )
    with pytest.raises(ValueError, match="below 16"):
        dequantize(torch.full((1, 1), 16, dtype=torch.uint8), generator=generator(), levels=16)


def test_bits_per_dimension_of_a_density_that_is_constant_on_the_cells_are_the_entropy():
    """p(x) = 256 P(k) on cell k: the bits are -log2 P(k), exactly, whatever the noise."""
    probabilities = torch.rand(256, generator=generator()).square()
    probabilities /= probabilities.sum()
    pixels = torch.multinomial(probabilities, 5000, replacement=True, generator=generator()).to(
        torch.uint8
    )
    x = dequantize(pixels.reshape(1000, 5), generator=generator(1)).double()
    log_prob = (256 * probabilities[(x * 256).long()]).log().sum(1)
    expected = -probabilities[pixels.long().reshape(1000, 5)].log2().mean(1)
    assert torch.allclose(bits_per_dimension(log_prob, dims=5), expected, rtol=1e-12)


def test_bits_per_dimension_bound_the_discrete_likelihood():
    """-log2 of the mass of each cell is below the mean of the bits over the noise."""
    density = Normal(0.4, 0.01)
    pixels = torch.arange(96, 110, dtype=torch.uint8)
    mass = density.cdf((pixels + 1.0) / 256) - density.cdf(pixels / 256.0)
    draws = torch.stack([dequantize(pixels, generator=generator(k)).double() for k in range(2000)])
    bits = bits_per_dimension(density.log_prob(draws).flatten(), dims=1).reshape(draws.shape)
    error = bits.std(0) / math.sqrt(len(draws))
    assert bool((bits.mean(0) >= -mass.log2() - 4 * error).all())
    assert bool((bits.mean(0) > -mass.log2()).any())


def test_bits_reject_nonsense():
    with pytest.raises(ValueError, match="at least one dimension"):
        bits_per_dimension(torch.zeros(1), dims=0)


@pytest.mark.parametrize(("n", "m", "dims"), [(200, 150, 6), (40, 60, 30)])
def test_frechet_distance_against_the_matrix_square_root(n, m, dims):
    first = torch.randn(n, dims) @ torch.randn(dims, dims)
    second = torch.randn(m, dims) @ torch.randn(dims, dims) + 1
    a, b = np.cov(first.numpy(), rowvar=False), np.cov(second.numpy(), rowvar=False)
    shift = first.mean(0) - second.mean(0)
    expected = (
        shift @ shift + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b).real)
    )
    assert gaussian_frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_distance_of_singular_covariances_has_its_closed_form():
    """Fewer samples than features, along orthogonal axes: the covariances do not overlap."""
    steps = torch.linspace(-1, 1, 9)[:, None]
    axes = torch.eye(50)
    first, second = steps * axes[0], 2 * steps * axes[1]
    variance = steps.var().item()
    assert gaussian_frechet_distance(first, second) == pytest.approx(5 * variance, rel=1e-12)
    assert gaussian_frechet_distance(first, first + 3 * axes[2]) == pytest.approx(9, rel=1e-12)
    assert gaussian_frechet_distance(first, 2 * first) == pytest.approx(variance, rel=1e-12)


def test_frechet_distance_of_a_set_with_itself_is_zero_and_never_negative():
    images = torch.rand(30, 1, 4, 4)
    result = frechet_distance(FLAT, images, images)
    assert 0 <= result.value < 1e-12
    assert (result.real, result.generated) == (30, 30)


def test_the_extractor_is_named_and_never_called_fid():
    images = torch.rand(8, 1, 2, 2)
    name = frechet_distance(FLAT, images, images.flip(0)).name
    assert name == "Fréchet distance (pixels)"
    assert "FID" not in name


def test_features_that_are_not_finite_are_a_finding():
    images = torch.rand(8, 1, 2, 2)
    broken = images.clone()
    broken[3, 0, 0, 0] = math.nan
    assert math.isnan(frechet_distance(FLAT, images, broken).value)
    with pytest.raises(ValueError, match="two images"):
        frechet_distance(FLAT, images, images[:1])


def test_extraction_does_not_depend_on_the_batches_and_keeps_no_graph():
    images = torch.rand(8, 1, 2, 2, requires_grad=True)
    features = FLAT(images)
    assert torch.equal(features, images.detach().flatten(1))
    assert not features.requires_grad


def test_errors_are_means_of_squares():
    clean = torch.zeros(2, 1, 2, 2)
    off = torch.tensor([[1.0, 0, 0, 0], [2.0, 2, 2, 2]]).reshape(2, 1, 2, 2)
    assert reconstruction_error(clean, off).tolist() == [0.25, 4.0]
    assert feature_error(FLAT, clean, off).tolist() == [0.25, 4.0]


def test_noise_has_its_deviation_where_nothing_is_clipped():
    x = torch.full((200, 500), 0.5)
    noisy = add_noise(x, deviation=0.05, generator=generator())
    assert (noisy - x).std().item() == pytest.approx(0.05, rel=0.01)
    clipped = add_noise(x, deviation=1.0, generator=generator())
    assert clipped.min() == 0
    assert clipped.max() == 1


def test_inception_needs_its_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        inception(tmp_path / "weights.pth")
