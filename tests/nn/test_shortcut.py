from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune
from torchvision.ops import FrozenBatchNorm2d

from fastres import contract
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.nn import (
    BatchNormAct2d,
    FusedBatchNormAct2d,
    PlainSkipConnection,
    ProjectionShortcut,
    SkipConnection,
    steps,
)
from tests.parity import DTYPES, FORMATS, close, same_training, scramble, twin

# With fewer inputs of a strided 1x1 convolution, plain PyTorch's oneDNN writes past its memory in channels_last.
IN, OUT = 17, 7


@pytest.fixture
def calls(monkeypatch):
    """How often the operator that does it all in one step was called."""
    counted = []
    original = steps.shortcut_act

    def spy(*args, **kwargs):
        counted.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(steps, "shortcut_act", spy)
    return counted


class End(nn.Module):
    """The end of a block: x comes from a convolution of s, so one input feeds both branches."""

    def __init__(self, shortcut, norm, stride):
        super().__init__()
        self.conv = nn.Conv2d(IN, OUT, 3, stride=stride, padding=1, bias=False)
        self.shortcut, self.norm = shortcut, norm

    def forward(self, s):
        return self.shortcut(s, self.conv(s), self.norm)


class PlainEnd(End):
    def forward(self, s):
        return F.relu(self.norm(self.conv(s)) + self.shortcut(s))


def pair(stride, dtype=torch.float64, norm=FusedBatchNormAct2d):
    torch.manual_seed(0)
    actual = scramble(End(ProjectionShortcut(IN, OUT, stride), norm(OUT), stride)).to(dtype)
    plain = nn.Sequential(nn.Conv2d(IN, OUT, 1, stride=stride, bias=False), nn.BatchNorm2d(OUT))
    expected = PlainEnd(plain, nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(OUT))), stride).to(dtype)
    expected.load_state_dict(
        {name.replace("norm.", "norm.norm."): value for name, value in actual.state_dict().items()}
    )
    return actual, expected


def inputs(dtype=torch.float64, memory_format=torch.channels_last, size=(6, 5)):
    generator = torch.Generator().manual_seed(1)

    def make():
        x = torch.randn(3, IN, *size, generator=generator, dtype=torch.float64)
        return x.to(dtype).contiguous(memory_format=memory_format)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_closing_a_block_is_both_normalisations_the_sum_and_relu(dtype, memory_format, stride, calls):
    actual, expected = pair(stride, dtype)
    same_training(actual, expected, inputs(dtype, memory_format), steps=2)
    assert len(calls) == 3


@pytest.mark.parametrize("frozen", ["shortcut", "norm", "both"])
def test_a_frozen_normalisation_keeps_its_statistics_on_either_side(frozen, calls):
    actual, expected = pair(2)
    for end in (actual, expected):
        if frozen != "norm":
            end.shortcut[1].eval()
        if frozen != "shortcut":
            end.norm.eval()
    same_training(actual, expected, inputs(), steps=2)
    assert actual.shortcut[1].num_batches_tracked == (2 if frozen == "norm" else 0)
    assert actual.norm.num_batches_tracked == (2 if frozen == "shortcut" else 0)
    # The evaluation at the end is one step again.
    assert len(calls) == (3 if frozen == "both" else 1)


def test_only_one_side_may_be_without_running_statistics():
    actual, expected = pair(1)
    for end in (actual, expected):
        end.shortcut[1] = nn.BatchNorm2d(OUT, track_running_stats=False, dtype=torch.float64)
    same_training(actual, expected, inputs(), steps=2)


def test_momentum_none_counts_batches_on_both_sides():
    actual, expected = pair(1)
    for end in (actual, expected):
        end.shortcut[1].momentum = end.norm.norm.momentum = None
    same_training(actual, expected, inputs(), steps=3)


def test_alone_it_is_the_downsample_of_torchvision():
    torch.manual_seed(0)
    actual = scramble(ProjectionShortcut(IN, OUT, 2)).double()
    expected = nn.Sequential(nn.Conv2d(IN, OUT, 1, stride=2, bias=False), nn.BatchNorm2d(OUT)).double()
    expected.load_state_dict(actual.state_dict())
    same_training(actual, expected, inputs(), steps=2)


def test_the_plain_twin_of_the_normalisation_gives_the_same(calls):
    actual, expected = pair(2, norm=BatchNormAct2d)
    same_training(actual, expected, inputs(), steps=2)
    assert not calls


