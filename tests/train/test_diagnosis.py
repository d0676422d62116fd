import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import models
from fastres.train.diagnosis import Diagnosis, diagnose

LARGE = 3e38


class Joined(nn.Module):
    """A residual sum between modules."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.factor + self.conv(x) * self.factor
        return out


class Explode(torch.autograd.Function):
    """The identity with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * math.inf


class Exploding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Explode.apply(x)
        return out


def network(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.3),
        *middle,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 4),
    )


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), torch.arange(6) % 4


def look(model: nn.Module, x: Tensor | None = None, loss_of: Callable[..., Tensor] = F.cross_entropy) -> Diagnosis:
    """Diagnose, and check that nothing else has changed."""
    images, labels = batch()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    generator, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    found = diagnose(model, images if x is None else x, labels, loss_of)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert not any(p._backward_hooks for p in model.parameters())
    assert "\n" not in found.what
    return found


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (-math.inf, "infinity")])
def test_input_is_looked_at_first(value: float, word: str) -> None:
    x = batch()[0]
    x[3, 1, 2, 5] = value
    assert look(network(), x) == Diagnosis("input", f"the input holds {word}")


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "6.bias"])
def test_broken_weight_is_named_with_the_step_before(name: str) -> None:
    model = network()
    model.get_parameter(name).data.flatten()[1] = math.nan
    assert look(model) == Diagnosis(name, f"{name} holds NaN: the step before overflowed")


def test_running_statistics_count_only_where_they_are_read() -> None:
    model = network()
    model.get_buffer("1.running_var")[2] = math.inf
    assert look(model).where == "nowhere"
    assert look(model.eval()) == Diagnosis("1.running_var", "1.running_var holds infinity: a step before overflowed")


def test_first_module_that_overflows_is_named() -> None:
    model = network(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU())
    model.get_parameter("4.weight").data.fill_(LARGE)
    found = look(model)
    assert found.where == "4"
    assert found.what.startswith("4 (Conv2d) is the first whose output is not finite (its inputs are, up to ")


def test_sum_between_modules_is_its_parents() -> None:
    found = look(network(Joined(LARGE)))
    assert found.where == "4"
    assert found.what.startswith("4 (Joined) is the first whose output is not finite (its inputs are, up to ")


def test_input_made_between_modules_is_told() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 1e30 * 1e30)

    found = look(network(Scaled(nn.ReLU())))
    assert found == Diagnosis(
        "4.0", "4.0 (ReLU) is the first whose output is not finite, from inputs that no module before it returned"
    )


def test_loss_of_finite_outputs_is_told() -> None:
    found = look(network(), loss_of=lambda logits, labels: logits.sum() * math.inf)
    assert found.where == "loss"
    assert found.what.startswith("the loss is ")


def test_first_gradient_that_overflows_is_named() -> None:
    # Backward: 7 (flatten), 6 (pool), 5 (explodes): the output of 4 is the first to get an infinite gradient.
    found = look(network(nn.ReLU(), Exploding()))
    assert found.where == "4"
    assert found.what.startswith("the gradient of the output of 4 (ReLU) is the first that is not finite (those before")


def test_finite_step_is_called_so() -> None:
    found = look(network())
    assert found.where == "nowhere"
    assert "everything is finite" in found.what


@pytest.mark.parametrize("training", [True, False])
def test_layer_within_fused_blocks_is_named(training: bool) -> None:
    model = models.create("resnet18", num_classes=4, fused=True).train(training)
    model.get_parameter("layer2.0.conv1.weight").data.fill_(LARGE)
    assert look(model).what.startswith(
        "layer2.0.conv1 (Conv2d) is the first whose output is not finite (its inputs are, up to "
    )
