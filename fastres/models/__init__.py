"""Networks of our blocks: torchvision's ResNets, those for small images, and the article's."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch.nn as nn

from fastres.fuse import unfuse
from fastres.models.article import ArticleResNet18
from fastres.models.cifar import CifarResNet, check_depth
from fastres.models.fast import FastNet
from fastres.models.resnet import (
    FusedResNet,
    FusedResNet18,
    FusedResNet34,
    FusedResNet50,
    FusedResNet101,
    FusedResNet152,
)
from fastres.models.wide import WideResNet

__all__ = [
    "NAMES",
    "ArticleResNet18",
    "CifarResNet",
    "FastNet",
    "FusedResNet",
    "FusedResNet18",
    "FusedResNet34",
    "FusedResNet50",
    "FusedResNet101",
    "FusedResNet152",
    "WideResNet",
    "create",
    "why_unknown",
]


_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": FusedResNet18,
    "resnet34": FusedResNet34,
    "resnet50": FusedResNet50,
    "resnet101": FusedResNet101,
    "resnet152": FusedResNet152,
    **{f"resnet{depth}": functools.partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "article": ArticleResNet18,
    "fast": FastNet,
    **{f"wrn{depth}-{k}": functools.partial(WideResNet, depth, k) for depth, k in ((16, 4), (28, 10), (40, 4))},
}
NAMES: tuple[str, ...] = tuple(_CLASSES)
"""Names of networks. `create` knows wrn<depth>-<k> of any depth 6n + 4 and any widening factor k as well."""

_WIDE = re.compile(r"wrn([1-9][0-9]{0,3})-([1-9][0-9]{0,2})")


def why_unknown(name: str) -> str | None:
    """Why `create` has no network of this name; None where it has one."""
    if name in _CLASSES:
        return None
    found = _WIDE.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return f"expected one of {', '.join(NAMES)}, or another wrn<depth>-<k>, got {name!r}"
    try:
        check_depth(int(found[1]), 4)
    except ValueError as error:
        return f"{str(error).removeprefix('depth: ').rpartition(', got')[0]} as the depth, got {name!r}"
    return None


def create(
    name: str,
    *,
    num_classes: int,
    stem: str = "cifar",
    dropout: float | None = None,
    fused: bool = True,
    conv_algorithm: str | None = None,
    width: float = 1.0,
) -> nn.Module:
    """A network by its name.

    Args:
        name: one of NAMES, or wrn<depth>-<k> with a depth of 6n + 4.
        num_classes: outputs.
        stem: "cifar" (3x3, stride 1, no pool) or "imagenet" (7x7, stride 2, max pool).
        dropout: 0 <= dropout < 1; None takes the network's own default.
        fused: off gives the same network in plain PyTorch; from the same seed it has the same weights.
        conv_algorithm: of the fused blocks, as `fastres.fuse`.
        width: multiplier of all channels, which are rounded to multiples of 8, at least 8.
    Returns:
        The network, in training mode, float32, on the CPU.
    Raises:
        ValueError: an unknown name, stem or conv_algorithm; num_classes below 1; dropout outside [0, 1); conv_algorithm
            with fused=False; width not positive and finite.
        TypeError: num_classes, dropout or width is not a number, conv_algorithm not a string or None.
    """
    why = why_unknown(name)
    if why is not None:
        raise ValueError(f"name: {why}")
    if conv_algorithm is not None and not fused:
        raise ValueError(f"conv_algorithm: expected None with fused=False, got {conv_algorithm!r}")
    make = _CLASSES.get(name)
    if make is None:
        depth, k = (int(number) for number in name.removeprefix("wrn").split("-"))
        make = functools.partial(WideResNet, depth, k)
    options = {} if dropout is None else {"dropout": dropout}
    model = make(num_classes=num_classes, stem=stem, conv_algorithm=conv_algorithm, width=width, **options)
    return model if fused else unfuse(model, inplace=True)
