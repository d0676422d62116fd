"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (a terminal that goes away), which let a run finish its step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastres.train.distributed import Group


class Stop:
    """Whether a signal has asked for the end, in this process or in another of the job.

    A signal reaches the processes at different moments, or one of them only. So `asked`, what has come here, decides
    nothing by itself; `by` is what the processes have agreed on.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.asked: signal.Signals | None = None
        self.by: str | None = None  # name of the signal; of several, SIGTERM

    def anywhere(self) -> bool:
        """Agree on whether a signal came to any process. All must call this, in the order of their collectives."""
        if self.by is None:
            number = self.group.largest(self.asked or 0)
            self.by = signal.Signals(number).name if number else None
        return self.by is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let the signals set `asked` inside the block; in a single process a second one ends it at once.

        SIGHUP stays ignored where it is, as under nohup.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        hangup = getattr(signal, "SIGHUP", None)  # which Windows lacks
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            previous[hangup] = signal.getsignal(hangup)

        def stop(number: int, frame: Any) -> None:
            self.asked = signal.Signals(number)
            # torchrun passes a Ctrl-C on to processes that the terminal has told already.
            if self.group.size == 1:
                for each in previous:
                    signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

        for number in previous:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
