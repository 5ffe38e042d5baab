"""The site's extension of griffe: doctests in a docstring become its section Examples."""

from __future__ import annotations

import re
from typing import Any

import griffe

#: where a section begins that stands after the doctests
SECTION = re.compile(r"\n+(?=(?:Args|Attributes|Returns|Yields|Raises|References):\n)")


class Doctests(griffe.Extension):
    """Gives doctests the heading without which they would be read as prose."""

    def on_instance(self, *, obj: griffe.Object, **settings: Any) -> None:
        """Change the docstring of one object, before it is parsed."""
        if obj.docstring is None:
            return
        text, prompt, rest = obj.docstring.value.partition("\n>>> ")
        if prompt:
            examples, *sections = SECTION.split(f">>> {rest}")
            lines = [f"    {line}".rstrip() for line in examples.rstrip().splitlines()]
            parts = [text.rstrip(), *sections, "\n".join(["Examples:", *lines])]
            obj.docstring.value = "\n\n".join(parts)
