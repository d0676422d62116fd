"""What is measured, how, and the file that keeps it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastres
from benchmarks import records, workloads
from benchmarks.machine import in_own_process
from benchmarks.memory import resident_peak
from benchmarks.results import interleave
from benchmarks.workloads import COMPILE, EAGER, FUSED, IMAGE, QUICK, SIDES, Run, Workload

INFERENCE, TRAINING = MODES = ("inference", "training")

BATCH, WIDTH, DEPTH, SIZE, THREADS = ("batch", "width", "depth", "image", "threads")
SWEEPS: dict[str, tuple[float, ...]] = (
    {BATCH: (1, 2, 4), WIDTH: (0.5, 1), DEPTH: (20, 32), SIZE: (16, 24), THREADS: (1, 2)}
    if QUICK
    else {
        BATCH: tuple(1 << i for i in range(11)),
        WIDTH: (0.5, 1, 2, 4),
        DEPTH: (20, 32, 56, 110),
        SIZE: (24, 32, 48, 64, 96),
        THREADS: (1, 2),
    }
)
"""The values that each sweep takes, in the order in which they are measured."""
BATCHES_OF_THREADS = (1, 4) if QUICK else (1, 128)
COMPILED_BATCHES = () if QUICK else (1, 32, 1024)
MEMORY_BATCHES = (1, 4) if QUICK else (1, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Point:
    """A network in a mode, and what a sweep may vary of it."""

    mode: str
    model: str = "resnet20"
    width: float = 1.0
    image: int = IMAGE
    batch: int = 4 if QUICK else 32
    threads: int = 2

    def at(self, sweep: str) -> float:
        """Where the point is on a sweep's axis."""
        return float(self.model.removeprefix("resnet") if sweep == DEPTH else getattr(self, sweep))

    @property
    def rounds(self) -> int:
        """An odd number: 31 of runs that take milliseconds, and 5 of those that take seconds."""
        image = 13.6 if self.model == "resnet18" else (self.at(DEPTH) - 2) / 18  # FLOPs over those of ResNet-20
        image *= self.width**2 * (self.image / 32) ** 2
        return 1 + 2 * max(2, min(15, int(128 / (self.batch * image))))

    def workload(self) -> Workload:
        """What is run once."""
        network = workloads.Network(self.model, self.image, self.width)
        if self.mode == TRAINING:
            (workload,) = workloads.train_workloads(self.batch, network=network)
        else:
            (workload,) = workloads.inference_workloads((self.batch,), network)
        return workload


@dataclass(frozen=True)
class Measured:
    """A point's figures by side: seconds of every round and of the first run, and peak resident bytes where taken."""

    point: Point
    seconds: dict[str, list[float]]
    first_seconds: dict[str, float]
    resident: dict[str, int] = field(default_factory=dict)

    def an_image(self, side: str) -> float:
        """Median seconds of a side that ran."""
        return statistics.median(self.seconds[side]) / self.point.batch


@dataclass(frozen=True)
class Sweep:
    """The machine as it was when a sweep ran, and its points, in inference and then in training."""

    machine: dict[str, Any]
    points: list[Measured]

    def line(self, mode: str, side: str, batch: int | None = None) -> list[Measured]:
        """The points of a mode where a side ran; of a batch, if one is given."""
        return [
            found
            for found in self.points
            if found.point.mode == mode and side in found.seconds and batch in (None, found.point.batch)
        ]


Record = dict[str, Sweep]
"""The newest measurement of each sweep on a processor with an instruction set."""


# ---------------------------------------------------------------------------------------------------------- measuring


def groups(sweep: str) -> Iterator[list[Point]]:
    """A sweep's points, those together that share a process; small ones first, since memory once used stays."""
    for mode in MODES:
        point = Point(mode, threads=torch.get_num_threads())
        if sweep == THREADS:
            for threads in SWEEPS[sweep]:
                yield [Point(mode, threads=int(threads), batch=batch) for batch in BATCHES_OF_THREADS]
        elif sweep == DEPTH:
            yield [dataclasses.replace(point, model=f"resnet{depth}") for depth in SWEEPS[sweep]]
        else:
            if sweep == SIZE:
                point = dataclasses.replace(point, model="resnet18", batch=8)
            changes: list[dict[str, Any]] = [{sweep: value} for value in SWEEPS[sweep]]
            yield [dataclasses.replace(point, **change) for change in changes]


