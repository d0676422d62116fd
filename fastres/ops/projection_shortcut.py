"""projection_shortcut: the strided 1x1 convolution of a residual network's shortcut, as a GEMM over gathered rows.

    product[n, k, i, j] = sum_c weight[k, c] * s[n, c, i * stride, j * stride]

In training the mean and M2 of the product, a channel each, are taken while its rows are still in cache; batch_norm_act
then takes the raw product with these statistics and never reads it to measure it. In evaluation everything up to the
activation is one pass, and the product is never written. The statistics are those of the product as it is stored, since
that is what batch_norm_act normalises.

csrc/cpu serves CPU tensors, csrc/cuda CUDA tensors, each compiled and loaded when the first such tensor comes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import contract
from fastres.ops import fallback
from fastres.ops.arguments import Ints2, Needs2
from fastres.ops.formulas import convolution_gradients
from fastres.ops.library import convolution_flops, define, needs_plain_formula, restored

# ------------------------------------------------------------------------------------------------------- fake kernels


def _empty_product(s: Tensor, weight: Tensor, stride: Ints2) -> Tensor:
    return fallback.empty_output(s, weight.shape[0], stride, contract.memory_format(s))


def _fake_forward(s: Tensor, weight: Tensor, stride: Ints2, statistics: bool) -> tuple[Tensor, ...]:
    size, dtype = weight.shape[0] if statistics else 0, contract.statistics_dtype(s.dtype)
    return _empty_product(s, weight, stride), *(s.new_empty(size, dtype=dtype) for _ in range(2))


def _fake_backward(s: Tensor, weight: Tensor, needs: Needs2, **_: Any) -> tuple[Tensor, Tensor]:
    ds = torch.empty_like(s) if needs[0] else s.new_empty(0)
    return ds, torch.empty_like(weight) if needs[1] else weight.new_empty(0)


def _fake_inference(s: Tensor, conv_weight: Tensor, stride: Ints2, **_: Any) -> Tensor:
    return _empty_product(s, conv_weight, stride)


# ---------------------------------------------------------------------------------------------------------- operators

forward = define(
    "projection_shortcut_forward",
    fallback.projection_shortcut_forward,
    "(Tensor product, Tensor mean, Tensor m2)",
    fake=_fake_forward,
    function="projection_shortcut",
    flops=lambda weight, out_shape, **_: convolution_flops(out_shape[0], weight),
    compiled_for=("cpu", "cuda"),
)

backward = define(
    "projection_shortcut_backward",
    fallback.projection_shortcut_backward,
    "(Tensor ds, Tensor dweight)",
    fake=_fake_backward,
    function="projection_shortcut",
    flops=lambda dproduct, weight, needs, **_: convolution_flops(dproduct, weight, sum(needs)),
    compiled_for=("cpu", "cuda"),
)

inference = define(
    "projection_shortcut_inference",
    fallback.projection_shortcut_inference,
    "Tensor",
    fake=_fake_inference,
    function="projection_shortcut",
    flops=lambda conv_weight, out_shape, **_: convolution_flops(out_shape, conv_weight),
    compiled_for=("cpu", "cuda"),
)

# ----------------------------------------------------------------------------------------------------------- autograd


class Projection(torch.autograd.Function):
    """(product, mean, M2) of the strided 1x1 convolution.

    Only the product is differentiable: that the statistics depend on it is part of batch_norm_act's own backward.
    """

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, weight: Tensor, stride: tuple[int, int], statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        product, mean, m2 = forward(s, weight, stride, statistics)
        ctx.save_for_backward(s, weight)
        ctx.stride, ctx.memory_format, ctx.weight_strides = stride, contract.memory_format(s), weight.stride()
        ctx.mark_non_differentiable(mean, m2)
        # Otherwise autograd makes zeros as gradients of the statistics, a launch each.
        ctx.set_materialize_grads(False)
        return product, mean, m2

    @staticmethod
    def backward(ctx: Any, dproduct: Tensor | None, *_: Any) -> Any:
        if dproduct is None:
            return None, None, None, None
        s, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if needs_plain_formula(dproduct):
            return *convolution_gradients(dproduct, s, weight, ctx.stride, needs), None, None
        s, dproduct = (t.contiguous(memory_format=ctx.memory_format) for t in (s, dproduct))
        ds, dweight = backward(dproduct, s, restored(weight, ctx.weight_strides), ctx.stride, needs)
        return ds if needs[0] else None, dweight if needs[1] else None, None, None
