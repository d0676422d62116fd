"""projection_shortcut: the strided 1x1 convolution of a residual network's shortcut, as a GEMM over gathered rows.

    product[n, k, i, j] = sum_c weight[k, c] * s[n, c, i * stride, j * stride]

In training the mean and M2 of the product, a channel each, are taken while its rows are still in cache;
batch_norm_act then takes the raw product with these statistics and never reads it to measure it. In evaluation
everything up to the ReLU is one pass, and the product is never written. The statistics are those of the product as it
is stored, since that is what batch_norm_act normalises.

csrc/cpu serves CPU tensors, csrc/cuda CUDA tensors, each compiled and loaded when the first such tensor comes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import reference
from fastres.ops.library import convolution_flops, convolution_gradients, define, restored, takes_plain_formula


def output_size(size: int, stride: int) -> int:
    """Output positions of a 1x1 convolution without padding along one axis."""
    return (size - 1) // stride + 1


def _empty_product(s: Tensor, weight: Tensor, stride: list[int]) -> Tensor:
    n, _, h, w = s.shape
    shape = (n, weight.shape[0], output_size(h, stride[0]), output_size(w, stride[1]))
    return torch.empty(shape, dtype=s.dtype, device=s.device, memory_format=reference.memory_format(s))


def _forward_fallback(s: Tensor, weight: Tensor, stride: list[int], statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    product = _empty_product(s, weight, stride)
    product.copy_(F.conv2d(s, weight, stride=stride))
    if not statistics:
        none = product.new_empty(0, dtype=reference.statistics_dtype(s.dtype))
        return product, none, none.clone()
    _, mean, m2 = reference.stats(product)
    return product, mean, m2


def _forward_fake(s: Tensor, weight: Tensor, stride: list[int], statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    vectors = [
        s.new_empty(weight.shape[0] if statistics else 0, dtype=reference.statistics_dtype(s.dtype)) for _ in range(2)
    ]
    return _empty_product(s, weight, stride), vectors[0], vectors[1]


forward = define(
    "projection_shortcut_forward(Tensor s, Tensor weight, int[2] stride, bool statistics)"
    " -> (Tensor product, Tensor mean, Tensor m2)",
    fallback=_forward_fallback,
    fake=_forward_fake,
    function="projection_shortcut",
    flops=lambda s, weight, *_, out_shape: convolution_flops(out_shape[0], weight),
    compiled_for=("cpu", "cuda"),
)


def _backward_fallback(
    dproduct: Tensor, s: Tensor, weight: Tensor, stride: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor]:
    ds, dweight, _ = torch.ops.aten.convolution_backward(
        dproduct, s, weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, [*needs, False]
    )
    ds = torch.empty_like(s).copy_(ds) if needs[0] else s.new_empty(0)
    return ds, torch.empty_like(weight).copy_(dweight) if needs[1] else s.new_empty(0)


def _backward_fake(
    dproduct: Tensor, s: Tensor, weight: Tensor, stride: list[int], needs: list[bool]
) -> tuple[Tensor, Tensor]:
    ds = torch.empty_like(s) if needs[0] else s.new_empty(0)
    return ds, torch.empty_like(weight) if needs[1] else weight.new_empty(0)


backward = define(
    "projection_shortcut_backward(Tensor dproduct, Tensor s, Tensor weight, int[2] stride, bool[2] needs)"
    " -> (Tensor ds, Tensor dweight)",
    fallback=_backward_fallback,
    fake=_backward_fake,
    function="projection_shortcut",
    flops=lambda dproduct, s, weight, stride, needs, out_shape: convolution_flops(dproduct, weight, sum(needs)),
    compiled_for=("cpu", "cuda"),
)


def _inference_fallback(
    s: Tensor, conv_weight: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, x: Tensor | None, x_running_mean: Tensor | None, x_running_var: Tensor | None,
    x_weight: Tensor | None, x_bias: Tensor | None, stride: list[int], eps: float, x_eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    norm = reference.NormParams(running_mean, running_var, weight, bias, eps=eps)
    x_norm = None
    if x_running_mean is not None:
        x_norm = reference.NormParams(x_running_mean, x_running_var, x_weight, x_bias, eps=x_eps)
    y = reference.projection_shortcut(s, conv_weight, norm, x, x_norm, stride=(stride[0], stride[1]), relu=relu)
    return _empty_product(s, conv_weight, stride).copy_(y)


def _inference_fake(
    s: Tensor, conv_weight: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None,
    bias: Tensor | None, x: Tensor | None, x_running_mean: Tensor | None, x_running_var: Tensor | None,
    x_weight: Tensor | None, x_bias: Tensor | None, stride: list[int], eps: float, x_eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    return _empty_product(s, conv_weight, stride)


inference = define(
    "projection_shortcut_inference(Tensor s, Tensor conv_weight, Tensor running_mean, Tensor running_var,"
    " Tensor? weight, Tensor? bias, Tensor? x, Tensor? x_running_mean, Tensor? x_running_var, Tensor? x_weight,"
    " Tensor? x_bias, int[2] stride, float eps, float x_eps, bool relu) -> Tensor",
    fallback=_inference_fallback,
    fake=_inference_fake,
    function="projection_shortcut",
    flops=lambda s, weight, *_, out_shape: convolution_flops(out_shape, weight),
    compiled_for=("cpu", "cuda"),
)


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
        ctx.stride, ctx.memory_format, ctx.weight_strides = stride, reference.memory_format(s), weight.stride()
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
        if takes_plain_formula(dproduct):
            return *convolution_gradients(dproduct, s, weight, ctx.stride, 0, needs), None, None
        s, dproduct = (t.contiguous(memory_format=ctx.memory_format) for t in (s, dproduct))
        ds, dweight = backward(dproduct, s, restored(weight, ctx.weight_strides), ctx.stride, needs)
        return ds if needs[0] else None, dweight if needs[1] else None, None, None
