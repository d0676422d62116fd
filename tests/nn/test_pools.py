"""Max poolings of the blocks and stems: which of them are ours, and that every other one is PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from fastres import fuse, models, unfuse
from fastres.nn import PooledBlock
from tests.operators import Operators

OURS = {
    "torchvision's": nn.MaxPool2d(3, 2, 1),
    "pairs": nn.MaxPool2d((2, 2), (2, 2), (0, 0), (1, 1)),
    "a list": nn.MaxPool2d([2, 2]),
    "in steps of one": nn.MaxPool2d(3, 1, 1),
}
OTHERS = {
    "ceiling": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "dilation": nn.MaxPool2d(2, 2, 0, dilation=2),
    "not square": nn.MaxPool2d((2, 3)),
    "one number in a list": nn.MaxPool2d([3], 2, 1),
    "mean": nn.AvgPool2d(2),
    "none": nn.Identity(),
}


class Own(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) + 1


def stem(pool: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=4, stem="imagenet", fused=False).to(memory_format=torch.channels_last)
    model.maxpool = pool
    return model


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def pooled_by(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The operators of ours that pool."""
    with Operators() as operators:
        model(x)
    return [name for name in operators.names if "pool" in name]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_square_windows_are_ours(name, training):
    x, model = images(), fuse(stem(OURS[name])).train(training)
    with torch.set_grad_enabled(training):
        assert pooled_by(model, x) == ["norm_act_max_pool_training" if training else "norm_act_max_pool_inference"]
        torch.testing.assert_close(model(x), unfuse(model)(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_called(name):
    x, model = images(), fuse(stem(OTHERS[name]))
    assert pooled_by(model, x) == []
    torch.testing.assert_close(model(x), unfuse(model)(x), rtol=1e-3, atol=1e-3)


def test_a_subclass_and_a_hooked_pool_are_called():
    assert pooled_by(fuse(stem(Own(3, 2, 1))), images()) == []
    hooked, called = nn.MaxPool2d(3, 2, 1), []
    hooked.register_forward_hook(lambda module, inputs, y: called.append(y.shape))
    assert pooled_by(fuse(stem(hooked)), images()) == [] and called


def test_a_replaced_function_is_called(monkeypatch):
    pytorchs, model, called = nn.functional.max_pool2d, fuse(stem(nn.MaxPool2d(3, 2, 1))), []

    def own(*args, **options):
        called.append(args)
        return pytorchs(*args, **options)

    monkeypatch.setattr(nn.functional, "max_pool2d", own)
    assert pooled_by(model, images()) == [] and called


def test_windows_that_do_not_fit_are_refused_by_pytorch():
    for pool in (nn.MaxPool2d(40), nn.MaxPool2d(3, 2, 2), nn.MaxPool2d(2, 0)):
        with pytest.raises(RuntimeError):
            fuse(stem(pool))(images())
    with pytest.raises(RuntimeError):
        PooledBlock(8, 16)(torch.randn(2, 8, 1, 1))
