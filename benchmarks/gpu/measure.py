"""`python -m benchmarks.gpu.measure`: fastres on a GPU against eager, torch.compile and torch.compile with autotuning.

The workloads stand in the order of their importance; the run stops cleanly where `--budget-s` ends. After each one
results.json is written whole, so that a run that is cut short leaves what it has.

How time is taken. Every round runs every side once, so that a device whose clock drifts slows all sides alike; figures
are medians over the rounds.
- "device", for operators and the projection shortcut: CUDA events around several runs that were queued while the GPU
  was still busy with a spin kernel, so that the GPU never waits for Python. Inputs take turns where they would fit in
  the L2 cache. `called_seconds` beside it is what a caller waits for, launches included.
- "called", for training steps: CUDA events around several steps in a row, started on an idle GPU.

Without a GPU only a rehearsal runs (FASTRES_BENCH_QUICK=1): tiny, timed by the host's clock, and never published.
"""

# argparse rather than tyro: a borrowed machine has torch and little else.
from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastres
from benchmarks import records, workloads
from benchmarks.gpu import report
from benchmarks.gpu.stages import RESULTS
from benchmarks.records import PUBLISHED, ROOT, write_text
from benchmarks.sides import COMPILE, COMPILE_GRAPH, FROZEN_GRAPH, FUSED_COMPILE, GRAPHS, MAX_AUTOTUNE
from benchmarks.workloads import Run, Workload
from fastres.info import backends

BATCHES = (512, 1024)
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


def tasks(batches: Sequence[int]) -> Iterable[Task]:
    """Everything, the most important first. The first batch comes whole before the second."""
    for index, batch in enumerate(batches):
        ops = list(workloads.op_workloads(batch))
        (step,) = workloads.train_workloads(batch)
        (with_dropout,) = workloads.train_workloads(batch, max(workloads.DROPOUTS))
        rates = len(workloads.DROPOUTS)
        # Autotuning the whole network takes longer than all else, so it waits; then every side is measured again, in
        # the same rounds.
        yield Task(step, tuple(side for side in step.sides if side != MAX_AUTOTUNE), f"{step.group}-{step.key}")
        yield from map(_whole, ops[:rates])
        if index == 0:
            yield from map(_whole, workloads.projection_workloads(batch))
        yield from map(_whole, ops[rates:])
        if index == 0:
            yield from map(_whole, workloads.inference_workloads())
        # Mostly for its memory: dropout is where eager keeps whole tensors.
        few = tuple(side for side in with_dropout.sides if side not in (MAX_AUTOTUNE, FUSED_COMPILE))
        yield Task(with_dropout, few, f"{step.group}-{with_dropout.key}")
        if MAX_AUTOTUNE in step.sides:
            yield Task(step, step.sides, f"{step.group}-{step.key}-{MAX_AUTOTUNE}")


def _whole(workload: Workload) -> Task:
    return Task(workload, workload.sides, f"{workload.group}-{workload.key}")


# ---------------------------------------------------------------------------------------------------------------- time


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


# ----------------------------------------------------------------------------------------------------------- measuring


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


def measure_all(todo: Iterable[Task], timer: Timer, budget: Budget, results: dict[str, Any], file: Path) -> None:
    """Measure task after task into `results`, writing `file` after each. Where the budget is over, say what is left."""
    results |= {"entries": [], "left_out": [], "complete": False}
    write_text(file, records.to_json(results))
    for task in todo:
        if budget.left() <= 0:
            results["left_out"].append(task.key)
            continue
        print(f"{task.key} ({budget.left():.0f} s left)", flush=True)
        results["entries"].append(measure(task, timer, budget))
        write_text(file, records.to_json(results))
    results["complete"] = not results["left_out"] and not any(entry["missing"] for entry in results["entries"])
    write_text(file, records.to_json(results))


