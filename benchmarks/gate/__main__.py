"""`python -m benchmarks.gate`: what the code does, counted, beside the committed figures; `--renew` writes them anew.

Ends with status 1 where a figure rose by more than 2 %, or is missing or new. A group that cannot be counted here, and
one that was counted with other versions, says why, fails nothing, and is left as it is by `--renew` in the first case.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from benchmarks.gate.figures import (
    BASELINE,
    Change,
    Counted,
    Unavailable,
    changes,
    read,
    table,
    why_not_comparable,
    write,
)
from benchmarks.gate.groups import GROUPS


@dataclass(frozen=True)
class Config:
    """Count what the code does, and compare it with the committed figures."""

    groups: tuple[str, ...] = tuple(GROUPS)
    """Some of them."""
    renew: bool = False
    """Write the figures that were counted; the table shows what differs from those before."""
    file: Path = BASELINE
    """The committed figures."""


def _processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(config: Config) -> int:
    """Count, print, write if asked for; the status.

    Raises:
        ValueError: an unknown group, or a file that does not hold figures.
    """
    unknown = [name for name in config.groups if name not in GROUPS]
    if unknown:
        raise ValueError(f"groups: expected some of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    known = read(config.file) if config.file.is_file() else {}
    kept = {name: known[name] for name in GROUPS if name in known}
    found: list[Change] = []
    said: list[str] = []
    failed = False
    for name in tqdm(config.groups, unit="group"):
        was = known.get(name, Counted({}, {}))
        before = _processor_seconds()
        try:
            now = GROUPS[name]()
        except Unavailable as error:
            said.append(f"{name}: not counted: {error}")
            continue
        reason = why_not_comparable(was, now) if name in known else ""
        if reason:
            said.append(f"{name}: not compared: {reason}")
        differing = changes(name, was.figures, now.figures)
        failed |= not reason and any(change.fails for change in differing)
        found += differing
        kept[name] = now
        seconds = _processor_seconds() - before
        said.append(f"{name}: {len(now.figures)} figures, {seconds:.0f} s of processor time")
    print("\n".join(said))
    print(f"\n{table(found)}" if found else "\nno figure differs")
    if config.renew:
        write({name: kept[name] for name in GROUPS if name in kept}, config.file)
        print(f"written: {config.file}")
        return 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
