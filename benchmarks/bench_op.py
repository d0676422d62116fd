"""relu(bn(x) + r), with and without dropout, forward + backward, at the shapes of ResNet-18's stages."""

from __future__ import annotations

from benchmarks.conftest import Measure, sides
from benchmarks.workloads import Workload, op_workloads


@sides(op_workloads())
def test_batch_norm_act(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)
