"""Standard output that does not take what is printed: a reader that is gone, a full disk, a name in no encoding."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console


class Terminal(Console):
    """Standard output of a run, which goes on without it from where it can no longer be written.

    A run may take days, and the terminal, the pipe or the log that it prints to does not always last as long. What it
    prints is in its files as well.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, but that no OSError comes out."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            self._give_up(error)

    def on_broken_pipe(self) -> None:
        """What rich calls where nobody reads any longer; its own ends the process."""
        self._give_up(BrokenPipeError("nobody reads it"))

    def _give_up(self, error: OSError) -> None:
        self.quiet = True
        discard_output()
        with suppress(OSError, ValueError):
            reason = error.strerror or error
            print(f"standard output cannot be written ({reason}); the run goes on without", file=sys.stderr)


def discard_output() -> None:
    """Let what is still to come on standard output go nowhere, and what its buffer holds, so that it fails but once."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def escape_output() -> None:
    """Let standard output escape what its encoding lacks, such as file names that are no UTF-8, where it would fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
