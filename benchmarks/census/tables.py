"""Tables in Markdown, and numbers as they are written in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["heading", "line", "number", "text"]


def number(value: float) -> str:
    """Two digits.

    >>> number(0.00071234), number(12.3), number(7), number(float("inf"))
    ('0.00071', '12', '7', 'inf')
    """
    return f"{value:.2g}"


def text(value: Any) -> str:
    """A cell: whole numbers as they are, "" for what was not measured.

    >>> text(3.0), text(0.01234), text(float("nan")), text("fit")
    ('3', '0.012', '', 'fit')
    """
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 1e6 else number(value)
    return str(value)


def line(cells: Iterable[Any]) -> str:
    """One line of a table.

    >>> line(["a", 1])
    '| a | 1 |'
    """
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def heading(names: Iterable[str]) -> list[str]:
    """The first two lines of a table.

    >>> heading(["a", "b"])
    ['| a | b |', '| --- | --- |']
    """
    names = list(names)
    return [line(names), line(["---"] * len(names))]
