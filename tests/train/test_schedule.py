from typing import Any

import pytest
import torch
from torch import nn

from fastres.train.config import TrainConfig
from fastres.train.schedule import lr_factor


def factors(total_steps: int, *, steps_per_epoch: int = 1, **fields: Any) -> list[float]:
    config = TrainConfig(**fields)
    return [
        lr_factor(step, config, steps_per_epoch=steps_per_epoch, total_steps=total_steps) for step in range(total_steps)
    ]


def torchs(scheduler: Any, optimizer: torch.optim.Optimizer, total_steps: int) -> list[float]:
    """The oracle: what one of torch's schedulers makes of a learning rate of 1."""
    found = []
    for step in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < total_steps:
            scheduler.step()
    return found


def make_sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_cosine_is_the_one_of_torch_after_the_warmup() -> None:
    optimizer = make_sgd()
    oracle = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, end_factor=1.0, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16),
        ],
        milestones=[4],
    )
    assert factors(20, warmup_epochs=4.0) == pytest.approx(torchs(oracle, optimizer, 20))


def test_steps_are_those_of_torch() -> None:
    optimizer = make_sgd()
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 15], gamma=0.2)
    ours = factors(20, steps_per_epoch=3, schedule="step", milestones=(2.0, 5.0), step_factor=0.2)
    assert ours == pytest.approx(torchs(oracle, optimizer, 20))


@pytest.mark.parametrize("total_steps", [2, 5, 50])
def test_onecycle_is_the_one_of_torch(total_steps: int) -> None:
    optimizer = make_sgd()
    oracle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total_steps, cycle_momentum=False)
    assert factors(total_steps, schedule="onecycle") == pytest.approx(torchs(oracle, optimizer, total_steps))


def test_triangle_goes_through_its_three_points_in_lines() -> None:
    # With 100 steps each is a percent of the way; the end lies one step after the last.
    ours = factors(100, schedule="triangle", triangle_start=0.2, triangle_peak=0.4, triangle_end=0.1)
    assert (ours[0], ours[20], ours[40], ours[70]) == pytest.approx((0.2, 0.6, 1.0, 0.55))
    assert ours[99] == pytest.approx(0.1 + 0.9 / 60)


@pytest.mark.parametrize(("peak", "expected"), [(0.0, [1.0, 0.5]), (1.0, [0.0, 0.5])])
def test_triangle_may_have_one_side(peak: float, expected: list[float]) -> None:
    assert factors(2, schedule="triangle", triangle_start=0.0, triangle_peak=peak, triangle_end=0.0) == expected


def test_constant_schedule_stays_at_the_peak_after_the_warmup() -> None:
    assert factors(5, schedule="constant", warmup_epochs=2.0) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_warmup_may_stay_at_a_share_of_the_peak() -> None:
    assert factors(4, schedule="constant", warmup_epochs=2.0, warmup_factor=0.1) == [0.1, 0.1, 1.0, 1.0]


def test_warmup_may_take_the_whole_run() -> None:
    assert factors(5, warmup_epochs=5.0)[4] == 1.0
