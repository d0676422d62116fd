from typing import Any

import pytest
import torch
from torch import nn

from fastres.train.config import TrainConfig
from fastres.train.optim import make_optimizer

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
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    assert type(optimizer) is kind
    for key, value in {"lr": 0.02, "weight_decay": 0.003, **settings}.items():
        assert optimizer.defaults[key] == value


def test_nesterov_without_momentum_is_plain_descent() -> None:
    config = TrainConfig(optimizer="nesterov", lr=0.1, weight_decay=0.0, momentum=0.0)
    model = nn.Module()
    model.weight = parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = make_optimizer(model, config)
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.8]))


def test_unresolved_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr=None"):
        make_optimizer(nn.Linear(2, 2), TrainConfig())


def test_groups_differ_in_learning_rate_and_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    config = TrainConfig(optimizer="momentum", lr=0.5, weight_decay=0.02, bias_lr_factor=4.0)
    weights, biases = make_optimizer(model, config).param_groups
    assert list(map(id, weights["params"])) == [
        id(model[i].get_parameter(n)) for i, n in ((0, "bias"), (1, "weight"), (2, "weight"), (2, "bias"))
    ]
    assert list(map(id, biases["params"])) == [id(model[1].bias)]
    assert (weights["lr"], weights["weight_decay"], weights["lr_factor"]) == (0.5, 0.02, 1.0)
    # The decay of a step, lr * weight_decay, is that of the weights.
    assert (biases["lr"], biases["weight_decay"], biases["lr_factor"]) == (2.0, 0.005, 4.0)


def test_norms_and_biases_may_be_spared_the_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    config = TrainConfig(lr=0.5, weight_decay=0.02, decay_norm_bias=False)
    decay = {id(p): g["weight_decay"] for g in make_optimizer(model, config).param_groups for p in g["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.02, 0.0, 0.0, 0.0, 0.02, 0.0]


def test_default_groups_are_one_as_in_old_checkpoints() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    (group,) = make_optimizer(model, TrainConfig(lr=0.5, weight_decay=0.02)).param_groups
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))
