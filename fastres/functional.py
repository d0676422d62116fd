"""Stateless functions: check the arguments, honour autocast, draw the dropout seed, call one operator.

A call that is not an ordinary one (`fastres.ordinary`), as under torch.func, is PyTorch's own operators instead, from
fastres.reference: derivatives of any order and kind, the batched form and a portable graph are those operators'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import reference
from fastres.ops import batch_norm_act as _bn_ops
from fastres.ops import conv3x3 as _conv_ops
from fastres.ops import norm_act_conv3x3 as _norm_act_conv_ops
from fastres.ops import projection_shortcut as _projection_ops
from fastres.ordinary import why_not_ordinary
from fastres.reference import NormParams

__all__ = [
    "Convolved",
    "NormParams",
    "Statistics",
    "batch_norm_act",
    "conv3x3",
    "conv3x3_norm_act",
    "measured_conv3x3",
    "norm_act_conv3x3",
    "projection_shortcut",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = ("add_act", "act_add")


class Statistics(NamedTuple):
    """What a normalisation by the batch's statistics measures of its input, where somebody has measured it already.

    Attributes:
        mean: [C], float32 (float64 for float64).
        m2: [C], the sum of squared deviations from the mean.
    """

    mean: Tensor
    m2: Tensor


class Convolved(NamedTuple):
    """A convolution's results.

    Attributes:
        y: [N, K, H, W].
        statistics: those of y where the convolution took them, for the normalisation that follows; or None.
        x: the convolution's input, to be taken by whatever else reads it (a residual, say). A gradient that comes back
            through it is added where the convolution writes its own, instead of in a pass over three tensors.
    """

    y: Tensor
    statistics: Statistics | None
    x: Tensor


# ------------------------------------------------------------------------------------------------------------- checks


def _check_activation(
    name: str,
    value: Tensor,
    like: Tensor | None = None,
    shape: torch.Size | None = None,
    *,
    any_dtype: bool = False,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got shape {tuple(value.shape)}")
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


def _check_channels(name: str, value: Tensor | None, like: Tensor, channels: int) -> None:
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


def _check_norm(prefix: str, norm: NormParams, like: Tensor, channels: int, training: bool) -> None:
    _check_channels(prefix + "running_mean", norm.running_mean, like, channels)
    _check_channels(prefix + "running_var", norm.running_var, like, channels)
    _check_channels(prefix + "weight", norm.weight, like, channels)
    _check_channels(prefix + "bias", norm.bias, like, channels)
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{prefix}running_mean and {prefix}running_var: expected both or neither, got one of them")
    if not training and norm.running_mean is None:
        raise ValueError(f"{prefix}running_mean: expected running statistics with training=False, got None")
    for name, value in (("momentum", norm.momentum), ("eps", norm.eps)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{prefix}{name}: expected a number, got {type(value).__name__}")
    if norm.eps < 0:
        raise ValueError(f"{prefix}eps: expected at least 0, got {norm.eps}")


def _check_options(
    training: bool, relu: bool, dropout_p: float, seed: Tensor | None, like: Tensor, shape: tuple[int, ...]
) -> None:
    for name, flag in (("training", training), ("relu", relu)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    if seed is not None:
        if not isinstance(seed, Tensor):
            raise TypeError(f"seed: expected an int64 Tensor of one element or None, got {type(seed).__name__}")
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected dtype torch.int64, got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed: expected one element, got shape {tuple(seed.shape)}")
        if seed.device != like.device:
            raise ValueError(f"seed: expected a tensor on {like.device}, got one on {seed.device}")
    if training and shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"x: expected more than 1 value a channel in training, got shape {shape}")


def _check_statistics(name: str, value: Statistics | None, like: Tensor, training: bool) -> None:
    if value is None:
        return
    if not isinstance(value, Statistics):
        raise TypeError(f"{name}: expected Statistics or None, got {type(value).__name__}")
    if not training:
        raise ValueError(f"{name}: expected None with training=False, which takes the running ones, got Statistics")
    dtype = reference.statistics_dtype(like.dtype)
    for part, vector in zip(value._fields, value, strict=True):
        if vector is None:
            raise TypeError(f"{name}.{part}: expected a Tensor, got NoneType")
        _check_channels(f"{name}.{part}", vector, like, like.shape[1])
        if vector.dtype != dtype:
            raise TypeError(f"{name}.{part}: expected dtype {dtype}, got {vector.dtype}")


def _check_convolution(x: Tensor, weight: Tensor, algorithm: str | None) -> None:
    _check_activation("x", x)
    # Under autocast the kernels take a weight as it is, and PyTorch's convolution takes it in x's dtype.
    casts = isinstance(weight, Tensor) and _autocast_dtype(x.device) is not None and _is_cast(x) and _is_cast(weight)
    _check_activation("weight", weight, x, any_dtype=casts)
    if weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight: expected shape (K, {x.shape[1]}, 3, 3) for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if algorithm is not None and not isinstance(algorithm, str):
        raise TypeError(f"algorithm: expected a string or None, got {type(algorithm).__name__}")


# ---------------------------------------------------------------------------------------------------------- preparation


def _dense(x: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    """x as it is where memory is contiguous NCHW or channels_last (or as asked), otherwise the one explicit copy."""
    if memory_format is None:
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return x
        memory_format = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=memory_format)


def _cast(norm: NormParams, dtype: torch.dtype) -> NormParams:
    """The norm with parameters and statistics in `dtype`; running statistics of another dtype become copies."""
    if all(t is None or t.dtype == dtype for t in norm[:4]):
        return norm
    mean, var, weight, bias = (None if t is None else t.to(dtype) for t in norm[:4])
    return NormParams(mean, var, weight, bias, norm.momentum, norm.eps)


def _store_running(norm: NormParams, computed: NormParams) -> None:
    for kept, new in ((norm.running_mean, computed.running_mean), (norm.running_var, computed.running_var)):
        if kept is not None and new is not None and kept is not new:
            kept.copy_(new)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # autocast does not know meta
        return torch.get_autocast_dtype(device.type)
    return None


def _is_cast(x: Tensor) -> bool:
    """Whether autocast touches a tensor like this: float64 stays what it is."""
    return x.is_floating_point() and x.dtype != torch.float64


def _autocast(x: Tensor) -> Tensor:
    """x as autocast on its device would have it."""
    autocast = _autocast_dtype(x.device) if isinstance(x, Tensor) else None
    return x if autocast is None or not _is_cast(x) else x.to(autocast)


def _served(weight: Tensor, x: Tensor) -> Tensor:
    """A convolution's weight in a dtype that the kernels take beside x: float32, or that of x."""
    return weight if weight.dtype in (torch.float32, x.dtype) else weight.to(x.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _run(
    x: Tensor,
    norm: NormParams,
    residual: Tensor | None,
    residual_norm: NormParams | None,
    x_stats: tuple[Tensor, Tensor] | None,
    residual_stats: tuple[Tensor, Tensor] | None,
    training: bool,
    relu: bool,
    dropout_p: float,
    order: str,
    seed: Tensor | None,
) -> Tensor:
    """One operator call on checked arguments; `x_stats` and `residual_stats` are (mean, M2) where they are known."""
    x = _dense(x)
    if residual is not None:
        residual = _dense(residual, reference.memory_format(x))
    if not training:
        dropout_p = 0.0
    elif dropout_p > 0 and seed is None:
        seed = reference.draw_seed(x.device)
    dtype = reference.statistics_dtype(x.dtype)
    given, residual_given = norm, residual_norm
    norm = _cast(norm, dtype)
    if residual_norm is not None:
        residual_norm = _cast(residual_norm, dtype)
    r = residual_norm if residual_norm is not None else NormParams(None, None)
    dropout_p = float(dropout_p)
    if not training and not _needs_grad(x, norm.weight, norm.bias, residual, r.weight, r.bias):
        y: Tensor = _bn_ops.inference(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, residual, r.running_mean, r.running_var,
            r.weight, r.bias, float(norm.eps), float(r.eps), relu, order, False,
        )[0]  # fmt: skip
        return y
    x_mean, x_m2 = x_stats if x_stats is not None else (None, None)
    residual_mean, residual_m2 = residual_stats if residual_stats is not None else (None, None)
    y = _bn_ops.BatchNormAct.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, residual, r.weight, r.bias, r.running_mean,
        r.running_var, x_mean, x_m2, residual_mean, residual_m2, seed, residual_norm is not None, training,
        float(norm.momentum), float(norm.eps), float(r.momentum), float(r.eps), relu, dropout_p, order,
    )  # fmt: skip
    if training:
        _store_running(given, norm)
        if residual_given is not None:
            _store_running(residual_given, r)
    return y


