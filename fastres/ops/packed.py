"""Packed weights: a convolution's weights in the order in which the CPU's products read them.

The order is the same on every processor, so that packed weights can be saved on one and loaded on another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16


def packed_shape(outputs: int, inputs: int, kernel: int, *, padded: bool) -> tuple[int, int, int]:
    """The shape of packed weights: an even number of groups of 16 outputs, rows of 16, as `pack` makes them."""
    depth = (inputs + PANEL - 1) // PANEL * PANEL if padded else inputs
    return (outputs + 2 * PANEL - 1) // (2 * PANEL) * 2, kernel * kernel * depth, PANEL


def pack(weight: Tensor, *, padded: bool) -> Tensor:
    """The weights of the operator packed_convolution.

    Args:
        weight: [K, C, kernel, kernel], any strides.
        padded: whether C is rounded up to a multiple of 16, as Winograd's algorithm has it.
    Returns:
        float32 [groups, tap and channel, 16], shaped as `packed_shape` says: element [k // 16, tap * C' + c, k % 16] is
        weight[k, c, tap // kernel, tap % kernel], C' being C, rounded up or not; zeros elsewhere.
    """
    outputs, inputs, kernel, _ = weight.shape
    groups, rows, _ = packed_shape(outputs, inputs, kernel, padded=padded)
    taps = kernel * kernel
    full = F.pad(weight.float(), (0, 0, 0, 0, 0, rows // taps - inputs, 0, groups * PANEL - outputs))
    panels = full.reshape(groups, PANEL, rows // taps, taps).permute(0, 3, 2, 1)
    return panels.reshape(groups, rows, PANEL).clone(memory_format=torch.contiguous_format)


def unpack(packed: Tensor, outputs: int, inputs: int, kernel: int) -> Tensor:
    """The weight [outputs, inputs, kernel, kernel], contiguous, out of what `pack` made of it."""
    groups, rows, _ = packed.shape
    taps = kernel * kernel
    weight = packed.reshape(groups, taps, rows // taps, PANEL).permute(0, 3, 2, 1)
    return weight.reshape(groups * PANEL, rows // taps, kernel, kernel)[:outputs, :inputs].contiguous()


def turn(weight: Tensor) -> Tensor:
    """The weight [K, C / groups, k, k] of a convolution in groups as float32 [k, k, C / groups, K], in new memory: what
    lies side by side is multiplied at a time.
    """
    return weight.float().permute(2, 3, 1, 0).clone(memory_format=torch.contiguous_format)


def turn_back(turned: Tensor) -> Tensor:
    """The weight [K, C / groups, k, k], a view of what `turn` made of it."""
    return turned.permute(3, 2, 0, 1)
