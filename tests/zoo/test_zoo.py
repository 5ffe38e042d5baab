"""Verdicts of every audit on every model of the zoo against the truth: misses, false alarms.

``python -m tests.zoo.test_zoo`` prints the table.
"""

from __future__ import annotations

import collections
import warnings

import mpmath
import pytest
import torch

import inn_guard as ig
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.audits.layer_blame import layer_blame
from inn_guard.audits.log_det import log_det
from inn_guard.audits.reconstruction import reconstruction
from tests.zoo import truth
from tests.zoo.specimens import SPECIMENS, Specimen
from tests.zoo.truth import Truth

CHECKS = {
    "reconstruction": (truth.reconstruction, reconstruction),
    "log_det": (truth.log_det, log_det),
    "jacobian_spectrum": (truth.spectrum, jacobian_spectrum),
}
Table = dict[str, collections.Counter]


@pytest.fixture(autouse=True)
def _default_dtype_as_at_home(_float64):
    torch.set_default_dtype(torch.float32)


def judged(specimens: list[Specimen]) -> tuple[Table, list[str]]:
    """Counts per check, and a line for each verdict that is not the truth."""
    table: Table = {name: collections.Counter() for name in [*CHECKS, "layer_blame"]}
    errors: list[str] = []
    for specimen in specimens:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, said, known in verdicts(specimen):
                outcome = compared(said, known)
                table[name][outcome] += 1
                if outcome in ("miss", "false alarm"):
                    errors.append(f"{outcome} of {name}: {specimen.id}")
    return table, errors


def verdicts(specimen: Specimen):
    """(check, whether it found something, the truth) of one specimen."""
    arguments, _, _ = specimen.made(specimen.dtype)
    model, x = ig.wrap(**arguments), specimen.x(specimen.dtype)
    for name, (known, audit) in CHECKS.items():
        found = known(specimen)
        if found is not None:
            yield name, audit(model, x).verdict.failed, found
    if specimen.broken_layer is not None:
        shares = [row["share"] for row in layer_blame(model, x).per_layer]
        yield "layer_blame", shares.index(max(shares)) == specimen.broken_layer, Truth.BAD


def compared(said: bool, known: Truth) -> str:
    if known is Truth.EITHER:
        return "either"
    if said:
        return "found" if known is Truth.BAD else "false alarm"
    return "miss" if known is Truth.BAD else "passed"


def test_no_miss_and_no_false_alarm_in_a_small_part_of_the_zoo():
    """Every 23rd specimen: among them each check meets one that is broken."""
    table, errors = judged(SPECIMENS[::23])
    assert errors == []
    for name, counts in table.items():
        assert counts["found"] >= 1, name


@pytest.mark.thorough
def test_no_miss_and_at_most_one_false_alarm_in_a_hundred():
    table, errors = judged(SPECIMENS)
    for name, counts in table.items():
        assert counts["miss"] == 0, errors
        assert counts["false alarm"] <= 0.01 * (counts["false alarm"] + counts["passed"]), errors
        assert counts["found"] >= 5, name
        assert name == "layer_blame" or counts["passed"] >= 20, name
        assert counts["either"] <= 0.1 * sum(counts.values()), name


def test_the_zoo_is_large_and_every_name_is_its_own():
    assert len(SPECIMENS) >= 100
    assert len({specimen.id for specimen in SPECIMENS}) == len(SPECIMENS)


@pytest.mark.parametrize(
    "specimen", [s for s in SPECIMENS if "around" in s.id and "float32" in s.id], ids=lambda s: s.id
)
def test_condition_numbers_are_those_of_forty_digits(specimen):
    """The dense float64 Jacobian's extremes by mpmath: the truth that the audits are held to."""
    J = truth.jacobian(specimen)
    with mpmath.workdps(40):
        sigma = [mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False) for matrix in J]
        exact = max(float(s[0] / s[len(s) - 1]) for s in sigma)
    assert truth.condition(specimen) == pytest.approx(exact, rel=1e-5)


def test_a_zoo_with_blind_audits_would_fail():
    known = [truth.spectrum(specimen) for specimen in SPECIMENS[::10]]
    assert {compared(False, each) for each in known} >= {"miss", "passed"}
    assert {compared(True, each) for each in known} >= {"found", "false alarm"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts, wrong = judged(SPECIMENS)
    print(f"{len(SPECIMENS)} models")
    for check, outcomes in counts.items():
        print(
            f"{check:18}",
            ", ".join(
                f"{outcomes[o]} {o}" for o in ("found", "passed", "miss", "false alarm", "either")
            ),
        )
    print("\n".join(wrong))
