"""Packed weights: a 3x3 convolution's weights in the order in which the CPU's products read them.

The order is the same on every processor, so that packed weights can be saved on one and loaded on another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
_TAPS = 9


def packed_shape(outputs: int, inputs: int) -> tuple[int, int, int]:
    """The shape of packed weights: an even number of groups of 16 outputs, rows of 16, channels rounded up to 16."""
    return (outputs + 2 * PANEL - 1) // (2 * PANEL) * 2, _TAPS * ((inputs + PANEL - 1) // PANEL * PANEL), PANEL


def pack(weight: Tensor) -> Tensor:
    """The weights of the operator conv3x3_packed.

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
