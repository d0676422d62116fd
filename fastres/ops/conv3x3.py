"""conv3x3: the 3x3 convolution with stride 1, padding 1, one group and no bias, by Winograd's F(4x4, 3x3) on the CPU.

    y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, c, i + u - 1, j + v - 1]

Each 4x4 tile of outputs takes 36 multiplications a pair of channels instead of 144; transforming tiles and weights
takes part of that back, so there is a cost model (`pays`). csrc/cpu serves float32 tensors on processors with AVX2 or
AVX-512; everything else is PyTorch's convolution. docs/convolution.md has the error figures.

Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks".
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import reference
from fastres.ops.library import define, differentiable_once

ALGORITHMS = ("auto", "direct", "winograd")

TILE = 4
_POINTS = 36
# Costs in floating-point operations of the products, as measured on one core with AVX-512 (docs/convolution.md): the
# transforms of a tile, a channel; the transform of the weights, a pair of channels; a call.
_TILE_COST = 1600
_WEIGHT_COST = 400
_CALL_COST = 1_000_000
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
    return direct > _ADVANTAGE * (products + transforms + _CALL_COST)


def takes_winograd(x: Tensor, weight: Tensor, algorithm: str) -> bool:
    """Whether this convolution goes to the operator, with `algorithm` one of ALGORITHMS."""
    if algorithm == "direct" or x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0:
        return False
    if algorithm == "winograd":
        return True
    n, c, h, w = x.shape
    return reference.rows_are_channels(x) and pays(n, c, weight.shape[0], h, w)


# ------------------------------------------------------------------------------------------------------------ operators


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    shape = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _forward_fallback(x: Tensor, weight: Tensor, keep_weights: bool) -> Tensor:
    return _empty_output(x, weight).copy_(F.conv2d(x, weight, padding=1))


def _forward_fake(x: Tensor, weight: Tensor, keep_weights: bool) -> Tensor:
    return _empty_output(x, weight)


forward = define(
    "conv3x3_forward(Tensor x, Tensor weight, bool keep_weights) -> Tensor",
    fallback=_forward_fallback,
    fake=_forward_fake,
)


def _empty_gradients(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if needs[1]:
        layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        dweight = torch.empty(weight.shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return dx, dweight


def _backward_fallback(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*needs, False]
    )
    results = _empty_gradients(x, weight, needs)
    for to, gradient, needed in zip(results, found[:2], needs, strict=True):
        if needed:
            to.copy_(gradient)
    return results


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, weight, needs)


backward = define(
    "conv3x3_backward(Tensor dy, Tensor x, Tensor weight, bool[2] needs) -> (Tensor dx, Tensor dweight)",
    fallback=_backward_fallback,
    fake=_backward_fake,
)

_backward_once = differentiable_once(backward, "conv3x3")


class Conv3x3(torch.autograd.Function):
    """y, channels_last. Kept for backward: x and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = forward(x, weight, False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        dx, dweight = _backward_once(dy, x, weight, needs)
        return dx if needs[0] else None, dweight if needs[1] else None
