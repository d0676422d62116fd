"""A basic block with the identity and with a projection as its shortcut, forward + backward."""

from __future__ import annotations

from benchmarks.conftest import Measure, sides
from benchmarks.workloads import Workload, block_workloads


@sides(block_workloads())
def test_basic_block(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)
