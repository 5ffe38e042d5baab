"""Recorders: every number arrives unchanged, also after a kill, a resume and new columns."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path

import pytest
import torch

from inn_guard.report.audit_report import AuditReport
from inn_guard.report.result import AuditResult
from inn_guard.report.verdict import Verdict
from inn_guard.training.actions import AdaptCoefficient
from inn_guard.training.audit_hook import AuditHook
from inn_guard.training.records import (
    CsvRecorder,
    MetricsRecorder,
    Record,
    TensorBoardRecorder,
    read_csv,
)
from inn_guard.training.regularizers import AdaptiveCoefficient, NormalizingFlowLoss
from tests.oracles.regularizers import TwoCouplings


def record(step, verdict=Verdict.STABLE, extra=None, **values):
    return Record(
        step,
        AuditReport((AuditResult("quick_round_trip", verdict, "", values=values),)),
        extra or {},
    )


def test_rows_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "history.csv"
    recorder = CsvRecorder(path)
    values = [1 / 3, 5e-324, 1e308, math.inf, -math.inf]
    for step, value in enumerate(values):
        recorder(record(step, error=value, extra={"coefficient": 0.1 * step}))
    rows = read_csv(path)
    assert [row["quick_round_trip.error"] for row in rows] == values
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[2] == {
        "step": 2,
        "verdict": "stable",
        "quick_round_trip.error": 1e308,
        "coefficient": 0.2,
    }
    recorder(record(5, Verdict.NON_FINITE, error=math.nan))
    assert math.isnan(read_csv(path)[-1]["quick_round_trip.error"])
    assert "coefficient" not in read_csv(path)[-1]


def test_new_columns_appear_and_missing_cells_stay_empty(tmp_path):
    recorder = CsvRecorder(tmp_path / "h.csv")
    recorder(record(0, error=1.0))
    recorder(record(1, error=2.0, angle=3.0))
    recorder(record(2, angle=4.0))
    assert (tmp_path / "h.csv").read_text().splitlines() == [
        "step,verdict,quick_round_trip.error,quick_round_trip.angle",
        "0,stable,1.0,",
        "1,stable,2.0,3.0",
        "2,stable,,4.0",
    ]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_that_a_kill_cut_short_is_made_good(tmp_path, cut):
    path = tmp_path / "h.csv"
    recorder = CsvRecorder(path)
    for step in range(3):
        recorder(record(step, error=1.5))
    whole = path.read_text()
    path.write_text(whole[:-cut])
    assert [row["step"] for row in read_csv(path)] == [0, 1]
    resumed = CsvRecorder(path)
    resumed(record(2, error=1.5))
    assert path.read_text() == whole
    resumed(record(3, error=2.5))
    assert len(read_csv(path)) == 4


def test_resuming_from_an_older_checkpoint_replaces_what_comes_again(tmp_path):
    path = tmp_path / "h.csv"
    first = CsvRecorder(path)
    for step in (0, 10, 20, 30):
        first(record(step, error=1.0))
    resumed = CsvRecorder(path)
    assert len(read_csv(path)) == 4  # nothing is lost before there is something new
    resumed(record(20, error=7.0))
    resumed(record(30, error=8.0))
    assert [(row["step"], row["quick_round_trip.error"]) for row in read_csv(path)] == [
        (0, 1),
        (10, 1),
        (20, 7),
        (30, 8),
    ]


def test_every_record_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "h.csv"
    recorder = CsvRecorder(path)
    for step in range(3):
        recorder(record(step, error=1.0))
        assert len(read_csv(path)) == step + 1
    assert [file.name for file in tmp_path.iterdir()] == ["h.csv"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "ragged.csv").write_text("step,verdict,x\n1,stable\n")
    with pytest.raises(ValueError, match="step,verdict"):
        CsvRecorder(tmp_path / "notes.csv")
    assert (tmp_path / "notes.csv").read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="3 cells"):
        read_csv(tmp_path / "ragged.csv")
    with pytest.raises(FileNotFoundError, match="create it first"):
        CsvRecorder(tmp_path / "nowhere" / "h.csv")


def test_tensorboard_gets_every_number():
    class Writer:
        def __init__(self):
            self.scalars = []

        def add_scalar(self, tag, scalar_value, global_step):
            self.scalars.append((tag, scalar_value, global_step))

    writer = Writer()
    TensorBoardRecorder(writer, prefix="run")(
        record(3, Verdict.UNSTABLE, error=math.inf, extra={"coefficient": 0.5})
    )
    assert writer.scalars == [
        ("run/failed", 1.0, 3),
        ("run/quick_round_trip/error", math.inf, 3),
        ("run/coefficient", 0.5, 3),
    ]


def test_metrics_go_to_any_logger(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.CSVLogger(tmp_path, name="", version="")
    recorder = MetricsRecorder(logger.log_metrics, prefix="run")
    recorder(record(3, Verdict.UNSTABLE, error=0.25, extra={"coefficient": 0.5}))
    logger.save()
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert {name: float(value) for name, value in row.items()} == {
        "step": 3.0,
        "run/failed": 1.0,
        "run/quick_round_trip/error": 0.25,
        "run/coefficient": 0.5,
    }
    with pytest.raises(TypeError):
        MetricsRecorder(logger)


@pytest.mark.library("mlflow")
def test_metrics_go_to_mlflow(tmp_path):
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run() as run:
        MetricsRecorder(mlflow.log_metrics)(record(3, Verdict.UNSTABLE, error=0.25))
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    assert metrics["audit/quick_round_trip/error"] == 0.25


@pytest.mark.library("mlflow")
def test_mlflow_keeps_the_page_of_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = importlib.import_module("mlflow")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    mlflow.create_experiment("pages", artifact_location=(tmp_path / "pages").as_uri())
    with mlflow.start_run(experiment_id=mlflow.get_experiment_by_name("pages").experiment_id):
        MetricsRecorder(mlflow.log_metrics, artifact=mlflow.log_artifact)(record(3, error=0.25))
    (page,) = (tmp_path / "pages").rglob("audit_3.html")
    assert "<html" in page.read_text(encoding="utf-8")


@pytest.mark.library("wandb")
def test_wandb_keeps_numbers_and_page_offline(tmp_path, monkeypatch):
    wandb = importlib.import_module("wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    with wandb.init(mode="offline", dir=tmp_path, project="audit") as run:
        recorder = MetricsRecorder(run.log, artifact=run.log_artifact)
        recorder(record(3, Verdict.UNSTABLE, error=0.25))
        recorder(record(4, error=0.5))  # a step is complete when the next one begins
        assert run.summary["audit/quick_round_trip/error"] == 0.25
        assert run.summary["audit/failed"] == 1.0
    assert list(tmp_path.rglob("*.wandb"))


def test_the_page_goes_to_a_function_and_is_removed(tmp_path):
    seen = {}

    def keep(path):
        seen[path] = Path(path).read_text(encoding="utf-8")

    MetricsRecorder(lambda numbers, step: None, prefix="run/a", artifact=keep)(record(3, error=0.5))
    ((path, text),) = seen.items()
    assert Path(path).name == "run_a_3.html"
    assert "<html" in text
    assert not Path(path).exists()
    with pytest.raises(TypeError, match=r"pass its method, such as run.log_artifact"):
        MetricsRecorder(print, artifact="report.html")


def test_through_a_hook(tmp_path):
    model, x = TwoCouplings().double(), torch.randn(6, 6)
    coefficient = AdaptiveCoefficient(NormalizingFlowLoss(1.0), target=100.0)
    checks = ["jacobian_spectrum", "reconstruction"]
    recorder = CsvRecorder(tmp_path / "h.csv")
    hook = AuditHook(
        model, every=2, checks=checks, record=recorder, actions=[AdaptCoefficient(coefficient)]
    )
    reports = [hook(x) for _ in range(5)]
    rows = read_csv(tmp_path / "h.csv")
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row, report in zip(rows, reports[::2], strict=True):
        assert row["verdict"] == report.verdict.label
        for result in report.results:
            for name, value in result.values.items():
                assert row[f"{result.name}.{name}"] == value
    assert rows[0]["coefficient"] == coefficient.initial
    assert rows[1]["coefficient"] < coefficient.initial
