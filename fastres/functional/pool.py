"""Max pooling, alone and of a normalised and activated input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import Activation
from fastres.contract import NormParams, Pool, Statistics, statistics_dtype
from fastres.functional.checks import (
    check_norm,
    check_statistics,
    check_tensor,
    check_training,
    checked_act,
    checked_group,
)
from fastres.functional.norm import batch_norm_act, is_compiled
from fastres.functional.prepare import cast, needs_grad, store_running
from fastres.ops import max_pool as ops
from fastres.ordinary import why_not_ordinary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _checked_pool(x: Tensor, kernel_size: int, stride: int | None, padding: int) -> Pool:
    check_tensor("x", x)
    given = {"kernel_size": kernel_size, "stride": kernel_size if stride is None else stride, "padding": padding}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < (name != "padding"):
            raise ValueError(f"{name}: expected at least {int(name != 'padding')}, got {value}")
    pool = Pool(*given.values())
    if padding > kernel_size // 2:
        raise ValueError(f"padding: expected at most half of kernel_size {kernel_size}, got {padding}")
    if not pool.fits(*x.shape[2:]):
        raise ValueError(
            f"kernel_size: expected at most the size of x with its padding, got {kernel_size} for shape "
            f"{tuple(x.shape)}"
        )
    return pool


def _is_ours(x: Tensor, pool: Pool) -> bool:
    """Whether the operators serve this call: it is an ordinary one, of rows of channels in the CPU's memory."""
    return (
        why_not_ordinary() is None
        and x.device.type in ("cpu", "meta")
        and pool.kernel <= ops.MOST
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()  # which of the two PyTorch would give back
        and x.numel() > 0
    )


def max_pool2d(x: Tensor, kernel_size: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """Max pooling with square windows.

        y[n, c, i, j] = max over u, v of x[n, c, stride * i + u - padding, stride * j + v - padding]

    On the CPU in channels_last backward reads one byte an output, its place in the window, where PyTorch's reads eight;
    and it writes the gradient of x in one pass, in which each element gathers from the windows that chose it. Of equal
    values the first is chosen, as in PyTorch. Elsewhere PyTorch's max pooling.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`.
        kernel_size: of both axes; above 15 it is PyTorch's.
        stride: of both axes; None is kernel_size.
        padding: of both axes, at most half of kernel_size; padding is never chosen.
    Returns:
        [N, C, (H + 2 padding - kernel_size) // stride + 1, ...], dtype and memory format of x.
    Raises:
        TypeError: not a tensor, an unsupported dtype, kernel_size, stride or padding not an int.
        ValueError: x has not four dimensions; a size below 1, a padding below 0 or above half of kernel_size;
            kernel_size above the size of x with its padding.
    Source: Scherer, Mueller and Behnke 2010, "Evaluation of pooling operations in convolutional architectures",
        section 3; ties and NaN as torch.nn.MaxPool2d has them.
    """
    pool = _checked_pool(x, kernel_size, stride, padding)
    if not _is_ours(x, pool):
        return F.max_pool2d(x, *pool)
    if needs_grad(x):
        return ops.MaxPool.apply(x, pool)  # type: ignore[no-any-return]
    return ops.forward(x, pool, False)[0]  # type: ignore[no-any-return]


def batch_norm_act_max_pool2d(
    x: Tensor,
    norm: NormParams,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    *,
    training: bool = False,
    relu: bool = True,
    activation: Activation | str | None = None,
    statistics: Statistics | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """max_pool2d(batch_norm_act(x)): the end of a stem that pools.

    On the CPU in channels_last the activation is neither written nor saved for backward: forward makes the rows that a
    window covers, backward the gradient of a few rows at a time. Saved are x, mean, rstd and one byte an output.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`.
        norm: normalisation of x; running statistics are updated in place in training, and needed otherwise.
        kernel_size, stride, padding: as in `max_pool2d`.
        training, relu, activation, statistics, group: as in `batch_norm_act`. With a group, and in evaluation where a
            gradient is asked for, one after the other.
    Returns:
        As `max_pool2d`.
    Raises:
        TypeError, ValueError, RuntimeError: as `batch_norm_act` and `max_pool2d`; norm is no NormParams.
    Source: Ioffe and Szegedy 2015, algorithm 1; He et al. 2015, "Deep residual learning", table 1 (conv1 and its pool).
    """
    pool = _checked_pool(x, kernel_size, stride, padding)
    if not isinstance(norm, NormParams):
        raise TypeError(f"norm: expected NormParams, got {type(norm).__name__}")
    act = checked_act(relu, activation, 0.0)
    check_norm("norm.", norm, x, x.shape[1], training)
    shared = checked_group(group, training)
    check_statistics("statistics", statistics, x, training, shared)
    check_training(training, None, x, tuple(x.shape), shared)
    of_more = shared is not None or (statistics is not None and statistics.count is not None)
    gradients = needs_grad(x, norm.weight, norm.bias)
    if of_more or not is_compiled(act) or not _is_ours(x, pool) or (gradients and not training):
        a = batch_norm_act(
            x, *norm[:4], training=training, momentum=norm.momentum, eps=norm.eps, activation=act.activation,
            statistics=statistics, group=group,
        )  # fmt: skip
        return max_pool2d(a, *pool)
    own = cast(norm, statistics_dtype(x.dtype))
    if not training:
        return ops.norm_act_inference(x, own, act.activation, pool)  # type: ignore[no-any-return]
    call = ops.Call(own, statistics, act.activation, pool)
    y: Tensor = ops.NormActMaxPool.apply(x, own.weight, own.bias, call)
    store_running(norm, own)
    return y
