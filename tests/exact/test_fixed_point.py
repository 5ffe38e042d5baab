"""Integer states: every map is undone bit for bit, and its values are the right ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inn_guard.exact.bijections import (
    Block,
    Shear,
    affine,
    scale_by_ratio,
    shear,
    undo_affine,
    undo_scale_by_ratio,
    undo_shear,
)
from inn_guard.exact.fixed_point import SEED, FixedPoint, NoExactRule
from inn_guard.exact.steps import Matrix, _shears
from inn_guard.exact.tape import Mismatch, Packed, PackedMask, Tape, checksum, digest

SHAPE = (3, 5)
WORDS = st.integers(-(2**50), 2**50)
SIZES = st.floats(1e-30, 1e30)


def integers(numbers: st.SearchStrategy, count: int = 15) -> st.SearchStrategy:
    lists = st.lists(numbers, min_size=count, max_size=count)
    return lists.map(lambda entries: torch.tensor(entries).reshape(SHAPE))


def applied(function, state: FixedPoint, *arguments, **settings) -> FixedPoint:
    """What a bijection makes of a state, which it may overwrite, without touching this one."""
    return function(state.clone(), *arguments, **settings)


def state_of(units, pushed) -> FixedPoint:
    return FixedPoint(units.double(), pushed.double(), None, 32)


def assert_same(a: FixedPoint, b: FixedPoint) -> None:
    assert torch.equal(a.units, b.units)
    assert torch.equal(a.pushed, b.pushed)
    assert torch.equal(a.exponents(), b.exponents())


@given(
    integers(st.integers(-(2**30), 2**30)),
    integers(st.integers(0, 2**52 - 1)),
    integers(st.integers(1, 2**20)),
    integers(st.integers(1, 2**36)),
)
def test_a_ratio_is_undone_bit_for_bit(units, pushed, num, den):
    state, tape = state_of(units, pushed), Tape()
    after = applied(scale_by_ratio, state, num, den, tape)
    exact = units.double() * num.double() / den.double()
    assert bool(((after.units - exact).abs() <= 1 + 1e-12 * exact.abs() + num).all())
    assert bool((after.pushed >= 0).all())
    assert_same(applied(undo_scale_by_ratio, after, num, den, tape), state)
    assert tape.events == []


def test_a_scale_of_one_changes_nothing():
    state = FixedPoint.of(torch.randn(SHAPE), 32)
    assert_same(applied(affine, state, torch.ones(SHAPE), None, Tape(), divide=False), state)


@given(integers(WORDS), integers(SIZES), integers(st.floats(-1e30, 1e30)), st.booleans())
def test_affine_maps_are_undone_bit_for_bit(units, scale, shift, divide):
    state, tape = state_of(units, torch.full(SHAPE, SEED)), Tape()
    scale = torch.where(units % 2 == 0, scale, -scale)
    after = applied(affine, state, scale, shift, tape, divide=divide)
    assert float(after.units.abs().max()) <= min(after.largest, 2**51)
    assert 0 <= float(after.pushed.min()) <= float(after.pushed.max()) <= after.fullest
    assert_same(applied(undo_affine, after, scale, shift, tape, divide=divide), state)
    assert tape.events == []


@given(integers(st.floats(-1e3, 1e3)), integers(st.floats(1e-2, 1e2)), st.booleans())
def test_affine_maps_have_the_right_values(values, scale, divide):
    shift = values.flip(0)
    after = applied(affine, FixedPoint.of(values, 32), scale, shift, Tape(), divide=divide)
    expected = (values - shift) / scale if divide else values * scale + shift
    tolerance = 1e-6 * (1 + values.abs() + shift.abs()) * torch.maximum(scale, 1 / scale)
    assert bool(((after.values(torch.float64) - expected).abs() <= tolerance).all())


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_many_scales_in_a_row_are_undone(scales):
    state, tape = FixedPoint.of(torch.randn(SHAPE), 32), Tape()
    after = state
    for size in scales:
        after = applied(affine, after, torch.full(SHAPE, size), None, tape, divide=False)
        assert float(after.units.abs().max()) <= after.largest
        assert float(after.pushed.max()) <= after.fullest
    for size in reversed(scales):
        after = applied(undo_affine, after, torch.full(SHAPE, size), None, tape, divide=False)
    assert_same(after, state)
    assert tape.events == []


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, 5e-324])
def test_scales_without_an_inverse_are_refused(bad):
    state = FixedPoint.of(torch.randn(SHAPE), 32)
    with pytest.raises(NoExactRule, match="scale"):
        applied(affine, state, torch.full(SHAPE, bad), None, Tape(), divide=True)


def test_shifts_that_are_not_finite_are_refused():
    state = FixedPoint.of(torch.randn(SHAPE), 32)
    with pytest.raises(NoExactRule, match="shift is not finite"):
        applied(affine, state, None, torch.full(SHAPE, torch.nan), Tape(), divide=False)


@given(integers(WORDS), st.floats(1e-3, 1e12), st.booleans(), st.sampled_from([1, -1]))
def test_shears_are_undone_bit_for_bit(units, size, sources_first, sign):
    state, tape = state_of(units, torch.full(SHAPE, SEED)), Tape()
    step = Shear.of([Block(0, size * torch.randn(1, 1, 2), sources_first=sources_first)])
    after = applied(shear, state, step, tape, sign=sign)
    assert_same(applied(undo_shear, after, step, tape, sign=sign), state)
    assert tape.events == []


@pytest.mark.parametrize("features", [1, 2, 3, 5, 8, 11, 12, 17])
@pytest.mark.parametrize("lower", [True, False])
def test_the_shears_of_a_triangle_have_its_product(features, lower):
    generator = torch.Generator().manual_seed(features)
    triangle = torch.randn(features, features, generator=generator, dtype=torch.float64)
    triangle = triangle.tril(-1) if lower else triangle.triu(1)
    triangle += torch.eye(features)
    product = torch.eye(features, dtype=torch.float64)
    shears = _shears(triangle, lower=lower)
    for step in shears:
        moved = step.product(product)
        assert not bool(step.product(moved).any())
        assert float(moved.abs().max()) <= step.growth * float(product.abs().max())
        product = product + moved
    assert torch.allclose(product, triangle, atol=1e-10 * float(product.abs().max()))
    assert len(shears) <= (features - 1).bit_length()


@pytest.mark.parametrize("shape", [(3, 1), (4, 5), (2, 3, 4), (5, 6, 2, 3)])
@pytest.mark.parametrize("inverse", [True, False])
def test_matrices_have_the_right_values_and_are_undone(shape, inverse):
    torch.manual_seed(len(shape))
    weight, bias = torch.randn(shape[1], shape[1]).double(), torch.randn(shape[1]).double()
    state = FixedPoint.of(torch.randn(shape), 32)
    step, tape = Matrix(weight, bias, dtype=torch.float64, inverse=inverse), Tape()
    after = step.run(state.clone(), tape)
    x, z = state.values(torch.float64).flatten(2 if len(shape) > 2 else 1), None
    columns = x if len(shape) > 2 else x[..., None]
    if inverse:
        z = torch.linalg.solve(weight, columns - bias[:, None])
    else:
        z = weight @ columns + bias[:, None]
    growth = 1 + float(torch.linalg.cond(weight))
    difference = (after.values(torch.float64).reshape(z.shape) - z).abs().max()
    assert float(difference) < 1e-7 * growth * float(z.abs().max())
    assert_same(step.undo(after, tape), state)
    assert tape.events == []


def test_a_checksum_sees_every_bit_and_the_order_also_in_half_of_a_tensor():
    whole = torch.randn(6, 8)
    left, right = whole.chunk(2, 1)
    assert checksum(left, right) == checksum(left.clone(), right.clone())
    seen = {checksum(left, right), checksum(right, left), checksum(left), checksum(None, right)}
    for bit in range(32):
        for half in (0, 1):
            changed = whole.clone()
            words = changed.view(torch.int32)
            words[3, 4 * half + bit % 4] ^= 1 << bit if bit < 31 else -(1 << 31)
            seen.add(checksum(*changed.chunk(2, 1)))
    # two signs at once
    seen.add(checksum(left, torch.cat([-right[:2], right[2:]])))
    assert len(seen) == 4 + 64 + 1


def test_large_values_get_exponents_and_small_ones_none():
    # 24 significant bits, as in float32
    values = torch.tensor([[1.5e30, -1.25, 1.0]]).float().double()
    values[0, 1] = -(2.0**990)
    state = FixedPoint.of(values, 32)
    assert torch.equal(state.values(torch.float64), values)
    assert state.exponents()[0, 2] == 0
    assert bool((state.units.abs() < 2**51).all())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_packing_keeps_every_integer(numbers):
    packed = Packed.of(torch.tensor(numbers))
    assert packed.unpack().tolist() == numbers


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_packing_keeps_every_mask(bits):
    assert PackedMask.of(torch.tensor(bits)).unpack().tolist() == bits


def test_packing_takes_as_few_bytes_as_needed():
    assert Packed.of(torch.tensor([-128, 127])).bits == 16
    assert Packed.of(torch.tensor([-129, 127])).bits == 32


def test_a_digest_sees_every_bit_and_the_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    hashes = {
        *(digest(a), digest(b), digest(a, b), digest(b, a), digest(a, None), digest(None, a)),
        *(digest(a.float()), digest(a.reshape(1, 2)), digest(a.nextafter(b)), digest(-0 * a)),
    }
    assert len(hashes) == 10


def test_another_event_on_the_tape_is_refused():
    with pytest.raises(Mismatch, match="expected 'steps' on the tape, found 'digest'"):
        Tape([("digest", b"")]).pop("steps")