def measure(points: Sequence[Point], rounds: float, compiled_batches: Sequence[int]) -> list[Measured]:
    """Time every side of some points in this process; torch.compile at some batches, with nothing compiled before."""
    fastres.reuse_cpu_memory()
    found = []
    for point in points:
        torch.set_num_threads(point.threads)
        workload, first = point.workload(), dict[str, float]()
        sides = SIDES if point.batch in compiled_batches else (EAGER, FUSED)
        workload = dataclasses.replace(workload, sides=sides, set_up=_first_run_timed(workload.set_up, first))
        with _nothing_compiled() if COMPILE in sides else contextlib.nullcontext():
            seconds = interleave(workload, max(1, round(point.rounds * rounds))).seconds
        found.append(Measured(point, seconds, first))
    return found


def _nothing_compiled() -> contextlib.AbstractContextManager[None]:
    from torch._inductor.utils import fresh_cache  # takes a second

    return fresh_cache()


def _first_run_timed(set_up: Callable[[str], Run], seconds: dict[str, float]) -> Callable[[str], Run]:
    def timed(side: str) -> Run:
        run = set_up(side)

        def timed_run() -> None:
            start = time.perf_counter()
            run()
            seconds.setdefault(side, time.perf_counter() - start)

        return timed_run

    return timed


def resident(point: Point, side: str) -> int:
    """The peak of a run's resident memory in bytes, in this process, above what was resident before it."""
    fastres.reuse_cpu_memory()
    torch.set_num_threads(point.threads)
    # The optimizer's state is whole in the second step.
    return resident_peak(point.workload().make(side), steps=2)


def measure_sweep(sweep: str, rounds: float) -> list[Measured]:
    """A sweep's points, in processes of their own."""
    found: list[Measured] = []
    for points in tqdm(list(groups(sweep)), desc=sweep):
        found += in_own_process(measure, points, rounds, COMPILED_BATCHES if sweep == BATCH else ())
    if sweep == BATCH:
        for entry in tqdm([entry for entry in found if entry.point.batch in MEMORY_BATCHES], desc="memory"):
            for side in (EAGER, FUSED):
                entry.resident[side] = in_own_process(resident, entry.point, side)
    return found


# ------------------------------------------------------------------------------------------------------------ records


def file_name(machine: dict[str, Any]) -> str:
    """scaling-<processor>-<capability>-<date>.json, in lower case."""
    name = records.slug(f"{machine['processor']} {machine['capability']}")
    return f"scaling-{name}-{machine['date']}{'-quick' if machine['quick'] else ''}.json"


def write(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {name: dataclasses.asdict(record[name]) for name in SWEEPS if name in record}
    records.write_text(path, records.to_json({"sweeps": data}))


def read(path: Path) -> Record:
    """What `write` wrote.

    Raises:
        ValueError: the file is not one of ours.
    """
    try:
        record = {}
        for name, sweep in json.loads(path.read_text(encoding="utf-8"))["sweeps"].items():
            points = [Measured(**{**entry, "point": Point(**entry["point"])}) for entry in sweep["points"]]
            record[name] = Sweep(sweep["machine"], points)
        date(record)
        return record
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"output_dir: {path} does not hold a record of this script ({error})") from error


def newest(folder: Path) -> dict[tuple[str, str], Record]:
    """(instruction set, processor) -> its newest record in a folder; a quick run sees quick ones, and no other does."""
    found: dict[tuple[str, str], Record] = {}
    for record in sorted(map(read, folder.glob("scaling-*.json")), key=date):
        machine = next(iter(record.values())).machine
        if machine["quick"] == QUICK:
            found[machine["capability"], machine["processor"]] = record
    return found


def date(record: Record) -> str:
    """When the last of a record's sweeps was measured."""
    return max(str(sweep.machine["date"]) for sweep in record.values())
