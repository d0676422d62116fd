"""The runner of processes: results in the order of ranks, and failures that say what happened."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import run_processes


def ranks_of_all(rank: int, added: int) -> list[int]:
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([rank + added]))
    return [int(t) for t in found] + [torch.get_num_threads()]


def one_fails(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def one_hangs(rank: int) -> None:
    if rank == 0:
        time.sleep(60)


def test_every_rank_brings_back_its_result():
    assert run_processes(ranks_of_all, 3, 10) == [[10, 11, 12, 1]] * 3


def test_a_failed_rank_is_the_failure_with_its_traceback():
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed:.*in one_fails.*ValueError: rank 1 has had enough"):
        run_processes(one_fails, 2)
    assert time.monotonic() - begin < 60


def test_a_hung_rank_says_where_it_stands():
    with pytest.raises(AssertionError, match=r"(?s)rank 0 failed:.*in one_hangs"):
        run_processes(one_hangs, 2, timeout=15)
