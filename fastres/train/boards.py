"""TensorBoard's view of a run, where TensorBoard is installed; elsewhere nothing happens."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
TAGS = {
    # a row of steps.jsonl
    "loss": "loss/step",
    # a row of metrics.jsonl
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "train_accuracy": "accuracy/train",
    "test_accuracy": "accuracy/test",
    "lr": "lr",
    "images_per_second": "images_per_second",
}
"""Figure of a row -> name of its curve."""


class Board:
    """Takes each row of metrics.jsonl and steps.jsonl, and writes its figures for TensorBoard.

    A board that cannot be written says so once, and takes no more rows: it never ends a run.
    """

    def __init__(self, directory: Path, last_step: int = 0, *, notify: Callable[[str], None] = print) -> None:
        """
        Args:
            directory: folder of the run; the events go into its folder `tensorboard`.
            last_step: the step from which the run goes on. What an earlier sitting wrote of later steps is purged, as
                TensorBoard does on reading.
            notify: takes the line that says what went wrong.
        """
        self._writer: Any = None
        self._notify = notify
        try:
            # Takes a second and more, which `import fastres.train` need not wait for.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._try(lambda: self._open(SummaryWriter, directory / FOLDER, last_step))

    def _open(self, writer: Any, folder: Path, last_step: int) -> None:
        self._writer = writer(str(folder), purge_step=last_step + 1)

    @property
    def live(self) -> bool:
        """Whether rows are written."""
        return self._writer is not None

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the figures of a row that TAGS names, at the row's step."""
        if self._writer is not None:
            self._try(lambda: self._write(row))

    def _write(self, row: Mapping[str, Any]) -> None:
        for name, tag in TAGS.items():
            if row.get(name) is not None:
                self._writer.add_scalar(tag, row[name], row["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # the writer's thread hands on whatever the disk said
            self._writer = None
            self._notify(f"TensorBoard: no longer written, {type(error).__name__}: {error}")
