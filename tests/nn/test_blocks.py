from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from fastres import reference
from fastres.fuse import fuse, unfuse
from fastres.nn import (
    DropoutBasicBlock,
    DropoutBottleneck,
    FusedBasicBlock,
    FusedBatchNormAct2d,
    FusedBottleneck,
    ProjectionShortcut,
    ResidualBlock,
    SkipConnection,
)
from tests.parity import DTYPES, FORMATS, close, same_training, scramble, twin

KINDS = [(FusedBasicBlock, BasicBlock), (FusedBottleneck, Bottleneck)]
PLAIN_WITH_DROPOUT = {FusedBasicBlock: DropoutBasicBlock, FusedBottleneck: DropoutBottleneck}
IN = 8


def downsample(kind, stride, planes):
    if kind == "none":
        return None
    if kind == "projection":
        return nn.Sequential(conv1x1(IN, planes, stride), nn.BatchNorm2d(planes))
    return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), conv1x1(IN, planes), nn.BatchNorm2d(planes))


def pair(fused, plain, *, shortcut="none", stride=1, dtype=torch.float64, planes=None, **options):
    """A fused block and torchvision's, with the same state."""
    torch.manual_seed(0)
    planes = planes or (IN // plain.expansion)
    blocks = [
        cls(IN, planes, stride, downsample(shortcut, stride, planes * plain.expansion), **options)
        for cls in (fused, plain)
    ]
    scramble(blocks[0])
    blocks[1].load_state_dict(blocks[0].state_dict())
    return [b.to(dtype) for b in blocks]


def inputs(dtype=torch.float64, memory_format=torch.channels_last, size=5, channels=IN):
    generator = torch.Generator().manual_seed(2)

    def make():
        x = torch.randn(4, channels, size, size, generator=generator, dtype=torch.float64)
        return x.to(dtype).contiguous(memory_format=memory_format)

    return make


@pytest.mark.parametrize(("fused", "plain"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shortcut", "stride"), [("none", 1), ("projection", 1), ("projection", 2), ("pooled", 2)])
def test_a_fused_block_trains_as_that_of_torchvision(fused, plain, dtype, memory_format, shortcut, stride):
    actual, expected = pair(fused, plain, shortcut=shortcut, stride=stride, dtype=dtype)
    kept = {"none": type(None), "projection": ProjectionShortcut, "pooled": nn.Sequential}
    assert type(actual.downsample) is kept[shortcut]
    same_training(actual, expected, inputs(dtype, memory_format), steps=2, times=8)


def test_groups_width_and_dilation_reach_the_convolutions():
    actual, expected = pair(FusedBottleneck, Bottleneck, groups=2, base_width=128, dilation=2)
    assert actual.conv2.groups == 2
    assert actual.conv2.dilation == (2, 2)
    same_training(actual, expected, inputs(), steps=1, times=8)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_a_norm_layer_with_other_constants_is_kept(fused, plain):
    actual, expected = pair(fused, plain, norm_layer=partial(nn.BatchNorm2d, eps=0.2, momentum=0.5))
    assert actual.bn1.eps == 0.2
    same_training(actual, expected, inputs(), steps=2, times=8)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_a_norm_layer_of_another_kind_is_refused(fused, plain):
    with pytest.raises(TypeError, match=r"norm_layer: expected .* torch\.nn\.BatchNorm2d, got GroupNorm for bn1"):
        fused(IN, IN, norm_layer=partial(nn.GroupNorm, 1))


@pytest.mark.parametrize("cls", [*PLAIN_WITH_DROPOUT, *PLAIN_WITH_DROPOUT.values(), ResidualBlock])
@pytest.mark.parametrize("dropout", [1.0, -0.5])
def test_a_dropout_rate_outside_its_range_is_refused(cls, dropout):
    with pytest.raises(ValueError, match="dropout: expected 0 <= dropout < 1"):
        cls(IN, IN, dropout=dropout)


@pytest.mark.parametrize("some", [("bn1",), ("bn2",), ("downsample",), ("bn1", "bn2", "downsample")])
@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_frozen_normalisations_stay_frozen(fused, plain, some):
    blocks = pair(fused, plain, shortcut="projection", stride=2)
    for block in blocks:
        for name in some:
            getattr(block, name).eval()
    same_training(*blocks, inputs(), steps=2, times=8)


def branch(block, x, drop):
    """The block's last convolution and what leads to it, in torch's words; `drop` stands before that convolution."""
    names = ["1", "2"] if isinstance(block, (BasicBlock, ResidualBlock)) else ["1", "2", "3"]
    for n in names:
        x = drop(x) if n == names[-1] else x
        x = getattr(block, f"conv{n}")(x)
        norm = getattr(block, f"bn{n}")
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        x = x if n == names[-1] else F.relu(x)
    return x


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_dropout_stands_before_the_last_convolution(fused, plain):
    block, _ = pair(fused, plain)
    actual = PLAIN_WITH_DROPOUT[fused](IN, IN // plain.expansion, dropout=0.4).double()
    actual.load_state_dict(block.state_dict())
    getattr(block, block.dropout_norm).dropout = 0.4
    x = inputs()()

    def drop(z):
        return torch.where(reference.dropout_keep(z.shape, reference.draw_seed(z.device), 0.4), z / 0.6, 0)

    for module, rule in ((block, drop), (actual, partial(F.dropout, p=0.4))):
        torch.manual_seed(3)
        expected = F.relu(branch(module, x, rule) + x)
        torch.manual_seed(3)
        close(module(x), expected, x.numel(), times=8)


@pytest.mark.parametrize("cls", [*PLAIN_WITH_DROPOUT, *PLAIN_WITH_DROPOUT.values(), ResidualBlock])
def test_freezing_the_normalisations_does_not_stop_the_dropout(cls):
    planes = IN if cls is ResidualBlock else IN // cls.expansion
    block, x = cls(IN, planes, dropout=0.5), inputs(torch.float32)()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(block(x), block(x))
    block.eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    # The other way round: statistics may be adapted at test time without dropping anything.
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize(("fused", "plain"), KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_unfuse_and_fuse_of_a_block_are_each_others_inverse(fused, plain, dropout):
    block = fused(IN, IN // plain.expansion, dropout=dropout)
    back = unfuse(block)
    assert type(back) is (PLAIN_WITH_DROPOUT[fused] if dropout else plain)
    assert repr(back) == repr(type(back)(IN, IN // plain.expansion, **({"dropout": dropout} if dropout else {})))
    assert repr(fuse(back)) == repr(block)
    assert fuse(back).__dict__.keys() == block.__dict__.keys()


def article_block(block, x, drop):
    """The article's block in torch's words."""
    out = F.conv2d(x, block.conv1.weight, stride=block.conv1.stride, padding=1)
    out = drop(F.relu(F.batch_norm(out, None, None, block.bn1.weight, block.bn1.bias, training=True)))
    if isinstance(block.shortcut, SkipConnection):
        conv, norm = block.shortcut
        x = F.conv2d(x, conv.weight, stride=conv.stride)
        x = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))
    out = F.conv2d(out + x, block.conv2.weight, padding=1)
    return F.batch_norm(out, None, None, block.bn2.weight, block.bn2.bias, training=True)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("out", "stride"), [(IN, 1), (12, 1), (IN, 2), (12, 2)])
def test_a_residual_block_adds_before_its_second_convolution(memory_format, fused, out, stride):
    torch.manual_seed(0)
    block = scramble(ResidualBlock(IN, out, stride, dropout=0.0)).double()
    assert isinstance(block.shortcut, nn.Identity) == (out == IN and stride == 1)
    if not fused:
        block = unfuse(block)
    other = twin(block)
    x = inputs(memory_format=memory_format)().requires_grad_()
    x2 = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, expected = block(x), article_block(other, x2, lambda z: z)
    close(y, expected, x.numel(), times=8)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    close(x.grad, x2.grad, x.numel(), "input gradient", times=8)
    for (name, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
        close(p.grad, q.grad, x.numel(), name, times=8)


def test_the_dropout_of_a_residual_block_stands_before_the_addition():
    block = scramble(ResidualBlock(IN, IN, dropout=0.4)).double()
    x = inputs()()

    def drop(z):
        return torch.where(reference.dropout_keep(z.shape, reference.draw_seed(z.device), 0.4), z / 0.6, 0)

    torch.manual_seed(3)
    expected = article_block(block, x, drop)
    torch.manual_seed(3)
    close(block(x), expected, x.numel(), times=8)


def test_a_residual_block_has_a_normalisation_for_each_convolution():
    block = ResidualBlock(IN, 12, 2)
    assert block.expansion == 1
    assert block.bn1.dropout == 0.5
    assert len({id(p) for m in block.modules() if isinstance(m, FusedBatchNormAct2d) for p in m.parameters(False)}) == 6


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [
    lambda: pair(FusedBasicBlock, BasicBlock, shortcut="projection", stride=2, dtype=torch.float32)[0],
    lambda: pair(FusedBottleneck, Bottleneck, dtype=torch.float32)[0],
    lambda: ResidualBlock(IN, 12, 2),
])  # fmt: skip
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, make):
    block = make()
    for module in block.modules():
        if isinstance(module, FusedBatchNormAct2d) and module.relu:
            module.dropout = 0.3
    other = twin(block)
    results = []
    for module, wrapped in ((block, False), (other, True)):
        x = inputs(torch.float32)().requires_grad_()
        torch.manual_seed(4)
        y = checkpoint(module, x, use_reentrant=use_reentrant) if wrapped else module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
