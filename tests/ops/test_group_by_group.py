"""3x3 convolutions in groups of many channels, by Winograd's algorithm group by group: values, statistics and gradients
against float64, and where it is taken."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import fastres
from fastres import functional, reference
from fastres.nn import FusedBottleneck
from tests.ops.test_grouped_conv import check, data, needs_kernels
from tests.oracle import LAYOUTS, form_of, input_length, output_length, weight_length

# groups, and inputs and outputs of each; images, height, width
WIDTHS = [(2, 8, 8), (3, 16, 24), (2, 40, 16), (5, 8, 16), (2, 64, 64)]
SIZES = [(2, 8, 8), (3, 7, 9), (1, 1, 1), (2, 10, 10), (1, 13, 4)]
widths = pytest.mark.parametrize("width", WIDTHS, ids=lambda w: "x".join(map(str, w)))
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
strides = pytest.mark.parametrize("stride", [1, 2])


def check_winograd(width: tuple[int, int, int], x: Tensor, weight: Tensor, dy: Tensor, stride: int) -> None:
    """`check`, with the errors of Winograd's algorithm."""
    _, inputs, outputs = width
    form = form_of(x, stride)
    lengths = output_length(inputs, form), input_length(outputs, form), weight_length(x, stride)
    check(x, weight, dy, stride, "winograd", lengths)


@needs_kernels
@widths
@sizes
@strides
def test_values_and_gradients_are_those_of_float64(width, size, stride):
    for layout in LAYOUTS:
        check_winograd(width, *data(width, size, stride=stride, layout=layout), stride)


@needs_kernels
@widths
@strides
def test_values_and_gradients_in_bfloat16_are_those_of_float64(width, stride):
    check_winograd(width, *data(width, (2, 7, 9), stride=stride, dtype=torch.bfloat16), stride)


@pytest.mark.parametrize("width", [(6, 4, 4), (8, 1, 1), (2, 9, 9)], ids=str)
def test_narrow_groups_are_pytorchs(width):
    x, weight, _ = data(width, (2, 7, 6))
    assert torch.equal(functional.grouped_conv2d(x, weight, algorithm="winograd"), reference.grouped_conv2d(x, weight))
    assert functional.grouped_conv2d_with_statistics(x, weight, algorithm="winograd").statistics is None


@pytest.mark.parametrize("kernel", [5, 7])
def test_larger_kernels_are_pytorchs(kernel):
    x, weight, _ = data((2, 16, 16), (2, 9, 9), kernel)
    y = functional.grouped_conv2d(x, weight, algorithm="winograd")
    assert torch.equal(y, reference.grouped_conv2d(x, weight))


@pytest.mark.parametrize("training", [True, False])
def test_a_bottleneck_of_wide_groups_agrees_with_float64(training):
    torch.manual_seed(1)
    block = FusedBottleneck(128, 32, groups=2, base_width=96, conv_algorithm="winograd").train(training)
    assert block.conv2.weight.shape[1] == 48
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    exactly = copy.deepcopy(block).double()
    x = torch.randn(3, 128, 9, 10).contiguous(memory_format=torch.channels_last)
    y, wanted = block(x), exactly(x.double())
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-5 * float(wanted.detach().abs().max()))


def test_a_frozen_one_agrees_with_float64():
    torch.manual_seed(1)
    block = FusedBottleneck(128, 32, groups=2, base_width=96, conv_algorithm="winograd").eval()
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    frozen = fastres.freeze(block)
    x = torch.randn(2, 128, 12, 11)
    with torch.no_grad():
        wanted = block.double()(x.double())
        torch.testing.assert_close(frozen(x).double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
