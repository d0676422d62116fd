"""An extension of griffe, which reads docstrings for the site: `a, b: words` in a section is an entry for each name.

Our docstrings say once what holds for several arguments; griffe expects one name an entry.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: .*)?\n)*?(?=^\S|\Z)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+(?:, \w+)+): (.*\n(?: {8}.*\n)*)", re.MULTILINE)


def split_entries(text: str) -> str:
    """The docstring with an entry for each name."""

    def single(entry: re.Match[str]) -> str:
        return "".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))

    return SECTION.sub(lambda section: ENTRY.sub(single, section[0]), text + "\n").removesuffix("\n")


class OneNameAnEntry(griffe.Extension):
    """See the module."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)
