"""Networks, built on torchvision's ResNet class with our blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn

from fastres.fuse import unfuse
from fastres.models.article import ArticleResNet18
from fastres.models.fast import FastNet
from fastres.models.resnet import (
    FusedResNet,
    FusedResNet18,
    FusedResNet34,
    FusedResNet50,
    FusedResNet101,
    FusedResNet152,
)

__all__ = [
    "NAMES",
    "ArticleResNet18",
    "FastNet",
    "FusedResNet",
    "FusedResNet18",
    "FusedResNet34",
    "FusedResNet50",
    "FusedResNet101",
    "FusedResNet152",
    "create",
]

_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": FusedResNet18,
    "resnet34": FusedResNet34,
    "resnet50": FusedResNet50,
    "resnet101": FusedResNet101,
    "resnet152": FusedResNet152,
    "article": ArticleResNet18,
    "fast": FastNet,
}
NAMES: tuple[str, ...] = tuple(_CLASSES)


def create(
    name: str,
    *,
    num_classes: int,
    stem: str = "cifar",
    dropout: float | None = None,
    fused: bool = True,
    conv_algorithm: str | None = None,
) -> nn.Module:
    """A network by its name.

    Args:
        name: one of NAMES.
        num_classes: outputs.
        stem: "cifar" (3x3, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool).
        dropout: 0 <= dropout < 1; None takes the network's own default.
        fused: off gives the same network in plain PyTorch; from the same seed it has the same weights.
        conv_algorithm: of the fused blocks, as `fastres.fuse`.
    Returns:
        The network, in training mode, float32, on the CPU.
    Raises:
        ValueError: an unknown name, stem or conv_algorithm; num_classes below 1; dropout outside [0, 1); conv_algorithm
            with fused=False.
        TypeError: num_classes or dropout is not a number, conv_algorithm not a string or None.
    """
    if name not in _CLASSES:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    if conv_algorithm is not None and not fused:
        raise ValueError(f"conv_algorithm: expected None with fused=False, got {conv_algorithm!r}")
    options = {} if dropout is None else {"dropout": dropout}
    model = _CLASSES[name](num_classes, stem=stem, conv_algorithm=conv_algorithm, **options)
    return model if fused else unfuse(model, inplace=True)
