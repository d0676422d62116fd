"""ResNet-18 to 152 on torchvision's ResNet class: names, initialisation and state_dict are torchvision's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn
from torchvision.models.resnet import ResNet

from fastres.models.stem import STEM_CHANNELS, check_head, check_width, init_convolution, make_stem, scaled
from fastres.nn.blocks import FusedBasicBlock, FusedBottleneck
from fastres.nn.stem import FusedStemResNet
from fastres.nn.steps import check_conv_algorithm, check_dropout


class FusedResNet(FusedStemResNet):
    """torchvision's ResNet with fused blocks and a fused stem.

    With stem "imagenet", width 1 and the same seed the initial state_dict is torchvision's, bit for bit; with any stem
    it has the same names, and checkpoints load both ways.

    Args:
        block: FusedBasicBlock or FusedBottleneck.
        layers: blocks in each of the four stages.
        num_classes: outputs.
        stem: "cifar" (3x3 convolution, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool 3x3, stride 2).
        dropout: 0 <= dropout < 1, inside each block before its last convolution.
        width: multiplier of all channels, which are rounded to multiples of 8.
        conv_algorithm: of the blocks' convolutions, as `fastres.fuse`.
        zero_init_residual, groups, width_per_group, replace_stride_with_dilation, norm_layer: as torchvision's ResNet;
            with another norm_layer than torch.nn.BatchNorm2d or SyncBatchNorm the network computes as torchvision's.
    Input: [N, 3, H, W]. Output: [N, num_classes], logits.
    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    Source: He et al. 2015, "Deep residual learning for image recognition", table 1; the 3x3 stem as in section 4.2.
    """

    plain_class = ResNet
    _width = 1.0

    def __init__(
        self,
        block: type[FusedBasicBlock] | type[FusedBottleneck],
        layers: Sequence[int],
        num_classes: int = 10,
        *,
        stem: str = "cifar",
        dropout: float = 0.0,
        width: float = 1.0,
        conv_algorithm: str | None = None,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        check_head(num_classes, stem)
        dropout = check_dropout(dropout)
        check_conv_algorithm(conv_algorithm)
        if check_width(width) != 1.0:
            self._width = width  # read by _make_layer, which torchvision's constructor calls
        super().__init__(
            block, list(layers), num_classes, zero_init_residual, groups, width_per_group, replace_stride_with_dilation,
            norm_layer,
        )  # fmt: skip
        channels = scaled(STEM_CHANNELS, width)
        if stem != "imagenet" or channels != STEM_CHANNELS:
            self.conv1, self.maxpool = make_stem(stem, channels)
            init_convolution(self.conv1)
        if width != 1.0:
            self.bn1, self.fc = self._norm_layer(channels), nn.Linear(self.inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, (FusedBasicBlock, FusedBottleneck)):
                module.dropout, module.conv_algorithm = dropout, conv_algorithm

    def _make_layer(
        self,
        block: type[FusedBasicBlock] | type[FusedBottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if "layer1" not in self._modules:  # the first stage reads the stem
            self.inplanes = scaled(STEM_CHANNELS, self._width)
        planes = scaled(planes, self._width)
        return super()._make_layer(block, planes, blocks, stride, dilate)  # type: ignore[no-any-return]


class FusedResNet18(FusedResNet):
    """ResNet-18. Arguments as `FusedResNet`."""

    plain_class = ResNet

    def __init__(self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.0, **options: Any) -> None:
        super().__init__(FusedBasicBlock, (2, 2, 2, 2), num_classes, stem=stem, dropout=dropout, **options)


class FusedResNet34(FusedResNet):
    """ResNet-34. Arguments as `FusedResNet`."""

    plain_class = ResNet

    def __init__(self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.0, **options: Any) -> None:
        super().__init__(FusedBasicBlock, (3, 4, 6, 3), num_classes, stem=stem, dropout=dropout, **options)


class FusedResNet50(FusedResNet):
    """ResNet-50. Arguments as `FusedResNet`."""

    plain_class = ResNet

    def __init__(self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.0, **options: Any) -> None:
        super().__init__(FusedBottleneck, (3, 4, 6, 3), num_classes, stem=stem, dropout=dropout, **options)


class FusedResNet101(FusedResNet):
    """ResNet-101. Arguments as `FusedResNet`."""

    plain_class = ResNet

    def __init__(self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.0, **options: Any) -> None:
        super().__init__(FusedBottleneck, (3, 4, 23, 3), num_classes, stem=stem, dropout=dropout, **options)


class FusedResNet152(FusedResNet):
    """ResNet-152. Arguments as `FusedResNet`."""

    plain_class = ResNet

    def __init__(self, num_classes: int = 10, *, stem: str = "cifar", dropout: float = 0.0, **options: Any) -> None:
        super().__init__(FusedBottleneck, (3, 8, 36, 3), num_classes, stem=stem, dropout=dropout, **options)
