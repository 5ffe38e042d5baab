"""The figures on the page of checks are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import inn_guard as ig
from inn_guard.audits import jacobian_spectrum, log_det, preflight, sampling
from inn_guard.audits.level import Level
from inn_guard.audits.out_of_distribution import audit as other_inputs
from inn_guard.audits.registry import AUDITS

PAGE = re.sub(r"\s+", " ", (Path(__file__).parents[2] / "docs" / "checks.md").read_text("utf-8"))
LIMITS = ig.Limits()
LOOKS = sampling.LOOKS


def setting(check: str, name: str) -> int:
    return AUDITS[check].all_settings()[name]


@pytest.mark.parametrize(
    "sentence",
    [
        f"On {preflight.SAMPLES} samples",
        f"**Limit** {LIMITS.density:g} nats for the worst sample",
        f"**Limit** {LIMITS.sampling:g} for the rate of lost draws; the {LIMITS.confidence:.0%}"
        " Clopper".replace("%", " %"),
        f"after {LOOKS[Level.QUICK][0]:,} and {LOOKS[Level.QUICK][1]:,} draws, at level full also"
        f" after {LOOKS[Level.FULL][2]:,}",
        f"**Limit** {LIMITS.reconstruction:g}, or 8 eps",
        f"decomposed up to D = {log_det.DENSE[Level.QUICK]:,} ({log_det.DENSE[Level.FULL]:,} at",
        f"for {log_det.USUAL} to {log_det.MOST} samples",
        f"of at least {log_det.LEAST} samples",
        f"**Limits** {LIMITS.gradient_angle:g} degree and {LIMITS.gradient_length:g}",
        f"more than {other_inputs.BITS:g} bits per dimension",
        f"along {other_inputs.DIRECTIONS} random directions",
        f"a round trip of {setting('out_of_distribution', 'samples')} samples for each family",
        f"more than a factor of {jacobian_spectrum.MIXED_UNITS:g}, cond",
        f"{4 * setting('jacobian_spectrum', 'max_steps')} products of"
        f" {setting('jacobian_spectrum', 'samples')} samples",
        f"D products of {setting('full_spectrum', 'samples')} samples",
    ],
)
def test_a_figure(sentence):
    assert sentence.replace("95%", "95 %") in PAGE
