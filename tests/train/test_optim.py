import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.train import ImageData, Summary
from fastres.train.config import TrainConfig
from fastres.train.errors import RunError
from fastres.train.optim import make_optimizer, own_implementation, restore
from tests.oracle import generator as fresh
from tests.train.optimizers import EACH, TIMM, TORCH, with_timm
from tests.train.test_engine import make_engine, step

EXPECTED: list[tuple[Any, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("sgd", torch.optim.SGD, {"momentum": 0, "nesterov": False, "fused": None}),
    ("momentum", torch.optim.SGD, {"momentum": 0.8, "nesterov": False, "fused": True}),
    ("nesterov", torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "fused": True}),
    ("rmsprop", torch.optim.RMSprop, {}),
    ("adam", torch.optim.Adam, {"amsgrad": False, "fused": True}),
    ("amsgrad", torch.optim.Adam, {"amsgrad": True, "fused": True}),
    ("adamw", torch.optim.AdamW, {"amsgrad": False, "fused": True}),
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


# --- implementations ---


def small_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights of three shapes, the convolution's in channels_last."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=fresh("optimizer", parameter.shape))
    return model.to(dtype).to(memory_format=torch.channels_last)


def give_gradients(model: nn.Module, number: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        values = torch.randn(parameter.shape, generator=fresh("gradient", number, index))
        parameter.grad = torch.empty_like(parameter).copy_(values)


def after_steps(optimizer: torch.optim.Optimizer, model: nn.Module, first: int = 0) -> list[Tensor]:
    for number in range(first, first + 3):
        give_gradients(model, number)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", TORCH)
def test_implementation_computes_what_the_loop_over_parameters_does(name: Any) -> None:
    """In float64 the loop."""
    config = TrainConfig(optimizer=name, lr=0.02, weight_decay=0.03, momentum=0.8)
    model = small_network()
    found = after_steps(make_optimizer(model, config), model)
    oracle = small_network(torch.float64)
    optimizer = make_optimizer(oracle, config)
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, False
    for ours, theirs in zip(found, after_steps(optimizer, oracle), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_restored_optimizer_goes_on_in_its_own_implementation(name: Any) -> None:
    """Whichever implementation and layout saved the state."""
    config = TrainConfig(optimizer=name, lr=0.02, weight_decay=0.03, momentum=0.8)
    model, other = small_network(), small_network()
    whole, part = make_optimizer(model, config), make_optimizer(other, config)
    after_steps(whole, model)
    after_steps(part, other)
    state = part.state_dict()
    for group in state["param_groups"]:
        group.update({key: None if key == "foreach" else False for key in ("foreach", "fused") if key in group})
    for values in state["state"].values():
        for key, value in values.items():
            values[key] = value.contiguous() if isinstance(value, Tensor) else value
    part = make_optimizer(other, config)
    restore(part, own_implementation(part, state))
    own = make_optimizer(other, config)
    for key in ("fused", "foreach"):
        assert [g.get(key) for g in part.param_groups] == [g.get(key) for g in own.param_groups]
    for one, two in zip(after_steps(whole, model, 3), after_steps(part, other, 3), strict=True):
        assert torch.equal(one, two)


def test_state_of_other_groups_is_refused() -> None:
    config = TrainConfig(lr=0.02, weight_decay=0.03)
    state = make_optimizer(small_network(), config).state_dict()
    model = small_network()
    optimizer = make_optimizer(model, TrainConfig(lr=0.02, weight_decay=0.03, decay_norm_bias=False))
    with pytest.raises(ValueError, match=r"parameter group"):
        restore(optimizer, own_implementation(optimizer, state))


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("name", ["nesterov", "sgd", "adamw", "rmsprop"])
def test_scaled_loss_steps_as_the_loss_itself(name: Any, clip: float | None, data: ImageData, tmp_path: Path) -> None:
    """A power of two scales without a rounding; gradients that overflow make no step."""
    engines = [make_engine(tmp_path, data, optimizer=name, clip_grad=clip, channels_last=False) for _ in range(2)]
    engines[1].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for number in range(2):
        for engine in engines:
            step(engine, number)
    weights = [[p.detach().clone() for p in e.model.parameters()] for e in engines]
    # The norm of scaled gradients is rounded otherwise.
    tolerance = {"rtol": 0, "atol": 0} if clip is None else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(weights[1], weights[0], **tolerance)
    engines[1].scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    step(engines[1], 2)
    assert all(map(torch.equal, weights[1], engines[1].model.parameters()))


@pytest.mark.parametrize("name", EACH)
def test_runs_repeat_and_resume_with_each_optimizer(name: Any, run: Callable[..., Summary], tmp_path: Path) -> None:
    run("whole", optimizer=name, dropout=0.2)
    run("again", optimizer=name, dropout=0.2)
    run("part", optimizer=name, dropout=0.2, max_steps=4)
    run("part", optimizer=name, resume=tmp_path / "part")
    found = [torch.load(tmp_path / to / "last.pt", weights_only=True) for to in ("whole", "again", "part")]
    for other in found[1:]:
        torch.testing.assert_close(other["model"], found[0]["model"], rtol=0, atol=0)


# --- timm's ---


@with_timm
def test_lars_is_the_formula() -> None:
    """You et al. 2017: w <- w - lr v, v <- momentum v + local (g + decay w), local = 0.001 |w| / (|g| + decay |w|)."""
    config = TrainConfig(optimizer="lars", lr=2.0, weight_decay=0.03, momentum=0.8)
    model = small_network()
    expected = [p.detach().double() for p in model.parameters()]
    speeds = [torch.zeros_like(w) for w in expected]
    for number in range(3):
        give_gradients(model, number)
        for index, parameter in enumerate(model.parameters()):
            assert parameter.grad is not None
            w, g = expected[index], parameter.grad.double()
            local = 0.001 * w.norm() / (g.norm() + 0.03 * w.norm())
            speeds[index] = 0.8 * speeds[index] + local * (g + 0.03 * w)
            expected[index] = w - 2.0 * speeds[index]
    found = after_steps(make_optimizer(model, config), model)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@with_timm
def test_muon_steps_a_convolution_by_an_orthogonal_matrix_of_its_filters() -> None:
    """Newton-Schulz's iteration ends near singular values of 1, all multiplied by one factor; vectors step by Adam."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8))
    give_gradients(model, 0)
    model[0].weight.grad[0] *= 5
    gradient = model[0].weight.grad.flatten(1).double()
    before = [p.detach().clone() for p in model.parameters()]
    make_optimizer(model, TrainConfig(optimizer="muon", lr=0.1, weight_decay=0.0)).step()
    moved = [(p.detach() - b).double() for p, b in zip(model.parameters(), before, strict=True)]
    update = -moved[0].flatten(1)
    values = torch.linalg.svdvals(update)
    assert values.max() < 1.5 * values.min() and torch.linalg.cond(gradient) > 3
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    assert (update * (u @ v)).sum() > 0.95 * update.norm() * (u @ v).norm()
    for vector, index in ((moved[1], 1), (moved[2], 2)):
        parameter = list(model.parameters())[index]
        assert parameter.grad is not None
        # A first step of Adam is of one length everywhere, against the gradient.
        torch.testing.assert_close(vector, -vector.abs().mean() * parameter.grad.sign().double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("module", "said"), [(None, "it is not installed"), (SimpleNamespace(), "this one has none")])
def test_missing_timm_is_told_with_how_to_install_it(
    name: Any, module: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim", module)
    with pytest.raises(
        RunError, match=rf"^optimizer: {name} is timm's, and {said}; pip install 'timm>=1.0.21'"
    ) as found:
        make_optimizer(small_network(), TrainConfig(optimizer=name, lr=0.1, weight_decay=0.0))
    assert "\n" not in str(found.value)
