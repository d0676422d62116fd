"""Parts taken away from a plain network, in place: shortcuts, normalisations, activations."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from torchvision.models.resnet import BasicBlock


class WithoutShortcut(BasicBlock):  # type: ignore[misc]
    """A basic block whose result is that of its two convolutions alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, K, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))  # type: ignore[no-any-return]


def remove_shortcuts(model: nn.Module) -> None:
    """Change every basic block into one without its shortcut.

    Raises:
        ValueError: there is none.
    """
    blocks: list[Any] = [module for module in model.modules() if type(module) is BasicBlock]
    if not blocks:
        raise ValueError("model: expected torchvision's basic blocks, found none")
    for block in blocks:
        block.__class__ = WithoutShortcut
        block.downsample = None


def remove(model: nn.Module, kind: type[nn.Module]) -> None:
    """Put an identity in the place of every module of `kind`.

    Raises:
        ValueError: there is none.
    """
    found = [(parent, name) for parent in model.modules() for name, child in parent.named_children()
             if isinstance(child, kind)]  # fmt: skip
    if not found:
        raise ValueError(f"model: expected a {kind.__name__} to take away, found none")
    for parent, name in found:
        setattr(parent, name, nn.Identity())


def remove_normalisations(model: nn.Module) -> None:
    """Take every batch normalisation away."""
    remove(model, nn.BatchNorm2d)


def remove_activations(model: nn.Module) -> None:
    """Take every ReLU away."""
    remove(model, nn.ReLU)
