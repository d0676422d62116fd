"""The block of plain networks that are trained in minutes: two convolutions, and a max pool between the first and its
normalisation."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres.nn.blocks import FusedBlock
from fastres.nn.steps import (
    check_dropout,
    conv_alone,
    conv_norm,
    conv_with_statistics,
    gains_by_channels_last,
    max_pool,
    norm_act,
    uses_batch_statistics,
)
from fastres.nn.trust import AnyActivation, activation_of, renamed


class PlainPooledBlock(nn.Module):
    """`PooledBlock` in plain PyTorch: the same arguments (but conv_algorithm), children, parameters and results."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dropout = check_dropout(dropout)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.bn1 = _norm_without_scale(out_channels, eps, momentum)
        self.act = nn.GELU() if act is None else act
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = _norm_without_scale(out_channels, eps, momentum)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H // 2, W // 2]."""
        out = self.act(self.bn1(self.pool(self.conv1(x))))
        out = self.act(self.bn2(self.conv2(out)))
        if self.dropout > 0.0:
            out = F.dropout(out, self.dropout, self.training)
        return out  # type: ignore[no-any-return]


def _norm_without_scale(channels: int, eps: float, momentum: float) -> nn.BatchNorm2d:
    """Its scale stays 1: torch's own backward on CUDA fails where there is a bias and no weight."""
    norm = nn.BatchNorm2d(channels, eps, momentum)
    norm.weight.requires_grad_(False)
    return norm


class PooledBlock(FusedBlock, PlainPooledBlock):
    """Two 3x3 convolutions, the first pooled, with a normalisation and an activation after each.

        y = dropout(f(bn2(conv2(f(bn1(maxpool(conv1 x)))))))

    The normalisations have a bias, and a scale that is not trained. The convolutions are
    `fastres.functional.conv3x3`; the second measures its output for bn2 in training, and applies bn2 and f itself in
    evaluation. The activated input of conv2 is written and kept: to compute an activation such as GELU again for every
    tile that reads an element costs more than that.

    Args:
        in_channels, out_channels: of the block.
        dropout: 0 <= dropout < 1; it acts where the block is in training mode.
        eps, momentum: of both normalisations, as torch.nn.BatchNorm2d.
        act: f; None is GELU.
        conv_algorithm: as `FusedBasicBlock`.
    Raises:
        TypeError: dropout is not a number, conv_algorithm not a string or None.
        ValueError: dropout is outside [0, 1); conv_algorithm is unknown.
    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 2.
    """

    exactly = {  # noqa: RUF012
        "conv1": nn.Conv2d,
        "pool": nn.MaxPool2d,
        "bn1": nn.BatchNorm2d,
        "act": AnyActivation,
        "conv2": nn.Conv2d,
        "bn2": nn.BatchNorm2d,
    }
    _plain = renamed(PlainPooledBlock.forward, "_plain")
    _plain_with_dropout = renamed(PlainPooledBlock.forward, "_plain_with_dropout")

    def __init__(self, *args: Any, dropout: float = 0.0, conv_algorithm: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, dropout=dropout, **kwargs)
        self._set(dropout, conv_algorithm)

    @torch.jit.unused
    def _gains_by_channels_last(self, x: Tensor) -> bool:
        return gains_by_channels_last(x, self.conv1, self.conv1, self.conv_algorithm)

    @torch.jit.unused
    def _fused(self, x: Tensor, shortcut: Tensor, readers: int) -> Any:
        algorithm, bn1, bn2, f = self.conv_algorithm, self.bn1, self.bn2, activation_of(self.act)
        out = norm_act(bn1, max_pool(self.pool, conv_alone(self.conv1, x, algorithm)), activation=f)
        if uses_batch_statistics(bn2):
            out, statistics, _ = conv_with_statistics(self.conv2, out, algorithm)
            return norm_act(
                bn2, out, activation=f, dropout=self._dropout_now(), statistics=statistics, readers=readers
            )  # fmt: skip
        y = conv_norm(self.conv2, bn2, out, activation=f, algorithm=algorithm)
        return y if readers == 1 else (y, y)
