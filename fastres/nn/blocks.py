"""Residual blocks: torchvision's two with everything after a convolution fused, their plain twins with dropout, and the
block that adds before its last convolution.

Where torchvision's blocks take a dropout rate, it stands between the convolutions: after the ReLU that comes before
the block's last convolution (Zagoruyko and Komodakis 2016, "Wide residual networks", section 2.4). That is after bn1's
ReLU in a basic block and after bn2's in a bottleneck. It acts where the block is in training mode; freezing a
normalisation (`block.bn1.eval()`) does not stop it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastres.nn.conv import (
    ConvAlgorithm,
    check_conv_algorithm,
    convolve,
    convolve_norm,
    norm_convolve,
    takes_batch_statistics,
)
from fastres.nn.norm import FusedBatchNormAct2d, check_dropout, known
from fastres.nn.shortcut import ProjectionShortcut, SkipConnection, add_shortcut, projection_obstacle


class FusedBasicBlock(ConvAlgorithm, BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock with everything between its convolutions fused.

        y = relu(bn2(conv2(dropout(relu(bn1(conv1 x))))) + shortcut(x))

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as torchvision's block;
            norm_layer has to make torch.nn.BatchNorm2d. A `downsample` of a 1x1 convolution and BatchNorm2d becomes a
            `ProjectionShortcut`; any other is called as it is.
        dropout: 0 <= dropout < 1, between the convolutions.
        conv_algorithm: of the 3x3 convolutions with stride 1, as `algorithm` of `fastres.functional.conv3x3`. By
            Winograd's, in training, the block keeps for backward its input, the raw outputs of its convolutions, and
            bits.
    Raises:
        TypeError: norm_layer makes something else than torch.nn.BatchNorm2d, conv_algorithm is not a string or None.
        ValueError: dropout is outside [0, 1); conv_algorithm is unknown.
    """

    norms: ClassVar[tuple[str, ...]] = ("bn1", "bn2")
    dropout_norm: ClassVar[str] = "bn1"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dropout: float = 0.0,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        self.conv_algorithm = check_conv_algorithm(conv_algorithm)
        _adopt_children(self, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        algorithm, bn1, bn2 = self.conv_algorithm, self.bn1, self.bn2
        if takes_batch_statistics(bn1):
            out, statistics, x = convolve(self.conv1, x, bn1, algorithm)
            out, statistics = norm_convolve(
                bn1, self.conv2, out, statistics, bn2, algorithm, dropout_training=self.training
            )
            return add_shortcut(bn2, out, x, self.downsample, statistics)
        out = convolve_norm(self.conv1, bn1, x, algorithm, dropout_training=self.training)
        if self.downsample is None:
            return convolve_norm(self.conv2, bn2, out, algorithm, residual=x)
        out, statistics, _ = convolve(self.conv2, out, bn2, algorithm)
        return add_shortcut(bn2, out, x, self.downsample, statistics)


class FusedBottleneck(ConvAlgorithm, Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck, fused around the convolutions; dropout stands after the ReLU of bn2.

    Args, Raises: as `FusedBasicBlock`.
    """

    norms: ClassVar[tuple[str, ...]] = ("bn1", "bn2", "bn3")
    dropout_norm: ClassVar[str] = "bn2"

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        dropout: float = 0.0,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        self.conv_algorithm = check_conv_algorithm(conv_algorithm)
        _adopt_children(self, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        algorithm, bn1, bn2 = self.conv_algorithm, self.bn1, self.bn2
        out = self.conv1(x)
        if takes_batch_statistics(bn1):
            out, statistics = norm_convolve(bn1, self.conv2, out, None, bn2, algorithm)
            out = bn2(out, dropout_training=self.training, **known(statistics))
        else:
            out = convolve_norm(self.conv2, bn2, bn1(out), algorithm, dropout_training=self.training)
        return add_shortcut(self.bn3, self.conv3(out), x, self.downsample)


def _adopt_children(block: FusedBasicBlock | FusedBottleneck, dropout: float) -> None:
    """Fuse the normalisations of a block, and its downsample where that can be."""
    dropout = check_dropout(dropout)
    for name in block.norms:
        norm = getattr(block, name)
        if type(norm) is not nn.BatchNorm2d:
            raise TypeError(
                f"norm_layer: expected one that makes torch.nn.BatchNorm2d, got {type(norm).__name__} for {name}"
            )
    for name in block.norms:
        FusedBatchNormAct2d.adopt(getattr(block, name), dropout=dropout if name == block.dropout_norm else 0.0)
    if isinstance(block.downsample, nn.Sequential) and projection_obstacle(block.downsample) is None:
        ProjectionShortcut.adopt(block.downsample)


class DropoutBasicBlock(BasicBlock):  # type: ignore[misc]
    """torchvision's BasicBlock with dropout between its convolutions: the plain twin of `FusedBasicBlock(dropout=p)`.

    Args:
        dropout: 0 <= dropout < 1; the others as torchvision's block.
    """

    def __init__(self, *args: Any, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = check_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = F.dropout(out, self.dropout, self.training)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}"


class DropoutBottleneck(Bottleneck):  # type: ignore[misc]
    """torchvision's Bottleneck with dropout before its last convolution: plain twin of `FusedBottleneck(dropout=p)`.

    Args:
        dropout: 0 <= dropout < 1; the others as torchvision's block.
    """

    def __init__(self, *args: Any, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dropout = check_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = F.dropout(out, self.dropout, self.training)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout:g}"


class ResidualBlock(ConvAlgorithm, nn.Module):
    """The residual block that adds its input before the second convolution.

        y = bn2(conv2(dropout(relu(bn1(conv1 x))) + shortcut(x)))

    Both convolutions are 3x3 without bias, the first with the stride. The shortcut is the identity where shapes agree
    and a `SkipConnection` where channels or stride change. Nothing follows bn2.

    Args:
        in_channels, out_channels: of the block.
        stride: of the first convolution and of the shortcut.
        dropout: 0 <= dropout < 1; it acts where the block is in training mode.
        conv_algorithm: as `FusedBasicBlock`.
    Raises:
        TypeError: conv_algorithm is not a string or None.
        ValueError: dropout is outside [0, 1); conv_algorithm is unknown.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dropout: float = 0.5,
        *,
        conv_algorithm: str | None = None,
    ) -> None:
        super().__init__()
        self.conv_algorithm = check_conv_algorithm(conv_algorithm)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = FusedBatchNormAct2d(out_channels, dropout=dropout, order="act_add")
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = SkipConnection(in_channels, out_channels, stride) if changes else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = FusedBatchNormAct2d(out_channels, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        algorithm, bn1, bn2 = self.conv_algorithm, self.bn1, self.bn2
        out, statistics, x = convolve(self.conv1, x, bn1, algorithm)
        shortcut = self.shortcut(x)
        if takes_batch_statistics(bn1):
            out, statistics = norm_convolve(
                bn1, self.conv2, out, statistics, bn2, algorithm, residual=shortcut, dropout_training=self.training
            )
            return bn2(out, **known(statistics))  # type: ignore[no-any-return]
        out = bn1(out, shortcut, dropout_training=self.training)
        return convolve_norm(self.conv2, bn2, out, algorithm)
