"""ResNet-18 with the CIFAR stem: a training step, and inference in a large batch and one image at a time.

FASTRES_BENCH_LARGE=1 adds the training steps of ResNet-18 and -50 on images of 224 pixels, of WRN-28-10, and of a
network of timm's by the compiler backend, which take minutes.
"""

from __future__ import annotations

import os

import pytest

from benchmarks import backend
from benchmarks.conftest import Measure, sides
from benchmarks.workloads import Workload, all_train_workloads, inference_workloads

LARGE = os.environ.get("FASTRES_BENCH_LARGE", "0") not in ("", "0")


@sides(all_train_workloads(large=LARGE))
def test_training_step(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)


@sides(inference_workloads())
def test_inference(measure: Measure, workload: Workload, side: str) -> None:
    measure(workload, side)


@sides([backend.workload("timm resnet50d")] if LARGE else [])
def test_compiled_training_step(measure: Measure, workload: Workload, side: str) -> None:
    pytest.importorskip("timm")
    measure(workload, side)
