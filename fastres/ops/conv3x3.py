"""conv3x3: the 3x3 convolution of stride 1 or 2, padding 1, one group and no bias, by Winograd's algorithm on the CPU.

    y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, c, stride * i + u - 1, stride * j + v - 1]

In training the batch statistics of y are taken while its tiles are in registers, for the normalisation that follows; in
evaluation that normalisation, a residual and the activation are applied there, and nothing else is written. In backward
a gradient that reaches x on another way is added where the convolution's own is written.

Each 4x4 tile of outputs takes 36 multiplications a pair of channels instead of 144, with stride 2 it takes 81;
transforming tiles and weights takes part of that back, so there is a cost model (`fastres.ops.algorithms`). csrc/cpu
serves float32 and bfloat16 tensors on processors with AVX2 or AVX-512; everything else is PyTorch's convolution.
docs/convolution.md has the error figures.

Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import contract
from fastres.ops import fallback
from fastres.ops.arguments import Needs2
from fastres.ops.formulas import convolution_gradients
from fastres.ops.library import (
    convolution_flops,
    define,
    in_strides_of,
    needs_plain_formula,
    restored,
)

# ------------------------------------------------------------------------------------------------------- fake kernels


def fake_forward(x: Tensor, weight: Tensor, statistics: bool, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, M2) of the convolution, uninitialised."""
    size = weight.shape[0] if statistics else 0
    mean, m2 = (x.new_empty(size, dtype=contract.statistics_dtype(x.dtype)) for _ in range(2))
    return fallback.empty_output(x, weight.shape[0], (stride, stride), torch.channels_last), mean, m2


def fake_backward(x: Tensor, weight: Tensor, needs: Needs2, **_: Any) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of the convolution, uninitialised."""
    return fallback.empty_gradients(x, weight, needs, torch.channels_last)


def _fake_inference(x: Tensor, conv_weight: Tensor, stride: int, **_: Any) -> Tensor:
    return fallback.empty_output(x, conv_weight.shape[0], (stride, stride), torch.channels_last)


# ---------------------------------------------------------------------------------------------------------- operators

forward = define(
    "conv3x3_forward",
    fallback.conv3x3_forward,
    "(Tensor y, Tensor mean, Tensor m2)",
    fake=fake_forward,
    function="conv3x3",
    flops=lambda weight, out_shape, **_: convolution_flops(out_shape[0], weight),
)

backward = define(
    "conv3x3_backward",
    fallback.conv3x3_backward,
    "(Tensor dx, Tensor dweight)",
    fake=fake_backward,
    function="conv3x3",
    flops=lambda dy, weight, needs, **_: convolution_flops(dy, weight, sum(needs)),
)

inference = define(
    "conv3x3_inference",
    fallback.conv3x3_inference,
    "Tensor",
    fake=_fake_inference,
    function="conv3x3",
    flops=lambda conv_weight, out_shape, **_: convolution_flops(out_shape, conv_weight),
)

# ----------------------------------------------------------------------------------------------------------- autograd


class Conv3x3(torch.autograd.Function):
    """(y, mean, M2, x): y channels_last, its statistics (not differentiable; that they depend on y is part of
    batch_norm_act's own backward), and x for every other use of it. Saved for backward: x and the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, statistics: bool, stride: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.weight_strides, ctx.stride = weight.stride(), stride
        y, mean, m2 = forward(x, weight, statistics, stride)
        ctx.mark_non_differentiable(mean, m2)
        # Otherwise autograd makes zeros where x has no other use.
        ctx.set_materialize_grads(False)
        return y, mean, m2, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _mean: None, _m2: None, added: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[:2]
        if dy is None:
            return added, None, None, None
        x, weight = ctx.saved_tensors
        if needs_plain_formula(dy):
            dx, dweight = convolution_gradients(dy, x, weight, [ctx.stride, ctx.stride], needs)
            return dx if dx is None or added is None else dx + added, dweight, None, None
        x, weight = x.contiguous(memory_format=torch.channels_last), restored(weight, ctx.weight_strides)
        dx, dweight = backward(dy, x, weight, added, needs, ctx.stride)
        return dx if needs[0] else None, in_strides_of(weight, dweight) if needs[1] else None, None, None
