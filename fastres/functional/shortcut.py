"""projection_shortcut: a residual block's end, where its shortcut changes channels or resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastres import contract, reference
from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import Act, NormParams, Statistics
from fastres.functional.checks import (
    autocast,
    check_norm,
    check_ordinary,
    check_statistics,
    check_tensor,
    check_training,
    checked_act,
    checked_group,
    checked_projection,
)
from fastres.functional.norm import is_compiled, norm_act, run
from fastres.functional.prepare import cast, dense, needs_grad
from fastres.ops import projection_shortcut as ops
from fastres.ordinary import why_not_ordinary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Branch(NamedTuple):
    """The main branch of a block: what the shortcut is added to.

    Attributes:
        value: [N, Cout, ceil(H / stride), ceil(W / stride)].
        norm: its normalisation, applied in the same pass; None: it is added as it is.
        statistics: of the value, where they were taken already.
    """

    value: Tensor
    norm: NormParams | None
    statistics: Statistics | None = None


def shortcut_act(
    s: Tensor,
    conv_weight: Tensor,
    norm: NormParams,
    branch: Branch | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    training: bool,
    act: Act,
    seed: Tensor | None = None,
    readers: int = 1,
    group: ProcessGroup | None = None,
) -> Any:
    """`projection_shortcut` with grouped arguments; `act` and `readers` as `norm.norm_act`."""
    s, conv_weight = autocast(s), autocast(conv_weight)
    strides, shape = checked_projection(s, conv_weight, stride)
    x, x_norm, x_statistics = (None, None, None) if branch is None else branch
    if x is not None:
        x = autocast(x)
        check_tensor("x", x, s, shape)
    for prefix, params in (("norm.", norm), ("x_norm.", x_norm)):
        if params is None and prefix == "x_norm.":
            continue
        if not isinstance(params, NormParams):
            raise TypeError(f"{prefix[:-1]}: expected NormParams, got {type(params).__name__}")
        check_norm(prefix, params, s, shape[1], training)
    shared = checked_group(group, training)
    if x is not None:
        check_statistics("x_statistics", x_statistics, x, training, shared)
        if x_statistics is not None and x_statistics.count is not None:
            raise ValueError("x_statistics.count: expected None, which means x's own, got a Tensor")
    check_training(training, seed, s, tuple(shape), shared)
    if shared is not None:
        check_ordinary()
    if shared is not None and (s.numel() == 0 or not is_compiled(act)):
        product = F.conv2d(s, conv_weight, stride=strides)
        common: dict[str, Any] = {"act": act, "training": True, "seed": seed, "readers": readers, "group": group}
        if x is None or x_norm is None:
            return norm_act(product, norm, x, **common)
        return norm_act(x, x_norm, product, norm, **common)
    if s.numel() == 0 or not is_compiled(act) or why_not_ordinary() is not None:
        y = reference.projection_shortcut(
            s, conv_weight, norm, x, x_norm, stride=strides, training=training, activation=act.activation,
            dropout_p=act.dropout_p if s.numel() > 0 else 0.0, seed=seed,
        )  # fmt: skip
        return y if readers == 1 else (y, y)
    s = dense(s) if x is None else dense(s, contract.memory_format(dense(x)))
    gradients = needs_grad(s, conv_weight, x, *norm[2:4], *(() if x_norm is None else x_norm[2:4]))
    # The CUDA kernel's epilogue has no other activations.
    in_epilogue = s.device.type == "cpu" or act.activation in (RELU, IDENTITY)
    if in_epilogue and not training and not gradients:
        dtype = contract.statistics_dtype(s.dtype)
        other = None if x_norm is None else cast(x_norm, dtype)
        y = ops.inference(
            s, conv_weight, cast(norm, dtype), None if x is None else dense(x), other, strides, act.activation
        )
        return y if readers == 1 else (y, y)
    product, mean, m2 = ops.Projection.apply(s, conv_weight, strides, training)
    statistics = Statistics(mean, m2) if training else None
    common = {"act": act, "training": training, "seed": seed, "readers": readers, "group": shared}
    if x is None or x_norm is None:
        return run(product, norm, x, statistics=(statistics, None), **common)
    return run(x, x_norm, product, norm, statistics=(x_statistics, statistics), **common)


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
    activation: Activation | str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    x_statistics: Statistics | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The projection shortcut of a residual block, with the addition and the activation that follow it.

        y = dropout(f(bn_x(x) + bn(conv1x1(s))))

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
        training, relu, activation, dropout_p, seed: as in `batch_norm_act`; `training` holds for both normalisations.
        x_statistics: those of x, where they are known already, with x_norm and in training only; without a count.
        group: as in `batch_norm_act`, for both normalisations, whose statistics are sent together.
    Returns:
        [N, Cout, ceil(H / stride), ceil(W / stride)], dtype of s and memory format of x, or of s where x is None.
    Raises:
        TypeError, ValueError: as `batch_norm_act`, and where conv_weight is not [Cout, Cin, 1, 1] or stride is not
            positive.
    Source: He et al. 2015, equation 2 and option B.
    """
    if x is None and x_norm is not None:
        raise ValueError("x_norm: expected None without x, got NormParams")
    if x_statistics is not None and (x is None or x_norm is None):
        raise ValueError("x_statistics: expected None without x and x_norm, got Statistics")
    y: Tensor = shortcut_act(
        s, conv_weight, norm, None if x is None else Branch(x, x_norm, x_statistics), stride=stride, training=training,
        act=checked_act(relu, activation, dropout_p), seed=seed, group=group,
    )  # fmt: skip
    return y
