"""How a side of a workload is set up, warmed up and timed on a GPU.

Every round runs every side once, so that a device whose clock drifts slows all sides alike; figures are medians over
the rounds.
- "device", for operators and the projection shortcut: CUDA events around several runs that were queued while the GPU
  was still busy with a spin kernel, so that the GPU never waits for Python. Inputs take turns where they would fit in
  the L2 cache. `called_seconds` beside it is what a caller waits for, launches included.
- "called", for training steps: CUDA events around several steps in a row, started on an idle GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.sides import COMPILE, COMPILE_GRAPH, FROZEN_GRAPH, FUSED_COMPILE, GRAPHS, MAX_AUTOTUNE
from benchmarks.workloads import Run, Workload

LEAST_ROUNDS = 3
# Seconds that compiling a side takes before it can run, guessed high: a side is left out where less is left. A training
# step is the whole network, with autotuning of every convolution.
COMPILE_S = {COMPILE: 15.0, MAX_AUTOTUNE: 25.0, FUSED_COMPILE: 15.0}
COMPILE_NETWORK_S = {COMPILE: 45.0, COMPILE_GRAPH: 45.0, MAX_AUTOTUNE: 150.0, FUSED_COMPILE: 45.0}
# Runs behind one spin kernel: about a thousand launches fill the queue, and a run of eager takes two dozen.
MOST_CALLS = 16


class Budget:
    """Seconds for the whole run, by a clock that tests can replace."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - self._clock()


@dataclass(frozen=True)
class Task:
    """A workload, with those of its sides that are measured together. `key` is unique in the run."""

    workload: Workload
    sides: tuple[str, ...]
    key: str

    def expected_s(self, side: str) -> float:
        """Seconds to allow for setting a side up."""
        network = self.workload.group.startswith("model")
        return (COMPILE_NETWORK_S if network else COMPILE_S).get(side, 2.0)


@dataclass
class Timed:
    """One side, ready to run, and what was seen of it."""

    run: Run
    setup_seconds: float
    run_seconds: float
    memory: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    called_seconds: list[float] = field(default_factory=list)
    kept_busy: bool = True
    ahead_s: float = 0.0


