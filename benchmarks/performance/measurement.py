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
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["alternating_seconds", "median_ratio", "peak_allocated", "peak_resident"]

Step = Callable[[], Any]


def alternating_seconds(steps: Mapping[str, Step], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, run in turn: A B C A B C ..., after one round that is not counted.

    On the CPU these are seconds of processor time of this process, in which waiting for a core does
    not count; on a GPU, seconds between two synchronisations.
    """
    clock = _synchronized_clock if torch.cuda.is_available() else time.process_time
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
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident(make: Callable[..., Step], *arguments: Any) -> int:
    """Growth of the process's resident memory during ``make(*arguments)()``, in bytes, at its largest.

    In a process of its own, after one step that is not counted, with freed memory handed back to
    the system at once, so that nothing that was used before can be used again unseen. Linux only.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    settings = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        child = context.Process(
            target=_resident, args=(sender, torch.get_num_threads(), make, arguments)
        )
        child.start()
        sender.close()
        peak = receiver.recv()
        child.join()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    return peak


def _resident(
    sender: Any, threads: int, make: Callable[..., Step], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    step = make(*arguments)
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    step()
    sender.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
