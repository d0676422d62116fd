"""The pages of the documents and the code that stands in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(<!-- [^\n]* -->\n)?```([\w+-]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.MULTILINE)
MARK = re.compile(r"<!-- (needs|not run:) (.+) -->\n")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block of code.

    Attributes:
        line: number of its first line in the page.
        needs: the module without which it does not run: `<!-- needs MODULE -->` on the line before it.
        why_not: why it is compiled and not run: `<!-- not run: REASON -->` on the line before it.
    """

    page: Path
    line: int
    language: str
    text: str
    needs: str | None
    why_not: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in some languages, in their order.

    Files of examples/ that a page shows are no such blocks: they have a test of their own.
    """
    text = page.read_text(encoding="utf-8")
    found = []
    for block in FENCE.finditer(text):
        mark = MARK.fullmatch(block[1] or "")
        needs, why_not = (mark[2] if mark and mark[1] == kind else None for kind in ("needs", "not run:"))
        if block[2] in languages:
            found.append(Block(page, text.count("\n", 0, block.start(3)) + 1, block[2], block[3], needs, why_not))
    return found


def snippets(page: Path) -> list[str]:
    """The files that a page shows, from the repository's root."""
    return SNIPPET.findall(page.read_text(encoding="utf-8"))
