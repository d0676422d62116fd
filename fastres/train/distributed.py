"""The processes of one training job: who they are, and the few things that they tell each other.

torchrun starts the processes and names each in its environment. A job of one process never touches torch.distributed.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastres.train.errors import InputError, RunError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others: longer than the slowest evaluation or download, which one does for all."""


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one of them. With one process every method is free of torch.distributed.

    All processes must call a method that communicates, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` things by torch.tensor_split's rule: contiguous, the first ones longer."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one process or more."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, of one shape, dtype and kind of device. The argument stays as it is."""
        if self.size == 1:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in every process. What can be pickled can be sent."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        # dist.barrier chooses a device of its own, and with NCCL would make a context on it.
        self.any(False)

    def close(self) -> None:
        """Leave the process group that `start_group` made."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


SINGLE = Group()


def start_group(device: torch.device) -> Group:
    """Join the job that torchrun started, or a process group that is there already; SINGLE without either.

    Args:
        device: a CUDA device adds NCCL to gloo, which carries whatever lies on the CPU.

    Raises:
        InputError: the environment names a rank without the job, or numbers that do not fit each other.
        RunError: the others cannot be reached.
    """
    size = _number("WORLD_SIZE", 1, low=1)
    rank = _number("RANK", 0, low=0)
    local_rank = _number("LOCAL_RANK", rank, low=0)
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size(), _number("LOCAL_RANK", dist.get_rank(), low=0))
    if size == 1:
        return SINGLE
    if not dist.is_available():
        raise RunError(f"WORLD_SIZE: {size} processes need a PyTorch with torch.distributed, this one has none")
    if rank >= size:
        raise InputError(f"RANK: expected a number below WORLD_SIZE = {size}, got {rank}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} of {size} cannot reach the others: {error}") from error
    return Group(rank, size, local_rank)


def _number(name: str, default: int, *, low: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < low:
        raise InputError(f"{name}: expected a number at least {low}, as torchrun sets it, got {text!r}")
    return int(text)
