"""A ResNet-18 whose blocks add before their last convolution, with one long skip from the stem to the logits."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastres.models.stem import STEM_CHANNELS, check_head, check_width, init_convolution, make_stem, scaled
from fastres.nn.blocks import PlainResidualBlock, ResidualBlock, set_conv_algorithm
from fastres.nn.norm import take_over_norm
from fastres.nn.stem import FusedNetwork, through_stages
from fastres.nn.steps import check_dropout, norm_act_pool
from fastres.nn.trust import activation_of, renamed


class PlainArticleResNet18(nn.Module):
    """`ArticleResNet18` in plain PyTorch: the same arguments (but conv_algorithm), children, parameters and results."""

    fused_class: "type[ArticleResNet18]"
    _block_class = PlainResidualBlock

    def __init__(self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.5, width: float = 1.0) -> None:
        check_head(num_classes, stem)
        dropout, width = check_dropout(dropout), check_width(width)
        first, *channels = (scaled(c, width) for c in (STEM_CHANNELS, 64, 128, 256, 512))
        super().__init__()
        self.conv1, self.maxpool = make_stem(stem, first)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(first, channels[0], 1, dropout)
        self.layer2 = self._stage(channels[0], channels[1], 2, dropout)
        self.layer3 = self._stage(channels[1], channels[2], 2, dropout)
        self.layer4 = self._stage(channels[2], channels[3], 2, dropout)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[3], num_classes)
        self.skip = nn.Linear(first, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module)

    def _stage(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> nn.Sequential:
        first = self._block_class(in_channels, out_channels, stride, dropout)
        return nn.Sequential(first, self._block_class(out_channels, out_channels, 1, dropout))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, num_classes]."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        logits = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits + self.skip(torch.flatten(self.avgpool(stem), 1))  # type: ignore[no-any-return]


class ArticleResNet18(FusedNetwork, PlainArticleResNet18):
    """Four stages of two `fastres.nn.ResidualBlock`, and the long skip.

        f = maxpool(relu(bn1(conv1 x)))
        logits = fc(mean(layer4(layer3(layer2(layer1 f))))) + skip(mean(f))

    The means go over space. `skip` is a linear layer of its own, from the stem's 64 channels to the classes.

    Args:
        num_classes: outputs.
        stem: "cifar" (3x3 convolution, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool 3x3, stride 2).
        dropout: 0 <= dropout < 1, in each block before the addition.
        width: multiplier of all channels, which are rounded to multiples of 8.
        conv_algorithm: of the blocks' convolutions, as `fastres.fuse`.
    Input: [N, 3, H, W]. Output: [N, num_classes], logits.
    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    """

    plain_class = PlainArticleResNet18
    _block_class = ResidualBlock
    _plain = renamed(PlainArticleResNet18.forward, "_plain")

    def __init__(
        self,
        num_classes: int = 10,
        *,
        stem: str = "cifar",
        dropout: float = 0.5,
        width: float = 1.0,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(num_classes, stem=stem, dropout=dropout, width=width)
        set_conv_algorithm(self, conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        stem = norm_act_pool(self.bn1, self.maxpool, self.conv1(x), activation=activation_of(self.relu))
        features = through_stages(stem, (self.layer1, self.layer2, self.layer3, self.layer4))
        logits = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits + self.skip(torch.flatten(self.avgpool(stem), 1))  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "relu" not in self._modules:  # pickled whole when the normalisation held the ReLU
            take_over_norm(self, "bn1")
            self.relu = nn.ReLU(inplace=True)


# What `fastres.fuse` makes of the plain network.
PlainArticleResNet18.fused_class = ArticleResNet18
