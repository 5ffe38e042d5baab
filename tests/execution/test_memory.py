"""Bytes held at once: against counts by hand, and against the profiler's record of allocations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.performance.measurement import peak_allocated
from inn_guard.execution.memory import (
    Footprint,
    forward_footprint,
    linearized_footprint,
    peak_bytes,
)
from tests.cases.toys import Linear, random_chain


def test_what_is_freed_does_not_count_and_what_is_kept_does():
    x = torch.randn(1000)

    def freed():
        y = x
        for _ in range(10):
            y = y + 1

    def kept():
        return [x + k for k in range(10)]

    assert peak_bytes(freed) == 2 * 8000
    assert peak_bytes(kept) == 10 * 8000


def test_views_and_in_place_operations_hold_nothing_new():
    x = torch.randn(1000)
    assert peak_bytes(lambda: x[:10].reshape(2, 5).t()) == 0
    assert peak_bytes(lambda: x.add_(1)) == 0


def test_a_graph_is_held_until_it_is_gone():
    x = torch.randn(1000, requires_grad=True)

    def step():
        y = x
        for _ in range(5):
            y = (2 * y).tanh()
        y.sum().backward()

    assert 5 * 8000 <= peak_bytes(step) <= 2 * 5 * 8000 + 4 * 8000
    x.grad = None


@pytest.mark.parametrize("size", [10, 300])
def test_agrees_with_the_profiler(size):
    matrix, x = torch.randn(size, size), torch.randn(50, size, requires_grad=True)

    def step():
        return torch.autograd.grad(((x @ matrix).tanh() @ matrix).square().sum(), x)[0]

    step()
    by_profiler = peak_allocated(step)
    assert 0.5 * by_profiler <= peak_bytes(step) <= 2 * by_profiler


def test_footprints_are_lines_in_the_number_of_samples():
    x = torch.randn(8, 100)
    model = Linear(torch.eye(100) + 0.01 * torch.randn(100, 100))
    line = forward_footprint(model, x)
    measured = peak_bytes(lambda: model.inverse(model(x)).detach())
    assert line.each >= 800
    assert 0.3 * measured <= line.of(8) <= 4 * measured


@pytest.mark.thorough
def test_a_linearisation_holds_more_than_a_pass():
    x, model = torch.randn(4, 6), random_chain(depth=3, spread=0.5)
    assert linearized_footprint(model, x).each > 2 * forward_footprint(model, x).each
    extra = linearized_footprint(model, x, vectors=100).each - linearized_footprint(model, x).each
    assert extra == 100 * 6 * 8


def test_a_footprint_is_measured_within_what_it_is_told():
    seen = []

    class Counting(Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    model, x = Counting(torch.eye(100)), torch.randn(8, 100)
    wide = forward_footprint(model, x)
    assert seen == [1, 2]
    seen.clear()
    narrow = forward_footprint(model, x, within=1.5 * wide.of(1))
    assert seen == [1]
    assert narrow.of(1) == wide.of(1)
    assert narrow.samples_within(1.5 * wide.of(1)) == 1


def test_samples_within_a_budget():
    line = Footprint(fixed=100, each=10)
    assert [line.samples_within(memory) for memory in (50, 109, 110, 129, 130)] == [1, 1, 1, 2, 3]
    assert line.of(line.samples_within(1000)) <= 1000
