"""No ratio that gradient ascent finds lies above a bound, whatever was done to the model."""

from __future__ import annotations

import pytest

from benchmarks.lipschitz import adversary
from tests.cases.trials import trials

#: configurations whose bounds were wrong, or blamed on a rule, at some time
CAUGHT = {
    111: "a parametrized layer whose class is patched",
    508: "a part of a library's block that is a subclass",
    2537: "a coupling whose index of kept entries is no partition",
    756: "a permutation that repeats an entry",
    8431: "a coupling that changes no entry",
    20831: "a coupling that keeps no entry",
    31423: "a permutation matrix times two, which the inverse transposes",
}


@trials(12, 1500)
def test_no_ratio_climbs_above_a_bound(trials):
    found = {}
    for seed in range(trials):
        found[seed] = adversary.outcome(seed)
    assert {seed: came for seed, came in found.items() if came[2] not in ("sound", "no bound")} == {
        seed: came for seed, came in found.items() if came[2] == "refused"
    }


@pytest.mark.parametrize("seed", CAUGHT)
def test_configurations_that_were_wrong(seed):
    assert adversary.outcome(seed)[2] in ("sound", "no bound")


@pytest.mark.parametrize("block", [*adversary.CHEAP, *adversary.DEAR])
def test_every_block_is_one_that_can_be_built(block):
    {**adversary.CHEAP, **adversary.DEAR}[block](adversary.D)
