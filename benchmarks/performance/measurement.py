"""Clocks and memory meters for one training step or one evaluation."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "alternating_seconds",
    "forget_peak",
    "in_own_process",
    "median_ratio",
    "peak_allocated",
    "peak_resident",
    "peak_resident_bytes",
    "processor_seconds",
    "resident_bytes",
]

Result = TypeVar("Result")
Step = Callable[[], Any]


def alternating_seconds(steps: Mapping[str, Step], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, run in turn: A B C A B C ..., after one round that is not counted.

    On the CPU these are seconds of processor time of this process, in which waiting for a core does
    not count; on a GPU, seconds between two synchronisations.
    """
    clock = time.process_time
    if torch.cuda.is_available():
        clock = _synchronized_clock
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: list[float], peer: list[float]) -> float:
    """Median over the rounds of one step's time over its peer's time in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, peer, strict=True))


def peak_allocated(step: Step) -> int:
    """Largest number of bytes that torch held at once during ``step``, beyond what it held before.

    On the CPU from the profiler's record of every allocation and release, exact to the byte and
    blind to what other libraries allocate (oneDNN's scratch memory); on a GPU from the allocator's
    own counter.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_resident(make: Callable[..., Step], *arguments: Any) -> int:
    """Largest growth of the resident memory during ``make(*arguments)()``, in bytes.

    In a process of its own, after one step that is not counted, with freed memory handed back to
    the system at once, so that nothing that was used before can be used again unseen. Linux only.
    """
    settings = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        return in_own_process(_resident, torch.get_num_threads(), make, arguments)
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, called in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    result = receiver.recv()
    child.join()
    return result


def resident_bytes() -> int:
    """Bytes of this process in memory. Linux only."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most bytes of this process in memory since ``forget_peak``. Linux only."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let ``peak_resident_bytes`` start again."""
    Path("/proc/self/clear_refs").write_text("5")


def processor_seconds(step: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of processor time of one call, and what it returned."""
    start = time.process_time()
    result = step()
    return time.process_time() - start, result


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def _resident(threads: int, make: Callable[..., Step], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(threads)
    step = make(*arguments)
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    forget_peak()
    before = resident_bytes()
    step()
    return peak_resident_bytes() - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"expected {key} in /proc/self/status; it is not there")


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
