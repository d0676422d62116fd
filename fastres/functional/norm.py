"""batch_norm_act, and the one way from checked arguments to its operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastres import contract, reference
from fastres.activations import KINDS, Activation
from fastres.contract import PLAIN, Act, Group, NormParams, Statistics
from fastres.functional.checks import (
    autocast_dtype,
    check_norm,
    check_ordinary,
    check_statistics,
    check_tensor,
    check_training,
    checked_act,
    checked_group,
    is_cast,
)
from fastres.functional.prepare import cast, dense, four_dimensional, needs_grad, store_running
from fastres.ops import batch_norm_act as ops
from fastres.ordinary import why_not_ordinary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_compiled(act: Act) -> bool:
    """Whether the operators know the activation; another one is computed by PyTorch's."""
    return KINDS[act.kind].compiled


def run(
    x: Tensor,
    norm: NormParams,
    residual: Tensor | None = None,
    residual_norm: NormParams | None = None,
    *,
    act: Act,
    training: bool,
    statistics: tuple[Statistics | None, Statistics | None] = (None, None),
    seed: Tensor | None = None,
    readers: int = 1,
    group: Group | None = None,
) -> Any:
    """One operator call on checked arguments; y, or for two readers (y, y), as `ops.BatchNormAct` has it.

    Args:
        statistics: of x and of the residual, where they are known.
    """
    x = dense(x)
    if residual is not None:
        residual = dense(residual, contract.memory_format(x))
    if not training:
        act = act._replace(dropout_p=0.0) if act.dropout_p > 0 else act
    elif act.dropout_p > 0 and seed is None:
        seed = contract.draw_seed(x.device)
    dtype = contract.statistics_dtype(x.dtype)
    own, other = cast(norm, dtype), None if residual_norm is None else cast(residual_norm, dtype)
    r_weight, r_bias = (None, None) if other is None else (other.weight, other.bias)
    if not training and not needs_grad(x, own.weight, own.bias, residual, r_weight, r_bias):
        y: Tensor = ops.inference(x, own, residual, other, act, False)[0]
        return y if readers == 1 else (y, y)
    call = ops.Call(own, other, *statistics, seed, act, training, readers, group)
    y = ops.BatchNormAct.apply(x, own.weight, own.bias, residual, r_weight, r_bias, call)
    if training:
        store_running(norm, own)
        if residual_norm is not None and other is not None:
            store_running(residual_norm, other)
    return y


