"""The 3x3 convolution by Winograd's algorithm against PyTorch's own: forward, and each gradient for itself."""

from __future__ import annotations

from benchmarks.conftest import Measure, sides
from benchmarks.workloads import Workload, conv_workloads


@sides(conv_workloads())
def test_conv3x3(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)
