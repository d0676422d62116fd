"""max_pool and norm_act_max_pool: max pooling in channels_last, alone and of a normalised and activated input.

    a = f(bn(x))        y[n, c, i, j] = max over u, v of a[n, c, s * i + u - p, s * j + v - p]
    da = at each element the sum of dy over the windows that chose it

Forward saves which element of its window an output is, u * kernel + v, in one byte; PyTorch saves eight, and what was
pooled. With a normalisation before it the activation a exists only as far as a window's rows need it: it is neither
written nor saved. Backward makes da of a few rows at a time and gives them to batch_norm_act's two stages.

Saved for backward: the positions, and with a normalisation x, mean and rstd. csrc/cpu serves tensors in channels_last;
everything else is PyTorch's, one operator after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract
from fastres.activations import Activation
from fastres.contract import Act, Norm, NormParams, Pool, Statistics
from fastres.ops import fallback, formulas
from fastres.ops.library import define, needs_plain_formula

# A position in a window is a byte.
MOST = 15

# ---------------------------------------------------------------------------------------------------- in plain PyTorch


def _corners(shape: torch.Size, pool: Pool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The row [OH, 1] and the column [OW] of each window's first element; they may lie in the padding."""
    rows, columns = (torch.arange(size, device=device) * pool.stride - pool.padding for size in shape[2:])
    return rows[:, None], columns


def _act(activation: Activation) -> Act:
    return Act(activation.kind, activation.alpha, 0.0, "add_act")


