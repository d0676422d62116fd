"""norm_act_conv3x3: a 3x3 convolution of what batch_norm_act makes of x, by the batch statistics of x.

    a = dropout(f(bn(x) + r))  or  dropout(f(bn(x))) + r        y = conv3x3(a)

The activation a exists only as far as a tile's transform needs it: it is neither written nor saved for backward.
Forward reads x (and r) in the convolution's input transform and normalises there (the prologue). Backward reads them
again for the weight's gradient; and the input gradient's output transform, with da of a tile in registers, applies the
activation's derivative and takes the two sums of the normalisation's backward (the epilogue), so that da is not read to
be summed.

    g = da * keep / (1 - p) * f'(f's input)
    dnorm_bias = sum g        dnorm_weight = sum g * xhat
    dx = norm_weight * rstd * (g - dnorm_bias / M - xhat * dnorm_weight / M)
    dr = g ("add_act")  or  da ("act_add")

Saved for backward: x, mean, rstd, r where there is one, and with dropout its keep mask, one bit an element. The mask is
drawn before the convolution: neighbouring tiles overlap, and each would draw the shared elements again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import contract
from fastres.contract import PLAIN, Act, Group, Norm, NormParams, Residual, Statistics, Sums
from fastres.ops import batch_norm_act, conv3x3, fallback, formulas
from fastres.ops.arguments import Needs3
from fastres.ops.formulas import convolution_gradients
from fastres.ops.library import (
    convolution_flops,
    define,
    in_strides_of,
    needs_plain_formula,
    restored,
)
from fastres.ops.synchronised import combine_sums

# ------------------------------------------------------------------------------------------------------- fake kernels


def _fake_forward(x: Tensor, weight: Tensor, act: Act, measure: bool, stride: int = 1, **_: Any) -> tuple[Tensor, ...]:
    mean, rstd = (x.new_empty(x.shape[1], dtype=contract.statistics_dtype(x.dtype)) for _ in range(2))
    n, c, h, w = x.shape
    keep = x.new_empty(n * h * w * ((c + 7) // 8) if act.dropout_p > 0 else 0, dtype=torch.uint8)
    return *conv3x3.fake_forward(x, weight, measure, stride), mean, rstd, keep


def _fake_backward(x: Tensor, norm: Norm, weight: Tensor, needs: Needs3, **_: Any) -> tuple[Tensor, ...]:
    dx, dweight = fallback.empty_gradients(x, weight, (needs[0], needs[2]), torch.channels_last)
    dr = torch.empty_like(x, memory_format=torch.channels_last) if needs[1] else x.new_empty(0)
    return dx, dr, dweight, *(norm.mean.new_empty(x.shape[1] if needs[0] else 0) for _ in range(2))


def _fake_backward_reduce(act: Act, needs: Needs3, **arguments: Any) -> tuple[Tensor, ...]:
    needs_dr = needs[1] and act.order == "act_add"
    return _fake_backward(needs=(needs[0], needs_dr, needs[2]), **arguments)


# ---------------------------------------------------------------------------------------------------------- operators


def _backward_flops(dy: Any, weight: Any, needs: Needs3, **_: Any) -> int:
    return convolution_flops(dy, weight, needs[0] + needs[2])


forward = define(
    "norm_act_conv3x3_forward",
    fallback.norm_act_conv3x3_forward,
    "(Tensor y, Tensor mean, Tensor m2, Tensor saved_mean, Tensor saved_rstd, Tensor keep)",
    fake=_fake_forward,
    mutates=("norm_running_mean", "norm_running_var"),
    function="norm_act_conv3x3",
    flops=lambda weight, out_shape, **_: convolution_flops(out_shape[0], weight),
)

_GRADIENTS = "Tensor dresidual, Tensor dweight, Tensor dnorm_weight, Tensor dnorm_bias"

backward_reduce = define(
    "norm_act_conv3x3_backward_reduce",
    fallback.norm_act_conv3x3_backward_reduce,
    f"(Tensor dz, {_GRADIENTS})",
    fake=_fake_backward_reduce,
    function="norm_act_conv3x3",
    flops=_backward_flops,
)

backward = define(
    "norm_act_conv3x3_backward",
    fallback.norm_act_conv3x3_backward,
    f"(Tensor dx, {_GRADIENTS})",
    fake=_fake_backward,
    function="norm_act_conv3x3",
    flops=_backward_flops,
)

# ----------------------------------------------------------------------------------------------------------- autograd


def _plain_backward(
    ctx: Any, dy: Tensor, x: Tensor, norm: Norm, residual: Tensor | None, keep: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight, dnorm_weight, dnorm_bias) as expressions of their inputs, for gradients of gradients and
    batches of gradients.
    """
    act, needed = ctx.act, ctx.needs_input_grad
    mean, rstd = formulas.batch_statistics(x, ctx.eps)
    norm, added = norm._replace(mean=mean, rstd=rstd), None if residual is None else Residual(residual)
    a, mask = formulas.activate(x, norm, added, act, formulas.unpack_keep(keep, x))
    needs_input = any(needed[:4])
    da, dweight = convolution_gradients(dy, a.to(x.dtype), weight, [ctx.stride, ctx.stride], [needs_input, needed[4]])
    if da is None:
        return None, None, dweight, None, None
    dx, dr, sums = formulas.gradients(da, x, norm, added, act, mask, True)
    return dx, dr, dweight, sums.dweight, sums.dbias


