"""The residual networks of He et al. 2015 for images of 32 pixels: 6n + 2 layers, shortcuts without parameters."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from fastres.models.stem import check_head, check_width, init_small_network, make_stem, scaled
from fastres.nn.blocks import DropoutBasicBlock, FusedBasicBlock, set_conv_algorithm
from fastres.nn.shortcut import PadShortcut
from fastres.nn.stem import FusedNetwork, through_stages
from fastres.nn.steps import check_dropout, norm_act_pool
from fastres.nn.trust import activation_of, renamed


def check_depth(depth: int, rest: int) -> int:
    """The number of blocks in each of three stages, of a network of 6n + rest layers.

    Raises:
        TypeError: depth is not an int.
        ValueError: there is no such n.
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth: expected an int, got {type(depth).__name__}")
    n, remainder = divmod(depth - rest, 6)
    if n < 1 or remainder != 0:
        known = ", ".join(str(6 * n + rest) for n in range(1, 6))
        raise ValueError(f"depth: expected 6n + {rest} ({known}, ...), got {depth}")
    return n


class PlainCifarResNet(nn.Module):
    """`CifarResNet` in plain PyTorch: the same arguments (but conv_algorithm), children, parameters and results."""

    fused_class: "type[CifarResNet]"

    def __init__(
        self, depth: int, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.0, width: float = 1.0
    ) -> None:
        blocks = check_depth(depth, 2)
        check_head(num_classes, stem)
        dropout = check_dropout(dropout)
        channels = [scaled(c, check_width(width)) for c in (16, 32, 64)]
        super().__init__()
        self.conv1, self.maxpool = make_stem(stem, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(channels[0], channels[0], 1, blocks, dropout)
        self.layer2 = self._stage(channels[0], channels[1], 2, blocks, dropout)
        self.layer3 = self._stage(channels[1], channels[2], 2, blocks, dropout)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[2], num_classes)
        init_small_network(self)

    def _stage(self, in_channels: int, out_channels: int, stride: int, blocks: int, dropout: float) -> nn.Sequential:
        shortcut = None if stride == 1 else PadShortcut(out_channels - in_channels, stride)
        first = self._block(in_channels, out_channels, stride, shortcut, dropout)
        return nn.Sequential(
            first, *(self._block(out_channels, out_channels, 1, None, dropout) for _ in range(1, blocks))
        )

    def _block(
        self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module | None, dropout: float
    ) -> nn.Module:
        if dropout == 0.0:
            return BasicBlock(in_channels, out_channels, stride, shortcut)  # type: ignore[no-any-return]
        return DropoutBasicBlock(in_channels, out_channels, stride, shortcut, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


class CifarResNet(FusedNetwork, PlainCifarResNet):
    """ResNet-20, -32, -44, -56 and -110: three stages of n basic blocks with 16, 32 and 64 channels.

    Where the channels double, the shortcut takes every second pixel and appends channels of zeros (option A).

    Args:
        depth: layers with weights, 6n + 2.
        num_classes: outputs.
        stem: "cifar" (3x3 convolution, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool 3x3, stride 2).
        dropout: 0 <= dropout < 1, between the convolutions of each block.
        width: multiplier of all channels, which are rounded to multiples of 8.
        conv_algorithm: of the blocks' convolutions, as `fastres.fuse`.
    Input: [N, 3, H, W]. Output: [N, num_classes], logits.
    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    Source: He et al. 2015, "Deep residual learning for image recognition", section 4.2.
    """

    plain_class = PlainCifarResNet
    _plain = renamed(PlainCifarResNet.forward, "_plain")

    def __init__(self, depth: int, num_classes: int = 10, *, conv_algorithm: str | None = None, **options: Any) -> None:
        super().__init__(depth, num_classes, **options)
        set_conv_algorithm(self, conv_algorithm)

    def _block(
        self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module | None, dropout: float
    ) -> nn.Module:
        return FusedBasicBlock(in_channels, out_channels, stride, shortcut, dropout=dropout)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        x = norm_act_pool(self.bn1, self.maxpool, self.conv1(x), activation=activation_of(self.relu))
        x = through_stages(x, (self.layer1, self.layer2, self.layer3))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


# What `fastres.fuse` makes of the plain network.
PlainCifarResNet.fused_class = CifarResNet
