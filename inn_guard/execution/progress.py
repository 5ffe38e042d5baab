"""Progress bars that leave no thread behind."""

from __future__ import annotations

from tqdm.auto import tqdm

__all__ = ["ProgressBar"]


class ProgressBar(tqdm):
    """tqdm without the thread that it otherwise starts, and keeps, for bars that stand still."""

    monitor_interval = 0
