"""conv3x3: the 3x3 convolution with stride 1, padding 1, one group and no bias, by Winograd's F(4x4, 3x3) on the CPU.

    y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, c, i + u - 1, j + v - 1]

In training the statistics of y, a channel each, are taken while its tiles are in registers, for the normalisation that
follows; in evaluation that normalisation, a residual and the ReLU are applied there, and nothing else is written. In
backward a gradient that reaches x on another way is added where the convolution's own is written.

Each 4x4 tile of outputs takes 36 multiplications a pair of channels instead of 144; transforming tiles and weights
takes part of that back, so there is a cost model (`pays`). csrc/cpu serves float32 and bfloat16 tensors on processors
with AVX2 or AVX-512; everything else is PyTorch's convolution. docs/convolution.md has the error figures.

Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks".
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import reference
from fastres.ops.library import (
    convolution_flops,
    convolution_gradients,
    define,
    in_strides_of,
    restored,
    takes_plain_formula,
)
from fastres.reference import Activation, Affine

ALGORITHMS = ("auto", "direct", "winograd")

TILE = 4
_POINTS = 36
# Costs in floating-point operations of the products, as measured on one core with AVX-512 (docs/convolution.md): the
# transforms of a tile, a channel; the transform of the weights, read from memory, a pair of channels; a call.
_TILE_COST = 1600
_WEIGHT_COST = 1200
_CALL_COST = 1_000_000
# Output positions up to which one product is faster than PyTorch's convolution (docs/convolution.md).
_FEW_POSITIONS = 256
# Winograd has to be this much cheaper, for its rounding errors are larger.
_ADVANTAGE = 1.1


# -------------------------------------------------------------------------------------------------- choice of algorithm


def asked_algorithm(algorithm: str | None) -> str:
    """The argument, or where it is None the environment variable FASTRES_CONV, or "auto".

    Raises:
        ValueError: neither of "auto", "direct" and "winograd".
    """
    name, asked = "algorithm", algorithm
    if asked is None:
        name, asked = "FASTRES_CONV", os.environ.get("FASTRES_CONV") or "auto"
    if asked not in ALGORITHMS:
        raise ValueError(f"{name}: expected one of {ALGORITHMS}, got {asked!r}")
    return asked


def pays(images: int, inputs: int, outputs: int, height: int, width: int) -> bool:
    """Whether Winograd's convolution is expected to be clearly faster than the direct one.

    Both are counted in operations of their inner loops, forward: the direct sum at 2 * 9 a pair of channels and
    position; Winograd at 2 * 36 a pair of channels and tile, channels rounded up to whole vectors, and its transforms.
    """
    tiles = images * ((height + TILE - 1) // TILE) * ((width + TILE - 1) // TILE)
    direct = 2 * 9 * images * height * width * inputs * outputs
    products = 2 * _POINTS * tiles * ((inputs + 15) // 16 * 16) * ((outputs + 31) // 32 * 32)
    transforms = _TILE_COST * tiles * (inputs + outputs) + _WEIGHT_COST * inputs * outputs
    # In whole numbers, which torch.export can reason about.
    return _holds(100 * direct > round(100 * _ADVANTAGE) * (products + transforms + _CALL_COST))


def _holds(condition: bool) -> bool:
    """The condition; for an exported graph, which serves a range of sizes, whether it is known to hold for all."""
    if not torch.compiler.is_exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def output_size(size: int, stride: int) -> int:
    """Output positions along one axis."""
    return (size - 1) // stride + 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def has_bfloat16_tiles() -> bool:
    """Whether the CPU multiplies bfloat16 matrices (AMX), at 16 times the speed of its float32."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def serves(x: Tensor) -> bool:
    """Whether kernels of our own take x at all, in channels_last."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0


def takes_winograd(x: Tensor, weight: Tensor, algorithm: str) -> bool:
    """Whether this convolution goes to Winograd's kernels, with `algorithm` one of ALGORITHMS."""
    return takes_winograd_for(x, weight.shape[0], algorithm)


def takes_winograd_for(x: Tensor, outputs: int, algorithm: str) -> bool:
    """`takes_winograd` for a weight of that many outputs."""
    if algorithm == "direct" or not serves(x):
        return False
    if algorithm == "winograd":
        return True
    if x.dtype == torch.bfloat16 and has_bfloat16_tiles():
        return False
    n, c, h, w = x.shape
    return reference.rows_are_channels(x) and pays(n, c, outputs, h, w)


