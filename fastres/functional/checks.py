"""Checks of arguments, as autocast has them: each says which argument, what was expected and what it was, before
anything is computed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import ORDERS, Act, Group, NormParams, Statistics, output_size, statistics_dtype
from fastres.ordinary import why_not_ordinary

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_VECTORS = NormParams._fields[:4]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # autocast does not know meta
        return torch.get_autocast_dtype(device.type)
    return None


def is_cast(x: Tensor) -> bool:
    """Whether autocast touches a tensor like this: float64 stays what it is."""
    return x.is_floating_point() and x.dtype != torch.float64


def autocast(x: Tensor) -> Tensor:
    """x as autocast on its device would have it."""
    autocast = autocast_dtype(x.device) if isinstance(x, Tensor) else None
    return x if autocast is None or not is_cast(x) else x.to(autocast)


def check_tensor(
    name: str,
    value: Tensor,
    like: Tensor | None = None,
    shape: torch.Size | None = None,
    *,
    any_dtype: bool = False,
    dimensions: tuple[int, ...] = (4,),
) -> None:
    """A feature map [N, C, H, W], beside another one where `like` is given; `dimensions` allows other numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dim() not in dimensions:
        expected = "4 dimensions [N, C, H, W]" if dimensions == (4,) else "2 to 5 dimensions [N, C, ...]"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(value.shape)}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dtype == torch.float64 and value.device.type not in ("cpu", "meta"):
        raise TypeError(f"{name}: float64 is served on the CPU only, got a tensor on {value.device}")
    if like is not None:
        if shape is not None and value.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")
        if value.dtype != like.dtype and not any_dtype:
            raise TypeError(f"{name}: expected dtype {like.dtype}, got {value.dtype}")


def check_channels(name: str, value: Tensor | None, like: Tensor, channels: int) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(value).__name__}")
    if value.dim() != 1 or value.shape[0] != channels:
        raise ValueError(f"{name}: expected shape ({channels},), one value a channel, got {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {value.device}")


def check_norm(prefix: str, norm: NormParams, like: Tensor, channels: int, training: bool) -> None:
    shape, device = (channels,), like.device
    for name, value in zip(_VECTORS, norm[:4], strict=True):
        # What is as it should be is passed over here: this runs at every call of every layer.
        if value is not None and not (
            isinstance(value, Tensor)
            and value.shape == shape
            and value.dtype.is_floating_point
            and value.device == device
        ):
            check_channels(prefix + name, value, like, channels)
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var: expected both or neither, got one of them")
    if not training and norm.running_mean is None:
        raise ValueError(f"{prefix}running_mean: expected running statistics with training=False, got None")
    if not isinstance(norm.momentum, (int, float)):
        raise TypeError(f"{prefix}momentum: expected a number, got {type(norm.momentum).__name__}")
    if not isinstance(norm.eps, (int, float)):
        raise TypeError(f"{prefix}eps: expected a number, got {type(norm.eps).__name__}")
    if norm.eps < 0:
        raise ValueError(f"{prefix}eps: expected at least 0, got {norm.eps}")


