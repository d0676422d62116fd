"""What can go wrong for reasons that lie outside the program, each told in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """An argument, a data folder or a checkpoint is not what it should be; nothing has been written."""


class RunError(RuntimeError):
    """The environment does not allow the run: no such device, no network for a download, no space."""


class DivergedError(RunError):
    """The loss became NaN or infinite; training stopped at the step named."""


@contextmanager
def reading(option: str, path: Path | str) -> Iterator[None]:
    """Turn whatever the system says against looking at `path`, which `option` names, into one sentence.

    Raises:
        InputError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        place = shortened(error.filename or path)
        raise InputError(f"{option}: cannot read {place}: {error.strerror or error}") from error


def shortened(words: object) -> str:
    """At most 200 characters of a path or another error's words, for a message."""
    text = str(words)
    return text if len(text) <= 200 else f"{text[:200]}..."


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, at most 160 characters; or its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
