"""python -m tests.train.kills FOLDER KILLS SEED: train in FOLDER, killed KILLS times at random moments.

The same command is given again after each kill. Beside it FOLDER-whole is trained, which nobody disturbs. Processes are
forked, so that each starts at once.
"""

import io
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fastres.train import ImageData, TrainConfig, train
from fastres.train.checkpoint import AUTO
from tests.train.conftest import TinyNet, make_data

SECONDS = 0.02
"""How long a step takes at least."""


def slow_network(config: TrainConfig, classes: int) -> nn.Module:
    """A tiny network with dropout, whose steps can be killed."""
    network = TinyNet(classes, 0.3, "cifar")
    network.register_forward_pre_hook(lambda module, inputs: time.sleep(SECONDS))
    return network


def run(folder: Path, data: ImageData) -> None:
    """The command that is given again and again."""
    config = TrainConfig(
        device="cpu", batch_size=8, epochs=3, optimizer="adam", output_dir=folder, resume=AUTO, save_minutes=1e-4,
        mixup=0.2, cutmix=1.0, randaugment=(2, 9), random_erasing=0.5, reuse_memory=False, report=False, threads=1,
    )  # fmt: skip
    train(config, data=data, make_model=slow_network, console=Console(file=io.StringIO()))


def attempt(folder: Path, data: ImageData) -> int:
    """The process of one run."""
    process = os.fork()
    if process:
        return process
    try:
        run(folder, data)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def wait(process: int, seconds: float) -> int | None:
    """The exit status of a process, or None where it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    random.seed(seed)
    data = make_data()
    started = time.monotonic()
    assert wait(attempt(folder.with_name(folder.name + "-whole"), data), 120) == 0
    whole = time.monotonic() - started
    for done in range(kills + 1):
        process = attempt(folder, data)
        status = wait(process, 120 if done == kills else random.uniform(0, 0.9 * whole / kills))
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        else:
            assert status == 0 and done == kills, f"exit status {status} after {done} kills"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
