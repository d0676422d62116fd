"""Wide residual networks: pre-activation blocks, 6n + 4 layers, k times as many channels."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastres.models.cifar import check_depth
from fastres.models.stem import check_head, check_width, init_small_network, make_stem, scaled
from fastres.nn.blocks import set_conv_algorithm
from fastres.nn.preactivation import FusedPreactivationBlock, PreactivationBlock
from fastres.nn.stem import FusedNetwork, through_stages
from fastres.nn.steps import check_dropout, norm_act
from fastres.nn.trust import activation_of, renamed


class PlainWideResNet(nn.Module):
    """`WideResNet` in plain PyTorch: the same arguments (but conv_algorithm), children, parameters and results."""

    fused_class: "type[WideResNet]"
    _block_class = PreactivationBlock

    def __init__(
        self,
        depth: int,
        k: int,
        num_classes: int = 10,
        *,
        stem: str = "cifar",
        dropout: float = 0.0,
        width: float = 1.0,
    ) -> None:
        blocks = check_depth(depth, 4)
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k: expected an int, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        check_head(num_classes, stem)
        dropout = check_dropout(dropout)
        channels = [scaled(c, check_width(width)) for c in (16, 16 * k, 32 * k, 64 * k)]
        super().__init__()
        self.conv1, self.maxpool = make_stem(stem, channels[0])
        self.layer1 = self._stage(channels[0], channels[1], 1, blocks, dropout)
        self.layer2 = self._stage(channels[1], channels[2], 2, blocks, dropout)
        self.layer3 = self._stage(channels[2], channels[3], 2, blocks, dropout)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[3], num_classes)
        init_small_network(self)

    def _stage(self, in_channels: int, out_channels: int, stride: int, blocks: int, dropout: float) -> nn.Sequential:
        first = self._block_class(in_channels, out_channels, stride, dropout)
        return nn.Sequential(
            first, *(self._block_class(out_channels, out_channels, 1, dropout) for _ in range(1, blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        x = self.layer3(self.layer2(self.layer1(self.maxpool(self.conv1(x)))))
        x = self.avgpool(self.relu(self.bn1(x)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


class WideResNet(FusedNetwork, PlainWideResNet):
    """WRN-d-k: three stages of n pre-activation blocks with 16k, 32k and 64k channels.

    The first convolution has 16 channels and no normalisation of its own; `bn1` and `relu` follow the last block.

    Args:
        depth: d, layers with weights (1x1 convolutions of shortcuts among them), 6n + 4.
        k: widening factor.
        num_classes: outputs.
        stem: "cifar" (3x3 convolution, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool 3x3, stride 2).
        dropout: 0 <= dropout < 1, between the convolutions of each block.
        width: multiplier of all channels, the first layer's too, which are rounded to multiples of 8.
        conv_algorithm: of the blocks' convolutions, as `fastres.fuse`.
    Input: [N, 3, H, W]. Output: [N, num_classes], logits.
    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    Source: Zagoruyko and Komodakis 2016, "Wide residual networks", table 1.
    """

    plain_class = PlainWideResNet
    norm_after_conv1 = False
    _block_class = FusedPreactivationBlock
    _plain = renamed(PlainWideResNet.forward, "_plain")

    def __init__(
        self, depth: int, k: int, num_classes: int = 10, *, conv_algorithm: str | None = None, **options: Any
    ) -> None:
        super().__init__(depth, k, num_classes, **options)
        set_conv_algorithm(self, conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        x = through_stages(self.maxpool(self.conv1(x)), (self.layer1, self.layer2, self.layer3))
        x = self.avgpool(norm_act(self.bn1, x, activation=activation_of(self.relu)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


# What `fastres.fuse` makes of the plain network.
PlainWideResNet.fused_class = WideResNet
