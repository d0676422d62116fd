"""ResNet-18 with the CIFAR stem: a training step, and inference in a large batch and one image at a time."""

from __future__ import annotations

from benchmarks.conftest import Measure, sides
from benchmarks.workloads import Workload, all_train_workloads, inference_workloads


@sides(all_train_workloads())
def test_resnet18_training_step(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)


@sides(inference_workloads())
def test_resnet18_inference(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)
