"""What a run has written so far, read back for pictures and pages: configuration, epochs, steps, outcome."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.train.errors import InputError, reading
from fastres.train.folder import Rows, read_rows


@dataclass(frozen=True)
class History:
    """The files of a run. A run at work, or one that was killed, has no summary, and maybe a last line cut short."""

    directory: Path
    config: dict[str, Any]  # empty where there is no config.json
    metrics: Rows  # a row an evaluated epoch, in the order of the epochs
    steps: Rows  # a row a step
    summary: dict[str, Any]  # empty before the run has ended
    broken: int  # lines that could not be read, but for a last one cut short

    @property
    def steps_per_epoch(self) -> float:
        """Steps an epoch, from the last whole epoch; before there is one, the longest epoch so far."""
        whole = [row for row in self.metrics if row.get("complete", True)]
        if whole:
            return float(max(whole[-1]["step"] / max(whole[-1]["epoch"], 1), 1.0))
        counts: dict[int, int] = {}
        for row in self.steps:
            counts[row["epoch"]] = counts.get(row["epoch"], 0) + 1
        return float(max(counts.values(), default=1))

    def epochs(self) -> list[float]:
        """Where each row of `metrics` lies on an axis of epochs; an epoch cut short lies where it was cut."""
        return [row["step"] / self.steps_per_epoch for row in self.metrics]

    def series(self, name: str) -> list[float]:
        """One figure of each epoch, NaN where it is missing."""
        return [math.nan if row.get(name) is None else float(row[name]) for row in self.metrics]


def read_history(directory: Path) -> History:
    """Read the files of a run, of which any but one of config.json and metrics.jsonl may be missing.

    Lines that are broken, or no records of this trainer, are left out and counted.

    Raises:
        InputError: no such folder, it holds no run, or a file of it cannot be read.
    """
    with reading("run", directory):
        if not directory.is_dir():
            raise InputError(f"run: no such folder: {directory}")
        if not any((directory / name).is_file() for name in ("config.json", "metrics.jsonl")):
            raise InputError(f"run: {directory} holds neither config.json nor metrics.jsonl, so it is no run's folder")
        metrics, lost_metrics = read_rows(directory / "metrics.jsonl", ("epoch", "step"))
        steps, lost_steps = read_rows(directory / "steps.jsonl", ("epoch", "step", "loss"))
    return History(
        directory,
        _read_object(directory / "config.json"),
        metrics,
        steps,
        _read_object(directory / "summary.json"),
        lost_metrics + lost_steps,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
