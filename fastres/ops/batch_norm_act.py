"""batch_norm_act: batch normalisation, residual addition, ReLU and dropout in one pass over memory.

    xhat = (x - mean) * rstd        z = weight * xhat + bias
    "add_act":  y = dropout(relu(z + r))            "act_add":  y = dropout(relu(z)) + r
    g = dy * bit / (1 - p)          bit = kept and (relu input > 0)
    dbias = sum g                   dweight = sum g * xhat
    dx = weight * rstd * (g - dbias / M - xhat * dweight / M)

The running statistics are arguments that an operator mutates, and torch.library.register_autograd refuses those. So the
autograd formula is a torch.autograd.Function over the mutable operator, which also has the least overhead.

CUDA tensors go to the Triton kernels. Under torch.compile the operators stay opaque to inductor instead of being opened
up with triton_op and wrap_triton, for three reasons. What stands before and behind them are convolutions, so inductor
has nothing to fuse into the kernels. The reductions need counters that are zero at every launch and outlive it; traced,
they would become a fill a launch. And the operators update running statistics by pointer, as their schema says; opened
up, inductor would have to find that out of the kernel's code. The price is the dispatcher's call, which a CUDA graph
(mode="reduce-overhead") takes away.

For backward are kept: x, mean, rstd, and one bit an element where neither can say which elements were passed on; the
residual only where it has a normalisation of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastres import reference
from fastres.ops.library import define, takes_plain_formula
from fastres.reference import Activation, Affine

_NORM = "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias"
_RESIDUAL_NORM = "Tensor? residual_mean, Tensor? residual_rstd, Tensor? residual_weight, Tensor? residual_bias"
_ACTIVATION = "bool relu, float dropout_p, str order"


def _residual(
    residual: Tensor | None, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor | Affine | None:
    if residual is None or mean is None or rstd is None:
        return residual
    return Affine(residual, mean, rstd, weight, bias)


def _vector(x: Tensor, size: int | torch.SymInt) -> Tensor:
    return x.new_empty(size, dtype=reference.statistics_dtype(x.dtype))


def _fake_bits(x: Tensor, act: Activation, has_residual: bool, save: bool = True) -> Tensor:
    size = reference.bits_size(x) if save and reference.needs_bits(act, has_residual) else 0
    return x.new_empty(size, dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------- statistics, apply


def _stats_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(1, dtype=torch.int64), _vector(x, x.shape[1]), _vector(x, x.shape[1])


stats = define(
    "batch_norm_act_stats(Tensor x) -> (Tensor count, Tensor mean, Tensor m2)",
    fallback=reference.stats,
    fake=_stats_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "stats"),
)


def _apply_fallback(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    residual_mean: Tensor | None, residual_rstd: Tensor | None, residual_weight: Tensor | None,
    residual_bias: Tensor | None, seed: Tensor | None, relu: bool, dropout_p: float, order: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r = _residual(residual, residual_mean, residual_rstd, residual_weight, residual_bias)
    return reference.apply(Affine(x, mean, rstd, weight, bias), r, seed, Activation(relu, dropout_p, order), True)


def _apply_fake(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    residual_mean: Tensor | None, residual_rstd: Tensor | None, residual_weight: Tensor | None,
    residual_bias: Tensor | None, seed: Tensor | None, relu: bool, dropout_p: float, order: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), _fake_bits(x, Activation(relu, dropout_p, order), residual is not None)


apply = define(
    f"batch_norm_act_apply(Tensor x, {_NORM}, Tensor? residual, {_RESIDUAL_NORM}, Tensor? seed, {_ACTIVATION})"
    " -> (Tensor y, Tensor bits)",
    fallback=_apply_fallback,
    fake=_apply_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "apply"),
)

# ------------------------------------------------------------------------------------------------------------ training


def _training_fallback(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None, residual_weight: Tensor | None, residual_bias: Tensor | None,
    residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
    x_mean: Tensor | None, x_m2: Tensor | None, residual_mean: Tensor | None, residual_m2: Tensor | None,
    seed: Tensor | None, residual_norm: bool, momentum: float, eps: float, residual_momentum: float,
    residual_eps: float, relu: bool, dropout_p: float, order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, rstd = reference.finalise(x, x_mean, x_m2, running_mean, running_var, momentum, eps)
    r: Tensor | Affine | None = residual
    r_mean, r_rstd = mean.new_empty(0), mean.new_empty(0)
    if residual is not None and residual_norm:
        r_mean, r_rstd = reference.finalise(
            residual, residual_mean, residual_m2, residual_running_mean, residual_running_var, residual_momentum,
            residual_eps,
        )  # fmt: skip
        r = Affine(residual, r_mean, r_rstd, residual_weight, residual_bias)
    act = Activation(relu, dropout_p, order)
    y, bits = reference.apply(Affine(x, mean, rstd, weight, bias), r, seed, act, True)
    return y, mean, rstd, r_mean, r_rstd, bits


def _training_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None, residual_weight: Tensor | None, residual_bias: Tensor | None,
    residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
    x_mean: Tensor | None, x_m2: Tensor | None, residual_mean: Tensor | None, residual_m2: Tensor | None,
    seed: Tensor | None, residual_norm: bool, momentum: float, eps: float, residual_momentum: float,
    residual_eps: float, relu: bool, dropout_p: float, order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c = x.shape[1]
    rc = c if residual_norm else 0
    bits = _fake_bits(x, Activation(relu, dropout_p, order), residual is not None)
    return torch.empty_like(x), _vector(x, c), _vector(x, c), _vector(x, rc), _vector(x, rc), bits


training = define(
    "batch_norm_act_training(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor? residual, Tensor? residual_weight, Tensor? residual_bias,"
    " Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var, Tensor? x_mean, Tensor? x_m2,"
    " Tensor? residual_mean, Tensor? residual_m2, Tensor? seed, bool residual_norm, float momentum, float eps,"
    f" float residual_momentum, float residual_eps, {_ACTIVATION})"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor saved_residual_mean, Tensor saved_residual_rstd, Tensor bits)",
    fallback=_training_fallback,
    fake=_training_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "training"),
)

# ---------------------------------------------------------------------------------------------------------- evaluation


def _inference_fallback(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, eps: float, residual_eps: float, relu: bool,
    order: str, save_bits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r_rstd = None if residual_running_var is None else torch.rsqrt(residual_running_var + residual_eps)
    r = _residual(residual, residual_running_mean, r_rstd, residual_weight, residual_bias)
    normed = Affine(x, running_mean, torch.rsqrt(running_var + eps), weight, bias)
    return reference.apply(normed, r, None, Activation(relu, 0.0, order), save_bits)


def _inference_fake(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, eps: float, residual_eps: float, relu: bool,
    order: str, save_bits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), _fake_bits(x, Activation(relu, 0.0, order), residual is not None, save_bits)


inference = define(
    "batch_norm_act_inference(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? residual_running_mean, Tensor? residual_running_var, Tensor? residual_weight,"
    " Tensor? residual_bias, float eps, float residual_eps, bool relu, str order, bool save_bits)"
    " -> (Tensor y, Tensor bits)",
    fallback=_inference_fallback,
    fake=_inference_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "inference"),
)

# ------------------------------------------------------------------------------------------------------------ backward


def _backward_reduce_fallback(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, relu: bool, dropout_p: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r = _residual(residual, residual_mean, residual_rstd, residual_weight, residual_bias)
    normed, act = Affine(x, mean, rstd, weight, bias), Activation(relu, dropout_p, order)
    return reference.backward_reduce(dy, normed, r if isinstance(r, Affine) else None, bits, act)


def _backward_reduce_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, relu: bool, dropout_p: float,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    c = x.shape[1]
    rc = 0 if residual_mean is None else c
    return _vector(x, c), _vector(x, c), _vector(x, rc), _vector(x, rc)


_SAVED = f"Tensor dy, Tensor x, {_NORM}, Tensor? residual, {_RESIDUAL_NORM}, Tensor? bits"

backward_reduce = define(
    f"batch_norm_act_backward_reduce({_SAVED}, {_ACTIVATION})"
    " -> (Tensor dweight, Tensor dbias, Tensor residual_dweight, Tensor residual_dbias)",
    fallback=_backward_reduce_fallback,
    fake=_backward_reduce_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "backward_reduce"),
)


def _backward_apply_fallback(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, dweight: Tensor | None,
    dbias: Tensor | None, residual_dweight: Tensor | None, residual_dbias: Tensor | None, count: Tensor | None,
    relu: bool, dropout_p: float, order: str, needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r = _residual(residual, residual_mean, residual_rstd, residual_weight, residual_bias)
    sums = None
    if dweight is not None and dbias is not None:
        none = dbias.new_empty(0)
        sums = (
            dweight,
            dbias,
            none if residual_dweight is None else residual_dweight,
            none if residual_dbias is None else residual_dbias,
        )
    normed, act = Affine(x, mean, rstd, weight, bias), Activation(relu, dropout_p, order)
    m: Tensor | int = x.numel() // x.shape[1] if count is None else count
    return reference.backward_apply(dy, normed, r, bits, act, sums, m, (needs[0], needs[1]))


def _backward_apply_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, dweight: Tensor | None,
    dbias: Tensor | None, residual_dweight: Tensor | None, residual_dbias: Tensor | None, count: Tensor | None,
    relu: bool, dropout_p: float, order: str, needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dr = (torch.empty_like(x) if need else x.new_empty(0) for need in needs)
    return dx, dr


backward_apply = define(
    f"batch_norm_act_backward_apply({_SAVED}, Tensor? dweight, Tensor? dbias, Tensor? residual_dweight,"
    f" Tensor? residual_dbias, Tensor? count, {_ACTIVATION}, bool[2] needs) -> (Tensor dx, Tensor dresidual)",
    fallback=_backward_apply_fallback,
    fake=_backward_apply_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "backward_apply"),
)


def _backward_fallback(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, training: bool, relu: bool,
    dropout_p: float, order: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r = _residual(residual, residual_mean, residual_rstd, residual_weight, residual_bias)
    normed, act = Affine(x, mean, rstd, weight, bias), Activation(relu, dropout_p, order)
    none = (mean.new_empty(0), mean.new_empty(0), mean.new_empty(0), mean.new_empty(0))
    sums = none
    if needs[2] or (training and (needs[0] or needs[1])):
        sums = reference.backward_reduce(dy, normed, r if isinstance(r, Affine) else None, bits, act)
    dx, dr = reference.backward_apply(
        dy, normed, r, bits, act, sums if training else None, x.numel() // x.shape[1], (needs[0], needs[1])
    )
    return dx, dr, *(sums if needs[2] else none)


def _backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, residual_mean: Tensor | None, residual_rstd: Tensor | None,
    residual_weight: Tensor | None, residual_bias: Tensor | None, bits: Tensor | None, training: bool, relu: bool,
    dropout_p: float, order: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dr = (torch.empty_like(x) if need else x.new_empty(0) for need in needs[:2])
    c = x.shape[1] if needs[2] else 0
    rc = 0 if residual_mean is None else c
    return dx, dr, _vector(x, c), _vector(x, c), _vector(x, rc), _vector(x, rc)


# needs: dx, dresidual, and the four sums as results. In training the first two depend on the sums, which are taken for
# them whether or not they are returned; what is not needed is empty.
backward = define(
    f"batch_norm_act_backward({_SAVED}, bool training, {_ACTIVATION}, bool[3] needs)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor residual_dweight, Tensor residual_dbias)",
    fallback=_backward_fallback,
    fake=_backward_fake,
    function="batch_norm_act",
    launcher=("batch_norm_act", "backward"),
)

# ------------------------------------------------------------------------------------------------------------ autograd


def _plain_backward(
    ctx: Any, dy: Tensor, x: Affine, residual: Tensor | None, rest: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` as expressions of its inputs, for gradients of gradients and batches of gradients."""
    batch_statistics, *activation = ctx.activation
    r_mean, r_rstd, r_weight, r_bias, bits = rest
    if batch_statistics:
        mean, rstd = reference.batch_statistics(x.value, ctx.eps[0])
        x = x._replace(mean=mean, rstd=rstd)
        if residual is not None:
            r_mean, r_rstd = reference.batch_statistics(residual, ctx.eps[1])
    r = _residual(residual, r_mean, r_rstd, r_weight, r_bias)
    assert not isinstance(r, Tensor)
    g, dx, dr, sums = reference.gradients(dy, x, r, bits, Activation(*activation), batch_statistics)
    return dx, g.to(dy.dtype) if dr is None else dr, *sums