# ------------------------------------------------------------------------------------------------------------- machine


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    machine: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "rehearsal": not workloads.CUDA,
        "quick": workloads.QUICK,
        "dtype": str(workloads.DTYPE).removeprefix("torch."),
        "memory_format": "channels_last",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "fastres": fastres.__version__,
        "python": platform.python_version(),
        "commit": records.commit(),
        "date": datetime.date.today().isoformat(),
        "backends": {name: words.replace(f"{records.ROOT}/", "") for name, words in backends()},
    }
    if workloads.CUDA:
        device = torch.cuda.get_device_properties(workloads.DEVICE)
        machine |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_bytes": device.total_memory,
            "l2_bytes": device.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return machine


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return said[0] if said else None


# ----------------------------------------------------------------------------------------------------------- publishing


def read(file: Path) -> dict[str, Any]:
    """What an earlier run wrote.

    Raises:
        ValueError: the file is missing or not one of ours.
    """
    try:
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        report.markdown(results)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"from-json: {file} does not hold results of this script ({error})") from error
    return results


def publish(results: dict[str, Any], folder: Path) -> Path:
    """Write results to <folder>/<device>-<date>.json, those of networks to <device>-networks-<date>.json.

    Raises:
        ValueError: they are of a rehearsal or of a quick run.
    """
    machine = results["machine"]
    if machine["rehearsal"] or machine["quick"]:
        raise ValueError("publish: expected figures of a GPU at full size, got those of a rehearsal or a quick run")
    kind = "-networks" if results.get("networks") else ""
    file = folder / f"{records.slug(machine['device'])}{kind}-{machine['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, records.to_json(results))
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read; write, print; 1 where a side failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.measure", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "gpu", help=f"folder for {RESULTS}")
    parser.add_argument("--budget-s", type=float, default=1500.0, help="seconds after which nothing new is started")
    parser.add_argument("--batch", type=int, nargs="+", default=None, help=f"batch sizes (default {BATCHES})")
    parser.add_argument("--networks", action="store_true", help="other networks and frozen ones instead of ResNet-18")
    parser.add_argument("--publish", action="store_true", help="copy to docs/results/<device>-<date>.json")
    parser.add_argument("--from-json", type=Path, help="print, and publish, what an earlier run wrote")
    options = parser.parse_args(arguments)
    if options.from_json is not None:
        try:
            results = read(options.from_json)
            print(report.markdown(results))
            if options.publish:
                print(f"published: {publish(results, PUBLISHED)}")
        except ValueError as error:
            parser.error(str(error))
        return 0
    if not workloads.CUDA and not workloads.QUICK:
        parser.error("no CUDA GPU is present; FASTRES_BENCH_QUICK=1 runs a rehearsal on the CPU")
    if options.publish and (workloads.QUICK or not workloads.CUDA):
        parser.error("publish: figures of a rehearsal or a quick run are not published (FASTRES_BENCH_QUICK is set)")
    if not math.isfinite(options.budget_s) or options.budget_s < 0:
        parser.error(f"budget-s: expected a number of seconds, at least 0, got {options.budget_s}")
    if options.batch is not None and min(options.batch) < 2:
        parser.error(f"batch: expected at least 2, got {min(options.batch)}")
    budget = Budget(options.budget_s)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    fastres.reuse_cpu_memory()
    # Shapes are fixed, so every side may let cuDNN try its algorithms, as one would in training.
    torch.backends.cudnn.benchmark = True
    timer: Timer = CudaTimer() if workloads.CUDA else HostTimer()
    batches = options.batch or ((workloads.BATCH,) if workloads.QUICK else BATCHES)
    results = {"machine": describe_machine(), "copy": copy_bandwidth(timer), "budget_s": options.budget_s}
    results["networks"] = options.networks
    file = options.output_dir / RESULTS
    if options.networks:
        from benchmarks.gpu import networks  # it needs this module

        networks.measure_all(networks.NAMES, budget, results, file)
    else:
        measure_all(tasks(batches), timer, budget, results, file)
    print(report.markdown(results))
    print(f"raw figures: {file}")
    failures = [why for entry in results["entries"] for why in entry["missing"].values() if why.startswith("failed")]
    if options.publish and results["entries"]:
        print(f"published: {publish(results, PUBLISHED)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