class HostTimer:
    """The host's clock, for a rehearsal without a GPU."""

    has_device_time = False

    def called(self, run: Run, calls: int) -> float:
        """Seconds a run, of `calls` runs in a row."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def device(self, side: Timed, calls: int) -> float:
        """The same: the host is the device."""
        return self.called(side.run, calls)


class CudaTimer:
    """CUDA events."""

    has_device_time = True

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        cycles = 20_000_000
        spin = functools.partial(torch.cuda._sleep, cycles)
        self.called(spin, 1)
        self._cycles_per_second = cycles / self.called(spin, 1)

    def called(self, run: Run, calls: int) -> float:
        """Seconds a run, of `calls` runs in a row that start on an idle GPU."""
        torch.cuda.synchronize()
        self._start.record()
        for _ in range(calls):
            run()
        self._end.record()
        return self._elapsed() / calls

    def device(self, side: Timed, calls: int) -> float:
        """Seconds of GPU work a run, of `calls` runs that all were queued before the first one began.

        Sets side.kept_busy to False where the host did not get ahead of the GPU, so that the figure holds gaps.
        """
        seconds = math.nan
        for _ in range(4):
            torch.cuda.synchronize()
            torch.cuda._sleep(max(1, int(side.ahead_s * self._cycles_per_second)))  # type: ignore[no-untyped-call]
            began = time.perf_counter()
            self._start.record()
            for _ in range(calls):
                side.run()
            self._end.record()
            ahead = not self._start.query()  # type: ignore[no-untyped-call]
            queued_s = time.perf_counter() - began
            seconds = self._elapsed() / calls
            if ahead:
                return seconds
            side.ahead_s = min(0.5, max(1.5 * queued_s, 2 * side.ahead_s))
        side.kept_busy = False
        return seconds

    def _elapsed(self) -> float:
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


Timer = HostTimer | CudaTimer


def copy_bandwidth(timer: Timer) -> dict[str, Any]:
    """A copy of one large tensor into another, the yardstick of the byte budget: bytes read and written, seconds."""
    elements = 1 << (28 if workloads.CUDA else 20)
    source = torch.randn(elements, device=workloads.DEVICE, dtype=workloads.DTYPE)
    target = torch.empty_like(source)
    run = functools.partial(target.copy_, source)
    timer.called(run, 3)
    return {
        "bytes": 2 * elements * workloads.DTYPE.itemsize,
        "seconds": [timer.called(run, 5) for _ in range(10)],
    }


@dataclass
class Prepared:
    """The sides of a task that are ready to run, and why others are missing."""

    task: Task
    sides: dict[str, Timed] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def measure(task: Task, timer: Timer, budget: Budget) -> dict[str, Any]:
    """Set up, warm up and time the sides of one task that there is time for."""
    return timed(prepare(task, timer, budget), timer, budget)


def prepare(task: Task, timer: Timer, budget: Budget) -> Prepared:
    """Set up and warm up the sides of one task that there is time for."""
    # Whatever the task before compiled, so that its code objects do not run into the limit of recompilations.
    torch.compiler.reset()
    ready = Prepared(task)
    for side in task.sides:
        if budget.left() < task.expected_s(side):
            ready.missing[side] = f"left out: {max(0.0, budget.left()):.0f} s of the budget left"
            continue
        with _reported(ready.missing, side):
            ready.sides[side] = set_up(task.workload, side, timer)
    _free()
    return ready


def timed(ready: Prepared, timer: Timer, budget: Budget) -> dict[str, Any]:
    """Time what is ready, and let it go."""
    task, sides, missing = ready.task, ready.sides, ready.missing
    workload = task.workload
    by_device = timer.has_device_time and not workload.group.startswith("model")
    calls = 1
    if sides and workloads.CUDA:
        # About ten milliseconds a sample, so that the events' own half microsecond is nothing.
        fastest = min(side.run_seconds for side in sides.values())
        calls = min(MOST_CALLS if by_device else 4, max(1, math.ceil(0.01 / fastest)))
    for done in range(workload.rounds):
        if budget.left() <= 0 and done >= LEAST_ROUNDS:
            break
        for name, side in list(sides.items()):
            with _reported(missing, name):
                called = timer.called(side.run, calls)
                seconds = timer.device(side, calls) if by_device else called
                side.called_seconds.append(called)
                side.seconds.append(seconds)
            if name in missing:
                del sides[name]
    entry = {
        "key": task.key,
        "group": workload.group,
        "name": workload.name,
        "images": workload.images,
        "shape": None if workload.shape is None else list(workload.shape),
        "dropout": workload.dropout,
        "bytes": workload.bytes,
        "timing": "device" if by_device else "called",
        "calls_a_sample": calls,
        "sides": {
            name: {
                "seconds": side.seconds,
                "called_seconds": side.called_seconds,
                "kept_busy": side.kept_busy,
                "setup_seconds": side.setup_seconds,
                **side.memory,
            }
            for name, side in sides.items()
        },
        "missing": missing,
    }
    sides.clear()
    _free()
    return entry


@contextlib.contextmanager
def _reported(missing: dict[str, str], side: str) -> Iterator[None]:
    """Write an exception down as the reason why a side is missing, with its traceback to stderr, and go on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        words = str(error).strip().splitlines() or [""]
        missing[side] = f"failed: {type(error).__name__}: {words[0]}"[:300]


def set_up(workload: Workload, side: str, timer: Timer) -> Timed:
    """A side that is compiled, warmed up and, on a GPU, weighed."""
    _free()
    start = time.monotonic()
    if not workloads.CUDA:
        run = workload.set_up(side)
        run()
        return Timed(run, time.monotonic() - start, timer.called(run, 1))
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run = workload.set_up(side)
    for _ in range(workload.warmup_rounds):
        run()
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    if side not in (*GRAPHS, FROZEN_GRAPH):
        # What compilation took for a while is none of the side's own. A graph's memory is taken once, at its capture.
        _free()
        torch.cuda.reset_peak_memory_stats()
    run_seconds = timer.called(run, 2)
    memory = {"peak_bytes": torch.cuda.max_memory_allocated() - allocated}
    if side == MAX_AUTOTUNE and workload.group.startswith("model"):
        # Its CUDA graphs run in pools that show as reserved only.
        torch.cuda.empty_cache()
        memory["peak_bytes"] = max(memory["peak_bytes"], torch.cuda.memory_reserved() - reserved)
    return Timed(run, seconds, run_seconds, memory)


def _free() -> None:
    gc.collect()
    if workloads.CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