def _second_stage(
    ctx: Any, dz: Tensor, dr: Tensor, x: Tensor, norm: Norm, sums: Sums, count: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx, dresidual) out of what the first stage gives, where the statistics are of `count` elements a channel."""
    dx = dz
    if ctx.needs_input_grad[0]:
        if ctx.group is not None:
            sums = Sums(*combine_sums(sums[:2], ctx.group))
        dx, _ = batch_norm_act.backward_apply(dz, x, norm, None, None, sums, count, PLAIN, [True, False])
    return dx, dz if ctx.act.order == "add_act" else dr


class Call(NamedTuple):
    """What `NormActConv3x3` is given beside the tensors that may get a gradient; see `batch_norm_act.Call`."""

    norm: NormParams
    statistics: Statistics | None
    seed: Tensor | None
    act: Act
    measure: bool
    group: Group | None = None
    stride: int = 1


class NormActConv3x3(torch.autograd.Function):
    """(y, mean, M2): y channels_last, and its statistics, which are not differentiable (see `conv3x3.Conv3x3`).

    Gradients go to x, norm_weight, norm_bias, residual and weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        call: Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm, statistics, seed, act, measure, group, stride = call
        if group is not None:
            (statistics,) = batch_norm_act.statistics_of_group([(x, statistics)], group)
        y, y_mean, y_m2, mean, rstd, keep = forward(x, norm, statistics, residual, seed, weight, act, measure, stride)
        count = None if statistics is None else statistics.count
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, residual, keep, weight, count)
        ctx.act, ctx.weight_strides, ctx.eps, ctx.group, ctx.stride = act, weight.stride(), norm.eps, group, stride
        ctx.mark_non_differentiable(y_mean, y_m2)
        ctx.set_materialize_grads(False)
        return y, y_mean, y_m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needed)
        x, mean, rstd, norm_weight, norm_bias, residual, keep, weight, count = ctx.saved_tensors
        x, weight = x.contiguous(memory_format=torch.channels_last), restored(weight, ctx.weight_strides)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        norm = Norm(mean, rstd, norm_weight, norm_bias)
        if needs_plain_formula(dy):
            batch_norm_act.refuse_plain_formula(count)
            dx, dr, dweight, *sums = _plain_backward(ctx, dy, x, norm, residual, keep, weight)
        else:
            needs = [any(needed[:4]), needed[3], needed[4]]
            if count is not None:
                dz, dr, dweight, *sums = backward_reduce(
                    dy, x, norm, residual, keep, weight, ctx.act, needs, ctx.stride
                )
                dx, dr = _second_stage(ctx, dz, dr, x, norm, Sums(*sums), count)
            else:
                dx, dr, dweight, *sums = backward(dy, x, norm, residual, keep, weight, ctx.act, needs, ctx.stride)
            dweight = in_strides_of(weight, dweight) if needed[4] else dweight
        return *[g if n else None for g, n in zip((dx, *sums, dr, dweight), needed, strict=False)], None
