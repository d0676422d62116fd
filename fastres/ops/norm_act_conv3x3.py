"""norm_act_conv3x3: a 3x3 convolution of what batch_norm_act makes of x, with the batch's own statistics.

    a = dropout(relu(bn(x) + r))  or  dropout(relu(bn(x))) + r        y = conv3x3(a)

The activation a exists only as far as a tile's transform needs it: it is neither written nor kept. Forward reads x (and
r) in the convolution's input transform and applies the normalisation there. Backward reads them again for the weight's
gradient; and the input gradient's output transform, with da of a tile in registers, masks it and takes the two sums of
the normalisation's backward, so that da is not read to be summed.

    g = da * keep / (1 - p) where bn(x) (+ r) > 0, else 0
    dnorm_bias = sum g        dnorm_weight = sum g * xhat
    dx = norm_weight * rstd * (g - dnorm_bias / M - xhat * dnorm_weight / M)
    dr = g ("add_act")  or  da ("act_add")

For backward are kept: x, mean, rstd, r where there is one, and with dropout its keep mask, one bit an element. The mask
is drawn before the convolution: neighbouring tiles overlap, and each would draw the shared elements again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import reference
from fastres.ops import conv3x3
from fastres.ops.library import (
    convolution_flops,
    convolution_gradients,
    define,
    in_strides_of,
    restored,
    takes_plain_formula,
)
from fastres.reference import Activation, Affine

_ACTIVATION = "bool relu, float dropout_p, str order"


def _rows(x: Tensor) -> Tensor:
    """[N * H * W, C, 1, 1]: the rows of channels that the keep mask packs, also where x has a single channel."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1)


