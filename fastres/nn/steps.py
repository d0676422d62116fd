"""The fused steps of a residual block, over torch's own modules.

In training a convolution measures its output for the normalisation that follows, applies the one before it to its own
input, and adds to its input's gradient that of the shortcut. In evaluation it applies the normalisation that follows.

Every function trusts that its modules are exactly what their classes say: the block has asked (`fastres.nn.trust`). A
convolution that is not one of ours is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres import functional
from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import Act, Pool, output_size
from fastres.functional import Convolved, NormParams, Statistics
from fastres.functional.checks import autocast_dtype
from fastres.functional.norm import norm_act as act_of_norm
from fastres.functional.prepare import needs_grad
from fastres.functional.shortcut import Branch, shortcut_act
from fastres.nn.trust import is_max_pool, why_not_children, why_not_exactly
from fastres.ops.algorithms import (
    GROUPED_KERNELS,
    choose_algorithm,
    is_served,
    known_algorithm,
    problem_of,
    requested_algorithm,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ------------------------------------------------------------------------------------------------------------ arguments


def check_conv_algorithm(conv_algorithm: str | None) -> str | None:
    """`conv_algorithm` under the name that it has today.

    Raises:
        TypeError: it is neither a string nor None.
        ValueError: it is none of `fastres.ops.algorithms.ALGORITHMS`.
    """
    if conv_algorithm is not None and not isinstance(conv_algorithm, str):
        raise TypeError(f"conv_algorithm: expected a string or None, got {type(conv_algorithm).__name__}")
    return None if conv_algorithm is None else known_algorithm("conv_algorithm", conv_algorithm)


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


# -------------------------------------------------------------------------------------------------------- normalisation


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """Whether torch.nn.BatchNorm2d.forward would normalise by the batch's own statistics."""
    if norm.training or norm._buffers.get("running_mean") is not None:
        return norm.training
    return norm.running_mean is None and norm.running_var is None


def begin_norm(norm: nn.BatchNorm2d) -> NormParams:
    """Count a batch, as torch.nn.BatchNorm2d does before anything else, and read what its forward would use.

    With momentum None the share of the batch is 1 / (batches seen, this one included), which makes the running
    statistics a cumulative average.
    """
    counts = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    if counts:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked) if counts else 0.0  # type: ignore[arg-type]
    tracks = norm.track_running_stats or not norm.training
    mean, var = (norm.running_mean, norm.running_var) if tracks else (None, None)
    return NormParams(mean, var, norm.weight, norm.bias, momentum, norm.eps)


