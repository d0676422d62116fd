"""The gate's figures: groups of them with the versions that they depend on, the committed file, what has changed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import records
from benchmarks.records import PUBLISHED, row

BASELINE = PUBLISHED / "gate.json"
ALLOWED = 0.02
"""How much a figure may rise, as a share of what it was. One that was 0 may not rise at all."""
RENEW = "python -m benchmarks.gate --renew"


class Unavailable(RuntimeError):
    """Why a group cannot be counted here; the message is for the user."""


@dataclass(frozen=True)
class Counted:
    """A group's figures by name, less is better, and the versions without which they would be others."""

    versions: dict[str, str]
    figures: dict[str, int]


@dataclass(frozen=True)
class Change:
    """A figure that is not what it was; None: it is not there."""

    group: str
    name: str
    was: int | None
    now: int | None

    @property
    def ratio(self) -> float:
        """Of what it is to what it was; not a number where one of them is missing."""
        if self.was is None or self.now is None:
            return math.nan
        return self.now / self.was if self.was else math.inf

    @property
    def fails(self) -> bool:
        """Whether the gate lets it not pass: it rose by more than `ALLOWED`, or is missing or new."""
        return not self.ratio <= 1 + ALLOWED

    def __str__(self) -> str:
        was, now = ("missing" if value is None else str(value) for value in (self.was, self.now))
        share = "" if not math.isfinite(self.ratio) else f" ({100 * (self.ratio - 1):+.1f} %)"
        return f"{self.group}, {self.name}: was {was}, is {now}{share}"


def changes(group: str, was: Mapping[str, int], now: Mapping[str, int]) -> list[Change]:
    """Every figure of a group that differs, in the order of the names as they are now, gone ones last."""
    names = dict.fromkeys((*now, *was))
    return [Change(group, name, was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)]


def why_not_comparable(was: Counted, now: Counted) -> str:
    """Which versions differ; "" where the figures can be compared."""
    different = [name for name in dict.fromkeys((*was.versions, *now.versions))
                 if was.versions.get(name) != now.versions.get(name)]  # fmt: skip
    return "; ".join(
        f"{name}: counted with {was.versions.get(name, 'none')}, here is {now.versions.get(name, 'none')}"
        for name in different
    )


def check(group: str, was: Counted, now: Counted) -> None:
    """Let a group pass, or not.

    Raises:
        AssertionError: figures that rose, or are missing or new; the message has a line for each.
        Unavailable: other versions than those of the baseline.
    """
    reason = why_not_comparable(was, now)
    if reason:
        raise Unavailable(reason)
    failed = [str(change) for change in changes(group, was.figures, now.figures) if change.fails]
    if failed:
        allowed = f"at most {100 * ALLOWED:.0f} % more than {BASELINE.name} says, and no figure missing or new"
        raise AssertionError("\n  ".join([f"expected {allowed}; where it is meant so, `{RENEW}`. Got", *failed]))


def table(found: Iterable[Change]) -> str:
    """The changes as rows of Markdown; failing ones in bold."""
    lines = [row("group", "figure", "was", "is", ""), row("---", "---", "---:", "---:", "---:")]
    for change in found:
        was, now = ("missing" if value is None else str(value) for value in (change.was, change.now))
        share = f"{100 * (change.ratio - 1):+.1f} %" if math.isfinite(change.ratio) else "from 0"
        share = "new" if change.was is None else "gone" if change.now is None else share
        lines.append(row(change.group, change.name, was, now, f"**{share}**" if change.fails else share))
    return "\n".join(lines) + "\n"


def read(path: Path = BASELINE) -> dict[str, Counted]:
    """The groups of a file that `write` wrote, by name.

    Raises:
        ValueError: the file is not one of those.
    """
    try:
        return {name: Counted(**group) for name, group in json.loads(path.read_text(encoding="utf-8")).items()}
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected the gate's figures, as `{RENEW}` writes them; {error}") from error


def write(groups: Mapping[str, Counted], path: Path = BASELINE) -> None:
    """Write the file whole or not at all."""
    records.write_text(path, records.to_json({name: dataclasses.asdict(group) for name, group in groups.items()}))