def test_a_hook_on_the_convolution_still_runs():
    actual, expected = pair(2)
    seen = []
    actual.shortcut[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    same_training(actual, expected, inputs(), steps=1)
    assert len(seen) == 2


def test_dropout_of_the_normalisation_comes_last_and_in_training_only():
    actual, plain = pair(2)
    actual.norm.dropout = 0.25
    s = inputs()()
    torch.manual_seed(5)
    y = actual(s)
    torch.manual_seed(5)
    expected = plain(s)
    keep = contract.dropout_keep(expected.shape, contract.draw_seed(s.device), 0.25)
    close(y, torch.where(keep, expected / 0.75, 0), s.numel())
    close(actual.eval()(s), plain.eval()(s), s.numel())


def test_a_pruned_convolution_stays_pruned():
    actual, expected = pair(2)
    for end in (actual, expected):
        torch.nn.utils.prune.l1_unstructured(end.shortcut[0], "weight", amount=0.5)
    same_training(actual, expected, inputs(), steps=2)
    assert (actual.shortcut[0].weight == 0).sum() == (OUT * IN + 1) // 2


def test_a_stride_that_is_changed_later_counts():
    actual, expected = pair(2)
    for end in (actual, expected):
        end.conv.stride = end.shortcut[0].stride = (1, 2)
    same_training(actual, expected, inputs(), steps=1)


def test_order_act_add_is_honoured():
    actual, _ = pair(1)
    actual.norm.order = "act_add"
    s = inputs()()
    other = twin(actual)
    expected = F.relu(F.batch_norm(other.conv(s), None, None, other.norm.weight, other.norm.bias, True))
    close(actual(s), expected + other.shortcut(s), s.numel())


def test_x_and_norm_come_together():
    shortcut, s = ProjectionShortcut(IN, OUT), torch.randn(2, IN, 4, 4)
    with pytest.raises(TypeError, match="expected both or neither, got x without the other"):
        shortcut(s, shortcut(s))
    with pytest.raises(TypeError, match="expected both or neither, got norm without the other"):
        shortcut(s, norm=FusedBatchNormAct2d(OUT))


@pytest.mark.parametrize(
    ("conv", "norm", "message"),
    [
        (nn.Conv2d(IN, OUT, 1), nn.BatchNorm2d(OUT), "its convolution has a bias"),
        (nn.Conv2d(IN, OUT, 3, padding=1, bias=False), nn.BatchNorm2d(OUT), "is not a 1x1 convolution"),
        (nn.Conv2d(IN, OUT, 1, padding=1, bias=False), nn.BatchNorm2d(OUT), "is not a 1x1 convolution"),
        (nn.Conv2d(IN, IN, 1, groups=IN, bias=False), nn.BatchNorm2d(IN), "is not a 1x1 convolution"),
        (nn.Conv2d(IN, OUT, 1, bias=False), nn.GroupNorm(1, OUT), "its 1 is torch.nn.GroupNorm, expected exactly"),
        (nn.Conv2d(IN, OUT, 1, bias=False), FrozenBatchNorm2d(OUT), "its 1 is torchvision.ops.misc.FrozenBatchNorm2d"),
        (nn.Identity(), nn.BatchNorm2d(IN), "its 0 is torch.nn.Identity, expected exactly torch.nn.Conv2d"),
    ],
)
@pytest.mark.parametrize("cls", [ProjectionShortcut, SkipConnection])
def test_with_children_of_another_kind_it_calls_them(conv, norm, message, cls, calls):
    shortcut = cls(IN, OUT)
    shortcut[0], shortcut[1] = conv, norm
    s = torch.randn(2, IN, 6, 5)
    expected = twin(nn.Sequential(*shortcut))
    assert re.search(message, fuse_report(shortcut).left[""])
    assert torch.equal(shortcut(s), expected(s))
    if cls is ProjectionShortcut:
        y = expected(s)
        x, last = torch.randn(y.shape), FusedBatchNormAct2d(y.shape[1])
        torch.testing.assert_close(shortcut(s, x, last), F.relu(twin(last).norm(x) + expected(s)))
    assert not calls


@pytest.mark.parametrize("cls", [ProjectionShortcut, SkipConnection])
def test_a_child_more_is_called_as_well(cls, calls):
    shortcut = cls(IN, OUT).append(nn.Softplus())
    s = torch.randn(2, IN, 6, 5)
    assert "it has the children" in fuse_report(shortcut).left[""]
    assert torch.equal(shortcut(s), nn.Sequential(*twin(shortcut))(s))
    assert not calls


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_skip_connection_is_convolution_normalisation_and_relu(memory_format, stride, calls):
    torch.manual_seed(0)
    actual = scramble(SkipConnection(IN, OUT, stride)).double()
    conv = nn.Conv2d(IN, OUT, 1, stride=stride, bias=False)
    expected = nn.Sequential(conv, nn.BatchNorm2d(OUT), nn.ReLU()).double()
    expected.load_state_dict(actual.state_dict())
    same_training(actual, expected, inputs(memory_format=memory_format), steps=2)
    assert len(calls) == 3


def test_a_hooked_skip_connection_gives_the_same():
    torch.manual_seed(0)
    actual = scramble(SkipConnection(IN, OUT, 2)).double()
    expected = twin(actual)
    seen = []
    actual[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    same_training(actual, expected, inputs(), steps=1)
    assert len(seen) == 2


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("weights", FORMATS)
def test_a_skip_connection_leaves_the_memory_format_of_its_plain_twin(memory_format, weights):
    skip = SkipConnection(IN, OUT, 2).to(memory_format=weights)
    plain = unfuse(skip)
    assert type(plain) is PlainSkipConnection
    assert type(fuse(plain)) is SkipConnection
    s = inputs(torch.float32, memory_format)()
    assert skip(s).stride() == plain(s).stride()
