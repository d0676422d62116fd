"""Small residual networks and others, written as users write them, with nothing of ours inside."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def conv3x3(inputs: int, outputs: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)


class Basic(nn.Module):
    """The block of the CIFAR collections: functional ReLU, the shortcut a Sequential that may be empty."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        planes = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=stride != 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + self.shortcut(x))


class OptionA(nn.Module):
    """The parameter-free shortcut: every second position, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu, self.stride, self.padding = nn.ReLU(inplace=True), stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return self.relu(out + x)


class Preactivation(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))
        out += shortcut
        return out


class ResNet(nn.Module):
    """A stem and two blocks, the second with twice the channels at half the resolution.

    With fewer than 16 inputs of a strided 1x1 convolution, oneDNN writes past its memory in channels_last.
    """

    def __init__(self, block: Any, width: int = 16, *, stem_norm: bool = True) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width) if stem_norm else nn.Identity()
        self.relu = nn.ReLU() if stem_norm else nn.Identity()
        self.blocks = nn.Sequential(block(width, width, 1), block(width, 2 * width, 2))
        self.last = nn.Identity() if stem_norm else nn.Sequential(nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True))
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.blocks(self.relu(self.bn1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(out, 2).mean((2, 3)))


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(
            conv3x3(inputs, outputs, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            conv3x3(outputs, outputs, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    def __init__(self, bias: bool, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = DoubleConv(3, width, bias), DoubleConv(width, 2 * width, bias)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge, self.out = DoubleConv(2 * width, width, bias), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        deep = self.down2(F.max_pool2d(skip, 2))
        return self.out(self.merge(torch.cat([skip, self.up(deep)], 1)))


class Perceptron(nn.Sequential):
    """Batch normalisation of vectors, with dropout that does nothing."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 16, bias=False),
            nn.BatchNorm1d(16), nn.SiLU(inplace=True), nn.Linear(16, 4),
        )  # fmt: skip


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.LeakyReLU(0.1, inplace=True), nn.MaxPool3d(2),
            nn.Conv3d(6, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ELU(),
        )  # fmt: skip


class Autoencoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv3x3(3, 8, 2, bias=True), nn.BatchNorm2d(8), nn.GELU(), conv3x3(8, 16, 2), nn.BatchNorm2d(16),
            nn.Hardswish(), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip


IMAGES = [(2, 3, 12, 12)]
NETWORKS: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "basic": (lambda: ResNet(Basic), IMAGES),
    "bottleneck": (lambda: ResNet(Bottleneck), IMAGES),
    "option_a": (lambda: ResNet(OptionA), IMAGES),
    "preactivation": (lambda: ResNet(Preactivation, stem_norm=False), IMAGES),
    "unet": (lambda: UNet(bias=False), IMAGES),
    "unet_bias": (lambda: UNet(bias=True), IMAGES),
    "perceptron": (Perceptron, [(8, 12)]),
    "volume": (Volume, [(2, 2, 6, 8, 8)]),
    "autoencoder": (Autoencoder, IMAGES),
}
