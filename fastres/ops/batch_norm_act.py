"""batch_norm_act: batch normalisation, residual addition, activation and dropout in one pass over memory.

    xhat = (x - mean) * rstd        z = weight * xhat + bias
    "add_act":  y = dropout(f(z + r))               "act_add":  y = dropout(f(z)) + r
    g = dy * keep / (1 - p) * f'(f's input)
    dbias = sum g                   dweight = sum g * xhat
    dx = weight * rstd * (g - dbias / M - xhat * dweight / M)

The running statistics are arguments that an operator mutates, and torch.library.register_autograd refuses those. So the
autograd formula is a torch.autograd.Function over the mutable operator, which also has the least overhead.

CUDA tensors go to the Triton kernels. Under torch.compile the operators stay opaque to inductor instead of being opened
up with triton_op and wrap_triton, for three reasons. The neighbours of these pointwise operations are convolutions, so
inductor has nothing to fuse into the kernels. The reductions need counters that are zero at every launch and outlive
it; traced, they would become a fill a launch. And the operators update running statistics by pointer, as their schema
says; opened up, inductor would have to find that out of the kernel's code. The price is the dispatcher's call, which a
CUDA graph (mode="reduce-overhead") takes away.

Saved for backward: x, mean, rstd, and one bit an element where these cannot tell what the activation and dropout passed
on (`Act.saves_bits`); the residual where it has a normalisation of its own, or where the activation is a smooth one
whose input is computed again. In evaluation dx is weight * rstd * g: without a gradient of weight or bias, as where the
normalisation is frozen, neither x nor the residual is saved, but that bit an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import contract
from fastres.contract import PLAIN, Act, Group, Norm, NormParams, Residual, Statistics, Sums
from fastres.ops import fallback, formulas
from fastres.ops.arguments import Needs2, Needs3
from fastres.ops.library import define, needs_plain_formula
from fastres.ops.synchronised import combine_statistics, combine_sums

# ------------------------------------------------------------------------------------------------------- fake kernels


def _vectors(x: Tensor, size: int | torch.SymInt, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(size, dtype=contract.statistics_dtype(x.dtype)) for _ in range(count))


def _activated(x: Tensor, saves: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(contract.bits_size(x) if saves else 0, dtype=torch.uint8)


def _fake_stats(x: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(1, dtype=torch.int64), *_vectors(x, x.shape[1], 2)


def _fake_apply(x: Tensor, residual: Residual | None, act: Act, save_bits: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return _activated(x, save_bits and act.saves_bits(residual is not None))


def _fake_training(
    x: Tensor, residual: Tensor | None, residual_norm: NormParams | None, act: Act, **_: Any
) -> tuple[Tensor, ...]:
    y, bits = _activated(x, act.saves_bits(residual is not None))
    size = 0 if residual_norm is None else x.shape[1]
    return y, *_vectors(x, x.shape[1], 2), *_vectors(x, size, 2), bits


def _fake_inference(x: Tensor, act: Act, save_bits: bool, **_: Any) -> tuple[Tensor, Tensor]:
    return _activated(x, save_bits and act._replace(dropout_p=0.0).gated)


def _sums(x: Tensor, residual: Residual | None, needed: bool = True) -> tuple[Tensor, ...]:
    normed = residual is not None and residual.norm is not None
    size = x.shape[1] if needed else 0
    return *_vectors(x, size, 2), *_vectors(x, size if normed else 0, 2)


def _fake_backward_reduce(dy2: Tensor | None, x: Tensor, residual: Residual | None, **_: Any) -> tuple[Tensor, ...]:
    return *_sums(x, residual), x.new_empty(0) if dy2 is None else torch.empty_like(x)


def _fake_backward_apply(x: Tensor, needs: Needs2, **_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) if need else x.new_empty(0) for need in needs)


def _fake_backward(x: Tensor, residual: Residual | None, needs: Needs3, **_: Any) -> tuple[Tensor, ...]:
    dx, dr = (torch.empty_like(x) if need else x.new_empty(0) for need in needs[:2])
    return dx, dr, *_sums(x, residual, needs[2])


# ---------------------------------------------------------------------------------------------------------- operators

_OF_NORM = ("norm_running_mean", "norm_running_var")

stats = define(
    "batch_norm_act_stats",
    fallback.stats,
    "(Tensor count, Tensor mean, Tensor m2)",
    fake=_fake_stats,
    function="batch_norm_act",
    launcher=("batch_norm_act", "stats"),
)

apply = define(
    "batch_norm_act_apply",
    fallback.apply,
    "(Tensor y, Tensor bits)",
    fake=_fake_apply,
    function="batch_norm_act",
    launcher=("batch_norm_act", "apply"),
)

training = define(
    "batch_norm_act_training",
    fallback.training,
    "(Tensor y, Tensor mean, Tensor rstd, Tensor residual_mean, Tensor residual_rstd, Tensor bits)",
    fake=_fake_training,
    mutates=(*_OF_NORM, *[f"residual_{name}" for name in _OF_NORM]),
    function="batch_norm_act",
    launcher=("batch_norm_act", "training"),
)

inference = define(
    "batch_norm_act_inference",
    fallback.inference,
    "(Tensor y, Tensor bits)",
    fake=_fake_inference,
    function="batch_norm_act",
    launcher=("batch_norm_act", "inference"),
)

_SUMS = "Tensor dweight, Tensor dbias, Tensor residual_dweight, Tensor residual_dbias"

backward_reduce = define(
    "batch_norm_act_backward_reduce",
    fallback.backward_reduce,
    f"({_SUMS}, Tensor dz)",
    fake=_fake_backward_reduce,
    function="batch_norm_act",
    launcher=("batch_norm_act", "backward_reduce"),
)

backward_apply = define(
    "batch_norm_act_backward_apply",
    fallback.backward_apply,
    "(Tensor dx, Tensor dresidual)",
    fake=_fake_backward_apply,
    function="batch_norm_act",
    launcher=("batch_norm_act", "backward_apply"),
)

backward = define(
    "batch_norm_act_backward",
    fallback.backward,
    f"(Tensor dx, Tensor dresidual, {_SUMS})",
    fake=_fake_backward,
    function="batch_norm_act",
    launcher=("batch_norm_act", "backward"),
)

# ----------------------------------------------------------------------------------------------------------- autograd


class Call(NamedTuple):
    """What `BatchNormAct` is given beside the tensors that may get a gradient.

    Attributes:
        norm, residual_norm: with the weights and biases that are given apart as well.
        statistics, residual_statistics: where somebody has taken them already.
        training: the statistics are those of the batch.
        readers: 2 where two readers of y are known: y comes twice, and so does its gradient.
        group: whose batches are normalised as one, in training; None: this process's alone.
    """

    norm: NormParams
    residual_norm: NormParams | None
    statistics: Statistics | None
    residual_statistics: Statistics | None
    seed: Tensor | None
    act: Act
    training: bool
    readers: int = 1
    group: Group | None = None


def statistics_of_group(values: Sequence[tuple[Tensor, Statistics | None]], group: Group) -> list[Statistics]:
    """The statistics over the group of tensors of one shape, in one message; each with its own where they are known."""
    own = []
    for x, known in values:
        if known is not None:
            own.append(known)
        elif x.numel() > 0:
            own.append(Statistics(*stats(x)[1:]))
        else:
            # An empty batch has none, and the group counts it for nothing.
            zeros = x.new_zeros(x.shape[1], dtype=contract.statistics_dtype(x.dtype))
            own.append(Statistics(zeros, zeros))
    x = values[0][0]
    return combine_statistics(own, x.numel() // x.shape[1], group)


class BatchNormAct(torch.autograd.Function):
    """y of batch_norm_act, or (y, y) for two readers, whose gradients are added where backward reads them.

    Gradients go to x, weight, bias, residual, residual_weight and residual_bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        call: Call,
    ) -> Tensor | tuple[Tensor, Tensor]:
        norm, residual_norm, statistics, residual_statistics, seed, act, by_batch, readers, group = call
        r_mean: Tensor | None = None
        r_rstd: Tensor | None = None
        if group is not None:
            values = [(x, statistics)]
            if residual is not None and residual_norm is not None:
                values.append((residual, residual_statistics))
            statistics, *other = statistics_of_group(values, group)
            residual_statistics = other[0] if other else None
        if by_batch:
            y, mean, rstd, r_mean, r_rstd, bits = training(
                x, norm, statistics, residual, residual_norm, residual_statistics, seed, act
            )
            if residual_norm is None:
                r_mean = r_rstd = None
        else:
            y, bits = inference(x, norm, residual, residual_norm, act, True)
            # The running statistics may move on before backward comes.
            mean, rstd = _constants(norm)
            if residual_norm is not None:
                r_mean, r_rstd = _constants(residual_norm)
        reads_residual = residual_norm is not None or act.reads_residual()
        saves_bits = act.saves_bits(residual is not None) if by_batch else act._replace(dropout_p=0.0).gated
        ctx.reads_x = (
            by_batch or any(ctx.needs_input_grad[i] for i in (1, 2, 4, 5)) or not (saves_bits or act.kind == "identity")
        )
        ctx.save_for_backward(
            x if ctx.reads_x else None, mean, rstd, weight, bias, residual if ctx.reads_x and reads_residual else None,
            r_mean, r_rstd, residual_weight, residual_bias, bits if saves_bits else None,
            None if statistics is None else statistics.count,
        )  # fmt: skip
        ctx.residual_is_normed = residual_norm is not None
        ctx.group = group
        ctx.act, ctx.training, ctx.memory_format = act, by_batch, contract.memory_format(x)
        ctx.eps = (norm.eps, 0.0 if residual_norm is None else residual_norm.eps)
        # Where no operation lies between y and the residual, its gradient is dy: nothing to compute, nothing to write.
        ctx.residual_gradient_is_dy = (
            residual is not None
            and residual_norm is None
            and (act.order == "act_add" or (act.kind == "identity" and act.dropout_p == 0))
        )
        ctx.set_materialize_grads(False)
        return y if readers == 1 else (y, y.detach())

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy2: Tensor | None = None) -> Any:
        if dy is None:
            dy, dy2 = dy2, None
        needed = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needed)
        x, mean, rstd, weight, bias, residual, *of_residual, bits, count = ctx.saved_tensors
        if not ctx.reads_x:  # whose shape is that of dy
            dy = dy.contiguous(memory_format=ctx.memory_format)
            x, residual = dy.detach(), dy.detach() if ctx.residual_is_normed else None
        # Hooks on saved tensors may bring them back in another format, and the bits are in the order of this one.
        x = x.contiguous(memory_format=ctx.memory_format)
        if residual is not None:
            residual = Residual(residual.contiguous(memory_format=ctx.memory_format), *of_residual)
        norm = Norm(mean, rstd, weight, bias)
        if needs_plain_formula(dy, dy2):
            refuse_plain_formula(count)
            dy = dy if dy2 is None else dy + dy2
            dx, dr, *sums = _plain_backward(ctx, dy, x, norm, residual, bits)
            dy2 = None
        else:
            dy = dy.contiguous(memory_format=ctx.memory_format)
            if dy2 is not None:
                dy2 = dy2.contiguous(memory_format=ctx.memory_format)
            needs_dr = needed[3] and (dy2 is not None or not ctx.residual_gradient_is_dy)
            # Where they are taken in any case, returning them costs less than making empty ones.
            needs_sums = needed[1] or needed[2] or needed[4] or needed[5] or ctx.training
            if count is not None:
                dx, dr, *sums = _backward_in_stages(ctx, dy, dy2, x, norm, residual, bits, count, [needed[0], needs_dr])
            else:
                dx, dr, *sums = backward(
                    dy, dy2, x, norm, residual, bits, ctx.act, ctx.training, [needed[0], needs_dr, needs_sums]
                )
        if ctx.residual_gradient_is_dy and dy2 is None:
            dr = dy
        dweight, dbias, r_dweight, r_dbias = sums
        grads = (dx, dweight, dbias, dr, r_dweight, r_dbias, None)
        return tuple([g if n else None for g, n in zip(grads, needed, strict=True)])


