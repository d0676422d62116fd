"""The folder of a run: one process writes in it, and each of its files is whole at any moment."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastres.train.distributed import Group
from fastres.train.errors import InputError, RunError, first_line, shortened

LOCK = ".lock"
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""Names of the files that become others when they are whole."""

Rows = list[dict[str, Any]]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever the system or torch.save says against writing `path` into one sentence.

    Raises:
        RunError: the block raised an OSError, or a RuntimeError that is none of the trainer's own.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, RuntimeError) as error:
        raise RunError(f"cannot write {shortened(path)}: {_reason(error, path)}") from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move it over `path` when the block ends without an exception.

    Whatever was at `path` stays as it was if the block fails. The file is on the disk before it gets its name, and the
    name before this returns, so neither a kill nor a power failure leaves half of it.

    Raises:
        RunError: as `writing`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # as TEMPORARY has it
    with writing(path):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_json(path: Path, row: dict[str, Any]) -> None:
    """Add a JSON object as a line."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path, numbers: tuple[str, ...] = ("step",)) -> tuple[Rows, int]:
    """The JSON objects of a file of lines that have these numbers, among them "step"; none where there is no file.

    Returns:
        The rows in the order of their steps, a step that was written twice as it was written last; and how many lines
        are no such rows. A last line without its end, as a kill leaves it or a run at work has it, counts for nothing.
    """
    rows: dict[int, dict[str, Any]] = {}
    broken = 0
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not all(isinstance(row[name], (int, float)) for name in numbers):
                raise TypeError
            rows[int(row["step"])] = row
        except (ValueError, TypeError, KeyError, OverflowError):
            broken += number < len(lines)
    return [rows[step] for step in sorted(rows)], broken


def keep_rows(path: Path, last_step: int, *, cut_short: bool) -> int:
    """Drop the lines that a resumed run will write again: those after `last_step`.

    Args:
        cut_short: drop those of epochs cut short, too.
    Returns:
        How many lines are no rows, and were dropped too.
    """
    if not path.exists():
        return 0
    with writing(path):
        rows, broken = read_rows(path)
    kept = [row for row in rows if row["step"] <= last_step and (row.get("complete", True) or not cut_short)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return broken


def claim(directory: Path) -> FileLock:
    """Make the folder where it is missing, and keep every other process from writing in it, until release or exit.

    Raises:
        InputError: another process has claimed it.
        RunError: it cannot be made or written to.
    """
    lock = FileLock(directory / LOCK)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(f"output_dir: another process is training in {directory}") from error
        # Nobody else is at work here, so these are what a killed process left; others have names of other forms.
        for temporary in directory.glob(".*.tmp"):
            if TEMPORARY.fullmatch(temporary.name):
                temporary.unlink(missing_ok=True)
    return lock


@contextmanager
def claimed(directory: Path, group: Group) -> Iterator[None]:
    """`claim` a folder for a job, in its main process, until the end of the block.

    Raises:
        InputError, RunError: as `claim`, in every process.
    """
    with group.agreed():
        lock = claim(directory) if group.is_main else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems have no way to say so of a folder
            raise
    finally:
        os.close(descriptor)


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # torch.save has words of its own for a full disk.
    with suppress(OSError):
        if shutil.disk_usage(path.parent).free < 2**20:
            return "no space left on the disk"
    return first_line(error)
