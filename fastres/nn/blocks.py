"""Residual blocks: torchvision's with fused passes, and those of "residual block" and "skip connection" as a plain CNN has them.

Dropout in the torchvision blocks stands between the convolutions: after the ReLU that comes before the block's last
convolution (Zagoruyko and Komodakis 2016, "Wide residual networks", section 2.4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastres import functional
from fastres.nn.batch_norm_act import (
    BatchNormAct2d,
    FusedBatchNormAct2d,
    check_dropout,
    norm_params,
    uses_batch_statistics,
)
from fastres.nn.projection import ProjectionShortcut

# ------------------------------------------------------------------------------------------- torchvision's blocks, plain


class DropoutBasicBlock(BasicBlock):
    """torchvision's BasicBlock with dropout between its convolutions."""

    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(F.dropout(out, self.dropout, self.training))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(out) + identity)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class DropoutBottleneck(Bottleneck):
    """torchvision's Bottleneck with dropout before its last convolution."""

    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.conv3(F.dropout(out, self.dropout, self.training))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn3(out) + identity)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


# ------------------------------------------------------------------------------------------- torchvision's blocks, fused


def fuse_norm(bn: nn.BatchNorm2d, dropout: float = 0.0) -> None:
    """Turn a BatchNorm2d into the FusedBatchNormAct2d that shares everything it has."""
    bn.__class__ = FusedBatchNormAct2d
    bn.relu, bn.dropout, bn.order = True, dropout, "add_act"  # type: ignore[assignment]


def why_not_projection(downsample: nn.Module) -> str | None:
    """Why a `downsample` cannot become a ProjectionShortcut, or None where it can."""
    if type(downsample) is not nn.Sequential or len(downsample) != 2:
        return f"expected a Sequential of a convolution and a BatchNorm2d, got {type(downsample).__name__}"
    conv, bn = downsample
    if type(conv) is not nn.Conv2d or conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding != (0, 0):
        return f"expected a 1x1 Conv2d without padding or groups first, got {conv}"
    if conv.bias is not None:
        return "its convolution has a bias"
    if type(bn) is not nn.BatchNorm2d:
        return f"expected a BatchNorm2d second, got {type(bn).__name__}"
    return None


def fuse_block_parts(block: BasicBlock | Bottleneck, dropout: float) -> None:
    """Turn a block's normalisations, and its downsample where that is a projection, into fused ones."""
    last_but_one = "bn2" if isinstance(block, Bottleneck) else "bn1"
    for name, child in block.named_children():
        if name.startswith("bn"):
            fuse_norm(child, dropout if name == last_but_one else 0.0)  # type: ignore[arg-type]
    if block.downsample is not None and why_not_projection(block.downsample) is None:
        block.downsample.__class__ = ProjectionShortcut


def _join(block: BasicBlock | Bottleneck, x: Tensor, out: Tensor, norm: BatchNormAct2d) -> Tensor:
    """relu(norm(out) + shortcut(x))"""
    if isinstance(block.downsample, ProjectionShortcut):
        return block.downsample(x, out, norm)  # type: ignore[no-any-return]
    return norm(out, x if block.downsample is None else block.downsample(x))  # type: ignore[no-any-return]


def _check_norm_layer(norm_layer: Callable[..., nn.Module] | None) -> None:
    if norm_layer not in (None, nn.BatchNorm2d):
        raise TypeError(f"norm_layer: expected torch.nn.BatchNorm2d or None, got {norm_layer!r}")


class FusedBasicBlock(BasicBlock):
    """torchvision's BasicBlock with BN + ReLU + dropout and BN + addition + ReLU in one pass each.

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as torchvision's BasicBlock.
            A downsample of a 1x1 convolution and a BatchNorm2d becomes a ProjectionShortcut.
        dropout: between the convolutions.
    """

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
    ) -> None:
        check_dropout(dropout)
        _check_norm_layer(norm_layer)
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        fuse_block_parts(self, dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return _join(self, x, self.conv2(out), self.bn2)


class FusedBottleneck(Bottleneck):
    """torchvision's Bottleneck with BN + ReLU (+ dropout) and BN + addition + ReLU in one pass each.

    Args:
        inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer: as torchvision's Bottleneck.
        dropout: before the last convolution.
    """

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
    ) -> None:
        check_dropout(dropout)
        _check_norm_layer(norm_layer)
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer)
        fuse_block_parts(self, dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return _join(self, x, self.conv3(out), self.bn3)


# --------------------------------------------------------------------------------------- residual block, skip connection


class SkipConnection(nn.Module):
    """The input's way to the addition where sizes differ: relu(bn(conv1x1(x))).

    Args:
        in_channels, out_channels: channels before and after.
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        self.bn: BatchNormAct2d = FusedBatchNormAct2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, ceil(H / stride), ceil(W / stride)]."""
        if not isinstance(self.bn, FusedBatchNormAct2d):
            return self.bn(self.conv(x))  # type: ignore[no-any-return]
        return functional.projection_shortcut(
            x,
            self.conv.weight,
            norm_params(self.bn),
            stride=self.conv.stride,  # type: ignore[arg-type]
            training=uses_batch_statistics(self.bn),
            relu=self.bn.relu,
        )


class ResidualBlock(nn.Module):
    """conv 3x3, BN, ReLU, dropout, addition of the input; then conv 3x3, BN.

        y = bn2(conv2(dropout(relu(bn1(conv1(x)))) + shortcut(x)))

    The shortcut is the input itself, or a SkipConnection where channels or resolution change. Nothing follows the last BN.

    Args:
        in_channels, out_channels: channels before and after.
        stride: of the first convolution and of the SkipConnection.
        dropout: probability of dropping an element in training.
    """

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1: BatchNormAct2d = FusedBatchNormAct2d(out_channels, dropout=dropout, order="act_add")
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2: BatchNormAct2d = FusedBatchNormAct2d(out_channels, relu=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else SkipConnection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] -> [N, Cout, ceil(H / stride), ceil(W / stride)]."""
        out = self.bn1(self.conv1(x), self.shortcut(x))
        return self.bn2(self.conv2(out))  # type: ignore[no-any-return]
