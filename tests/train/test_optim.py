from typing import Any

import pytest
import torch
from torch import nn

from fastres.train.config import TrainConfig
from fastres.train.optim import lr_factor, make_optimizer

EXPECTED: list[tuple[Any, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("sgd", torch.optim.SGD, {"momentum": 0, "nesterov": False}),
    ("momentum", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
    ("nesterov", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    ("rmsprop", torch.optim.RMSprop, {}),
    ("adam", torch.optim.Adam, {"amsgrad": False}),
    ("amsgrad", torch.optim.Adam, {"amsgrad": True}),
    ("adamw", torch.optim.AdamW, {"amsgrad": False}),
]


@pytest.mark.parametrize(("name", "kind", "settings"), EXPECTED)
def test_optimizer_is_torchs_with_the_settings_asked(
    name: Any, kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    config = TrainConfig(optimizer=name, lr=0.02, weight_decay=0.003, momentum=0.8)
    optimizer = make_optimizer(nn.Linear(2, 2).parameters(), config)
    assert type(optimizer) is kind
    for key, value in {"lr": 0.02, "weight_decay": 0.003, **settings}.items():
        assert optimizer.defaults[key] == value


def test_nesterov_without_momentum_is_plain_descent() -> None:
    config = TrainConfig(optimizer="nesterov", lr=0.1, weight_decay=0.0, momentum=0.0)
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_optimizer([parameter], config)
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.8]))


def test_unresolved_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr=None"):
        make_optimizer(nn.Linear(2, 2).parameters(), TrainConfig())


def test_cosine_is_the_one_of_torch_after_the_warmup() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, end_factor=1.0, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16),
        ],
        milestones=[4],
    )
    for step in range(20):
        ours = lr_factor(step, schedule="cosine", warmup_steps=4, total_steps=20)
        assert ours == pytest.approx(oracle.get_last_lr()[0])
        optimizer.step()
        oracle.step()


def test_constant_schedule_stays_at_the_peak_after_the_warmup() -> None:
    factors = [lr_factor(step, schedule="constant", warmup_steps=2, total_steps=5) for step in range(5)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_warmup_may_take_the_whole_run() -> None:
    assert lr_factor(4, schedule="cosine", warmup_steps=5, total_steps=5) == 1.0
