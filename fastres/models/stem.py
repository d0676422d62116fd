"""What networks share: the first layers, for small images or for those of ImageNet's size, the head, and the width."""

from __future__ import annotations

import math

import torch.nn as nn

STEMS = ("cifar", "imagenet")
STEM_CHANNELS = 64


def check_head(num_classes: int, stem: str) -> None:
    """Check two arguments that every network has.

    Raises:
        TypeError: num_classes is not an int.
        ValueError: num_classes is below 1, or stem unknown.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes: expected an int, got {type(num_classes).__name__}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    if stem not in STEMS:
        raise ValueError(f"stem: expected one of {STEMS}, got {stem!r}")


def check_width(width: float) -> float:
    """`width`, the multiplier of a network's channels, as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive and finite.
    """
    if isinstance(width, bool) or not isinstance(width, (int, float)):
        raise TypeError(f"width: expected a number, got {type(width).__name__}")
    if not 0 < width < math.inf:
        raise ValueError(f"width: expected a positive number, got {width}")
    return float(width)


def scaled(channels: int, width: float) -> int:
    """channels * width as the nearest multiple of 8, at least 8; kernels take channels eight or sixteen at a time."""
    return max(8, 8 * math.floor(channels * width / 8 + 0.5))


def make_stem(stem: str, channels: int = STEM_CHANNELS) -> tuple[nn.Conv2d, nn.Module]:
    """The first convolution and the pool: 7x7 stride 2 and 3x3 stride 2 (He et al. 2015, table 1), or 3x3 and none."""
    if stem == "imagenet":
        conv = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
        return conv, nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return nn.Conv2d(3, channels, kernel_size=3, padding=1, bias=False), nn.Identity()


def init_convolution(conv: nn.Conv2d) -> None:
    """As torchvision's ResNet: He et al. 2015, "Delving deep into rectifiers", equation 15."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def init_small_network(network: nn.Module) -> None:
    """As the authors' networks for CIFAR: convolutions by `init_convolution`, biases of linear layers 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            init_convolution(module)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
