"""The 3x3 convolutions of a residual block together with the normalisations around them.

In training a convolution measures its output for the normalisation that follows, applies the one before it to its own
input, and adds to its input's gradient that of the shortcut. In evaluation it applies the normalisation that follows.

Every function here asks at each call whether its modules are exactly what it stands for. A module that is hooked,
pruned, parametrised or replaced, or that convolves in another way, is called as it is.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch.nn as nn
from torch import Tensor

from fastres import functional
from fastres.functional import Convolved, Statistics
from fastres.nn.norm import FusedBatchNormAct2d, count_batch, known, read_norm, uses_batch_statistics
from fastres.nn.obstacles import is_exactly
from fastres.ops.conv3x3 import ALGORITHMS


def check_conv_algorithm(conv_algorithm: str | None) -> str | None:
    """`conv_algorithm` as it is.

    Raises:
        TypeError: it is neither a string nor None.
        ValueError: it is none of `fastres.ops.conv3x3.ALGORITHMS`.
    """
    if conv_algorithm is not None and not isinstance(conv_algorithm, str):
        raise TypeError(f"conv_algorithm: expected a string or None, got {type(conv_algorithm).__name__}")
    if conv_algorithm is not None and conv_algorithm not in ALGORITHMS:
        raise ValueError(f"conv_algorithm: expected one of {ALGORITHMS} or None, got {conv_algorithm!r}")
    return conv_algorithm


class ConvAlgorithm:
    """A block whose 3x3 convolutions may be told how to compute.

    Attributes:
        conv_algorithm: "auto", "direct" or "winograd" as in `fastres.functional.conv3x3`; None leaves it to the
            environment variable FASTRES_CONV.
    """

    conv_algorithm: str | None

    def extra_repr(self) -> str:
        return "" if self.conv_algorithm is None else f"conv_algorithm={self.conv_algorithm}"


def is_conv3x3(conv: nn.Module, strides: tuple[tuple[int, int], ...] = ((1, 1),)) -> TypeGuard[nn.Conv2d]:
    """Whether calling the module is `fastres.functional.conv3x3` with its weight, or the same with one of `strides`."""
    return (
        is_exactly(conv, nn.Conv2d)
        and conv.bias is None
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.dilation == (1, 1)
        and conv.stride in strides
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def takes_batch_statistics(norm: nn.Module) -> TypeGuard[FusedBatchNormAct2d]:
    """Whether a convolution may stand in for part of this normalisation, and has to use the batch's statistics."""
    return is_exactly(norm, FusedBatchNormAct2d) and uses_batch_statistics(norm)


def convolve(conv: nn.Module, x: Tensor, norm: nn.Module, algorithm: str | None) -> Convolved:
    """conv(x), which goes to `norm`; with its statistics where norm needs them, and x for its other uses."""
    # Beside a normalisation in plain PyTorch the convolution is PyTorch's as well: that is what unfuse leaves behind.
    if not is_exactly(norm, FusedBatchNormAct2d) or not is_conv3x3(conv):
        return Convolved(conv(x), None, x)
    if uses_batch_statistics(norm):
        return functional.measured_conv3x3(x, conv.weight, algorithm=algorithm)
    return Convolved(functional.conv3x3(x, conv.weight, algorithm=algorithm), None, x)


def norm_convolve(
    norm: FusedBatchNormAct2d,
    conv: nn.Module,
    x: Tensor,
    statistics: Statistics | None,
    next_norm: nn.Module,
    algorithm: str | None,
    *,
    residual: Tensor | None = None,
    dropout_training: bool | None = None,
) -> tuple[Tensor, Statistics | None]:
    """conv(norm(x, residual)), and its statistics where next_norm needs them.

    Args:
        norm: one that `takes_batch_statistics`.
        statistics: those of x where they are known.
        residual, dropout_training: as `FusedBatchNormAct2d.forward`.
    """
    if not is_conv3x3(conv):
        return conv(norm(x, residual, dropout_training=dropout_training, statistics=statistics)), None
    params, _ = read_norm(norm)
    drops = norm.training if dropout_training is None else dropout_training
    y, measured = functional.norm_act_conv3x3(
        x, params, conv.weight, statistics=statistics, residual=residual,
        relu=norm.relu, dropout_p=norm.dropout if drops else 0.0, order=norm.order, algorithm=algorithm,
    )  # fmt: skip
    count_batch(norm)
    return y, measured if takes_batch_statistics(next_norm) else None


def convolve_norm(conv: nn.Module, norm: nn.Module, x: Tensor, algorithm: str | None, **call: Any) -> Tensor:
    """norm(conv(x), **call), in one step where norm takes its running statistics."""
    residual = call.get("residual")
    if (
        is_exactly(norm, FusedBatchNormAct2d)
        and not uses_batch_statistics(norm)
        and (residual is None or norm.order == "add_act")
        and not (norm.dropout and call.get("dropout_training"))
        and is_conv3x3(conv, ((1, 1), (2, 2)))
    ):
        params, _ = read_norm(norm)
        return functional.conv3x3_norm_act(
            x, conv.weight, params, residual=residual, relu=norm.relu, stride=conv.stride[0], algorithm=algorithm
        )
    y, statistics, _ = convolve(conv, x, norm, algorithm)
    return norm(y, **call, **known(statistics))  # type: ignore[no-any-return]
