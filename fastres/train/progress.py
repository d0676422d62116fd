"""The progress line of a terminal: loss, accuracy, images a second, the time left. In a log file there is none."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """A line that is redrawn in place where `file` is a terminal, and nothing at all elsewhere.

    The time left is that of the images of this sitting, evaluations and checkpoints included, for those that are still
    to come; the first report, in which kernels are built and memory is laid out, does not count.
    """

    def __init__(
        self, total: int, done: int = 0, *, file: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """
        Args:
            total: training images of the whole run.
            done: how many of them came before this sitting.
            file: where the line goes, standard error by default.
        """
        self._file = sys.stderr if file is None else file
        self._total, self._done, self._clock = total, done, clock
        self._first: tuple[int, float] | None = None  # images and time at the end of the first report
        self._bar: Any = tqdm(
            total=total, initial=done, file=self._file, disable=None, mininterval=0.2, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:20}|{postfix}",
        )  # fmt: skip

    @property
    def shown(self) -> bool:
        """Whether there is a line."""
        return not self._bar.disable

    def epoch(self, number: int, epochs: int) -> None:
        """Epoch `number` of `epochs` begins."""
        self._bar.set_description_str(f"epoch {number}/{epochs}", refresh=False)

    def update(self, images: int, *, loss: float, accuracy: float, rate: float) -> None:
        """`images` more have been trained on.

        Args:
            loss: of the last batch.
            accuracy: share of the epoch's images so far.
            rate: images a second of late.
        """
        self._done += images
        if self._first is None:
            self._first = self._done, self._clock()
        words = [f"loss {loss:.4f}", f"accuracy {accuracy:.2%}", f"{rate:,.0f} images/s"]
        left = self.seconds_left()
        if left is not None:
            words.append(f"{duration(left)} left")
        # tqdm sets a comma before a postfix only in its own format.
        self._bar.postfix = " " + "  ".join(words)
        self._bar.update(images)

    def seconds_left(self) -> float | None:
        """The time to the end, None before the second report."""
        if self._first is None:
            return None
        images, since = self._first
        if self._done <= images:
            return None
        return (self._total - self._done) * (self._clock() - since) / (self._done - images)

    def clear(self) -> None:
        """Take the line away, before something is printed in its place; the next `update` draws it again."""
        self._bar.clear()

    def close(self) -> None:
        """Leave the line as it is, and go on below it."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as people write them: 42 s, 3:07 min, 5:02 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
