"""Convolution norms against dense matrices: random kernels, every kind of geometry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from inn_guard.numerics.convolution_norm import convolution_norm, riesz_norm, torus_norm
from tests.cases.trials import trials


def dense(module: nn.Module, channels: int, size: tuple[int, ...]) -> torch.Tensor:
    basis = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    with torch.no_grad():
        return module(basis).flatten(1).T


def truth(module: nn.Module, channels: int, size: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(dense(module, channels, size), 2))


def fill(module: nn.Module, generator: torch.Generator, trial: int) -> nn.Module:
    weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
    if trial % 3 == 0:
        weight = weight.abs()
    if trial % 5 == 4:  # largest at the Nyquist frequency
        sign = (-1.0) ** torch.arange(weight.shape[-1])
        weight = weight.abs() * sign
    module.weight = nn.Parameter(weight)
    return module


def draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


@trials(40, 300)
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_padding_stride_dilation_groups(transposed, trials):
    generator = torch.Generator().manual_seed(int(transposed))
    for trial in range(trials):
        groups, k, stride = draw(generator, 1, 2), draw(generator, 1, 4), draw(generator, 1, 3)
        dilation = draw(generator, 1, 2) if stride == 1 else 1
        padding = draw(generator, 0, k)
        window = dilation * (k - 1) + 1
        n = (
            draw(generator, max(window - 2 * padding, 2), 7)
            if window - 2 * padding <= 7
            else window
        )
        inner, outer = groups * draw(generator, 1, 3), groups * draw(generator, 1, 3)
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        if transposed and (n - 1) * stride - 2 * padding + window < 1:
            continue
        module = kind(
            inner,
            outer,
            k,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=False,
            dtype=torch.float64,
        )
        module = fill(module, generator, trial)
        assert truth(module, inner, (n, n)) <= convolution_norm(module, (n, n)) * (1 + 1e-12)


@trials(15, 60)
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_modes(mode, trials):
    generator = torch.Generator().manual_seed(7)
    for trial in range(trials):
        k, stride = (3, 5)[trial % 2], 1 + trial % 2
        module = nn.Conv2d(
            2, 3, k, stride, k // 2, padding_mode=mode, bias=False, dtype=torch.float64
        )
        fill(module, generator, trial)
        bound, true = convolution_norm(module, (7, 6)), truth(module, 2, (7, 6))
        assert true <= bound * (1 + 1e-12)
        if mode == "circular" and stride == 1:
            assert bound <= true * (1 + 1e-10)


@pytest.mark.parametrize(
    ("kind", "size"), [(nn.Conv1d, (9,)), (nn.Conv3d, (4, 3, 4)), (nn.ConvTranspose1d, (5,))]
)
def test_one_and_three_dimensions(kind, size):
    generator = torch.Generator().manual_seed(8)
    for trial in range(20):
        module = fill(kind(2, 3, 3, padding=1, bias=False, dtype=torch.float64), generator, trial)
        assert truth(module, 2, size) <= convolution_norm(module, size) * (1 + 1e-12)


def test_same_padding_of_an_even_window():
    generator = torch.Generator().manual_seed(9)
    for trial in range(20):
        module = nn.Conv2d(1, 2, (4, 2), padding="same", bias=False, dtype=torch.float64)
        fill(module, generator, trial)
        assert truth(module, 1, (6, 5)) <= convolution_norm(module, (6, 5)) * (1 + 1e-12)


def test_output_padding_of_a_transposed_convolution():
    generator = torch.Generator().manual_seed(10)
    module = nn.ConvTranspose2d(2, 2, 3, 2, 1, output_padding=1, bias=False, dtype=torch.float64)
    fill(module, generator, 0)
    assert truth(module, 2, (4, 4)) <= convolution_norm(module, (4, 4)) * (1 + 1e-12)


@trials(15, 60)
def test_size_free_bound_holds_for_every_size(trials):
    generator = torch.Generator().manual_seed(11)
    for trial in range(trials):
        stride = 1 + trial % 2
        module = nn.Conv2d(2, 2, 3, stride, 1, bias=False, dtype=torch.float64)
        fill(module, generator, trial)
        bound = convolution_norm(module)
        assert max(truth(module, 2, (n, n)) for n in (3, 8)) <= bound * (1 + 1e-12)
    circular = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    assert convolution_norm(circular) == math.inf


def test_torus_is_tight_for_large_images():
    module = nn.Conv2d(3, 6, 3, padding=1, bias=False, dtype=torch.float64)
    fill(module, torch.Generator().manual_seed(12), 1)
    assert convolution_norm(module, (16, 16)) <= truth(module, 3, (16, 16)) * 1.02


def test_all_ones_kernel_has_norm_equal_to_its_sum():
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    assert 9 <= torus_norm(kernel, (5, 5), ((1, 1), (1, 1)), (1, 1)) <= 9 + 1e-12
    assert 9 <= riesz_norm(kernel, (1, 1)) <= 9.1


def test_groups_are_a_maximum_and_not_a_product():
    module = nn.Conv2d(4, 4, 1, groups=4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1, 1))
    assert convolution_norm(module, (8, 8)) == pytest.approx(0.4)