def checked_act(relu: bool, activation: Activation | str | None, dropout_p: float, order: str = "add_act") -> Act:
    """The activation, dropout and order that a call asks for."""
    if not isinstance(relu, bool):
        raise TypeError(f"relu: expected a bool, got {type(relu).__name__}")
    if activation is None:
        chosen = RELU if relu else IDENTITY
    else:
        chosen = Activation.of(activation)
        if not relu and chosen != IDENTITY:
            raise ValueError(f"relu: expected True with an activation of another kind, got False with {chosen.kind!r}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    return Act(*chosen, float(dropout_p), order)


def checked_group(group: Any, training: bool) -> Group | None:
    """What the operators know of a process group; None where nothing is sent: in evaluation, and within one process."""
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    size = group.size()
    return Group(group.group_name, size) if training and size > 1 else None


def check_ordinary() -> None:
    """A call whose statistics are of more than its own batch: PyTorch's operators have no such normalisation."""
    reason = why_not_ordinary()
    if reason is not None:
        raise RuntimeError(
            f"batch statistics over several processes: expected an ordinary call, but {reason}; normalise by this "
            "process's own batch, or in evaluation, there"
        )


def check_training(
    training: bool, seed: Tensor | None, like: Tensor, shape: tuple[int, ...], group: Group | None = None
) -> None:
    """`training`, the dropout seed beside `like`, and the shape that a batch is normalised in."""
    if not isinstance(training, bool):
        raise TypeError(f"training: expected a bool, got {type(training).__name__}")
    if seed is not None:
        if not isinstance(seed, Tensor):
            raise TypeError(f"seed: expected an int64 Tensor of one element or None, got {type(seed).__name__}")
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected dtype torch.int64, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one element, got shape {tuple(seed.shape)}")
        if seed.device != like.device:
            raise ValueError(f"seed: expected a tensor on {like.device}, got one on {seed.device}")
    if training and group is None and math.prod(shape) == shape[1]:
        raise ValueError(f"x: expected more than 1 value a channel in training, got shape {shape}")


def check_statistics(
    name: str, value: Statistics | None, like: Tensor, training: bool, group: Group | None = None
) -> None:
    if value is None:
        return
    if not isinstance(value, Statistics):
        raise TypeError(f"{name}: expected Statistics or None, got {type(value).__name__}")
    if not training:
        raise ValueError(f"{name}: expected None with training=False, which takes the running ones, got Statistics")
    dtype = statistics_dtype(like.dtype)
    count = value.count
    if count is not None:
        if not isinstance(count, Tensor):
            raise TypeError(f"{name}.count: expected an int64 Tensor or None, got {type(count).__name__}")
        if group is not None:
            raise ValueError(f"{name}.count: expected None with a group, which counts for itself, got a Tensor")
        if count.dtype != torch.int64 or count.numel() != 1:
            raise ValueError(
                f"{name}.count: expected one element of dtype torch.int64, got {count.numel()} of {count.dtype}"
            )
        if count.device != like.device:
            raise ValueError(f"{name}.count: expected a tensor on {like.device}, got one on {count.device}")
    for part in ("mean", "m2"):
        vector = getattr(value, part)
        if vector is None:
            raise TypeError(f"{name}.{part}: expected a Tensor, got NoneType")
        check_channels(f"{name}.{part}", vector, like, like.shape[1])
        if vector.dtype != dtype:
            raise TypeError(f"{name}.{part}: expected dtype {dtype}, got {vector.dtype}")


def check_convolution(
    x: Tensor, weight: Tensor, kernel: int, stride: int, algorithm: str | None, dilation: int = 1
) -> None:
    _check_weight(x, weight)
    if weight.shape[1:] != (x.shape[1], kernel, kernel):
        raise ValueError(
            f"weight: expected shape (K, {x.shape[1]}, {kernel}, {kernel}) for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    _check_way(stride, algorithm, dilation)


def checked_groups(x: Tensor, weight: Tensor, stride: int, algorithm: str | None) -> int:
    """The number of groups of a convolution, which its weight's shape says."""
    _check_weight(x, weight)
    outputs, inputs, kernel, width = weight.shape
    if width != kernel or kernel % 2 == 0:
        raise ValueError(f"weight: expected a square kernel of odd size, got shape {tuple(weight.shape)}")
    groups = x.shape[1] // inputs if inputs > 0 else 0
    if groups == 0 or groups * inputs != x.shape[1] or outputs % groups != 0:
        raise ValueError(
            f"weight: expected shape (K, C / groups, k, k), K and C = {x.shape[1]} divisible by groups, for x of shape "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    _check_way(stride, algorithm)
    return groups


def _check_weight(x: Tensor, weight: Tensor) -> None:
    check_tensor("x", x)
    # Under autocast the kernels take a weight as it is, and PyTorch's convolution takes it in x's dtype.
    casts = isinstance(weight, Tensor) and autocast_dtype(x.device) is not None and is_cast(x) and is_cast(weight)
    check_tensor("weight", weight, x, any_dtype=casts)


def _check_way(stride: int, algorithm: str | None, dilation: int = 1) -> None:
    for name, value in (("stride", stride), ("dilation", dilation)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if algorithm is not None and not isinstance(algorithm, str):
        raise TypeError(f"algorithm: expected a string or None, got {type(algorithm).__name__}")


def checked_projection(
    s: Tensor, conv_weight: Tensor, stride: int | tuple[int, int]
) -> tuple[tuple[int, int], torch.Size]:
    """(strides of both axes, shape of the product)."""
    check_tensor("s", s)
    strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
    if len(strides) != 2 or not all(isinstance(v, int) for v in strides):
        raise TypeError(f"stride: expected an int or two, got {stride!r}")
    if min(strides) < 1:
        raise ValueError(f"stride: expected at least 1, got {stride!r}")
    check_tensor("conv_weight", conv_weight, s)
    if conv_weight.shape[1:] != (s.shape[1], 1, 1):
        raise ValueError(
            f"conv_weight: expected shape (Cout, {s.shape[1]}, 1, 1) for s of shape {tuple(s.shape)}, "
            f"got {tuple(conv_weight.shape)}"
        )
    height, width = (output_size(size, step) for size, step in zip(s.shape[2:], strides, strict=True))
    return strides, torch.Size((s.shape[0], conv_weight.shape[0], height, width))
