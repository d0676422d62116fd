"""What every benchmark shares: the allocator's setting, and how one side of a workload is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fastres
from benchmarks import workloads
from benchmarks.workloads import Workload

Measure = Callable[[Workload, str], None]


def sides(cases: Iterable[Workload]) -> pytest.MarkDecorator:
    """Parametrise over workloads and their sides; eager comes first, so that the others can state their ratio to it."""
    return pytest.mark.parametrize(
        ("workload", "side"),
        [pytest.param(case, side, id=f"{case.key}-{side}") for case in cases for side in case.sides],
    )


@pytest.fixture(scope="session")
def medians() -> dict[tuple[str, str], float]:
    """Seconds of what was measured so far: (workload's name, side) -> median. "copy" is a side of an operator."""
    # Page faults would drown the arithmetic; the setting holds for every side alike.
    fastres.reuse_cpu_memory()
    return {}


@pytest.fixture
def measure(benchmark: BenchmarkFixture, medians: dict[tuple[str, str], float]) -> Measure:
    """A function that times one side of a workload and adds rate, bytes, floor and ratios to extra_info."""

    def run(workload: Workload, side: str) -> None:
        benchmark.group = f"{workload.group}: {workload.name}"
        if workload.shape is not None and (workload.name, "copy") not in medians:
            medians[workload.name, "copy"] = _median(workloads.copy(workload.shape), workload.rounds)
        benchmark.pedantic(workload.make(side), rounds=workload.rounds, warmup_rounds=workload.warmup_rounds)  # type: ignore[no-untyped-call]
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = medians[workload.name, side] = benchmark.stats.stats.median
        info = benchmark.extra_info
        info["images_per_second"] = workload.images / seconds
        if workload.shape is not None and workload.bytes is not None:
            bandwidth = workloads.copied_bytes(workload.shape) / medians[workload.name, "copy"]
            info["bytes"] = workload.bytes
            info["GB_per_second"] = workload.bytes / seconds / 1e9
            info["copy_GB_per_second"] = bandwidth / 1e9
            info["floor_seconds"] = workload.bytes / bandwidth
            info["ratio_to_floor"] = seconds * bandwidth / workload.bytes
        for other in workload.sides:
            if other != side and (workload.name, other) in medians:
                info[f"times_as_fast_as_{other}"] = medians[workload.name, other] / seconds

    return run


def _median(run: workloads.Run, rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
