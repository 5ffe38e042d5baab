"""Two processes and one: the same reports, the same gradients, errors in both; on gloo."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inn_guard as ig
from inn_guard.audits.jacobian_spectrum import jacobian_spectrum
from inn_guard.core.random import SampleNoise
from inn_guard.execution.memory import Footprint
from inn_guard.execution.parallel import SERIAL, WorkSharing, rank_noise, register_fsdp_methods
from tests.execution.parallel_worker import (
    CHECKS,
    STEPS,
    batches,
    couplings,
    data,
    model,
    regularizers,
    train,
)
from tests.oracles import transforms as reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.execution.parallel_worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    told = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(told)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def same(found, expected, *, tolerance: float, path: str = "") -> None:
    """Equal entry by entry, numbers up to a relative tolerance, or both rounding errors of 1."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            same(found[key], expected[key], tolerance=tolerance, path=f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, tolerance=tolerance, path=f"{path}[{k}]")
    elif isinstance(expected, float) and isinstance(found, float):
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-12), (
            f"{path}: {found} and {expected}"
        )
    else:
        assert found == expected, path


def without_timing(report: dict) -> dict:
    report["settings"].pop("seconds", None)
    report["settings"].pop("processes", None)
    return report


def test_the_report_of_two_processes_is_that_of_one(answers):
    alone = without_timing(json.loads(ig.audit(model(), data(), checks=CHECKS).to_json()))
    assert answers[0]["report"]["settings"]["processes"] == 2
    for answer in answers:
        found = without_timing(answer["report"])
        assert [r["verdict"] for r in found["results"]] == [r["verdict"] for r in alone["results"]]
        for mine, theirs in zip(found["results"], alone["results"], strict=True):
            if mine["name"] == "layer_blame":
                # rounding errors themselves, which depend on the size of a batch
                errors = [report["values"]["log10_expected_error"] for report in (mine, theirs)]
                assert abs(errors[0] - errors[1]) < 1
                continue
            for part in ("values", "per_sample", "measured_mask", "settings"):
                same(mine[part], theirs[part], tolerance=1e-5, path=f"{mine['name']}.{part}")


def test_both_processes_have_the_same_report(answers):
    first, second = (without_timing(answer["report"]) for answer in answers)
    assert first == second
    assert answers[0]["few"]["results"] == answers[1]["few"]["results"]


def test_fewer_samples_than_processes_and_a_budget(answers):
    assert [result["verdict"] for result in answers[0]["few"]["results"]] == ["stable"] * 2 + [
        "not_applicable",
        "stable",
    ]


@pytest.mark.parametrize(("how", "make"), [("composed", couplings), ("rows", model)])
def test_the_jacobian_of_one_sample_is_shared(how, make, answers):
    alone = ig.audit(make(), data(1), checks=["full_spectrum"])["full_spectrum"].per_sample[
        "singular_values"
    ]
    for answer in answers:
        assert answer[how]["formed"] == [3]
        same(answer[how]["values"], alone.tolist(), tolerance=1e-12)


def test_a_dry_run_knows_of_the_processes(answers):
    assert [answer["dry"] for answer in answers] == [2, 2]


def test_parts_come_back_in_their_order(answers):
    for answer in answers:
        assert answer["mapped"] == [0.0, 10.0, 20.0, 30.0, 40.0]
        assert answer["dealt"] == ["a0", "b1", "c0"]


def test_different_data_are_refused_in_every_process(answers):
    for answer in answers:
        assert answer["other data"].startswith(
            "ValueError: expected the same data x in every process"
        )


def test_an_error_in_one_process_is_raised_in_all(answers):
    for answer in answers:
        assert answer["raised"] == "NotApplicable: one of them cannot"
        assert answer["local"].endswith("Local: not to be pickled")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_averaged_gradient_and_the_schedule_are_those_of_one_process(how, answers):
    net = model()
    alone = train(net, ig.RegularizerHook(net, regularizers(), every=2), batches(slice(None)))
    assert alone["due"] == [True, False] * (STEPS // 2)
    for answer in answers:
        assert answer[how]["due"] == alone["due"]
        same(answer[how]["gradients"], alone["gradients"], tolerance=1e-8)


def test_alone_is_one_call_without_a_bound():
    calls = []

    def measure(rows):
        calls.append(rows.tolist())
        return (rows,)

    SERIAL.map(torch.arange(5), measure)
    WorkSharing().map(torch.arange(5), measure, at_most=2)
    assert calls == [[0, 1, 2, 3, 4], [0, 1], [2, 3], [4]]
    assert (
        SERIAL.max_batch(lambda within: pytest.fail("no footprint is measured without a bound"))
        == math.inf
    )
    limited = WorkSharing(memory=100)
    assert limited.max_batch(lambda within: Footprint(fixed=within - 90, each=30)) == 3


def test_noise_belongs_to_samples():
    rows = torch.tensor([4, 1])
    whole = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part = SampleNoise(torch.Generator().manual_seed(1), rows, 6)((2, 3))
    assert torch.equal(part, whole[rows])
    alone = rank_noise(
        (6, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64, group=None
    )
    assert torch.equal(alone, whole)


def test_micro_batches_change_no_singular_value_of_iterations_run_to_their_end():
    exact = functools.partial(
        jacobian_spectrum, tolerance=1e-14
    )  # six entries: Lanczos ends after six steps
    whole, tight = (
        ig.audit(model(), data(), checks=[exact], memory=memory) for memory in (None, 4000)
    )
    for quantity in ("condition_number", "sigma_max", "sigma_min"):
        found, expected = (
            report["jacobian_spectrum"].per_sample[quantity] for report in (tight, whole)
        )
        assert torch.allclose(found, expected, rtol=1e-12, atol=0)


@pytest.mark.thorough
def test_micro_batches_change_no_verdict_and_singular_values_by_the_tolerance_asked_for():
    """An iteration ends when all samples of its batch are done, so some get further steps.

    Their singular values are then nearer to the truth, by up to the tolerance, and never farther.
    """
    whole = ig.audit(model(), data(), checks=CHECKS[:-1])
    tight = ig.audit(model(), data(), checks=CHECKS[:-1], memory=4000)
    assert [r.verdict for r in whole.results] == [r.verdict for r in tight.results]
    tolerance = whole["jacobian_spectrum"].settings["tolerance"]
    truth = torch.linalg.svdvals(reference.jacobian(model().forward, data()))
    for report in (tight, whole):
        found = report["jacobian_spectrum"].per_sample
        for quantity, exact in (("sigma_max", truth[:, 0]), ("sigma_min", truth[:, -1])):
            assert torch.allclose(found[quantity], exact, rtol=tolerance)
        assert bool((found["sigma_max"] <= truth[:, 0] * (1 + 1e-12)).all())
        assert bool((found["sigma_min"] >= truth[:, -1] * (1 - 1e-12)).all())
    # rounding errors themselves, which depend on the size of a batch
    gains = [report["layer_blame"].values["log10_expected_error"] for report in (tight, whole)]
    assert abs(gains[0] - gains[1]) < 1


def test_what_is_not_sharded_is_said():
    with pytest.raises(TypeError, match="nothing sharded in it"):
        register_fsdp_methods(torch.nn.Linear(2, 2))
