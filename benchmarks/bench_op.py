"""relu(bn(x) + r), with and without dropout, at the shapes of ResNet-18's stages, and maxpool(relu(bn(x))) of a stem,
forward + backward.
"""

from __future__ import annotations

from itertools import chain

from benchmarks.conftest import Measure, sides
from benchmarks.pooling import pool_workloads
from benchmarks.workloads import Workload, op_workloads


@sides(chain(op_workloads(), pool_workloads()))
def test_batch_norm_act(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)
