"""audit(): the public call, its report, and what it says to bad input."""

from __future__ import annotations

import functools
import json
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import inn_guard as ig
from inn_guard.audits import AUDITS, Level, audit_check, checks_of_level
from inn_guard.audits.reconstruction import reconstruction
from inn_guard.audits.run import audit
from inn_guard.layers.chain import Chain
from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from tests.cases.toys import Linear, Warp, random_chain


def data(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def good() -> Chain:
    return random_chain(depth=2, spread=0.5)


def test_levels_and_names_decide_what_runs():
    for level in (Level.STANDARD, Level.QUICK):
        expected = tuple(check.name for check in checks_of_level(level))
        assert audit(good(), data(), level=level).names == expected
    assert audit(good(), data(), checks=["log_det"]).names == ("preflight", "log_det")
    partial = functools.partial(reconstruction, batch_size=2)
    report = audit(good(), data(), checks=[partial, "preflight"])
    assert report.names == ("preflight", "reconstruction")
    assert report["reconstruction"].settings["batch_size"] == 2


def test_a_good_model_is_stable_and_its_report_readable():
    report = audit(good(), data())
    assert report.verdict is Verdict.STABLE, str(report)
    text = str(report)
    assert text.startswith("Chain")
    assert "uses ok" in text.splitlines()[0]
    assert all(name in report.details() for name in report.names)
    assert "what to do" not in text
    assert report.advice == ()
    assert report.worst_layer is None
    assert max(map(len, text.splitlines())) <= 100


def test_a_bad_model_names_the_worst_layer_and_says_what_to_do():
    squeeze = torch.diag(torch.logspace(0, -18, 6))
    report = audit(Chain(Warp(6), Linear(squeeze), Warp(6, seed=1)), data())
    assert report.verdict.failed
    assert "layer 1 (Linear)" in report.worst_layer
    assert report.worst_layer in " ".join(str(report).split())
    assert "what to do" in str(report)


def test_foreign_models_are_wrapped():
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

        def inverse(self, z: Tensor) -> Tensor:
            return z / 2

    report = audit(Doubling(), data())
    assert report["jacobian_spectrum"].values["sigma_max"] == pytest.approx(2)


def test_context_is_handed_on_and_checked():
    class Shifted(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.context

        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z / self.context)

    context = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    report = audit(Shifted(torch.eye(6)), data(), context=context, checks=["jacobian_spectrum"])
    assert report["jacobian_spectrum"].per_sample["sigma_max"].tolist() == pytest.approx(
        [1, 2, 4, 8]
    )
    with pytest.raises(ValueError, match="context with 4 rows"):
        audit(Shifted(torch.eye(6)), data(), context=context[:3])


def test_a_data_loader_is_read_up_to_a_bound():
    loader = DataLoader(TensorDataset(torch.randn(1000, 6), torch.arange(1000)), batch_size=100)
    report = audit(good(), loader, checks=["reconstruction"])
    assert report.settings["samples"] == 256
    assert len(report["reconstruction"].per_sample["max_error"]) == 256
    assert audit(good(), DataLoader(torch.randn(5, 6)), checks=[]).settings["samples"] == 5


def test_audits_with_a_loss_get_it():
    @audit_check(question="What is the loss?")
    def asks(context) -> AuditResult:
        loss = context.loss(context.model(context.x)).item()
        return AuditResult("asks", Verdict.STABLE, "asked", values={"loss": loss})

    report = audit(Linear(torch.eye(6)), torch.ones(2, 6), checks=[asks], loss=lambda z: z.sum())
    assert report["asks"].values["loss"] == 12


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(0, 6, dtype=torch.float64), ValueError, "at least one sample"),
        (torch.zeros(4, 0, dtype=torch.float64), ValueError, "at least one sample"),
        (torch.zeros(6, dtype=torch.float64), ValueError, "shape"),
        (torch.zeros(4, 7, dtype=torch.float64), ValueError, "accepts, got"),
        (torch.zeros(4, 6, dtype=torch.long), TypeError, "floating-point"),
        (torch.zeros(4, 6, dtype=torch.complex64), TypeError, "real floating-point"),
        (torch.zeros(4, 6, dtype=torch.float32), ValueError, r"x\.to\(torch\.float64\)"),
        (torch.zeros(4, 6, dtype=torch.float64, device="meta"), ValueError, "device"),
        ([[1.0]], TypeError, "one tensor"),
        ((torch.zeros(4, 6), torch.zeros(4, 6)), TypeError, "one tensor"),
        (torch.eye(6, dtype=torch.float64).to_sparse(), TypeError, "to_dense"),
        (torch.zeros(4, 6, dtype=torch.float64).to(torch.float8_e4m3fn), TypeError, "16 bits"),
        (DataLoader([{"x": torch.zeros(6, dtype=torch.float64)}]), TypeError, "got a dict"),
        ("data", TypeError, "next\\(iter"),
        (None, TypeError, "got None"),
        (DataLoader(torch.zeros(0, 6)), ValueError, "at least one batch"),
    ],
    ids=range(16),
)
def test_bad_input_is_refused_with_what_to_do(x, error, says):
    model = good()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=says):
        audit(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bad_names_are_refused_with_those_that_exist():
    with pytest.raises(ValueError, match=r"reconstruction.*'recon'"):
        audit(good(), data(), checks=["recon"])
    with pytest.raises(ValueError, match=r"quick, standard, full.*'all'"):
        audit(good(), data(), level="all")
    with pytest.raises(TypeError, match=r'checks=\["log_det"\]'):
        audit(good(), data(), checks="log_det")
    with pytest.raises(TypeError, match="by name or as functions; got <class 'int'>"):
        audit(good(), data(), checks=[int])
    with pytest.raises(TypeError):
        audit(3, data())


def test_a_model_without_inverse_gets_findings():
    class OneWay(Linear):
        def inverse(self, z: Tensor) -> Tensor:
            raise RuntimeError("no way back")

    report = audit(OneWay(torch.eye(6)), data())
    assert report.verdict is Verdict.UNSTABLE
    assert "RuntimeError: no way back" in report["preflight"].reason
    assert "no way back" in report["reconstruction"].reason
    # J^-1 is solved from the forward Jacobian, so the spectrum is measured all the same
    assert report["jacobian_spectrum"].values["condition_number"] == pytest.approx(1)


def test_an_error_of_the_audit_itself_is_not_swallowed():
    def broken(model, x: Tensor) -> AuditResult:
        raise KeyError("programmer's mistake")

    with pytest.raises(KeyError, match="mistake"):
        audit(good(), data(), checks=[broken])


def test_under_no_grad_and_inference_mode():
    model, checks = good(), ["jacobian_spectrum"]
    expected = audit(model, data(), checks=checks)["jacobian_spectrum"].values["sigma_max"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = data()
            report = audit(model, x, checks=checks)
        assert report["jacobian_spectrum"].values["sigma_max"] == pytest.approx(expected)


def test_json_is_whole_and_strict(tmp_path):
    report = audit(good(), torch.cat([data(), torch.full((1, 6), torch.nan)]))
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text
    saved = json.loads(text, parse_constant=pytest.fail)
    assert saved["verdict"] == report.verdict.label
    assert [row["name"] for row in saved["results"]] == list(report.names)
    (row,) = [row for row in saved["results"] if row["name"] == "reconstruction"]
    assert row["per_sample"]["max_error"][4] == "nan"
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_json_holds_every_value():
    values = {"a": math.inf, "b": 1.5, "c": math.nan}
    result = AuditResult(
        "x", Verdict.STABLE, "", values=values, settings={"dtype": torch.float32, "n": (1, 2)}
    )
    saved = json.loads(AuditReport((result,)).to_json())["results"][0]
    assert saved["values"] == {"a": "inf", "b": 1.5, "c": "nan"}
    assert saved["settings"] == {"dtype": "torch.float32", "n": [1, 2]}


def test_lookup_names_what_there_is():
    report = audit(good(), data(), checks=["log_det"])
    assert "log_det" in report
    assert "precision" not in report
    with pytest.raises(KeyError, match="preflight, log_det"):
        report["precision"]


def test_the_verdict_is_the_worst_one():
    def of(*verdicts: Verdict) -> Verdict:
        return AuditReport(
            tuple(AuditResult(str(k), v, "") for k, v in enumerate(verdicts))
        ).verdict

    assert of() is Verdict.UNDECIDED
    assert of(Verdict.NOT_APPLICABLE) is Verdict.NOT_APPLICABLE
    assert of(Verdict.NOT_APPLICABLE, Verdict.STABLE) is Verdict.STABLE
    assert of(Verdict.UNSTABLE, Verdict.STABLE) is Verdict.UNSTABLE
    assert of(Verdict.NON_FINITE, Verdict.UNSTABLE) is Verdict.NON_FINITE


def test_every_audit_is_in_a_level():
    quick, standard, full = ({check.name for check in checks_of_level(level)} for level in Level)
    assert full == set(AUDITS)
    assert quick < standard < full


def test_a_memory_saving_model_is_audited_as_the_map_inside():
    """Its gradients are compared with the true ones, not with themselves."""
    torch.manual_seed(0)
    exploding = ig.wrap(layers=[_Shrink(1e-9), _Shrink(1e9), _Shift()])
    x = torch.randn(8, 4, dtype=torch.float32)
    plain, saving = (
        ig.audit(model, x, checks=["gradient_angle"])["gradient_angle"]
        for model in (exploding, ig.memory_saving(exploding))
    )
    assert saving.values == plain.values


class _Shrink(ig.Invertible):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=torch.float32))

    def forward(self, x):
        return x * self.factor + 1

    def inverse(self, z):
        return (z - 1) / self.factor


class _Shift(_Shrink):
    def __init__(self):
        super().__init__(0.5)


def test_a_data_loader_moves_no_generator():
    loader = DataLoader(data(8), batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    audit(good(), loader, checks=[])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_meta_model_is_refused():
    with pytest.raises(ValueError, match="meta device"):
        audit(good().to("meta"), data().to("meta"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda z: z[:, :2], r"returns shape \(4, 2\), expected \(4, 6\)"),
        (lambda z: z.to(torch.complex128), "returns torch.complex128"),
        (lambda z: z.long(), "returns torch.int64"),
    ],
)
def test_an_inverse_of_another_kind_is_a_finding_of_every_audit(broken, says):
    report = audit(ig.wrap(encode=lambda x: 2 * x, decode=broken), data())
    assert report.verdict.failed
    for name in ("preflight", "reconstruction", "layer_blame"):
        assert re.search(says, report[name].reason), report[name].reason
