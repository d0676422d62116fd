"""3x3 convolutions with dilation in any network: by the phases of their images, where ours compute those."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.compiled import compare
from tests.ops.test_conv3x3 import needs_kernels

pytestmark = needs_kernels


class Dilated(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.first = nn.Conv2d(4, 16, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.conv = nn.Conv2d(16, 16, 3, padding=dilation, dilation=(dilation, dilation))
        self.last = nn.Conv2d(16, 8, 3, padding="same", dilation=dilation)

    def forward(self, x):
        x = F.relu(self.norms[0](self.first(x)))
        return self.last(F.relu(self.norms[1](self.conv(x))))


def operators(make, size=(8, 12), **options):
    how = {"dtype": torch.float32, "layout": "channels_last", "off_zero": True, "conv_algorithm": "winograd"}
    return [dict(report.operators) for report in compare.check(make, [(2, 4, *size)], **how | options)]


@pytest.mark.parametrize(("dilation", "size"), [(2, (8, 12)), (2, (7, 9)), (4, (8, 10))])
def test_values_are_those_of_pytorch(dilation, size):
    training, evaluation = operators(functools.partial(Dilated, dilation), size)
    assert training == {"norm_act_conv3x3": 2}
    assert evaluation == {"batch_norm_act": 1, "conv3x3": 1, "conv3x3_norm_act": 1}


def test_autocast():
    training, _ = operators(functools.partial(Dilated, 2), autocast=torch.bfloat16)
    assert training == {"norm_act_conv3x3": 2}


OTHERS = {
    "two numbers": lambda: nn.Conv2d(4, 16, 3, padding=(2, 3), dilation=(2, 3)),
    "more padding": lambda: nn.Conv2d(4, 16, 3, padding=3, dilation=2),
    "a stride": lambda: nn.Conv2d(4, 16, 3, stride=2, padding=2, dilation=2),
    "groups": lambda: nn.Conv2d(4, 16, 3, padding=2, dilation=2, groups=2),
    "5x5": lambda: nn.Conv2d(4, 16, 5, padding=4, dilation=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay_pytorchs(name):
    reports = compare.check(
        lambda: nn.Sequential(OTHERS[name](), nn.Tanh()), [(2, 4, 12, 12)], dtype=torch.float32,
        layout="channels_last", conv_algorithm="winograd",
    )  # fmt: skip
    assert [report.fused_convolutions for report in reports] == [0, 0]
    assert all(left.reason for report in reports for left in report.left)
