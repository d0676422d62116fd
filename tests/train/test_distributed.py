import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastres.train.distributed import SINGLE, Group, start_group
from fastres.train.errors import InputError

CPU = torch.device("cpu")


def start(rank: int, size: int, port: int, work: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    group = start_group(CPU)
    results[rank] = work(group, *args)
    group.close()


def in_processes(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What work(group, *args) gives in each of `size` processes, by rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(start, (size, port, work, args, results), nprocs=size, start_method="fork")
        return [results[rank] for rank in range(size)]


# --- Group ---


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 60, 61])
def test_shares_are_those_of_tensor_split(size: int, count: int) -> None:
    things = torch.arange(count)
    for rank, part in enumerate(torch.tensor_split(things, size)):
        assert torch.equal(things[Group(rank, size).share(count)], part)


def test_one_process_needs_no_process_group() -> None:
    tensor = torch.ones(2)
    assert SINGLE.is_main
    assert SINGLE.any(True) and not SINGLE.any(False)
    assert SINGLE.sum(tensor) is tensor
    assert SINGLE.gather("a") == ["a"]
    assert SINGLE.broadcast("a") == "a"
    SINGLE.barrier()
    SINGLE.close()
    assert not dist.is_initialized()


def talk(group: Group) -> dict[str, Any]:
    tensor = torch.full((2,), group.rank + 1.0)
    return {
        "main": group.is_main,
        "again": start_group(CPU) == group,
        "any": [group.any(group.rank == 1), group.any(False)],
        "sum": group.sum(tensor).tolist(),
        "kept": tensor.tolist(),
        "gather": group.gather(f"from {group.rank}"),
        "broadcast": group.broadcast(f"from {group.rank}"),
        "barrier": group.barrier(),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_processes_tell_each_other(size: int) -> None:
    for rank, heard in enumerate(in_processes(size, talk)):
        assert heard == {
            "main": rank == 0,
            "again": True,
            "any": [True, False],
            "sum": [size * (size + 1) / 2] * 2,
            "kept": [rank + 1.0] * 2,
            "gather": [f"from {other}" for other in range(size)],
            "broadcast": "from 0",
            "barrier": None,
        }


def test_job_of_one_process_starts_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert start_group(CPU) is SINGLE
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert start_group(CPU) is SINGLE
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_RANK", "x")]
)
def test_wrong_environment_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, number in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", name: value}.items():
        monkeypatch.setenv(key, number)
    with pytest.raises(InputError, match=rf"^{name}: .*{value}"):
        start_group(CPU)
