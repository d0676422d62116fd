"""How figures are written down: numbers and rows of Markdown tables, JSON, the commit that was measured.

Standard library only: benchmarks/gpu/summary.py reads results where nothing of ours is installed yet.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs" / "results"


def row(*cells: str) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def number(value: float, unit: str = "") -> str:
    """Three digits; nothing where there is no value."""
    if value != value:
        return ""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"


def slug(text: str) -> str:
    """Text as part of a file's name: lower-case letters and digits with dashes between."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", text.lower())).strip("-")


def to_json(data: Any) -> str:
    """JSON with a list of figures on one line."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def commit() -> str:
    """The commit that was measured, marked where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    `fastres.train.folder.write_text` does the same, but importing it takes torch and all that training needs.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def insert_table(file: Path, text: str, name: str = "results") -> bool:
    """Put text between the lines `<!-- name -->` and `<!-- /name -->` of a file.

    False, and nothing written, where it lacks them.
    """
    if not file.is_file():
        return False
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, start, rest = file.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        return False
    write_text(file, f"{before}{start}\n{text}{end}{after}")
    return True
