"""The phases of images: a convolution with dilation d is one without of each of d * d phases.

Phase (a, b) of an image has its rows a, a + d, a + 2 d, ... and its columns b, b + d, ...: what the taps of a dilated
kernel read lies side by side there, and what is padding is padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def are_whole(x: Tensor, dilation: int) -> bool:
    """Whether all phases of x [N, C, H, W] have as many rows and columns: `split` adds none then."""
    return all(size % dilation == 0 for size in x.shape[2:])


def split(x: Tensor, dilation: int) -> Tensor:
    """[N, C, H, W] to [N * d * d, C, ceil(H / d), ceil(W / d)], channels_last; what a phase has less of is zeros."""
    n, c, h, w = x.shape
    rows, columns = (-(-size // dilation) for size in (h, w))
    if not are_whole(x, dilation):
        x = F.pad(x, (0, columns * dilation - w, 0, rows * dilation - h))
    pixels = x.permute(0, 2, 3, 1).reshape(n, rows, dilation, columns, dilation, c)
    phases = pixels.permute(0, 2, 4, 1, 3, 5).reshape(n * dilation * dilation, rows, columns, c)
    return phases.permute(0, 3, 1, 2)


def join(phases: Tensor, dilation: int, x: Tensor) -> Tensor:
    """The images, in channels_last, of which these are the phases: as many and as large as x has."""
    _, c, rows, columns = phases.shape
    n, _, h, w = x.shape
    pixels = phases.permute(0, 2, 3, 1).reshape(n, dilation, dilation, rows, columns, c)
    whole = pixels.permute(0, 3, 1, 4, 2, 5).reshape(n, rows * dilation, columns * dilation, c)
    return whole[:, :h, :w].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
