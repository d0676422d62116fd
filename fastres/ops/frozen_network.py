"""frozen_network: the layers of a frozen network, or of a block of one, in one call.

A plan (`fastres.nn.plan` makes it) is a table of steps: what each computes, of which sizes, and where it reads and
writes: in the input, in the output, or in one scratch buffer, whose parts are used again as soon as nobody reads them.
csrc/cpu serves float32 and bfloat16 tensors on processors with AVX2 or AVX-512; the fallback, in plain PyTorch, says
what a step means.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import KINDS, Activation
from fastres.ops.library import define
from fastres.ops.packed import turn_back, unpack

Tensors = Annotated[Sequence[Tensor], "Tensor[]"]
Ints = Annotated[Sequence[int], "int[]"]

INPUT, OUTPUT, NONE = -1, -2, -3
"""Places outside of scratch."""


class Kind(enum.IntEnum):
    """What a step computes.

    CONVOLUTION: f(conv(x) + bias + residual), the weights packed.
    NORM_ACT: f(weight * x + bias + residual).
    MAX_POOL: over a square window. MEAN: over all pixels of an image.
    GROUPED: f(conv(x) + bias), the convolution in groups, its weights turned round.
    """

    CONVOLUTION = 0
    NORM_ACT = 1
    MAX_POOL = 2
    MEAN = 3
    GROUPED = 4


class Step(NamedTuple):
    """A row of the table.

    Attributes:
        input, residual, output: places: offsets in scratch, in elements of one image, or INPUT, OUTPUT and NONE.
        weight, bias: numbers of tensors; -1 for none.
        channels, height, width, outputs, out_height, out_width: sizes of the input and of the output.
        kernel, stride, padding: of a window, both ways.
        depth: rows of a tap in packed weights; in groups, inputs of each.
        winograd: whether by Winograd's algorithm, 0 or 1.
        activation, alpha: number of the activation in `KINDS`, and the bits of its parameter as a float64.
    """

    kind: int
    input: int
    residual: int
    output: int
    weight: int
    bias: int
    channels: int
    height: int
    width: int
    outputs: int
    out_height: int
    out_width: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    depth: int = 0
    winograd: int = 0
    activation: int = 0
    alpha: int = 0


_KIND_NUMBERS = {name: i for i, name in enumerate(KINDS)}


def activation_numbers(activation: Activation) -> tuple[int, int]:
    """A step's `activation` and `alpha`."""
    return _KIND_NUMBERS[activation.kind], struct.unpack("<q", struct.pack("<d", activation.alpha))[0]


def _activation_of(step: Step) -> Activation:
    return Activation(list(KINDS)[step.activation], struct.unpack("<d", struct.pack("<q", step.alpha))[0])


def _run(step: Step, x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    if step.kind == Kind.MAX_POOL:
        return F.max_pool2d(x, step.kernel, step.stride, step.padding)
    if step.kind == Kind.MEAN:
        return x.mean((2, 3), keepdim=True)
    weight, bias = tensors[step.weight].to(x.dtype), tensors[step.bias].to(x.dtype)
    if step.kind == Kind.GROUPED:
        y = F.conv2d(x, turn_back(weight), bias, step.stride, step.padding, groups=step.channels // step.depth)
    elif step.kind == Kind.CONVOLUTION:
        weight = unpack(weight, step.outputs, step.channels, step.kernel)
        y = F.conv2d(x, weight, bias, step.stride, step.padding)
    else:
        y = x * weight[:, None, None] + bias[:, None, None]
    return _activation_of(step).forward(y if residual is None else y + residual)


def fallback(x: Tensor, tensors: Tensors, steps: Tensor, scratch: int, output: Ints) -> Tensor:
    """The steps in plain PyTorch, each value in memory of its own.

    Args:
        x: [N, C, H, W].
        tensors: packed weights and vectors [K], float32.
        steps: int64 [steps, fields], rows of `Step`.
        scratch: elements of one image.
        output: sizes of the result, [N, K, H', W'] or [N, K].
    """
    values = {INPUT: x}
    for row in steps.tolist():
        step = Step(*row)
        values[step.output] = _run(step, values[step.input], values.get(step.residual), tensors)
    return _empty(x, output).copy_(values[OUTPUT].reshape(tuple(output)))


def _empty(x: Tensor, output: Sequence[int]) -> Tensor:
    layout = torch.channels_last if len(output) == 4 else torch.contiguous_format
    return torch.empty(tuple(output), dtype=x.dtype, device=x.device, memory_format=layout)


def _fake(x: Tensor, output: Sequence[int], **_: Any) -> Tensor:
    return _empty(x, output)


frozen_network = define("frozen_network", fallback, "Tensor", fake=_fake, function="conv3x3_norm_act")
