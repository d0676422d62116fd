"""The pre-activation residual block of wide networks, fused and in plain PyTorch.

    y = conv2(dropout(relu(bn2(conv1(a))))) + shortcut        a = relu(bn1 x)

The shortcut is x itself, or a 1x1 convolution of a where channels or resolution change. Nothing follows the addition:
the next block normalises.

Source: He et al. 2016, "Identity mappings in deep residual networks", figure 4 (e); Zagoruyko and Komodakis 2016, "Wide
residual networks", section 2.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres.nn.blocks import FusedBasicBlock, FusedBlock
from fastres.nn.steps import (
    check_conv_algorithm,
    check_dropout,
    conv_add,
    conv_norm,
    conv_with_statistics,
    is_computed_in_its_dtype,
    norm_act,
    norm_act_conv,
    uses_batch_statistics,
)
from fastres.nn.trust import activation_of, renamed


class PreactivationBlock(nn.Module):
    """`FusedPreactivationBlock` in plain PyTorch: the same arguments (but conv_algorithm), children and results."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = check_dropout(dropout)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()  # in place it would write to the shortcut, were bn1 folded away
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        a = self.relu(self.bn1(x))
        out = self.relu(self.bn2(self.conv1(a)))
        if self.dropout > 0.0:
            out = F.dropout(out, self.dropout, self.training)
        out = self.conv2(out)
        return out + (x if self.shortcut is None else self.shortcut(a))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}" if self.dropout > 0 else ""


class FusedPreactivationBlock(FusedBlock, PreactivationBlock):
    """The pre-activation block with everything between its convolutions fused.

    With the identity shortcut, by Winograd's algorithm, in training, relu(bn1 x) is applied where the first convolution
    reads x; the block keeps for backward its input, the raw output of its first convolution, and with dropout one bit
    an element. With a convolution as the shortcut relu(bn1 x) has two readers, and is written once.

    Children, parameters and state_dict are those of `PreactivationBlock`, and so is what it computes where
    `FusedBasicBlock` computes child by child.

    Args:
        in_channels, out_channels: of the block.
        stride: of the first convolution and of the shortcut.
        dropout: 0 <= dropout < 1, between the convolutions; it acts where the block is in training mode.
        conv_algorithm: as `FusedBasicBlock`.
    Raises:
        TypeError: dropout is not a number, conv_algorithm not a string or None.
        ValueError: dropout is outside [0, 1); conv_algorithm is unknown.
    """

    exactly = FusedBasicBlock.exactly
    _plain = renamed(PreactivationBlock.forward, "_plain")
    _plain_with_dropout = renamed(PreactivationBlock.forward, "_plain_with_dropout")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dropout: float = 0.0,
        *,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, stride, dropout)
        self.conv_algorithm = check_conv_algorithm(conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor, shortcut: Tensor, readers: int) -> Any:
        algorithm, bn1, bn2, f = self.conv_algorithm, self.bn1, self.bn2, activation_of(self.relu)
        if not uses_batch_statistics(bn1):
            a = norm_act(bn1, x, activation=f)
            out = conv_norm(self.conv1, bn2, a, activation=f, algorithm=algorithm)
            y = conv_add(self.conv2, out, shortcut if self.shortcut is None else self.shortcut(a), algorithm)
            return y if readers == 1 else (y, y)
        if self.shortcut is None and is_computed_in_its_dtype(x):
            out, statistics = norm_act_conv(
                bn1, self.conv1, x, activation=f, dropout=0.0, statistics=None, algorithm=algorithm
            )
        else:
            two = self.shortcut is not None and torch.is_grad_enabled()
            made = norm_act(bn1, x, activation=f, readers=2 if two else 1)
            a, other = made if two else (made, made)
            out, statistics, same = conv_with_statistics(self.conv1, a, algorithm)
            if self.shortcut is not None:
                # The first convolution adds the gradient of the second to its own, where it can.
                shortcut = self.shortcut(other if same is a else same)
        out, _ = norm_act_conv(
            bn2, self.conv2, out, activation=f, dropout=self._dropout_now(), statistics=statistics, algorithm=algorithm
        )
        # Nobody else reads what the convolution wrote, and it is not saved for backward.
        in_place = out.dtype == shortcut.dtype and out.shape == shortcut.shape
        y = out.add_(shortcut) if in_place else out + shortcut
        return y if readers == 1 else (y, y)
