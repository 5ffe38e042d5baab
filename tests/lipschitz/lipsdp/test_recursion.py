"""The recursion against every vertex of slopes it must dominate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from inn_guard.lipschitz.lipsdp.chain import Chain, Layer
from inn_guard.lipschitz.lipsdp.multipliers import fast_multipliers, optimise
from inn_guard.lipschitz.lipsdp.recursion import certify
from tests.cases.trials import trials


def selection(rows: torch.Tensor, size: int) -> torch.Tensor:
    return torch.eye(size)[rows][None]


def random_chain(generator: torch.Generator, frequencies: int = 1) -> Chain:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    dtype = torch.float64 if frequencies == 1 else torch.complex128
    size = state = integer(1, 5)
    layers = []
    for _ in range(integer(1, 4)):
        n = integer(1, 6)
        weight = torch.randn(frequencies, n, state, generator=generator, dtype=dtype) * 1.5
        rows = torch.randperm(state, generator=generator)[: integer(0, state)].sort().values
        mixed = torch.randn(frequencies, integer(0, 3), state, generator=generator, dtype=dtype)
        keep = mixed if integer(0, 2) == 0 else selection(rows, state)
        ends = torch.rand(2, n, generator=generator) * 2 - 0.7
        n = n if integer(0, 4) or keep.shape[1] == 0 else 0
        layers.append(Layer(keep, weight[:, :n], ends.amin(0)[:n], ends.amax(0)[:n]))
        state = keep.shape[1] + n
    return Chain(
        size,
        tuple(layers),
        torch.randn(frequencies, integer(1, 5), state, generator=generator, dtype=dtype),
    )


def worst_vertex(chain: Chain, generator: torch.Generator, count: int) -> float:
    worst = 0.0
    for _ in range(count):
        slopes = [
            torch.where(
                torch.rand(len(layer.lower), generator=generator) < 0.5, layer.lower, layer.upper
            )
            for layer in chain.layers
        ]
        worst = max(worst, float(torch.linalg.matrix_norm(chain.jacobian(slopes), 2).max()))
    return worst


@trials(12, 80)
@pytest.mark.parametrize("frequencies", [1, 3])
def test_bound_dominates_random_slope_vertices(frequencies, trials):
    generator = torch.Generator().manual_seed(frequencies)
    for trial in range(trials):
        chain = random_chain(generator, frequencies)
        multipliers = optimise(chain, steps=12) if trial % 2 else fast_multipliers(chain)
        bound = certify(chain, multipliers)
        assert math.isfinite(bound)
        assert worst_vertex(chain, generator, 40) <= bound * (1 + 1e-12)


@trials(20, 150)
def test_any_multipliers_are_a_proof_or_none(trials):
    generator = torch.Generator().manual_seed(5)
    proved = 0
    for _ in range(trials):
        chain = random_chain(generator)
        multipliers = tuple(
            D * torch.empty_like(D).uniform_(0.3, 4, generator=generator)
            for D in fast_multipliers(chain)
        )
        bound = certify(chain, multipliers)
        proved += math.isfinite(bound)
        assert worst_vertex(chain, generator, 20) <= bound * (1 + 1e-12)
    assert trials // 5 < proved < trials


def test_slopes_of_one_are_linear_algebra():
    generator = torch.Generator().manual_seed(6)
    W = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    one = torch.ones(4, dtype=torch.float64)
    chain = Chain(
        3,
        (Layer(selection(torch.arange(3), 3), W[None], one, one),),
        torch.eye(7, dtype=torch.float64)[None],
    )
    truth = float(torch.linalg.matrix_norm(torch.cat([torch.eye(3), W]), 2))
    assert truth <= certify(chain, (1e7 * one,)) <= truth * (1 + 1e-5)


def test_optimised_is_at_most_fast_and_below_the_product():
    generator = torch.Generator().manual_seed(7)
    sizes = [8, 32, 32, 8]
    weights = [
        torch.randn(o, i, generator=generator) / math.sqrt(i) for i, o in itertools.pairwise(sizes)
    ]
    zero, one, none = torch.zeros(32), torch.ones(32), torch.arange(0)
    layers = tuple(Layer(selection(none, W.shape[1]), W[None], zero, one) for W in weights[:2])
    chain = Chain(8, layers, weights[2][None])
    product = math.prod(float(torch.linalg.matrix_norm(W, 2)) for W in weights)
    fast, tight = certify(chain, fast_multipliers(chain)), certify(chain, optimise(chain, steps=60))
    assert tight < 0.8 * fast < fast < 0.8 * product


def test_zero_weights_and_narrow_states():
    none = torch.arange(0)
    chain = Chain(
        2,
        (Layer(selection(none, 2), torch.zeros(1, 3, 2), torch.zeros(3), torch.ones(3)),),
        torch.ones(1, 1, 3),
    )
    assert certify(chain, optimise(chain, steps=3)) < 1e-5


def test_wrong_multipliers_prove_nothing():
    chain = random_chain(torch.Generator().manual_seed(8))
    assert certify(chain, tuple(1e-9 * D for D in fast_multipliers(chain))) == math.inf