def takes_product(x: Tensor, outputs: int, stride: int, algorithm: str) -> bool:
    """Whether this convolution, in evaluation, goes to one product: output positions are few.

    To read the weights is then the greater part of the work. The product reads them once, and multiplies them from the
    cache; Winograd's algorithm makes four times as many of them, and PyTorch's convolution orders them anew first.
    """
    if algorithm != "auto" or not serves(x) or (x.dtype == torch.bfloat16 and has_bfloat16_tiles()):
        return False
    n, c, h, w = x.shape
    positions = n * output_size(h, stride) * output_size(w, stride)
    few = _holds(positions <= _FEW_POSITIONS) and reference.rows_are_channels(x)
    return few and not (stride == 1 and pays(n, c, outputs, h, w))


# ------------------------------------------------------------------------------------------------------------- forward


def _empty_output(x: Tensor, outputs: int, stride: int) -> Tensor:
    shape = (x.shape[0], outputs, output_size(x.shape[2], stride), output_size(x.shape[3], stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def empty_output(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """The convolution's output, uninitialised: channels_last whatever x is."""
    return _empty_output(x, weight.shape[0], stride)


def measured(y: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, M2), the last two empty where they are not asked for."""
    if statistics:
        return (y, *reference.stats(y)[1:])
    none = y.new_empty(0, dtype=reference.statistics_dtype(y.dtype))
    return y, none, none.clone()


def fake_measured(x: Tensor, weight: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `measured` gives for the output of this convolution, uninitialised."""
    size = weight.shape[0] if statistics else 0
    mean, m2 = (x.new_empty(size, dtype=reference.statistics_dtype(x.dtype)) for _ in range(2))
    return empty_output(x, weight), mean, m2


def _forward_fallback(x: Tensor, weight: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    return measured(empty_output(x, weight).copy_(F.conv2d(x, weight.to(x.dtype), padding=1)), statistics)


forward = define(
    "conv3x3_forward(Tensor x, Tensor weight, bool statistics) -> (Tensor y, Tensor mean, Tensor m2)",
    fallback=_forward_fallback,
    fake=fake_measured,
    function="conv3x3",
    flops=lambda x, weight, *_, out_shape: convolution_flops(out_shape[0], weight),
)


def _inference_fallback(
    x: Tensor, conv_weight: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, eps: float, relu: bool, stride: int = 1, direct: bool = False,
) -> Tensor:  # fmt: skip
    y = F.conv2d(x, conv_weight.to(x.dtype), padding=1, stride=stride)
    if running_mean is not None and running_var is not None:
        normed = Affine(y, running_mean, torch.rsqrt(running_var + eps), weight, bias)
        y, _ = reference.apply(normed, residual, None, Activation(relu, 0.0, "add_act"), False)
    return empty_output(x, conv_weight, stride).copy_(y)


def _inference_fake(
    x: Tensor, conv_weight: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, eps: float, relu: bool, stride: int = 1, direct: bool = False,
) -> Tensor:  # fmt: skip
    return empty_output(x, conv_weight, stride)


inference = define(
    "conv3x3_inference(Tensor x, Tensor conv_weight, Tensor? running_mean, Tensor? running_var, Tensor? weight,"
    " Tensor? bias, Tensor? residual, float eps, bool relu, int stride=1, bool direct=False) -> Tensor",
    fallback=_inference_fallback,
    fake=_inference_fake,
    function="conv3x3",
    flops=lambda x, weight, *_, out_shape: convolution_flops(out_shape, weight),
)

# ------------------------------------------------------------------------------------------------------ packed weights

PANEL = 16
_TAPS = 9


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int]:
    """The shape of packed weights: an even number of groups of 16 outputs, rows of 16, channels rounded up to 16."""
    return (outputs + 2 * PANEL - 1) // (2 * PANEL) * 2, _TAPS * ((inputs + PANEL - 1) // PANEL * PANEL), PANEL


def pack(weight: Tensor) -> Tensor:
    """The weights of `conv3x3_packed`, in the order in which the CPU's products read them.

    The order is the same on every processor, so that packed weights can be saved on one and loaded on another.

    Args:
        weight: [K, C, 3, 3], any strides.
    Returns:
        float32 [groups, tap and channel, 16], shaped as `packed_shape` says: element [k // 16, tap * C' + c, k % 16] is
        weight[k, c, tap // 3, tap % 3], C' being C rounded up to 16; zeros elsewhere.
    """
    outputs, inputs = weight.shape[:2]
    groups, rows, _ = packed_shape(outputs, inputs)
    padded = F.pad(weight.float(), (0, 0, 0, 0, 0, rows // _TAPS - inputs, 0, groups * PANEL - outputs))
    panels = padded.reshape(groups, PANEL, rows // _TAPS, _TAPS).permute(0, 3, 2, 1)
    return panels.reshape(groups, rows, PANEL).clone(memory_format=torch.contiguous_format)


def unpack(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight [outputs, inputs, 3, 3], contiguous, out of what `pack` made of it."""
    groups, rows, _ = packed.shape
    weight = packed.reshape(groups, _TAPS, rows // _TAPS, PANEL).permute(0, 3, 2, 1)
    return weight.reshape(groups * PANEL, rows // _TAPS, 3, 3)[:outputs, :inputs].contiguous()


def _packed_fallback(
    x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, relu: bool, stride: int,
    product: bool,
) -> Tensor:  # fmt: skip
    weight = unpack(packed, outputs, x.shape[1]).to(x.dtype)
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding=1, stride=stride)
    y = y if residual is None else y + residual
    return _packed_fake(x, packed, outputs, bias, residual, relu, stride, product).copy_(F.relu(y) if relu else y)


def _packed_fake(
    x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, relu: bool, stride: int,
    product: bool,
) -> Tensor:  # fmt: skip
    return _empty_output(x, outputs, stride)


packed_inference = define(
    "conv3x3_packed(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? residual, bool relu, int stride,"
    " bool product) -> Tensor",
    fallback=_packed_fallback,
    fake=_packed_fake,
    function="conv3x3_norm_act",
    flops=lambda x, packed, outputs, *rest, out_shape: convolution_flops(out_shape, (outputs, x[1], 3, 3)),
)

# ------------------------------------------------------------------------------------------------------------ backward


def empty_gradients(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx, dweight), uninitialised, and empty where not needed."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if needs[1]:
        layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device, memory_format=layout)
    return dx, dweight


def plain_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx, dweight) by PyTorch, in the layouts of `empty_gradients`."""
    found = torch.ops.aten.convolution_backward(
        dy, x, weight.to(x.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*needs, False]
    )
    results = empty_gradients(x, weight, needs)
    for to, gradient, needed in zip(results, found[:2], needs, strict=True):
        if needed:
            to.copy_(gradient)
    return results


def _backward_fallback(
    dy: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dweight = plain_backward(dy, x, weight, needs)
    return dx.add_(added) if needs[0] and added is not None else dx, dweight


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return empty_gradients(x, weight, needs)


backward = define(
    "conv3x3_backward(Tensor dy, Tensor x, Tensor weight, Tensor? added, bool[2] needs) -> (Tensor dx, Tensor dweight)",
    fallback=_backward_fallback,
    fake=_backward_fake,
    function="conv3x3",
    flops=lambda dy, x, weight, added, needs, out_shape: convolution_flops(dy, weight, sum(needs)),
)


class Conv3x3(torch.autograd.Function):
    """(y, mean, M2, x): y channels_last, its statistics (not differentiable; that they depend on y is part of
    batch_norm_act's own backward), and x for every other use of it. Kept for backward: x and the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.weight_strides = weight.stride()
        y, mean, m2 = forward(x, weight, statistics)
        ctx.mark_non_differentiable(mean, m2)
        # Otherwise autograd makes zeros where x has no other use.
        ctx.set_materialize_grads(False)
        return y, mean, m2, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _mean: None, _m2: None, added: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[:2]
        if dy is None:
            return added, None, None
        x, weight = ctx.saved_tensors
        if takes_plain_formula(dy):
            dx, dweight = convolution_gradients(dy, x, weight, [1, 1], 1, needs)
            return dx if dx is None or added is None else dx + added, dweight, None
        x, weight = x.contiguous(memory_format=torch.channels_last), restored(weight, ctx.weight_strides)
        dx, dweight = backward(dy, x, weight, added, needs)
        return dx if needs[0] else None, in_strides_of(weight, dweight) if needs[1] else None, None
