"""Modules that were pickled whole by an earlier version, in which fused blocks had children of their own kinds.

Each file of tests/data is what torch.save wrote, compressed: the module in training mode, an input, the seed of the
dropout, and what that version gave for them, all in float64 and with values that compress well.
"""

from __future__ import annotations

import copy
import io
import lzma
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastres.fuse import fuse, fuse_report, unfuse
from fastres.models import ArticleResNet18, FusedResNet18
from fastres.nn import FusedBasicBlock, FusedBatchNormAct2d, FusedBottleneck, ProjectionShortcut, ResidualBlock

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.name.removesuffix(".pt.xz") for path in DATA.glob("*.pt.xz"))
CLASSES = {
    "article_resnet18": ArticleResNet18,
    "basic_block": FusedBasicBlock,
    "batch_norm_act": FusedBatchNormAct2d,
    "batch_norm_act_without_relu": FusedBatchNormAct2d,
    "bottleneck": FusedBottleneck,
    "fused_layer_getter": torch.nn.ModuleDict,
    "fused_resnet18": FusedResNet18,
    "fused_torchvision_resnet": ResNet,
    "projection_shortcut": ProjectionShortcut,
    "residual_block": ResidualBlock,
}


def load(name):
    data = lzma.decompress((DATA / f"{name}.pt.xz").read_bytes())
    return torch.load(io.BytesIO(data), weights_only=False)


def output(y):
    return y["out"] if isinstance(y, dict) else y


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def check(module, saved):
    """Training, what it left in the statistics, and the gradients are those that were saved."""
    torch.manual_seed(saved["seed"])
    y = output(module.train()(saved["input"]))
    same(y.detach(), saved["training"])
    y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape))
    same(torch.stack([p.grad.square().sum() for p in module.parameters()]), saved["gradient_sums"])
    with torch.no_grad():
        same(output(module.eval()(saved["input"])), saved["evaluation"])


def test_every_file_is_known():
    assert sorted(CLASSES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_module_pickled_whole_by_an_earlier_version_gives_what_it_gave(name):
    saved = load(name)
    assert isinstance(saved["module"], CLASSES[name])
    check(saved["module"], saved)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_one_of_todays_modules_and_can_be_saved_again(name):
    saved = load(name)
    file = io.BytesIO()
    torch.save(saved["module"], file)
    file.seek(0)
    check(torch.load(file, weights_only=False), saved)
    check(copy.deepcopy(load(name)["module"]), saved)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("fused_torchvision_resnet", "fused_layer_getter")])
def test_it_takes_the_fused_steps(name):
    module = load(name)["module"]
    report = fuse_report(module)
    assert report.swapped
    assert not report.left


def test_blocks_hold_torchs_modules_and_the_rate_that_their_normalisation_had():
    rates = {"basic_block": 0.3, "bottleneck": 0.2, "residual_block": 0.4}
    for name, rate in rates.items():
        block = load(name)["module"]
        assert block.dropout == rate
        assert block.conv_algorithm == ("winograd" if name == "basic_block" else None)
        types = {type(m) for m in block.modules() if not [*m.children()]}
        assert types == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU}
    assert type(load("basic_block")["module"].downsample) is nn.Sequential


@pytest.mark.parametrize("name", ["fused_torchvision_resnet", "fused_layer_getter", "projection_shortcut"])
@pytest.mark.parametrize("way", [unfuse, lambda module: fuse(unfuse(module)), fuse])
def test_fused_and_unfused_it_gives_the_same(name, way):
    saved = load(name)
    check(way(saved["module"]), saved)


def test_unfused_its_blocks_are_torchvisions():
    plain = unfuse(load("fused_torchvision_resnet")["module"])
    assert {type(m) for m in plain.modules() if isinstance(m, BasicBlock)} == {BasicBlock}
