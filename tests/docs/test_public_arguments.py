"""Whatever is passed to a public function: it works, or the error says what was expected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import inn_guard as ig
from tests.docs.public_arguments import CALLS

ROOT = Path(__file__).parents[2]

#: classes that callers get and do not make, tables, and what tests of their own call with junk
MADE_BY_US = {
    *("AUDITS", "USES", "AuditReport", "AuditResult", "AuditSpec", "Comparison", "Direction"),
    *("Invertible", "Level", "LipschitzBounds", "Look", "MixedPrecision", "NotApplicable"),
    *("PrecisionSummary", "Stabilized", "Verdict", "actions", "audit_check", "stabilize"),
    *("AdaptiveCoefficient", "CsvRecorder", "MetricsRecorder", "TensorBoardRecorder"),
    *("raise_precision", "RegularizerHook"),
}


def test_every_public_function_is_called():
    assert {name for name in ig.__all__ if name not in MADE_BY_US} <= set(CALLS)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.thorough)])
def test_errors_say_what_was_expected(count, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.docs.public_arguments", "0", str(count)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
