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
from fastres.nn.norm import (
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    FusedBatchNormAct1d,
    FusedBatchNormAct2d,
    FusedBatchNormAct3d,
)
from fastres.nn.pooled import PlainPooledBlock, PooledBlock
from fastres.nn.preactivation import FusedPreactivationBlock, PreactivationBlock
from fastres.nn.shortcut import PadShortcut, PlainSkipConnection, ProjectionShortcut, SkipConnection
from fastres.nn.stem import FusedLayerGetter, FusedStemResNet

__all__ = [
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "DropoutBasicBlock",
    "DropoutBottleneck",
    "FusedBasicBlock",
    "FusedBatchNormAct1d",
    "FusedBatchNormAct2d",
    "FusedBatchNormAct3d",
    "FusedBottleneck",
    "FusedLayerGetter",
    "FusedPreactivationBlock",
    "FusedStemResNet",
    "PadShortcut",
    "PlainPooledBlock",
    "PlainResidualBlock",
    "PlainSkipConnection",
    "PooledBlock",
    "PreactivationBlock",
    "ProjectionShortcut",
    "ResidualBlock",
    "SkipConnection",
]
