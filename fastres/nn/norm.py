"""Batch normalisation with what follows it: addition, ReLU, dropout. Fused, and its twin in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres import functional
from fastres.functional import NormParams, Statistics

if TYPE_CHECKING:
    from typing_extensions import Self


def check_dropout(dropout: float) -> float:
    """`dropout` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in 0 <= dropout < 1.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: expected a number, got {type(dropout).__name__}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
    return float(dropout)


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether torch.nn.BatchNorm2d.forward would normalise by the batch's own statistics."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def read_norm(norm: nn.BatchNorm2d) -> tuple[NormParams, bool]:
    """What torch.nn.BatchNorm2d.forward would use: parameters, and whether the batch's own statistics count.

    With momentum None the share of the batch is 1 / (batches seen, this one included), which makes the running
    statistics a cumulative average.
    """
    tracks = norm.track_running_stats or not norm.training
    mean, var = (norm.running_mean, norm.running_var) if tracks else (None, None)
    momentum = norm.momentum
    if momentum is None:
        counts = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1.0) if counts else 0.0  # type: ignore[arg-type]
    params = NormParams(mean, var, norm.weight, norm.bias, momentum, norm.eps)
    return params, uses_batch_statistics(norm)


def count_batch(norm: nn.BatchNorm2d) -> None:
    """Count a batch as torch.nn.BatchNorm2d does, to be called once the batch has gone through."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def known(statistics: Statistics | None) -> dict[str, Any]:
    """The keyword of `FusedBatchNormAct2d.forward`, left out where nothing is known: another class may lack it."""
    return {} if statistics is None else {"statistics": statistics}


class _NormAct(nn.BatchNorm2d):
    """BatchNorm2d that knows what follows it. Subclasses say how it is computed."""

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
        bias: bool = True,
        relu: bool = True,
        dropout: float = 0.0,
        order: str = "add_act",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set(relu, dropout, order)

    def _set(self, relu: bool, dropout: float, order: str) -> None:
        if not isinstance(relu, bool):
            raise TypeError(f"relu: expected a bool, got {type(relu).__name__}")
        if order not in functional.ORDERS:
            raise ValueError(f"order: expected one of {functional.ORDERS}, got {order!r}")
        self.relu, self.dropout, self.order = relu, check_dropout(dropout), order

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def adopt(cls, norm: nn.BatchNorm2d, *, relu: bool = True, dropout: float = 0.0, order: str = "add_act") -> Self:
        """Turn `norm` itself into one of these. Parameters, buffers, hooks, mode: the object stays the same."""
        if type(norm) is not nn.BatchNorm2d and not isinstance(norm, _NormAct):
            raise TypeError(f"norm: expected exactly torch.nn.BatchNorm2d, got {type(norm).__name__}")
        norm.__class__ = cls
        assert isinstance(norm, cls)
        norm._set(relu, dropout, order)
        return norm

    def release(self) -> nn.BatchNorm2d:
        """The way back from `adopt`: this object as a plain torch.nn.BatchNorm2d, without what followed."""
        del self.relu, self.dropout, self.order
        self.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        return self

    def extra_repr(self) -> str:
        steps = ["batch_norm", *["relu"] * self.relu, *[f"dropout({self.dropout:g})"] * (self.dropout > 0)]
        # Where the residual joins when one is passed to forward.
        steps.insert(1 if self.order == "add_act" else len(steps), "[add]")
        own = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{own}, steps={' > '.join(steps)}"


class FusedBatchNormAct2d(_NormAct):
    """torch.nn.BatchNorm2d with the addition, ReLU and dropout that follow it, in one pass over memory.

        "add_act":  y = dropout(relu(bn(x) + residual))
        "act_add":  y = dropout(relu(bn(x))) + residual

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as torch.nn.BatchNorm2d.
        relu: off leaves normalisation and addition.
        dropout: 0 <= dropout < 1, the probability of dropping an element, in training mode only.
        order: "add_act" (ResNet v1) or "act_add".
    The state_dict is BatchNorm2d's.
    Raises:
        TypeError, ValueError: an argument has the wrong type, dropout is outside [0, 1), order is unknown.
    """

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_training: bool | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """Normalise `x`, add `residual`, apply ReLU and dropout.

        Args:
            x: [N, C, H, W], float32 | bfloat16 | float16 (float64 on the CPU); NCHW or channels_last.
            residual: [N, C, H, W], dtype and device of x.
            dropout_training: whether dropout acts; None means in training mode. A block passes its own mode, so that
                freezing the normalisation (`norm.eval()`) leaves the block's dropout alone.
            statistics: those of x where they are known already, as a convolution measures them; only where the batch's
                statistics are used.
        Returns:
            [N, C, H, W], dtype and memory format of x.
        Raises:
            TypeError, ValueError: as `fastres.functional.batch_norm_act`.
        """
        dropout = self.dropout if (self.training if dropout_training is None else dropout_training) else 0.0
        norm, batch_statistics = read_norm(self)
        # The operator knows dropout only together with batch statistics; a frozen normalisation needs a second step.
        separate = dropout > 0 and not batch_statistics
        late = separate and self.order == "act_add"
        y = functional.batch_norm_act(
            x, *norm[:4], training=batch_statistics, momentum=norm.momentum, eps=norm.eps,
            residual=None if late else residual, relu=self.relu, dropout_p=0.0 if separate else dropout,
            order=self.order, statistics=statistics,
        )  # fmt: skip
        if separate:
            y = F.dropout(y, dropout)
        if late and residual is not None:
            y = y + residual
        count_batch(self)
        return y


class BatchNormAct2d(_NormAct):
    """`FusedBatchNormAct2d` in plain PyTorch: the same arguments, parameters and results, one operator after another.

    `fastres.unfuse` leaves it behind where torchvision has no class to go back to.
    """

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_training: bool | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """As `FusedBatchNormAct2d.forward`; x is measured whether or not `statistics` are given."""
        y = super().forward(x)
        if residual is not None and self.order == "add_act":
            y = y + residual
        if self.relu:
            y = F.relu(y)
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, self.training if dropout_training is None else dropout_training)
        if residual is not None and self.order == "act_add":
            y = y + residual
        return y


class AbsorbedReLU(nn.ReLU):
    """A ReLU that the normalisation before it has already applied: it hands its input on, and still runs its hooks."""

    def forward(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x