def norm_act(
    x: Tensor,
    norm: NormParams,
    residual: Tensor | None = None,
    residual_norm: NormParams | None = None,
    *,
    act: Act,
    training: bool,
    statistics: Statistics | None = None,
    seed: Tensor | None = None,
    readers: int = 1,
    group: ProcessGroup | None = None,
) -> Any:
    """`batch_norm_act` with grouped arguments.

    Args:
        act: checked already (`checks.checked_act`).
        readers: 2 where y will have two readers that are known. Then the result is (y, y): each is for one of them, and
            the two gradients are added where backward reads them, instead of in a pass of their own. Nobody else may
            see these two, for neither's gradient is the whole one.
    """
    check_tensor("x", x, dimensions=(2, 3, 4, 5))
    if residual is not None:
        differs = isinstance(residual, Tensor) and residual.dtype != x.dtype
        if differs and autocast_dtype(x.device) is not None and is_cast(residual):
            residual = residual.to(x.dtype)
        check_tensor("residual", residual, x, x.shape, dimensions=(2, 3, 4, 5))
    elif residual_norm is not None:
        raise ValueError("residual_norm: expected None without a residual, got NormParams")
    if residual_norm is not None:
        if not isinstance(residual_norm, NormParams):
            raise TypeError(f"residual_norm: expected NormParams or None, got {type(residual_norm).__name__}")
        check_norm("residual_norm.", residual_norm, x, x.shape[1], training)
    check_norm("", norm, x, x.shape[1], training)
    shared = checked_group(group, training)
    check_statistics("statistics", statistics, x, training, shared)
    check_training(training, seed, x, tuple(x.shape), shared)
    if shared is not None or (statistics is not None and statistics.count is not None):
        check_ordinary()
        if not is_compiled(act):
            plain: dict[str, Any] = {"act": PLAIN, "training": True, "group": group}
            if act.order == "add_act":
                z, r = norm_act(x, norm, residual, residual_norm, statistics=statistics, **plain), None
            else:
                z, r = norm_act(x, norm, statistics=statistics, **plain), residual
                r = r if r is None or residual_norm is None else norm_act(r, residual_norm, **plain)
            y = reference.follow(z, r, act, seed)
            return y if readers == 1 else (y, y)
    # As torch.nn.BatchNorm2d an empty x gives a result that autograd can pass through, running statistics untouched.
    elif x.numel() == 0 or not is_compiled(act) or why_not_ordinary() is not None:
        y = reference.batch_norm_act(
            x, *norm[:4], training=training, momentum=norm.momentum, eps=norm.eps, residual=residual,
            residual_norm=residual_norm, activation=act.activation, dropout_p=act.dropout_p if x.numel() > 0 else 0.0,
            order=act.order, seed=seed,
        )  # fmt: skip
        return y if readers == 1 else (y, y)
    if x.dim() != 4:
        y = run(
            four_dimensional(x), norm, None if residual is None else four_dimensional(residual), residual_norm,
            act=act, training=training, statistics=(statistics, None), seed=seed, readers=readers, group=shared,
        )  # fmt: skip
        return y.view(x.shape) if readers == 1 else tuple(part.view(x.shape) for part in y)
    return run(
        x, norm, residual, residual_norm, act=act, training=training, statistics=(statistics, None), seed=seed,
        readers=readers, group=shared,
    )  # fmt: skip


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
    activation: Activation | str | None = None,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
    statistics: Statistics | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Normalise `x`, add `residual`, apply an activation and dropout in one pass over memory.

        z = weight * (x - mean) * rstd + bias
        "add_act":  y = dropout(f(z + residual))
        "act_add":  y = dropout(f(z)) + residual

    mean and rstd are those of the batch in training, and the running ones otherwise. Only x, mean, rstd and at most one
    bit an element are saved for backward; with an activation that is not piecewise linear also the residual itself,
    where it is added before. Gradients that are differentiated again, or batched, are computed by PyTorch's
    operators.

    Args:
        x: [N, C, H, W], or [N, C], [N, C, L] and [N, C, D, H, W], which are views onto the same kernels; float32 |
            bfloat16 | float16 (float64 on the CPU). Contiguous NCHW and channels_last (channels_last_3d) are read as
            they are; other strides are copied once, to channels_last where stride(1) == 1 and else to NCHW.
        running_mean, running_var: [C] or None; updated in place in training (the unbiased variance goes in).
        weight, bias: [C] or None (1 and 0). Statistics, parameters and sums are float32 whatever the dtype of x.
        training: use the batch's statistics, update the running ones and apply dropout. Otherwise dropout is the
            identity.
        momentum: share of the batch in the running statistics. For a cumulative average pass 1 / (batches seen so
            far, this one included), as `fastres.nn.FusedBatchNormAct2d(momentum=None)` does.
        eps: added to the variance.
        residual: shape, dtype and device of x. In another memory format than x it is copied once.
        residual_norm: the residual's own batch normalisation, applied in the same pass.
        relu: off leaves a plain normalisation, or normalisation and addition; a shorthand for `activation`.
        activation: f, an `fastres.Activation` or its kind: "relu", "leaky_relu", "relu6", "hardswish", "silu", "gelu",
            "gelu_tanh", "elu" or "identity". None: as `relu` says.
        dropout_p: 0 <= dropout_p < 1, the probability of dropping an element; kept ones are scaled by
            1 / (1 - dropout_p).
        order: "add_act" (ResNet v1) or "act_add".
        seed: int64, one element, on x's device; the dropout mask is a pure function of it. None draws one from torch's
            generator, so torch.manual_seed and activation checkpointing behave.
        statistics: those of x, where they are known already, in training only. x is then not read to be measured. With
            a count they are those of more elements than x's, which count as constants in backward.
        group: processes whose batches are normalised as one, as torch.nn.SyncBatchNorm does it, in training only: their
            statistics, and in backward their sums, are sent and combined. Batches may differ in N, which may be 0.
            Gradients of weight and bias are those of this process's batch.
    Returns:
        Shape, dtype and memory format of x.
    Raises:
        TypeError: not a tensor, an integer dtype, dtypes of x and residual differ.
        ValueError: shapes or devices disagree; one value a channel in training; dropout_p outside [0, 1); an unknown
            order or activation; no running statistics with training=False; residual_norm without residual.
        RuntimeError: torch.func, forward-mode differentiation or a tracer asks for PyTorch's own operators, or backward
            is to be differentiated again, where the statistics are of more than x (group, or statistics with a count).
    Source: Ioffe and Szegedy 2015, algorithm 1; He et al. 2015, figure 2; Srivastava et al. 2014, section 4.
    """
    y: Tensor = norm_act(
        x, NormParams(running_mean, running_var, weight, bias, momentum, eps), residual, residual_norm,
        act=checked_act(relu, activation, dropout_p, order), training=training, statistics=statistics, seed=seed,
        group=group,
    )  # fmt: skip
    return y
