"""Batch normalisation with what follows it in a residual network, fused and plain."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastres import functional
from fastres.functional import NormParams


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether forward normalises by the batch: in training, and always where no running statistics are kept."""
    return bn.training or bn.running_mean is None


def norm_params(bn: nn.BatchNorm2d) -> NormParams:
    """What `functional` needs of a BatchNorm2d for one forward pass; in training it counts the batch, as the module does."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    tracked = not bn.training or bn.track_running_stats
    return NormParams(
        bn.running_mean if tracked else None, bn.running_var if tracked else None, bn.weight, bn.bias, momentum, bn.eps
    )


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm2d, addition, ReLU and dropout on PyTorch's own operators: the plain twin of `FusedBatchNormAct2d`.

        "add_act":  y = dropout(relu(bn(x) + residual))            "act_add":  y = dropout(relu(bn(x))) + residual

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.BatchNorm2d.
        relu: off leaves the normalisation and the addition.
        dropout: probability of dropping an element in training, 0 <= dropout < 1.
        order: "add_act" | "act_add".
    Raises:
        ValueError: dropout or order out of range.
    """

    relu: bool
    dropout: float
    order: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        relu: bool = True,
        dropout: float = 0.0,
        order: str = "add_act",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_dropout(dropout)
        if order not in functional.ORDERS:
            raise ValueError(f"order: expected one of {functional.ORDERS}, got {order!r}")
        self.relu, self.dropout, self.order = relu, dropout, order

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [N, C, H, W] -> [N, C, H, W]."""
        y = super().forward(x)
        if residual is not None and self.order == "add_act":
            y = y + residual
        if self.relu:
            y = F.relu(y)
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, self.training)
        if residual is not None and self.order == "act_add":
            y = y + residual
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}, dropout={self.dropout}, order={self.order!r}"


class FusedBatchNormAct2d(BatchNormAct2d):
    """BatchNorm2d, addition, ReLU and dropout in one pass: `functional.batch_norm_act` with a BatchNorm2d's parameters.

    Arguments, parameters, buffers and state_dict are those of torch.nn.BatchNorm2d; `BatchNormAct2d` documents the rest.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [N, C, H, W] -> [N, C, H, W], dtype and memory format of x."""
        norm = norm_params(self)
        return functional.batch_norm_act(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=uses_batch_statistics(self),
            momentum=norm.momentum,
            eps=norm.eps,
            residual=residual,
            relu=self.relu,
            dropout_p=self.dropout if self.training else 0.0,
            order=self.order,
        )


def check_dropout(dropout: float) -> None:
    """Raises ValueError unless 0 <= dropout < 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
