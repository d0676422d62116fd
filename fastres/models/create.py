"""A network by its name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastres.fuse import unfuse
from fastres.models.article import ArticleResNet18
from fastres.models.resnet import FusedResNet18, FusedResNet34, FusedResNet50, FusedResNet101, FusedResNet152

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": FusedResNet18,
    "resnet34": FusedResNet34,
    "resnet50": FusedResNet50,
    "resnet101": FusedResNet101,
    "resnet152": FusedResNet152,
    "article": ArticleResNet18,
}
NAMES = tuple(_MODELS)


def create(
    name: str, *, num_classes: int, stem: str = "cifar", dropout: float | None = None, fused: bool = True
) -> nn.Module:
    """A network with fresh parameters; the same torch seed gives the same ones fused and plain.

    Args:
        name: one of `NAMES`.
        num_classes, stem: as `FusedResNet`.
        dropout: None means the network's own default.
        fused: off gives the same network on plain PyTorch operators.
    Raises:
        ValueError: an unknown name, or an argument that the network refuses.
    """
    if name not in _MODELS:
        raise ValueError(f"name: expected one of {NAMES}, got {name!r}")
    options = {} if dropout is None else {"dropout": dropout}
    model = _MODELS[name](num_classes, stem=stem, **options)
    return model if fused else unfuse(model, inplace=True)
