"""Modules with parameters: they read them, and call `fastres.functional`.

A fused module holds the children and parameters of the torch or torchvision module that it stands for, under the same
names, so checkpoints go both ways.
"""

from fastres.nn.blocks import (
    DropoutBasicBlock,
    DropoutBottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    PlainResidualBlock,
    ResidualBlock,
)
from fastres.nn.norm import BatchNormAct2d, FusedBatchNormAct2d
from fastres.nn.shortcut import PlainSkipConnection, ProjectionShortcut, SkipConnection
from fastres.nn.stem import FusedLayerGetter, FusedStemResNet

__all__ = [
    "BatchNormAct2d",
    "DropoutBasicBlock",
    "DropoutBottleneck",
    "FusedBasicBlock",
    "FusedBatchNormAct2d",
    "FusedBottleneck",
    "FusedLayerGetter",
    "FusedStemResNet",
    "PlainResidualBlock",
    "PlainSkipConnection",
    "ProjectionShortcut",
    "ResidualBlock",
    "SkipConnection",
]