# ----------------------------------------------------------------------------------------------------- public functions


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    residual_norm: NormParams | None = None,
    relu: bool = True,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Normalise `x`, add `residual`, apply ReLU and dropout in one pass over memory.

        z = weight * (x - mean) * rstd + bias
        "add_act":  y = dropout(relu(z + residual))
        "act_add":  y = dropout(relu(z)) + residual

    mean and rstd are those of the batch in training, and the running ones otherwise. Only x, mean, rstd and at most one
    bit an element are kept for backward. Gradients that are differentiated again, or batched, are computed by PyTorch's
    operators.

    Args:
        x: [N, C, H, W], float32 | bfloat16 | float16 (float64 on the CPU). Contiguous NCHW and channels_last are
            read as they are; other strides are copied once, to channels_last where stride(1) == 1 and else to NCHW.
        running_mean, running_var: [C] or None; updated in place in training (the unbiased variance goes in).
        weight, bias: [C] or None (1 and 0). Statistics, parameters and sums are float32 whatever the dtype of x.
        training: use the batch's statistics, update the running ones and apply dropout. Otherwise dropout is the
            identity.
        momentum: share of the batch in the running statistics. For a cumulative average pass 1 / (batches seen so
            far, this one included), as `fastres.nn.FusedBatchNormAct2d(momentum=None)` does.
        eps: added to the variance.
        residual: [N, C, H, W], dtype and device of x. In another memory format than x it is copied once.
        residual_norm: the residual's own batch normalisation, applied in the same pass.
        relu: off leaves a plain normalisation, or normalisation and addition.
        dropout_p: 0 <= dropout_p < 1, the probability of dropping an element; kept ones are scaled by
            1 / (1 - dropout_p).
        order: "add_act" (ResNet v1) or "act_add".
        seed: int64, one element, on x's device; the dropout mask is a pure function of it. None draws one from torch's
            generator, so torch.manual_seed and activation checkpointing behave.
        statistics: those of x, where they are known already, in training only. x is then not read to be measured.
    Returns:
        [N, C, H, W], dtype and memory format of x.
    Raises:
        TypeError: not a tensor, an integer dtype, dtypes of x and residual differ.
        ValueError: shapes or devices disagree; one value a channel in training; dropout_p outside [0, 1); an unknown
            order; no running statistics with training=False; residual_norm without residual.
    Source: Ioffe and Szegedy 2015, algorithm 1; He et al. 2015, figure 2; Srivastava et al. 2014, section 4.
    """
    _check_activation("x", x)
    channels = x.shape[1]
    norm = NormParams(running_mean, running_var, weight, bias, momentum, eps)
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if residual is not None:
        autocast = _autocast_dtype(x.device)
        if autocast is not None and isinstance(residual, Tensor) and _is_cast(residual):
            residual = residual.to(x.dtype)
        _check_activation("residual", residual, x, x.shape)
    elif residual_norm is not None:
        raise ValueError("residual_norm: expected None without a residual, got NormParams")
    if residual_norm is not None:
        if not isinstance(residual_norm, NormParams):
            raise TypeError(f"residual_norm: expected NormParams or None, got {type(residual_norm).__name__}")
        _check_norm("residual_norm.", residual_norm, x, channels, training)
    _check_norm("", norm, x, channels, training)
    _check_statistics("statistics", statistics, x, training)
    _check_options(training, relu, dropout_p, seed, x, tuple(x.shape))
    # As torch.nn.BatchNorm2d an empty x gives a result that autograd can pass through, running statistics untouched.
    if x.numel() == 0 or why_not_ordinary() is not None:
        return reference.batch_norm_act(
            x, *norm[:4], training=training, momentum=momentum, eps=eps, residual=residual, residual_norm=residual_norm,
            relu=relu, dropout_p=dropout_p if x.numel() > 0 else 0.0, order=order, seed=seed,
        )  # fmt: skip
    return _run(x, norm, residual, residual_norm, statistics, None, training, relu, dropout_p, order, seed)


def projection_shortcut(
    s: Tensor,
    conv_weight: Tensor,
    norm: NormParams,
    x: Tensor | None = None,
    x_norm: NormParams | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    training: bool = False,
    relu: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    x_statistics: Statistics | None = None,
) -> Tensor:
    """The projection shortcut of a residual block, with the addition and the activation that follow it.

        y = dropout(relu(bn_x(x) + bn(conv1x1(s))))

    In training the statistics of the product are gathered while the convolution writes it, and it enters
    batch_norm_act as a residual with its own normalisation. In evaluation, where no gradient is asked for, the
    product is never written.

    Args:
        s: [N, Cin, H, W], the block's input; dtypes and memory formats as in `batch_norm_act`.
        conv_weight: [Cout, Cin, 1, 1], dtype of s.
        norm: normalisation of the convolution's output, [Cout].
        x: [N, Cout, ceil(H / stride), ceil(W / stride)], the main branch, or None (nothing is added).
        x_norm: normalisation of x, applied in the same pass; None adds x as it is.
        stride: of the convolution, one number or (rows, columns).
        training, relu, dropout_p, seed: as in `batch_norm_act`; `training` holds for both normalisations.
        x_statistics: those of x, where they are known already, with x_norm and in training only.
    Returns:
        [N, Cout, ceil(H / stride), ceil(W / stride)], dtype of s and memory format of x, or of s where x is None.
    Raises:
        TypeError, ValueError: as `batch_norm_act`, and where conv_weight is not [Cout, Cin, 1, 1] or stride is not
            positive.
    Source: He et al. 2015, equation 2 and option B.
    """
    s, conv_weight = _autocast(s), _autocast(conv_weight)
    x = None if x is None else _autocast(x)
    _check_activation("s", s)
    strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
    if len(strides) != 2 or not all(isinstance(v, int) for v in strides):
        raise TypeError(f"stride: expected an int or two, got {stride!r}")
    if min(strides) < 1:
        raise ValueError(f"stride: expected at least 1, got {stride!r}")
    _check_activation("conv_weight", conv_weight, s)
    if conv_weight.shape[1:] != (s.shape[1], 1, 1):
        raise ValueError(
            f"conv_weight: expected shape (Cout, {s.shape[1]}, 1, 1) for s of shape {tuple(s.shape)}, "
            f"got {tuple(conv_weight.shape)}"
        )
    n, _, h, w = s.shape
    channels = conv_weight.shape[0]
    shape = torch.Size(
        (n, channels, _projection_ops.output_size(h, strides[0]), _projection_ops.output_size(w, strides[1]))
    )
    if x is not None:
        _check_activation("x", x, s, shape)
    elif x_norm is not None:
        raise ValueError("x_norm: expected None without x, got NormParams")
    for prefix, params in (("norm.", norm), ("x_norm.", x_norm)):
        if params is None and prefix == "x_norm.":
            continue
        if not isinstance(params, NormParams):
            raise TypeError(f"{prefix[:-1]}: expected NormParams, got {type(params).__name__}")
        _check_norm(prefix, params, s, channels, training)
    if x_statistics is not None:
        if x is None or x_norm is None:
            raise ValueError("x_statistics: expected None without x and x_norm, got Statistics")
        _check_statistics("x_statistics", x_statistics, x, training)
    _check_options(training, relu, dropout_p, seed, s, tuple(shape))
    if s.numel() == 0 or why_not_ordinary() is not None:
        return reference.projection_shortcut(
            s, conv_weight, norm, x, x_norm, stride=strides, training=training, relu=relu,
            dropout_p=dropout_p if s.numel() > 0 else 0.0, seed=seed,
        )  # fmt: skip
    s = _dense(s) if x is None else _dense(s, reference.memory_format(_dense(x)))
    parameters = [t for p in (norm, x_norm) if p is not None for t in (p.weight, p.bias)]
    if not training and not _needs_grad(s, conv_weight, x, *parameters):
        dtype = reference.statistics_dtype(s.dtype)
        own = _cast(norm, dtype)
        other = _cast(x_norm, dtype) if x_norm is not None else NormParams(None, None)
        return _projection_ops.inference(  # type: ignore[no-any-return]
            s, conv_weight, own.running_mean, own.running_var, own.weight, own.bias,
            None if x is None else _dense(x), other.running_mean, other.running_var, other.weight, other.bias,
            strides, float(own.eps), float(other.eps), relu,
        )  # fmt: skip
    product, mean, m2 = _projection_ops.Projection.apply(s, conv_weight, strides, training)
    stats = (mean, m2) if training else None
    if x is None or x_norm is None:
        return _run(product, norm, x, None, stats, None, training, relu, dropout_p, "add_act", seed)
    return _run(x, x_norm, product, norm, x_statistics, stats, training, relu, dropout_p, "add_act", seed)


def conv3x3(x: Tensor, weight: Tensor, *, algorithm: str | None = None) -> Tensor:
    """3x3 convolution with stride 1, padding 1, one group and no bias.

        y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, c, i + u - 1, j + v - 1]

    On the CPU in float32 and bfloat16 by Winograd's F(4x4, 3x3), which takes a quarter of the multiplications. In
    float32 its rounding errors are about twice those of the direct sum; in bfloat16, which it computes in float32, they
    are no larger. Tiles with values too large for its transforms, infinities or NaN are summed directly, so that these
    show only where they are read (docs/convolution.md, "Range"). Results are the same in every run; the rounding of the
    weight's gradient, and nothing else, depends on the number of threads. Elsewhere PyTorch's convolution.

    Where no gradient is asked for and output positions are few (a small image at batch 1), "auto" takes the direct sum
    as one matrix product of our own, with PyTorch's rounding errors.

    The weight is read at every call; nothing of it is kept for the next one.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`. Winograd's algorithm reads float32 and bfloat16 in
            channels_last, and computes in float32.
        weight: [K, C, 3, 3], dtype of x. Under autocast Winograd's algorithm takes a float32 weight unrounded.
        algorithm: "auto" takes Winograd's where x is channels_last and a cost model says that it pays (never for
            bfloat16 on a CPU with AMX, which PyTorch's convolution uses); "winograd" wherever it serves x at all
            (other memory formats are copied once); "direct" leaves all to PyTorch. None: the environment variable
            FASTRES_CONV, or "auto". Under torch.compile the variable is read when the function is traced.
    Returns:
        [N, K, H, W], dtype of x; channels_last by Winograd's algorithm, and else as PyTorch's convolution makes it.
    Raises:
        TypeError: not a tensor, an unsupported dtype, dtypes of x and weight differ, algorithm not a string.
        ValueError: shapes or devices disagree; an unknown algorithm.
    Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.
    """
    x = _autocast(x)
    _check_convolution(x, weight, algorithm)
    asked = _conv_ops.asked_algorithm(algorithm)
    if why_not_ordinary() is not None:
        return reference.conv3x3(x, weight.to(x.dtype))
    needs_grad = _needs_grad(x, weight)
    product = not needs_grad and _conv_ops.takes_product(x, weight.shape[0], 1, asked)
    if not product and not _conv_ops.takes_winograd(x, weight, asked):
        return reference.conv3x3(x, weight.to(x.dtype))
    x, weight = _dense(x, torch.channels_last), _served(weight, x)
    if needs_grad:
        y: Tensor = _conv_ops.Conv3x3.apply(x, weight, False)[0]
        return y
    return _conv_ops.inference(  # type: ignore[no-any-return]
        x, weight, None, None, None, None, None, 0.0, False, 1, product
    )


def measured_conv3x3(x: Tensor, weight: Tensor, *, algorithm: str | None = None) -> Convolved:
    """`conv3x3` in training, with what its neighbours in a residual block can use.

    Args, Raises, Source: as `conv3x3`.
    Returns:
        y as `conv3x3`; by Winograd's algorithm with its statistics, and with x for its other uses. See `Convolved`.
    """
    x = _autocast(x)
    _check_convolution(x, weight, algorithm)
    asked = _conv_ops.asked_algorithm(algorithm)
    if why_not_ordinary() is not None or not _conv_ops.takes_winograd(x, weight, asked):
        return Convolved(reference.conv3x3(x, weight.to(x.dtype)), None, x)
    x = _dense(x, torch.channels_last)
    y, mean, m2, same = _conv_ops.Conv3x3.apply(x, _served(weight, x), True)
    # Otherwise x would ask for a gradient that nobody takes, where only the weight does.
    return Convolved(y, Statistics(mean, m2), same if x.requires_grad else x)


def norm_act_conv3x3(
    x: Tensor,
    norm: NormParams,
    weight: Tensor,
    *,
    statistics: Statistics | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
    algorithm: str | None = None,
) -> tuple[Tensor, Statistics | None]:
    """conv3x3(batch_norm_act(x)) in training: normalisation by the batch's statistics, and the convolution after it.

        a = batch_norm_act(x, *norm, training=True, ...)        y = conv3x3(a, weight)

    By Winograd's algorithm a is applied in the convolution's input transform: it is neither written nor kept for
    backward. Kept are x, mean, rstd, the weight, the residual, and with dropout one bit an element.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`.
        norm: normalisation of x; running statistics are updated in place.
        weight: [K, C, 3, 3], dtype of x, of the convolution.
        statistics, residual, relu, dropout_p, order, seed: as in `batch_norm_act`, training=True.
        algorithm: as in `conv3x3`; "direct" computes the one after the other.
    Returns:
        y: [N, K, H, W], dtype of x; memory format as `conv3x3`'s.
        statistics: those of y, or None where they have not been taken.
    Raises:
        TypeError, ValueError: as `batch_norm_act` and `conv3x3`.
    Source: Ioffe and Szegedy 2015, algorithm 1; Lavin and Gray 2016, section 4.
    """
    x, residual = _autocast(x), None if residual is None else _autocast(residual)
    _check_convolution(x, weight, algorithm)
    if not isinstance(norm, NormParams):
        raise TypeError(f"norm: expected NormParams, got {type(norm).__name__}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if residual is not None:
        _check_activation("residual", residual, x, x.shape)
    _check_norm("norm.", norm, x, x.shape[1], True)
    _check_statistics("statistics", statistics, x, True)
    _check_options(True, relu, dropout_p, seed, x, tuple(x.shape))
    asked = _conv_ops.asked_algorithm(algorithm)
    if why_not_ordinary() is not None or not _conv_ops.takes_winograd(x, weight, asked):
        a = batch_norm_act(
            x, *norm[:4], training=True, momentum=norm.momentum, eps=norm.eps, residual=residual, relu=relu,
            dropout_p=dropout_p, order=order, seed=seed, statistics=statistics,
        )  # fmt: skip
        return reference.conv3x3(a, weight.to(x.dtype)), None
    if residual is not None:
        residual = _dense(residual, torch.channels_last)
    if dropout_p > 0 and seed is None:
        seed = reference.draw_seed(x.device)
    own = _cast(norm, torch.float32)
    x_mean, x_m2 = statistics if statistics is not None else (None, None)
    y, mean, m2 = _norm_act_conv_ops.NormActConv3x3.apply(
        _dense(x, torch.channels_last), own.weight, own.bias, residual, _served(weight, x), x_mean, x_m2,
        own.running_mean, own.running_var, seed, float(norm.momentum), float(norm.eps), relu, float(dropout_p), order,
        True,
    )  # fmt: skip
    _store_running(norm, own)
    return y, Statistics(mean, m2)


def conv3x3_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: NormParams,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    stride: int = 1,
    algorithm: str | None = None,
) -> Tensor:
    """batch_norm_act(conv3x3(x)) in evaluation: the convolution, and the normalisation by running statistics after it.

        y = relu(bn(conv3x3(x)) + residual)

    Where `conv3x3` takes kernels of its own and no gradient is asked for, one pass: all that follows the sum is done to
    outputs in registers.

    Args:
        x, weight, algorithm: as in `conv3x3`.
        norm: normalisation of the convolution's output, [K]; running statistics are needed.
        residual: [N, K, ceil(H / stride), ceil(W / stride)], dtype and device of x.
        relu: off leaves normalisation and addition.
        stride: of the convolution, both axes. Winograd's algorithm serves 1 only.
    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], dtype of x; memory format as `conv3x3`'s.
    Raises:
        TypeError, ValueError: as `batch_norm_act` and `conv3x3`.
    """
    x = _autocast(x)
    _check_convolution(x, weight, algorithm)
    if not isinstance(norm, NormParams):
        raise TypeError(f"norm: expected NormParams, got {type(norm).__name__}")
    if not isinstance(stride, int) or isinstance(stride, bool):
        raise TypeError(f"stride: expected an int, got {type(stride).__name__}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    height, width = (_conv_ops.output_size(size, stride) for size in x.shape[2:])
    shape = torch.Size((x.shape[0], weight.shape[0], height, width))
    if residual is not None:
        residual = _autocast(residual)
        _check_activation("residual", residual, x, shape)
    _check_norm("norm.", norm, x, shape[1], False)
    _check_options(False, relu, 0.0, None, x, tuple(shape))
    asked = _conv_ops.asked_algorithm(algorithm)
    if why_not_ordinary() is not None:
        return reference.conv3x3_norm_act(x, weight.to(x.dtype), norm, residual=residual, relu=relu, stride=stride)
    product = _conv_ops.takes_product(x, shape[1], stride, asked)
    winograd = not product and stride == 1 and _conv_ops.takes_winograd(x, weight, asked)
    if not (product or winograd) or _needs_grad(x, weight, norm.weight, norm.bias, residual):
        if winograd:
            y = _conv_ops.Conv3x3.apply(_dense(x, torch.channels_last), _served(weight, x), False)[0]
        else:
            y = F.conv2d(x, weight.to(x.dtype), stride=stride, padding=1)
        return batch_norm_act(y, *norm[:4], momentum=norm.momentum, eps=norm.eps, residual=residual, relu=relu)
    if residual is not None:
        residual = _dense(residual, torch.channels_last)
    own = _cast(norm, torch.float32)
    return _conv_ops.inference(  # type: ignore[no-any-return]
        _dense(x, torch.channels_last), _served(weight, x), own.running_mean, own.running_var, own.weight, own.bias,
        residual, float(norm.eps), relu, stride, product,
    )  # fmt: skip
