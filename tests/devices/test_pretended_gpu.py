"""Every path of ``paths.py`` gives on the pretended device what it gives on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.devices.paths import PATHS

ROOT = Path(__file__).parents[2]

SHORT = (
    "RegularizerHook and its step",
    "FiniteDifferences refuses dropout",
    "memory saving, float",
    "memory saving, images",
    "memory saving, guard",
    "memory saving, exact",
    "memory saving, dropout",
    "Jacobian products",
    "Jacobian products of callables",
    "Jacobian products, images",
    "Lanczos",
    "Lanczos, images",
    "dense Jacobians and log-determinants",
    "exact",
    "AuditHook",
    "audit, quick",
)
#: Not among them: lipschitz_bounds, which ends the process on the pretended device, for a reason
#: not found; and dequantization_attack, whose climbs follow the rounding of the device.
LONG = (
    "dry run",
    "stabilize",
    "raise_precision",
    "audit, standard",
    "audit of callables",
    "audit, images",
    "audit, full_spectrum",
    "audit, rare_event_sampling",
    "audit, shadowing",
)
MISTAKES = ("a CPU tensor by mistake", "a CPU generator by mistake")
CASES = [name for name in PATHS if name.startswith("case ")]
FEW_CASES = (
    "case aef/residual scale",
    "case freia-GLOWCouplingBlock-image-condition",
    "case freia-AllInOneBlock-soft",
    "case callables-reverse-flag",
    "case memcnn-AdditiveCoupling",
    "case nflows-AffineCouplingTransform-image",
    "case nflows-PiecewiseRationalQuadraticCouplingTransform-unconditional",
    "case normflows-GlowBlock",
    "case ours/residual images",
    "case ours/glow flow",
    "case zuko-NSF",
)


def failures(names: Sequence[str]) -> dict[str, str | None]:
    """What went wrong on each path, in a process of its own: a device once made stays.

    Where a path ends the process, those after it run in the next one.
    """
    found: dict[str, str | None] = {}
    left = list(names)
    while left:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.devices.paths", *left],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        for line in run.stdout.splitlines():
            found |= json.loads(line)
        left = [name for name in left if name not in found]
        if left:
            found[left.pop(0)] = f"ended its process ({run.returncode}): {run.stderr[-2000:]}"
    return found


def assert_none(found: dict[str, str | None]) -> None:
    wrong = {name: reason for name, reason in found.items() if reason is not None}
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())


def test_training_spectra_exact_mode_a_quick_audit_and_models():
    """In one process, because torch and all libraries are imported in each."""
    found = failures([*MISTAKES, *SHORT, *FEW_CASES])
    tensor, generator = (found.pop(name) for name in MISTAKES)
    assert "at least two devices" in tensor
    assert "for generator but found 'cpu'" in generator
    assert_none(found)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LONG)
def test_longer_paths(name):
    assert_none(failures([name]))


@pytest.mark.thorough
@pytest.mark.parametrize("part", range(4))
def test_all_models(part):
    assert_none(failures(CASES[part::4]))
