"""The small tensor functions: shapes, dtypes, and the ends of the floating-point range."""

from __future__ import annotations

import math

import pytest
import torch

from inn_guard.core.missing import Missing
from inn_guard.core.tensors import (
    concatenate_flat,
    dtype_name,
    finite_rows,
    log_norm,
    nonzero_or_one,
    norms,
    peak,
    per_channel,
    per_sample,
    split_flat,
    standard_normal,
    unit_vectors,
)

SPECIAL = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", SPECIAL)
def test_finite_rows_finds_every_kind_of_non_finite_entry_in_any_shape(bad):
    t = torch.ones(3, 2, 4, 5)
    t[1, 1, 3, 4] = bad
    assert finite_rows(t).tolist() == [True, False, True]
    assert finite_rows(t.flatten(1)).tolist() == [True, False, True]


def test_per_sample_broadcasts_and_keeps_the_dtype():
    x = torch.ones(2, 3, 4)
    scaled = x * per_sample(torch.tensor([2, 3]), x)
    assert scaled[0].eq(2).all()
    assert scaled[1].eq(3).all()
    assert per_sample(torch.tensor([True, False]), x).dtype == torch.bool
    assert per_sample(torch.ones(2), torch.ones(2)).shape == (2,)


@pytest.mark.parametrize("shape", [(4, 7), (4, 2, 3), (4, 1)])
def test_norms_are_bit_for_bit_the_plain_ones_where_those_are_in_range(shape):
    t = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norms(t), t.flatten(1).norm(dim=1))
    assert torch.equal(norms(t.float()), t.float().double().flatten(1).norm(dim=1))
    torch.testing.assert_close(log_norm(t), t.flatten(1).norm(dim=1).log(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e-200, 1.0, 1e200, 1e308])
def test_norms_neither_overflow_nor_vanish(size):
    t = torch.full((2, 2), size, dtype=torch.float64)
    t[0, 1] = 0
    assert norms(t)[0] == size
    assert log_norm(t)[0].item() == pytest.approx(math.log(size), rel=1e-14)
    assert log_norm(t)[1].item() == pytest.approx(math.log(size) + 0.5 * math.log(2), rel=1e-14)


def test_the_logarithm_is_finite_where_the_norm_exceeds_float64():
    t = torch.full((1, 9), 1e308, dtype=torch.float64)
    assert norms(t).item() == math.inf
    assert log_norm(t).item() == pytest.approx(math.log(3) + 308 * math.log(10))


def test_norms_of_zero_infinite_and_nan_samples():
    t = torch.tensor([[0.0, 0.0], [1.0, torch.inf], [torch.inf, torch.nan]])
    assert norms(t)[:2].tolist() == [0.0, math.inf]
    assert log_norm(t)[:2].tolist() == [-math.inf, math.inf]
    assert norms(t)[2].isnan()
    assert log_norm(t)[2].isnan()
    assert peak(t)[:2].tolist() == [0.0, math.inf]
    assert peak(t)[2].isnan()
    assert nonzero_or_one(peak(t)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_unit_vectors_have_length_one_in_their_dtype(size):
    t = size * torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    unit = unit_vectors(t)
    assert unit.dtype == t.dtype
    torch.testing.assert_close(norms(unit), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert torch.equal(unit_vectors(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_standard_normal_draws_the_same_numbers_in_every_dtype():
    single, double = (
        standard_normal(torch.zeros(4, 3, dtype=dtype), torch.Generator().manual_seed(1))
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single, double.float())


def test_per_channel_broadcasts_over_samples_and_positions():
    x = torch.ones(5, 2, 3)
    scaled = x * per_channel(torch.tensor([2, 3]), x)
    assert scaled[:, 0].eq(2).all()
    assert scaled[:, 1].eq(3).all()
    assert per_channel(torch.ones(2), torch.ones(5, 2)).shape == (2,)


def test_flat_concatenations_are_split_again():
    parts = [torch.randn(4, 3), torch.randn(4, 2, 5), torch.randn(4, 1, 1, 1)]
    flat = concatenate_flat(parts)
    assert flat.shape == (4, 14)
    for part, back in zip(parts, split_flat(flat, [(3,), (2, 5), (1, 1, 1)]), strict=True):
        assert torch.equal(part, back)


def test_names_of_dtypes():
    assert [dtype_name(d) for d in (torch.float16, torch.bfloat16)] == ["float16", "bfloat16"]


def test_missing_says_why():
    assert str(Missing("the map has no inverse")) == "the map has no inverse"
    assert Missing("a") == Missing("a")
