"""grouped_conv: 3x3, 5x5 and 7x7 convolutions of stride 1 or 2 in groups of few channels, or of single ones
(depthwise), with padding of half the kernel and no bias.

    y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, first(k) + c, stride * i + u - p, stride * j + v - p]

first(k) is the first channel of the group of k, and p half the kernel. A direct sum: csrc/cpu keeps a tile of outputs
in registers and reads weights packed by vectors of a group's outputs. It serves float32 and bfloat16 on processors with
AVX2 or AVX-512, groups of 1, of 4, and of multiples of 8 channels; everything else is PyTorch's convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres.ops import fallback
from fastres.ops.conv3x3 import fake_backward, fake_forward
from fastres.ops.formulas import convolution_gradients
from fastres.ops.library import (
    convolution_flops,
    define,
    in_strides_of,
    needs_plain_formula,
    restored,
)

# ---------------------------------------------------------------------------------------------------------- operators

forward = define(
    "grouped_conv_forward",
    fallback.grouped_conv_forward,
    "(Tensor y, Tensor mean, Tensor m2)",
    fake=fake_forward,
    function="grouped_conv2d",
    flops=lambda weight, out_shape, **_: convolution_flops(out_shape[0], weight),
)

backward = define(
    "grouped_conv_backward",
    fallback.grouped_conv_backward,
    "(Tensor dx, Tensor dweight)",
    fake=fake_backward,
    function="grouped_conv2d",
    # PyTorch's counter takes the weight's gradient for that of a convolution in one group.
    flops=lambda dy, x, weight, needs, **_: convolution_flops(dy, weight, needs[0] + needs[1] * x[1] // weight[1]),
)

# ----------------------------------------------------------------------------------------------------------- autograd


class GroupedConv(torch.autograd.Function):
    """(y, mean, M2): y channels_last, its statistics (not differentiable; that they depend on y is part of
    batch_norm_act's own backward). Saved for backward: x and the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, statistics: bool, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.weight_strides, ctx.stride = weight.stride(), stride
        y, mean, m2 = forward(x, weight, statistics, stride)
        ctx.mark_non_differentiable(mean, m2)
        return y, mean, m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _mean: None, _m2: None) -> Any:
        needs = ctx.needs_input_grad[:2]
        x, weight = ctx.saved_tensors
        if needs_plain_formula(dy):
            return *convolution_gradients(dy, x, weight, [ctx.stride, ctx.stride], needs), None, None
        x, weight = x.contiguous(memory_format=torch.channels_last), restored(weight, ctx.weight_strides)
        dx, dweight = backward(dy, x, weight, needs, ctx.stride)
        return dx if needs[0] else None, in_strides_of(weight, dweight) if needs[1] else None, None, None
