"""A ResNet-18 whose blocks add before their last convolution, with one long skip from the stem to the logits."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from fastres.models.stem import STEM_CHANNELS, check_head, init_convolution, make_stem
from fastres.nn.blocks import ResidualBlock
from fastres.nn.conv import check_conv_algorithm
from fastres.nn.norm import FusedBatchNormAct2d, check_dropout


class ArticleResNet18(nn.Module):
    """Four stages of two `fastres.nn.ResidualBlock`, and the long skip.

        f = maxpool(relu(bn1(conv1 x)))
        logits = fc(mean(layer4(layer3(layer2(layer1 f))))) + skip(mean(f))

    The means go over space. `skip` is a linear layer of its own, from the stem's 64 channels to the classes.

    Args:
        num_classes: outputs.
        stem: "cifar" (3x3 convolution, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool 3x3, stride 2).
        dropout: 0 <= dropout < 1, in each block before the addition.
        conv_algorithm: of the blocks' 3x3 convolutions with stride 1, as `fastres.fuse`.
    Input: [N, 3, H, W]. Output: [N, num_classes], logits.
    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    """

    def __init__(
        self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.5, conv_algorithm: str | None = None
    ) -> None:
        check_head(num_classes, stem)
        dropout = check_dropout(dropout)
        check_conv_algorithm(conv_algorithm)
        super().__init__()
        self.conv1, self.maxpool = make_stem(stem)
        self.bn1 = FusedBatchNormAct2d(STEM_CHANNELS)
        self.layer1 = _stage(STEM_CHANNELS, 64, 1, dropout, conv_algorithm)
        self.layer2 = _stage(64, 128, 2, dropout, conv_algorithm)
        self.layer3 = _stage(128, 256, 2, dropout, conv_algorithm)
        self.layer4 = _stage(256, 512, 2, dropout, conv_algorithm)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * ResidualBlock.expansion, num_classes)
        self.skip = nn.Linear(STEM_CHANNELS, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        stem = self.maxpool(self.bn1(self.conv1(x)))
        features = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        logits = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits + self.skip(torch.flatten(self.avgpool(stem), 1))  # type: ignore[no-any-return]


def _stage(
    in_channels: int, out_channels: int, stride: int, dropout: float, conv_algorithm: str | None
) -> nn.Sequential:
    first = ResidualBlock(in_channels, out_channels, stride, dropout, conv_algorithm=conv_algorithm)
    return nn.Sequential(first, ResidualBlock(out_channels, out_channels, 1, dropout, conv_algorithm=conv_algorithm))
