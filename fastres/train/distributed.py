"""The processes of one training job: who they are, what they tell each other, and who reports when one fails.

torchrun starts the processes and names each in its environment. A job of one process never touches torch.distributed.
"""

import gc
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
DEATH_SECONDS = 2.0
"""How long a process may take from closing its connections to being gone."""
PATIENCE_SECONDS = 10.0
"""How long a process that cannot begin leaves it to the first one to say why."""
LINGER_SECONDS = 0.1
"""How long a process stays after leaving its group, for threads that the group's end does not wait for."""


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
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

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

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let an InputError or RunError of one process inside the block be raised by all, so that none waits in vain.

        Nothing inside the block may communicate. The message names the ranks unless the error is everybody's.
        """
        found: InputError | RunError | None = None
        try:
            yield
        except (InputError, RunError) as error:
            found = error
        errors = self.gather(None if found is None else (type(found), str(found)))
        if found is not None and all(error == errors[0] for error in errors):
            raise found
        for kind, text in dict.fromkeys(error for error in errors if error is not None):
            ranks = [str(rank) for rank, error in enumerate(errors) if error == (kind, text)]
            raise kind(f"{text} (rank {', '.join(ranks)} of {self.size} processes)") from found


SINGLE = Group()


class _Job:
    """What `start_group` found out, for the report of a failure: the job's store, and where each process runs."""

    group = SINGLE
    store: Any = None  # torch.distributed.Store
    processes: tuple[tuple[str, int], ...] = ()  # host and process number, by rank


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
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        store = PrefixStore(_meet(store, rank, size), store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {rank} of {size} cannot reach the others: {error}") from error
    group = Group(rank, size, local_rank)
    _Job.group, _Job.store = group, store
    _Job.processes = tuple(group.gather((socket.gethostname(), os.getpid())))
    return group


def leave_group() -> None:
    """Leave the process group that `start_group` made; without one nothing happens. No collective may be under way.

    A thread of gloo's that puts down the tensors of the last collective while the interpreter ends aborts the process
    (https://github.com/pytorch/pytorch/issues/190489). A group that nothing else holds waits for its threads.
    """
    if _Job.store is None or not dist.is_initialized():
        return
    gc.collect()  # the network's replica holds the group, in a cycle
    dist.destroy_process_group()
    _Job.group, _Job.store, _Job.processes = SINGLE, None, ()
    time.sleep(LINGER_SECONDS)  # DTensor's caches hold the group of FSDP's shards for good


def rank_device(device: torch.device, group: Group) -> torch.device:
    """The device of this process: with several on CUDA a GPU each, by local rank.

    Raises:
        InputError: one GPU is named for all.
        RunError: there are fewer GPUs than processes on this machine.
    """
    if group.size == 1 or device.type != "cuda":
        return device
    if device != torch.device("cuda"):
        raise InputError(f"device: each process takes a GPU of its own, expected auto or cuda, got {device}")
    if group.local_rank >= torch.cuda.device_count():
        raise RunError(
            f"device: cuda:{group.local_rank} is not there for local rank {group.local_rank}, "
            f"{torch.cuda.device_count()} CUDA devices are available"
        )
    torch.cuda.set_device(group.local_rank)
    return torch.device("cuda", group.local_rank)


def restarts_left() -> bool:
    """Whether torchrun would start the job again after a failure."""
    return _number("TORCHELASTIC_MAX_RESTARTS", 0, low=0) > _number("TORCHELASTIC_RESTART_COUNT", 0, low=0)


def was_restarted() -> bool:
    """Whether torchrun has started this job again after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, low=0) > 0


def recorded(main: Callable[[], int]) -> Callable[[], int | None]:
    """`main` with its exceptions written where torchrun's summary of a failure looks for them; itself elsewhere."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def report_failure(program: str, error: BaseException) -> None:
    """Say on standard error why the run ends, in one line for the whole job, and tell torchrun's summary.

    The processes of a job fail one after the other, each because of the one before. The first to come here speaks.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    group = _Job.group
    if group.size == 1:
        if os.environ.get("RANK", "0") != "0":
            # All read the same arguments, and the first says what is wrong with them; torchrun ends the others then. An
            # end before that would be the first's as well.
            time.sleep(PATIENCE_SECONDS)
        first = True
    else:
        try:
            first = _Job.store.add("failures", 1) == 1
        except RuntimeError:  # the process that keeps the store is gone
            first = True
    if first:
        label = "" if group.size == 1 else f"rank {group.rank} of {group.size}: "
        print(f"{program}: error: {label}{error}", file=sys.stderr, flush=True)


def lost_peer(error: BaseException) -> RunError | None:
    """What an error means that came out of a collective: which process is gone. None where that is not its cause."""
    if _Job.group.size == 1 or not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return None
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    network = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "TCPStore"))
    deadline = time.monotonic() + (DEATH_SECONDS if network else 0.0)
    while True:
        gone = [
            f"rank {rank} (process {number})"
            for rank, (host, number) in enumerate(_Job.processes)
            if host == socket.gethostname() and rank != _Job.group.rank and not _is_alive(number)
        ]
        if gone:
            return RunError(f"{' and '.join(gone)} of {_Job.group.size} has died, the job ends")
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    if not network:
        return None
    return RunError(f"the connection to another rank is lost, the job ends: {reason}")


def _meet(store: Any, rank: int, size: int) -> str:
    """A word that the living processes of the job agree on, and no earlier ones.

    torchrun keeps one store for all its restarts. Without a prefix of its own, a restarted process group finds the
    addresses of the one before in there, and connects to processes that are gone. The restart's number is no such
    prefix: torchrun's agents on several machines count differently.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        store.wait([f"welcome/{mine}"], TIMEOUT)
        word: str = store.get(f"welcome/{mine}").decode()
        store.set(f"here/{word}/{rank}", "")
        return word
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    missing, answered = set(range(1, size)), set()
    while missing:
        # A hello may be one of an earlier process, which will not come; then the new one's replaces it.
        for other in missing:
            hello = store.get(f"hello/{other}").decode() if store.check([f"hello/{other}"]) else None
            if hello is not None and hello not in answered:
                answered.add(hello)
                store.set(f"welcome/{hello}", mine)
        missing = {other for other in missing if not store.check([f"here/{mine}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(missing)} did not come within {TIMEOUT}")
        time.sleep(0.01)
    return mine


def _is_alive(process: int) -> bool:
    """Whether a process of this machine runs; one that has ended and was not yet waited for does not."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (ProcessLookupError, FileNotFoundError):
        return not os.path.isdir("/proc/self")
    except OSError:
        return True


def _number(name: str, default: int, *, low: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < low:
        raise InputError(f"{name}: expected a number at least {low}, as torchrun sets it, got {text!r}")
    return int(text)
