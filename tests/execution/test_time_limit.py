"""time_limit() ends what hangs; afterwards traced code still runs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from inn_guard.execution.time_limit import TimedOut, time_limit

#: an interruption that arrives, one that the code catches, and none; then code under a trace
AFTERWARDS = """
import sys, time
from inn_guard.execution.time_limit import TimedOut, time_limit

def forever():
    while True:
        pass

def swallowing():
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                pass
        except BaseException:
            pass

for call in (forever, swallowing, int):
    try:
        with time_limit(0.05):
            call()
    except TimedOut:
        pass
    seen = []
    sys.settrace(lambda frame, event, argument: seen.append(event))
    sorted([3, 1, 2], key=lambda value: -value)
    sys.settrace(None)
    assert seen
"""


def forever():
    while True:
        time.sleep(0.001)


def test_traced_code_runs_after_a_time_limit():
    # in a process of its own: what this guards against is an endless loop of the interpreter
    subprocess.run([sys.executable, "-c", AFTERWARDS], check=True)


def test_what_hangs_is_ended_and_what_ends_is_left_alone():
    with pytest.raises(TimedOut, match=r"after 0.05 s"), time_limit(0.05):
        forever()
    with time_limit(60.0):
        value = sum(range(1000))
    assert value == 499500
