"""Python blocks of Markdown pages: where they begin, what they need, what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
#: an optional comment that names libraries, then a block that runs; ```py marks one that does not
BLOCK = re.compile(r"(?:<!-- needs: ([\w, ]+) -->\n)?```python\n(.*?)```", flags=re.DOTALL)


class Block(NamedTuple):
    """One block of a page."""

    line: int
    needs: tuple[str, ...]
    code: str

    @property
    def file(self) -> str:
        """The file that the block shows, from its first line; "" if it shows none."""
        named = re.match(r"# ([\w/]+\.py)\n", self.code)
        return named.group(1) if named else ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        needs = tuple(re.findall(r"\w+", match.group(1) or ""))
        found.append(Block(line, needs, match.group(2)))
    return found


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page in docs/."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
