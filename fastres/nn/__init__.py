"""Modules with parameters: they read them, and call `fastres.functional`.

A fused module holds the parameters of the torch or torchvision module that it stands for, under the same names, so
checkpoints go both ways.
"""

from fastres.nn.blocks import (
    DropoutBasicBlock,
    DropoutBottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    ResidualBlock,
)
from fastres.nn.norm import AbsorbedReLU, BatchNormAct2d, FusedBatchNormAct2d
from fastres.nn.shortcut import ProjectionShortcut, SkipConnection

__all__ = [
    "AbsorbedReLU",
    "BatchNormAct2d",
    "DropoutBasicBlock",
    "DropoutBottleneck",
    "FusedBasicBlock",
    "FusedBatchNormAct2d",
    "FusedBottleneck",
    "ProjectionShortcut",
    "ResidualBlock",
    "SkipConnection",
]