def _activate(x: Affine, residual: Tensor | None, keep: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """(a, passed): the convolution's input, and where it passes a gradient on."""
    z = x.z()
    if act.order == "add_act" and residual is not None:
        z = z + residual
    passed = ~(z <= 0) if act.relu else torch.ones_like(z, dtype=torch.bool)  # as relu does, NaN passes
    if act.dropout_p > 0:
        n, c, h, w = x.value.shape
        kept = reference.unpack_bits(keep, _rows(x.value))
        passed = passed & kept.reshape(n, h, w, c).permute(0, 3, 1, 2)
    a = torch.where(passed, z / (1 - act.dropout_p), 0)
    if act.order == "act_add" and residual is not None:
        a = a + residual
    return torch.empty_like(x.value).copy_(a), passed


def _forward_fallback(
    x: Tensor, x_mean: Tensor | None, x_m2: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    weight: Tensor, momentum: float, eps: float, relu: bool, dropout_p: float, order: str, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = reference.finalise(x, x_mean, x_m2, running_mean, running_var, momentum, eps)
    keep = torch.empty(0, dtype=torch.uint8, device=x.device)
    if dropout_p > 0:
        assert seed is not None
        keep = reference.pack_bits(_rows(reference.dropout_keep(x.shape, seed, dropout_p)), _rows(x))
    normed = Affine(x, mean, rstd, norm_weight, norm_bias)
    a, _ = _activate(normed, residual, keep, Activation(relu, dropout_p, order))
    y = conv3x3.empty_output(x, weight).copy_(reference.conv3x3(a, weight.to(x.dtype)))
    return *conv3x3.measured(y, statistics), mean, rstd, keep


def _forward_fake(
    x: Tensor, x_mean: Tensor | None, x_m2: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    weight: Tensor, momentum: float, eps: float, relu: bool, dropout_p: float, order: str, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = (x.new_empty(x.shape[1], dtype=reference.statistics_dtype(x.dtype)) for _ in range(2))
    n, c, h, w = x.shape
    keep = x.new_empty(n * h * w * ((c + 7) // 8) if dropout_p > 0 else 0, dtype=torch.uint8)
    return *conv3x3.fake_measured(x, weight, statistics), mean, rstd, keep


def _forward_flops(*args: Any, out_shape: Any) -> int:
    return convolution_flops(out_shape[0], weight=args[9])


forward = define(
    "norm_act_conv3x3_forward(Tensor x, Tensor? x_mean, Tensor? x_m2, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? residual, Tensor? seed, Tensor weight,"
    f" float momentum, float eps, {_ACTIVATION}, bool statistics)"
    " -> (Tensor y, Tensor mean, Tensor m2, Tensor saved_mean, Tensor saved_rstd, Tensor keep)",
    fallback=_forward_fallback,
    fake=_forward_fake,
    function="norm_act_conv3x3",
    flops=_forward_flops,
)


def _backward_fallback(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, keep: Tensor, weight: Tensor, relu: bool, dropout_p: float, order: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    normed, act = Affine(x, mean, rstd, norm_weight, norm_bias), Activation(relu, dropout_p, order)
    a, passed = _activate(normed, residual, keep, act)
    da, dweight = conv3x3.plain_backward(dy, a, weight, [needs[0], needs[2]])
    dx, dr, sums = x.new_empty(0), x.new_empty(0), (mean.new_empty(0), mean.new_empty(0))
    if needs[0]:
        none, bits = mean.new_empty(0), reference.pack_bits(passed, x)
        sums = reference.backward_reduce(da, normed, None, bits, act)[:2]
        r = residual if needs[1] else None
        dx, dr = reference.backward_apply(
            da, normed, r, bits, act, (*sums, none, none), x.numel() // x.shape[1], (True, needs[1])
        )
        dx = dx.contiguous(memory_format=torch.channels_last)
        dr = dr.contiguous(memory_format=torch.channels_last) if needs[1] else dr
    return dx, dr, dweight, *sums


def _backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
    residual: Tensor | None, keep: Tensor, weight: Tensor, relu: bool, dropout_p: float, order: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight = conv3x3.empty_gradients(x, weight, [needs[0], needs[2]])
    dr = torch.empty_like(x, memory_format=torch.channels_last) if needs[1] else x.new_empty(0)
    dnorm_weight, dnorm_bias = (mean.new_empty(x.shape[1] if needs[0] else 0) for _ in range(2))
    return dx, dr, dweight, dnorm_weight, dnorm_bias


def _backward_flops(dy: Any, *args: Any, out_shape: Any) -> int:
    weight, needs = args[7], args[-1]
    return convolution_flops(dy, weight, needs[0] + needs[2])


backward = define(
    "norm_act_conv3x3_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? norm_weight, Tensor? norm_bias,"
    f" Tensor? residual, Tensor keep, Tensor weight, {_ACTIVATION}, bool[3] needs)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dnorm_weight, Tensor dnorm_bias)",
    fallback=_backward_fallback,
    fake=_backward_fake,
    function="norm_act_conv3x3",
    flops=_backward_flops,
)


def _plain_backward(
    ctx: Any, dy: Tensor, x: Affine, residual: Tensor | None, keep: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """`backward` as expressions of its inputs, for gradients of gradients and batches of gradients."""
    act, needed = Activation(*ctx.activation), ctx.needs_input_grad
    mean, rstd = reference.batch_statistics(x.value, ctx.eps)
    x = x._replace(mean=mean, rstd=rstd)
    a, passed = _activate(x, residual, keep, act)
    needs_input = any(needed[:4])
    da, dweight = convolution_gradients(dy, a, weight, [1, 1], 1, [needs_input, needed[4]])
    if da is None:
        return None, None, None, None, dweight
    g, dx, _, (dnorm_weight, dnorm_bias, *_) = reference.gradients(
        da, x, None, reference.pack_bits(passed, x.value), act, True
    )
    return dx, dnorm_weight, dnorm_bias, (g if act.order == "add_act" else da).to(da.dtype), dweight


class NormActConv3x3(torch.autograd.Function):
    """(y, mean, M2): y channels_last, and its statistics, which are not differentiable (see `conv3x3.Conv3x3`).

    Gradients go to x, norm_weight, norm_bias, residual and weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, residual: Tensor | None,
        weight: Tensor, x_mean: Tensor | None, x_m2: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, seed: Tensor | None, momentum: float, eps: float, relu: bool, dropout_p: float,
        order: str, statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y, y_mean, y_m2, mean, rstd, keep = forward(
            x, x_mean, x_m2, norm_weight, norm_bias, running_mean, running_var, residual, seed, weight, momentum, eps,
            relu, dropout_p, order, statistics,
        )  # fmt: skip
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, residual, keep, weight)
        ctx.activation, ctx.weight_strides, ctx.eps = (relu, dropout_p, order), weight.stride(), eps
        ctx.mark_non_differentiable(y_mean, y_m2)
        ctx.set_materialize_grads(False)
        return y, y_mean, y_m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needed)
        x, mean, rstd, norm_weight, norm_bias, residual, keep, weight = ctx.saved_tensors
        x, weight = x.contiguous(memory_format=torch.channels_last), restored(weight, ctx.weight_strides)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        if takes_plain_formula(dy):
            grads = _plain_backward(ctx, dy, Affine(x, mean, rstd, norm_weight, norm_bias), residual, keep, weight)
        else:
            dx, dr, dweight, dnorm_weight, dnorm_bias = backward(
                dy, x, mean, rstd, norm_weight, norm_bias, residual, keep, weight, *ctx.activation,
                [any(needed[:4]), needed[3], needed[4]],
            )  # fmt: skip
            grads = dx, dnorm_weight, dnorm_bias, dr, in_strides_of(weight, dweight) if needed[4] else dweight
        gradients = [g if n else None for g, n in zip(grads, needed, strict=False)]
        return (*gradients, *[None] * (len(needed) - len(grads)))
