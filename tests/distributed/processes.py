"""Runs a function in several real processes that form a process group, and brings back what each returned."""

from __future__ import annotations

import faulthandler
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0
"""Seconds until a run counts as hung; the start alone, which imports torch, takes several on a busy machine."""

GRACE = 1.0
"""Seconds that the others have, once a rank has failed, to say why they do, too."""


def run_processes(work: Callable[..., Any], count: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """work(rank, *args) in `count` processes of one gloo group, a thread each.

    Args:
        work: a function at the top of an importable module. It may return whatever torch.save takes.
        timeout: seconds. A process that takes longer says where it stands, in the failure's message.
    Returns:
        What each rank returned, in their order.
    Raises:
        AssertionError: a rank failed, with its traceback; the other ranks are stopped at once.
    """
    # Forked from one that has imported torch and the test, and has no threads: a start takes no time, and is safe.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", work.__module__])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [server.Process(target=_run, args=(rank, count, name, timeout, work, args)) for rank in range(count)]
        for process in ranks:
            process.start()
        try:
            failed = _wait(ranks, time.monotonic() + timeout + 10)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        if failed:
            said = {rank: "".join(f.read_text() for f in sorted(folder.glob(f"error{rank}*"))) for rank in failed}
            raise AssertionError("\n".join(f"rank {rank} failed:\n{text or 'no word'}" for rank, text in said.items()))
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(count)]


def _wait(ranks: list[Any], until: float) -> list[int]:
    """The ranks that failed first, with those that follow them at once, or that were not done in time."""
    while True:
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (0, None)]
        running = [rank for rank, process in enumerate(ranks) if process.exitcode is None]
        if failed and running and until > time.monotonic() + GRACE:
            until = time.monotonic() + GRACE
        if not running or time.monotonic() > until:
            return failed or running
        time.sleep(0.02)


def _run(rank: int, count: int, name: str, timeout: float, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    folder = Path(name)
    with (folder / f"error{rank}.hung").open("w") as hung:
        faulthandler.dump_traceback_later(timeout, exit=True, file=hung)
        try:
            torch.set_num_threads(1)
            store = dist.FileStore(str(folder / "store"), count)
            # Longer than a run may take, so that a hung one is told by its own stack and not by a neighbour's.
            patience = timedelta(seconds=2 * timeout)
            dist.init_process_group("gloo", timeout=patience, rank=rank, world_size=count, store=store)
            result = work(rank, *args)
            torch.save(result, folder / f"result{rank}")
            # Nobody leaves while another still reads from it.
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            (folder / f"error{rank}").write_text(traceback.format_exc())
            raise SystemExit(1) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