def group_of(norm: nn.Module) -> ProcessGroup | None:
    """The processes whose batches the normalisation takes as one, as torch.nn.SyncBatchNorm.forward finds them."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    # Below 1 in a process that is no member of the group.
    return group if dist.get_world_size(group) > 1 else None


def norm_act(
    norm: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    activation: Activation = RELU,
    dropout: float = 0.0,
    order: str = "add_act",
    statistics: Statistics | None = None,
    readers: int = 1,
) -> Any:
    """dropout(f(norm(x) + residual)), in the order that `fastres.functional.batch_norm_act` says.

    Args:
        dropout: the rate; it has to be 0 where norm uses its running statistics.
        statistics: those of x, where they were taken already and norm uses the batch's.
        readers: as in `fastres.functional.norm.norm_act`.
    """
    if residual is not None and residual.shape != x.shape:
        # PyTorch's own addition, which broadcasts, or says what is wrong.
        if order == "act_add":
            y = norm_act(norm, x, activation=activation, dropout=dropout, statistics=statistics) + residual
        else:
            y = norm_act(norm, x, activation=IDENTITY, statistics=statistics)
            y += residual
            y = activation.forward(y)
            y = F.dropout(y, dropout) if dropout > 0 else y
        return y if readers == 1 else (y, y)
    return act_of_norm(
        x, begin_norm(norm), residual, act=Act(*activation, dropout, order), training=uses_batch_statistics(norm),
        statistics=statistics, readers=readers, group=group_of(norm),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- pooling


def _windows(pool: nn.Module, x: Tensor) -> Pool | None:
    """The windows of a child that is exactly a max pooling with square ones; None where it is better called."""
    if not is_max_pool(pool) or pool.ceil_mode or pool.return_indices or x.dim() != 4:
        return None
    windows = Pool.of(pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    # PyTorch says what is wrong with others.
    return windows if windows is not None and windows.fits(*x.shape[2:]) else None


def max_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """pool(x)."""
    windows = _windows(pool, x)
    return pool(x) if windows is None else functional.max_pool2d(x, *windows)


def norm_act_pool(norm: nn.BatchNorm2d, pool: nn.Module, x: Tensor, *, activation: Activation = RELU) -> Tensor:
    """pool(f(norm(x)))."""
    windows = _windows(pool, x)
    if windows is None:
        return pool(norm_act(norm, x, activation=activation))  # type: ignore[no-any-return]
    return functional.batch_norm_act_max_pool2d(
        x, begin_norm(norm), *windows, training=uses_batch_statistics(norm), activation=activation, group=group_of(norm)
    )


# --------------------------------------------------------------------------------------------------------- convolutions


def is_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether calling the module is `fastres.functional.conv3x3` with its weight, with stride 2 or any dilation."""
    return (
        conv.bias is None
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.dilation
        and (conv.dilation == (1, 1) or (conv.stride == (1, 1) and _is_square(conv.dilation)))
        and conv.stride in ((1, 1), (2, 2))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _is_square(given: Any) -> bool:
    return type(given) is tuple and len(given) == 2 and given[0] == given[1]


def _way(conv: nn.Conv2d) -> dict[str, Any]:
    """How `is_conv3x3` goes over its input, for the functions that compute it."""
    return {"stride": conv.stride[0], "dilation": cast("tuple[int, int]", conv.dilation)[0]}


def is_conv1x1(conv: nn.Conv2d) -> bool:
    """Whether calling the module is a 1x1 convolution with stride 1, no padding, one group and no bias."""
    return (
        conv.bias is None
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_grouped(conv: nn.Conv2d) -> bool:
    """Whether calling the module is `fastres.functional.grouped_conv2d` with its weight, with a kernel that it has."""
    return (
        conv.bias is None
        and conv.groups != 1
        and any(conv.kernel_size == (k, k) and conv.padding == (k // 2, k // 2) for k in GROUPED_KERNELS)
        and conv.dilation == (1, 1)
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding_mode == "zeros"
    )


def fits_convolution(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether the convolution takes x: its channels, its device, and its dtype or what autocast makes of it."""
    weight = conv.weight
    if x.shape[1] != weight.shape[1] * conv.groups or x.device != weight.device:
        return False
    return x.dtype == weight.dtype or (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))


def _output_shape(conv: nn.Conv2d, x: Tensor) -> tuple[int, ...]:
    """The shape of conv(x), for a 3x3 convolution with padding 1 or a 1x1 convolution without."""
    height, width = (output_size(size, stride) for size, stride in zip(x.shape[2:], _strides(conv), strict=True))
    return (x.shape[0], conv.weight.shape[0], height, width)


def _strides(conv: nn.Conv2d) -> tuple[int, int]:
    return cast("tuple[int, int]", torch.nn.modules.utils._pair(conv.stride))  # users set a single number as well


def is_computed_in_its_dtype(x: Tensor) -> bool:
    """Whether a convolution that reads x computes in the dtype of x, as autocast has it.

    Where it does not, PyTorch still normalises and adds x as it is.
    """
    return autocast_dtype(x.device) in (None, x.dtype)


def conv_with_statistics(conv: nn.Conv2d, x: Tensor, algorithm: str | None) -> Convolved:
    """conv(x) in training, its statistics where the convolution took them, and x for its other readers."""
    if is_conv3x3(conv):
        return functional.conv3x3_with_statistics(x, conv.weight, **_way(conv), algorithm=algorithm)
    if is_conv1x1(conv):
        return functional.conv1x1_with_statistics(x, conv.weight, algorithm=algorithm)
    if is_grouped(conv):
        return functional.grouped_conv2d_with_statistics(x, conv.weight, stride=conv.stride[0], algorithm=algorithm)
    return Convolved(conv(x), None, x)


def norm_act_conv(
    norm: nn.BatchNorm2d,
    conv: nn.Conv2d,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    activation: Activation = RELU,
    dropout: float,
    order: str = "add_act",
    statistics: Statistics | None,
    algorithm: str | None,
) -> tuple[Tensor, Statistics | None]:
    """conv(norm_act(norm, x, residual)) by the batch's statistics, and its own statistics where they were taken."""
    is_3x3 = is_conv3x3(conv)
    if not (is_3x3 or is_conv1x1(conv)) or (residual is not None and residual.shape != x.shape):
        a = norm_act(norm, x, residual, activation=activation, dropout=dropout, order=order, statistics=statistics)
        return conv_with_statistics(conv, a, algorithm)[:2]
    ours: Any = functional.norm_act_conv3x3 if is_3x3 else functional.norm_act_conv1x1
    return ours(  # type: ignore[no-any-return]
        x, begin_norm(norm), conv.weight, statistics=statistics, residual=residual, activation=activation,
        dropout_p=dropout, order=order, **(_way(conv) if is_3x3 else {}), algorithm=algorithm, group=group_of(norm),
    )  # fmt: skip


def conv_norm(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    activation: Activation = RELU,
    algorithm: str | None,
) -> Tensor:
    """f(norm(conv(x)) + residual), by norm's running statistics."""
    if is_conv3x3(conv) and (residual is None or residual.shape == _output_shape(conv, x)):
        return functional.conv3x3_norm_act(
            x, conv.weight, begin_norm(norm), residual=residual, activation=activation, **_way(conv),
            algorithm=algorithm,
        )  # fmt: skip
    return norm_act(norm, conv_alone(conv, x, algorithm), residual, activation=activation)  # type: ignore[no-any-return]


def conv_alone(conv: nn.Conv2d, x: Tensor, algorithm: str | None) -> Tensor:
    """conv(x), without a normalisation beside it."""
    if is_conv3x3(conv):
        return functional.conv3x3(x, conv.weight, **_way(conv), algorithm=algorithm)
    if is_grouped(conv):
        return functional.grouped_conv2d(x, conv.weight, stride=conv.stride[0], algorithm=algorithm)
    return conv(x)  # type: ignore[no-any-return]


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor, algorithm: str | None) -> Tensor:
    """conv(x) + residual in evaluation; where no gradient is asked for, the addition is part of the convolution."""
    fits = is_conv3x3(conv) and residual.shape == _output_shape(conv, x)
    alike = residual.dtype == x.dtype and is_computed_in_its_dtype(x)
    if not fits or not alike or needs_grad(x, conv.weight, residual):
        return conv_alone(conv, x, algorithm) + residual
    mean, var = (make(conv.weight.shape[0], device=x.device) for make in (torch.zeros, torch.ones))
    no_norm = NormParams(mean, var, None, None, 0.0, 0.0)  # exactly the identity
    return functional.conv3x3_norm_act(
        x, conv.weight, no_norm, residual=residual, activation=IDENTITY, **_way(conv), algorithm=algorithm
    )


# ------------------------------------------------------------------------------------------------------------ shortcuts


def why_not_projection(shortcut: nn.Module) -> str | None:
    """Why the first two children are not exactly a 1x1 convolution and a batch normalisation; None where they are."""
    problem = why_not_children(shortcut, {"0": nn.Conv2d, "1": nn.BatchNorm2d})
    if problem is not None:
        return problem
    conv = cast(nn.Conv2d, shortcut._modules["0"])
    if conv.bias is not None:
        return "its convolution has a bias"
    plain = conv.padding in ((0, 0), "valid") and conv.groups == 1 and conv.padding_mode == "zeros"
    if conv.kernel_size != (1, 1) or not plain:
        return f"its convolution is not a 1x1 convolution without padding and groups, but {conv}"
    return None


def why_not_downsample(downsample: nn.Module) -> str | None:
    """Why a block's `downsample` is not exactly a Sequential of a 1x1 convolution and a batch normalisation."""
    problem = why_not_exactly(downsample, nn.Sequential)
    if problem is None and list(downsample._modules) != ["0", "1"]:
        problem = f"has the children {list(downsample._modules)}, expected a convolution and a normalisation"
    return problem or why_not_projection(downsample)


def projection(
    shortcut: nn.Module,
    s: Tensor,
    norm: nn.BatchNorm2d | None = None,
    x: Tensor | None = None,
    *,
    activation: Activation = RELU,
    dropout: float = 0.0,
    statistics: Statistics | None = None,
    readers: int = 1,
) -> Any:
    """f(norm(x) + bn(conv1x1(s))), or without x f(bn(conv1x1(s))).

    Args:
        shortcut: the convolution is its child "0", the normalisation its child "1"; see `why_not_projection`.
        norm: of x; it uses the batch's statistics where the shortcut's own normalisation does, and of the same
            processes.
        statistics: those of x, where they were taken already.
    """
    conv, own = cast(nn.Conv2d, shortcut._modules["0"]), cast(nn.BatchNorm2d, shortcut._modules["1"])
    x_params = None if norm is None else begin_norm(norm)
    return shortcut_act(
        s, conv.weight, begin_norm(own), None if x is None else Branch(x, x_params, statistics),
        stride=cast("tuple[int, int]", conv.stride), training=uses_batch_statistics(own),
        act=Act(*activation, dropout, "add_act"), readers=readers, group=group_of(own),
    )  # fmt: skip


def projects_beside(norm: nn.BatchNorm2d, x: Tensor, shortcut: nn.Module, s: Tensor) -> bool:
    """Whether norm(x) and a projection of s are of one shape, by two normalisations that use one kind of statistics, of
    the same processes' batches.
    """
    conv, own = cast(nn.Conv2d, shortcut._modules["0"]), cast(nn.BatchNorm2d, shortcut._modules["1"])
    if own is norm or uses_batch_statistics(own) != uses_batch_statistics(norm) or group_of(own) is not group_of(norm):
        return False
    return fits_convolution(s, conv) and x.shape == _output_shape(conv, s)


def add_shortcut(
    norm: nn.BatchNorm2d,
    x: Tensor,
    s: Tensor,
    downsample: nn.Module | None,
    *,
    activation: Activation,
    statistics: Statistics | None = None,
    readers: int = 1,
) -> Any:
    """The end of a residual block: f(norm(x) + downsample(s)), with downsample None the identity.

    `statistics` are those of x where they were taken already and norm uses the batch's. `readers`: as in
    `fastres.functional.norm.norm_act`.
    """
    if downsample is None:
        return norm_act(norm, x, s, activation=activation, statistics=statistics, readers=readers)
    if why_not_downsample(downsample) is None:
        if projects_beside(norm, x, downsample, s):
            return projection(downsample, s, norm, x, activation=activation, statistics=statistics, readers=readers)
        conv, own = cast(nn.Conv2d, downsample._modules["0"]), cast(nn.Module, downsample._modules["1"])
        if own is not norm and group_of(own) is not None and fits_convolution(s, conv):
            # PyTorch's own refuses CPU tensors.
            r = projection(downsample, s, activation=IDENTITY)
            return norm_act(norm, x, r, activation=activation, statistics=statistics, readers=readers)
    return norm_act(norm, x, downsample(s), activation=activation, statistics=statistics, readers=readers)


# -------------------------------------------------------------------------------------------------------- memory format


def is_channels_last(t: Tensor) -> bool:
    """Whether PyTorch's convolutions would take t for channels_last."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def gives_channels_last(x: Tensor, convs: Iterable[nn.Conv2d]) -> bool:
    """Whether PyTorch's convolutions, one after the other, would give an output in channels_last."""
    return is_channels_last(x) or any(is_channels_last(conv.weight) for conv in convs)


def gains_by_channels_last(x: Tensor, before: nn.Conv2d, conv: nn.Conv2d, algorithm: str | None) -> bool:
    """Whether it pays to copy a block's input x to channels_last, and its output back, for conv in conv(before(x))."""
    if x.is_contiguous(memory_format=torch.channels_last) or not is_conv3x3(conv):
        return False
    problem = problem_of(x, conv.weight.shape[0], 3, **_way(conv), needs_grad=True)
    height, width = (output_size(size, stride) for size, stride in zip(x.shape[2:], _strides(before), strict=True))
    as_read = problem._replace(shape=(x.shape[0], conv.weight.shape[1], height, width), channels_last=True)
    return is_served(problem) and choose_algorithm(as_read, requested_algorithm(algorithm)).algorithm == "winograd"