def refuse_plain_formula(count: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: the statistics are of more elements than x has, `count` of them.
    """
    if count is not None:
        raise RuntimeError(
            "backward: expected an ordinary one where the statistics are of more than this process's batch, got one "
            "that is differentiated again, batched or transformed"
        )


def _backward_in_stages(
    ctx: Any,
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    norm: Norm,
    residual: Residual | None,
    bits: Tensor | None,
    count: Tensor,
    needs: Needs2,
) -> tuple[Tensor | None, ...]:
    """`backward` with all sums, where the statistics are of `count` elements a channel: those of a group's processes,
    or without a group of x and others that are constants.
    """
    act, normed = ctx.act, residual is not None and residual.norm is not None
    empty = x.numel() == 0
    if empty:
        found = [torch.zeros_like(norm.mean) for _ in range(4)]
    else:
        *found, dz = backward_reduce(dy, dy2, x, norm, residual, bits, act)
    sums: Sequence[Tensor] = found[: 4 if normed else 2]
    if ctx.group is not None and (needs[0] or (normed and needs[1])):
        sums = combine_sums(sums, ctx.group)
    if empty:
        return torch.empty_like(x), torch.empty_like(x), *found
    if dy2 is not None:
        dy, act, bits = (dz, PLAIN, None) if act.order == "add_act" else (dz, act, bits)
    dx, dr = backward_apply(dy, x, norm, residual, bits, Sums(*sums), count, act, needs)
    return dx, dr, *found


def _constants(norm: NormParams) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean.clone(), torch.rsqrt(norm.running_var + norm.eps)


def _plain_backward(
    ctx: Any, dy: Tensor, x: Tensor, norm: Norm, residual: Residual | None, bits: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`backward` as expressions of its inputs, for gradients of gradients and batches of gradients."""
    if ctx.training:
        mean, rstd = formulas.batch_statistics(x, ctx.eps[0])
        norm = norm._replace(mean=mean, rstd=rstd)
        if residual is not None and residual.norm is not None:
            mean, rstd = formulas.batch_statistics(residual.value, ctx.eps[1])
            residual = residual._replace(mean=mean, rstd=rstd)
    mask = None if bits is None else contract.unpack_bits(bits, x)
    dx, dr, sums = formulas.gradients(dy, x, norm, residual, ctx.act, mask, ctx.training)
    return dx, dr, *sums
