"""The summary of `make gpu`: summary.json and summary.md, and the table on the console.

The standard library and rich only, as in stages.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.gpu import report
from benchmarks.gpu.stages import (
    FAILED,
    FILES,
    OK,
    RESULTS,
    SKIPPED,
    STOPPED,
    SUMMARY_JSON,
    SUMMARY_MD,
    Context,
    Outcome,
)
from benchmarks.records import write_text


def write_summary(context: Context, outcomes: Sequence[Outcome], started: str, seconds: float) -> None:
    """Write summary.json and summary.md."""
    folder = context.settings.output_dir
    data = {
        "rehearsal": not context.gpu,
        "machine": context.facts,
        "commit": records.commit(),
        "started": started,
        "seconds": round(seconds, 1),
        "deadline_s": context.settings.deadline_s,
        "stages": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    write_text(folder / SUMMARY_JSON, records.to_json(data))
    lines = [
        f"make gpu: {context.machine}; commit {data['commit'] or 'unknown'}, {started}, {seconds:.0f} s",
        "",
        "| stage | state | seconds | limit | what was seen |",
        records.row("---", "---", "---:", "---:", "---"),
    ]
    for outcome in outcomes:
        detail = outcome.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(
            records.row(outcome.name, outcome.state, f"{outcome.seconds:.1f}", f"{outcome.limit_s:.0f}", detail)
        )
    text = "\n".join(lines) + "\n"
    # Results are read as they are, also those of a run that was killed half-way.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        text += "\n" + report.markdown(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
    write_text(folder / SUMMARY_MD, text)


def show(outcomes: Sequence[Outcome], context: Context, console: Console) -> None:
    """The table at the end."""
    table = Table(title=f"make gpu: {context.machine}", title_justify="left")
    for name, justify in (("stage", "left"), ("state", "left"), ("seconds", "right"), ("what was seen", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    colours = {OK: "green", FAILED: "red", STOPPED: "red", SKIPPED: "yellow"}
    for outcome in outcomes:
        detail = outcome.detail.replace("[", r"\[")
        state = f"[{colours[outcome.state]}]{outcome.state}[/]"
        table.add_row(outcome.name, state, f"{outcome.seconds:.1f}", detail if len(detail) < 300 else detail[:300])
    console.print(table)
    files = [name for name in FILES if (context.settings.output_dir / name).is_file()]
    console.print(f"{context.settings.output_dir}: {', '.join(files)}", highlight=False, markup=False)
