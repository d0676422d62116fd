"""`python -m fastres.train` with a tiny network and few images, for torchrun; one process may be told to fail.

FAIL=rank:step:how, how being killed, broken (an InputError), raised (an exception that nobody expects), or a signal's
name, which comes to this process alone, or with a * to torchrun, which passes it on to all. A job that torchrun has
restarted does not fail again.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres import models
from fastres.train import __main__ as command
from fastres.train import prepare
from fastres.train.distributed import recorded
from fastres.train.engine import Engine
from fastres.train.errors import InputError
from tests.train.conftest import TinyNet, make_data

TINY_DROPOUT = 0.2
train_step = Engine.train_step


def fail_or_train(engine: Engine, *step_arguments: Any) -> Tensor:
    rank, step, how = os.environ.get("FAIL", "-1:0:").split(":")
    engine.taken = getattr(engine, "taken", 0) + 1
    if engine.group.rank == int(rank) and engine.taken == int(step) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how.startswith("SIG"):
            send(how)
            return train_step(engine, *step_arguments)
        raise InputError("data_dir: broken image cat.png") if how == "broken" else ZeroDivisionError("by zero")
    return train_step(engine, *step_arguments)


def send(name: str) -> None:
    """Send a signal, and wait until it has come back here."""
    arrived, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    os.kill(os.getppid() if name.endswith("*") else os.getpid(), signal.Signals[name.rstrip("*")])
    assert select.select([arrived], [], [], 60)[0]
    signal.set_wakeup_fd(-1)


def create(name: str, *, num_classes: int, **options: Any) -> TinyNet:
    return TinyNet(num_classes, TINY_DROPOUT, "cifar")


def names_of_threads() -> Iterator[str]:
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            yield file.read_text().strip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    models.create = create
    prepare.load_data = lambda *args, **options: make_data()
    Engine.train_step = fail_or_train
    status = recorded(command.main)()
    names = list(names_of_threads())
    assert os.environ.get("FAIL") or "--fsdp" in sys.argv or "pt_gloo_runloop" not in names, names
    sys.exit(status)
