import pytest
import torch
from torch import nn

from benchmarks.distributed import expected, measure, predictions, scaling, sent, summary, table
from fastres import FusedResNet18


def test_bytes_of_a_ring() -> None:
    """Three processes: each sends two thirds of the tensor to add it up, and two thirds to share the sum."""
    assert sent("all_reduce", 900.0, 3) == sent("reduce_scatter", 900.0, 3) + sent("all_gather", 300.0, 3) == 1200.0


def test_expected_bytes_are_those_of_the_parameters_and_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    assert expected(model, 1, sync_bn=True) == {"weights": 0, "statistics": 0}
    assert expected(model, 2, sync_bn=True) == {"weights": 4 * 40, "statistics": 4 * 4 * 8}
    assert expected(model, 2, fsdp=True) == {"weights": 2 * 4 * 40, "statistics": 0}


def test_scaling_is_the_share_of_a_step_that_is_work() -> None:
    assert scaling(1.0, 1e9, 2, 1.0) == pytest.approx(0.5)
    assert "| 1 s | 50% | 91% | 96% | 99% |" in predictions({"1 s": 1.0}, 0.125e9, (2,))


def test_two_processes_hand_over_what_the_formula_says() -> None:
    model = FusedResNet18(num_classes=10)
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    [row] = [summary("DDP", 2, measure(2, {}), model)]
    assert row["bytes"] == {"all_reduce": gradients} and row["expected"] == gradients
    assert f"{gradients:,}" in table([row])


def test_one_process_sends_nothing() -> None:
    assert measure(1, {}) == []
    assert not torch.distributed.is_initialized()