class BatchNormAct(torch.autograd.Function):
    """Autograd formula of batch_norm_act; `training` says whether the statistics are those of the batch.

    forward returns y alone; gradients go to x, weight, bias, residual, residual_weight and residual_bias.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, residual: Tensor | None, residual_weight: Tensor | None,
        residual_bias: Tensor | None, residual_running_mean: Tensor | None, residual_running_var: Tensor | None,
        x_mean: Tensor | None, x_m2: Tensor | None, residual_mean: Tensor | None, residual_m2: Tensor | None,
        seed: Tensor | None, residual_norm: bool, batch_statistics: bool, momentum: float, eps: float,
        residual_momentum: float, residual_eps: float, relu: bool, dropout_p: float, order: str,
    ) -> Tensor:  # fmt: skip
        r_mean: Tensor | None
        r_rstd: Tensor | None
        if batch_statistics:
            y, mean, rstd, r_mean, r_rstd, bits = training(
                x, weight, bias, running_mean, running_var, residual, residual_weight, residual_bias,
                residual_running_mean, residual_running_var, x_mean, x_m2, residual_mean, residual_m2, seed,
                residual_norm, momentum, eps, residual_momentum, residual_eps, relu, dropout_p, order,
            )  # fmt: skip
        else:
            y, bits = inference(
                x, running_mean, running_var, weight, bias, residual, residual_running_mean, residual_running_var,
                residual_weight, residual_bias, eps, residual_eps, relu, order, True,
            )  # fmt: skip
            # The running statistics may move on before backward comes.
            assert running_mean is not None and running_var is not None
            mean, rstd = running_mean.clone(), torch.rsqrt(running_var + eps)
            r_mean = r_rstd = None
            if residual_running_mean is not None and residual_running_var is not None:
                r_mean, r_rstd = residual_running_mean.clone(), torch.rsqrt(residual_running_var + residual_eps)
        if not residual_norm:
            r_mean = r_rstd = None
        keeps_bits = reference.needs_bits(Activation(relu, dropout_p, order), residual is not None)
        ctx.save_for_backward(
            x, mean, rstd, weight, bias, residual if residual_norm else None, r_mean, r_rstd, residual_weight,
            residual_bias, bits if keeps_bits else None,
        )  # fmt: skip
        ctx.activation, ctx.memory_format = (batch_statistics, relu, dropout_p, order), reference.memory_format(x)
        ctx.eps = (eps, residual_eps)
        # Where nothing stands between y and the residual, its gradient is dy: nothing to compute, nothing to write.
        ctx.residual_gradient_is_dy = (
            residual is not None and not residual_norm and (order == "act_add" or (not relu and dropout_p == 0))
        )
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, mean, rstd, weight, bias, residual, *rest = ctx.saved_tensors
        needed = ctx.needs_input_grad
        # Hooks on saved tensors may bring them back in another format, and the bits are in the order of this one.
        x = x.contiguous(memory_format=ctx.memory_format)
        if residual is not None:
            residual = residual.contiguous(memory_format=ctx.memory_format)
        if takes_plain_formula(dy):
            dx, dr, dweight, dbias, r_dweight, r_dbias = _plain_backward(
                ctx, dy, Affine(x, mean, rstd, weight, bias), residual, rest
            )
        else:
            dy = dy.contiguous(memory_format=ctx.memory_format)
            needs_dr = needed[5] and not ctx.residual_gradient_is_dy
            # Where they are taken in any case, returning them costs less than making empty ones.
            needs_sums = needed[1] or needed[2] or needed[6] or needed[7] or ctx.activation[0]
            dx, dr, dweight, dbias, r_dweight, r_dbias = backward(
                dy, x, mean, rstd, weight, bias, residual, *rest, *ctx.activation, [needed[0], needs_dr, needs_sums]
            )
        if ctx.residual_gradient_is_dy:
            dr = dy
        grads = (dx, dweight, dbias, None, None, dr, r_dweight, r_dbias)
        gradients = [g if n else None for g, n in zip(grads, needed, strict=False)]
        return (*gradients, *[None] * (len(needed) - len(grads)))
