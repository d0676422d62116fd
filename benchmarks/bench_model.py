"""ResNet-18 with the CIFAR stem: a training step, and inference in a large batch and one image at a time.

FASTRES_BENCH_LARGE=1 adds the training steps of ResNet-18 and -50 on images of 224 pixels, which take minutes.
"""

from __future__ import annotations

import os

from benchmarks.conftest import Measure, sides
from benchmarks.workloads import Workload, all_train_workloads, inference_workloads


@sides(all_train_workloads(large=os.environ.get("FASTRES_BENCH_LARGE", "0") not in ("", "0")))
def test_training_step(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)


@sides(inference_workloads())
def test_inference(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)
