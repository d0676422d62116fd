"""Stateless functions: check the arguments, honour autocast, draw the dropout seed, call one operator.

A call that is not an ordinary one (`fastres.ordinary`), as under torch.func, is PyTorch's own operators instead, from
fastres.reference: derivatives of any order and kind, the batched form and a portable graph are those operators'.
"""

from fastres.contract import ORDERS, NormParams, Statistics
from fastres.functional.conv import (
    Convolved,
    conv1x1_with_statistics,
    conv3x3,
    conv3x3_norm_act,
    conv3x3_with_statistics,
    measured_conv3x3,
    norm_act_conv1x1,
    norm_act_conv3x3,
)
from fastres.functional.grouped import grouped_conv2d, grouped_conv2d_with_statistics
from fastres.functional.norm import batch_norm_act
from fastres.functional.pool import batch_norm_act_max_pool2d, max_pool2d
from fastres.functional.shortcut import projection_shortcut

__all__ = [
    "ORDERS",
    "Convolved",
    "NormParams",
    "Statistics",
    "batch_norm_act",
    "batch_norm_act_max_pool2d",
    "conv1x1_with_statistics",
    "conv3x3",
    "conv3x3_norm_act",
    "conv3x3_with_statistics",
    "grouped_conv2d",
    "grouped_conv2d_with_statistics",
    "max_pool2d",
    "measured_conv3x3",
    "norm_act_conv1x1",
    "norm_act_conv3x3",
    "projection_shortcut",
]
