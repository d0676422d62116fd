"""`python -m fastres.train` with a tiny network and few images, for torchrun; one process may be told to fail.

FAIL=rank:step:how, how being killed, broken (an InputError) or raised (an exception that nobody expects). A job that
torchrun has restarted does not fail again.
"""

import os
import signal
import sys
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
        raise InputError("data_dir: broken image cat.png") if how == "broken" else ZeroDivisionError("by zero")
    return train_step(engine, *step_arguments)


def create(name: str, *, num_classes: int, **options: Any) -> TinyNet:
    return TinyNet(num_classes, TINY_DROPOUT, "cifar")


if __name__ == "__main__":
    torch.set_num_threads(1)
    models.create = create
    prepare.load_data = lambda *args, **options: make_data()
    Engine.train_step = fail_or_train
    sys.exit(recorded(command.main)())