def _as_channels_last(x: Tensor) -> Tensor:
    # contiguous() may return its input, which an operator must not.
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def unpool(dy: Tensor, position: Tensor, like: Tensor, pool: Pool) -> Tensor:
    """The gradient of what was pooled, which has the shape of `like`, as an expression of dy; NCHW."""
    height, width = like.shape[2:]
    rows, columns = _corners(dy.shape, pool, dy.device)
    offset = position.long()
    at = (rows + offset // pool.kernel) * width + columns + offset % pool.kernel
    n, c = dy.shape[:2]
    values = dy.to(contract.statistics_dtype(dy.dtype)).reshape(n, c, -1)
    flat = values.new_zeros((n, c, height * width)).scatter_add(2, at.reshape(n, c, -1), values)
    return flat.to(dy.dtype).reshape(n, c, height, width)


def max_pool_forward(x: Tensor, pool: Pool, save_position: bool) -> tuple[Tensor, Tensor]:
    """(y, position uint8), both [N, C, OH, OW] in channels_last; position is empty where it is not asked for."""
    y, at = F.max_pool2d(x, *pool, return_indices=True)
    if not save_position:
        return _as_channels_last(y), torch.empty(0, dtype=torch.uint8, device=x.device)
    rows, columns = _corners(y.shape, pool, x.device)
    position = (at // x.shape[3] - rows) * pool.kernel + at % x.shape[3] - columns
    return _as_channels_last(y), _as_channels_last(position.to(torch.uint8))


def max_pool_backward(dy: Tensor, position: Tensor, like: Tensor, pool: Pool) -> Tensor:
    """dx, channels_last. `like` has the shape of what was pooled; its values are not read."""
    return _as_channels_last(unpool(dy, position, like, pool))


def norm_act_max_pool_training(
    x: Tensor, norm: NormParams, statistics: Statistics | None, activation: Activation, pool: Pool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, position) by the batch statistics of x."""
    act = _act(activation)
    a, mean, rstd, *_ = fallback.training(x, norm, statistics, None, None, None, None, act)
    y, position = max_pool_forward(a, pool, True)
    return y, mean, rstd, position


def norm_act_max_pool_inference(x: Tensor, norm: NormParams, activation: Activation, pool: Pool) -> Tensor:
    """y by running statistics, channels_last."""
    a, _ = fallback.inference(x, norm, None, None, _act(activation), False)
    return max_pool_forward(a, pool, False)[0]


def norm_act_max_pool_backward(
    dy: Tensor, position: Tensor, x: Tensor, norm: Norm, activation: Activation, pool: Pool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), dx channels_last."""
    da, act = unpool(dy, position, x, pool), _act(activation)
    dx, _, dweight, dbias, *_ = fallback.backward(da, None, x, norm, None, None, act, True, [True, False, True])
    return _as_channels_last(dx), dweight, dbias


# ------------------------------------------------------------------------------------------------------- fake kernels


def _pooled(x: Tensor, pool: Pool, dtype: torch.dtype) -> Tensor:
    size = (*x.shape[:2], *(pool.output_size(s) for s in x.shape[2:]))
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _fake_forward(x: Tensor, pool: Pool, save_position: bool) -> tuple[Tensor, Tensor]:
    nothing = x.new_empty(0, dtype=torch.uint8)
    return _pooled(x, pool, x.dtype), _pooled(x, pool, torch.uint8) if save_position else nothing


def _fake_backward(dy: Tensor, like: Tensor, **_: Any) -> Tensor:
    return torch.empty(like.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _fake_training(x: Tensor, pool: Pool, **_: Any) -> tuple[Tensor, ...]:
    mean, rstd = (x.new_empty(x.shape[1], dtype=contract.statistics_dtype(x.dtype)) for _ in range(2))
    return _pooled(x, pool, x.dtype), mean, rstd, _pooled(x, pool, torch.uint8)


def _fake_norm_backward(x: Tensor, norm: Norm, **_: Any) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(norm.mean), torch.empty_like(norm.mean)


# ---------------------------------------------------------------------------------------------------------- operators

forward = define(
    "max_pool_forward", max_pool_forward, "(Tensor y, Tensor position)", fake=_fake_forward, function="max_pool2d"
)

backward = define("max_pool_backward", max_pool_backward, "Tensor dx", fake=_fake_backward, function="max_pool2d")

norm_act_training = define(
    "norm_act_max_pool_training",
    norm_act_max_pool_training,
    "(Tensor y, Tensor mean, Tensor rstd, Tensor position)",
    fake=_fake_training,
    mutates=("norm_running_mean", "norm_running_var"),
    function="batch_norm_act_max_pool2d",
)

norm_act_inference = define(
    "norm_act_max_pool_inference",
    norm_act_max_pool_inference,
    "Tensor y",
    fake=lambda x, pool, **_: _pooled(x, pool, x.dtype),
    function="batch_norm_act_max_pool2d",
)

norm_act_backward = define(
    "norm_act_max_pool_backward",
    norm_act_max_pool_backward,
    "(Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake_norm_backward,
    function="batch_norm_act_max_pool2d",
)

# ----------------------------------------------------------------------------------------------------------- autograd


class MaxPool(torch.autograd.Function):
    """y of max_pool2d. The gradient goes to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool) -> Tensor:
        y, position = forward(x, pool, True)
        ctx.save_for_backward(position)
        ctx.shape, ctx.pool = x.shape, pool
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (position,) = ctx.saved_tensors
        # An operator's list of sizes would be that of one trace; a tensor's shape may vary. This one has no memory.
        like = dy.new_empty(()).expand(ctx.shape)
        if needs_plain_formula(dy):
            return unpool(dy, position, like, ctx.pool), None
        return backward(dy, position, like, ctx.pool), None


class Call(NamedTuple):
    """What `NormActMaxPool` is given beside the tensors that may get a gradient."""

    norm: NormParams
    statistics: Statistics | None
    activation: Activation
    pool: Pool


class NormActMaxPool(torch.autograd.Function):
    """y of batch_norm_act_max_pool2d in training. Gradients go to x, weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> Tensor:
        norm, statistics, activation, pool = call
        y, mean, rstd, position = norm_act_training(x, norm, statistics, activation, pool)
        ctx.save_for_backward(x, mean, rstd, weight, bias, position)
        ctx.activation, ctx.pool, ctx.eps = activation, pool, norm.eps
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, mean, rstd, weight, bias, position = ctx.saved_tensors
        x = x.contiguous(memory_format=torch.channels_last)  # hooks on saved tensors may change it
        norm = Norm(mean, rstd, weight, bias)
        if needs_plain_formula(dy):
            da, act = unpool(dy, position, x, ctx.pool), _act(ctx.activation)
            mean, rstd = formulas.batch_statistics(x, ctx.eps)
            dx, _, sums = formulas.gradients(da, x, norm._replace(mean=mean, rstd=rstd), None, act, None, True)
            found = (dx, sums.dweight, sums.dbias)
        else:
            found = norm_act_backward(dy, position, x, norm, ctx.activation, ctx.pool)
        return *[g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)], None
