"""packed_convolution: a convolution in inference with packed weights, its bias, a residual and an activation.

    y[n, k, i, j] = f(sum over c, u, v of weight[k, c, u, v] * x[n, c, s i + u - p, s j + v - p] + bias[k] + residual)

with stride s and padding p, of any square kernel, in one group. csrc/cpu serves float32 and bfloat16 tensors on
processors with AVX2 or AVX-512, by one matrix product over the output positions ("gemm") or, for 3x3 kernels with
stride 1 or 2, Winograd's algorithm ("winograd"); everything else is PyTorch's convolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastres.contract import ConvShape
from fastres.ops import fallback
from fastres.ops.library import convolution_flops, define


def _fake(x: Tensor, shape: ConvShape, **_: Any) -> Tensor:
    return fallback.empty_packed_output(x, shape)


packed_convolution = define(
    "packed_convolution",
    fallback.packed_convolution,
    "Tensor",
    fake=_fake,
    function="conv3x3_norm_act",
    flops=lambda x, shape, out_shape, **_: convolution_flops(
        out_shape, (shape.outputs, x[1], shape.kernel, shape.kernel)
    ),
)
