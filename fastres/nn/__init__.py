"""Modules with parameters. Each reads its parameters and calls `fastres.functional`."""

from fastres.nn.batch_norm_act import BatchNormAct2d, FusedBatchNormAct2d
from fastres.nn.blocks import (
    DropoutBasicBlock,
    DropoutBottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    ResidualBlock,
    SkipConnection,
)
from fastres.nn.projection import ProjectionShortcut

__all__ = [
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
