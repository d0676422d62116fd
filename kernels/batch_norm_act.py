"""The launchers of batch_norm_act, an operator each: what fastres/ops/fallback.py says in plain PyTorch.

T is one pass over a tensor of x's size and dtype. In training the forward pass is two launches, `statistics_kernel` and
`apply_kernel`, the backward pass two, `backward_reduce_kernel` and `backward_apply_kernel`; evaluation is one each.

Every kernel runs over a grid of (splits, channel blocks): a program owns BLOCK_C channels and every splits-th tile of
positions (tile.py), so a vector of one value a channel is loaded once a program. The second pass of a pair walks the
tiles backwards, since what the first pass read last is what the second-level cache still holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import contract
from fastres.contract import PLAIN, Act, Norm, NormParams, Residual, Statistics, Sums

from .activations import backward_arguments, forward_arguments
from .backward import backward_apply_kernel, backward_reduce_kernel
from .forward import apply_kernel
from .launch import arrival_counters, geometry, launch, launch_over_channels, mark_updated
from .plan import Geometry, Plan, apply_plan, reduce_plan
from .statistics import finalise_kernel, statistics_kernel

_CROWDED_REDUCE, _CROWDED_APPLY = (functools.partial(make, crowded=True) for make in (reduce_plan, apply_plan))


def _image(shape: Geometry) -> int:
    # Of no use in channels_last, and a constant there is one specialisation less.
    return 1 if shape.channels_last else shape.image


def _vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def _nothing(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


def _is_normed(residual: Residual | None) -> bool:
    return residual is not None and residual.mean is not None


def _check(
    x: Tensor,
    activations: Iterable[tuple[str, Tensor | None]],
    vectors: Iterable[Tensor | None],
    bits: Tensor | None = None,
) -> None:
    """Refuse what would make a kernel leave its tensors. `fastres.functional` has checked all of it with better words.

    Raises:
        ValueError: another shape or memory format than x's, or a vector that is not [C]. TypeError: another dtype.
    """
    for name, t in activations:
        if t is not None:
            if t.shape != x.shape or t.stride() != x.stride():
                raise ValueError(
                    f"{name}: expected shape {tuple(x.shape)} and strides {x.stride()}, got {tuple(t.shape)} and"
                    f" {t.stride()}"
                )
            if t.dtype != x.dtype:
                raise TypeError(f"{name}: expected dtype {x.dtype}, got {t.dtype}")
    for v in vectors:
        if v is not None:
            if v.dim() != 1 or v.shape[0] != x.shape[1]:
                raise ValueError(f"vector: expected size ({x.shape[1]},), one value a channel, got {tuple(v.shape)}")
            if v.dtype != torch.float32:
                raise TypeError(f"vector: expected dtype torch.float32, got {v.dtype}")
    if bits is not None and bits.numel() not in (0, contract.bits_size(x)):
        raise ValueError(f"bits: expected {contract.bits_size(x)} bytes, got {bits.numel()}")


def _check_count(name: str, count: Tensor | None) -> None:
    if count is not None and (count.numel() != 1 or count.dtype != torch.int64):
        raise ValueError(f"{name}: expected one element of dtype torch.int64, got {count.numel()} of {count.dtype}")


# ---------------------------------------------------------------------------------------------------------- statistics


class _Measured(NamedTuple):
    """A tensor with the normalisation that it gets by its batch statistics, which may be known."""

    value: Tensor
    norm: NormParams
    given: Statistics | None


_NO_NORM = NormParams(None, None, momentum=0.0, eps=0.0)
_NOT_GIVEN = (None, None, None)


def _batch_statistics(values: list[_Measured], shape: Geometry) -> list[tuple[Tensor, Tensor]]:
    """(mean, rstd) of x, and of a normalised residual, in one launch; the running statistics are updated."""
    results = [(_vector(v.value), _vector(v.value)) for v in values]
    # The kernels take first what they have to compute.
    order = sorted(range(len(values)), key=lambda i: values[i].given is not None)
    x, norm, given = values[order[0]]
    kept = (*results[order[0]], *norm[:2])
    other, other_norm, other_given = None, _NO_NORM, None
    other_kept: tuple[Tensor | None, ...] = (None,) * 4
    if len(values) == 2:
        other, other_norm, other_given = values[order[1]]
        other_kept = (*results[order[1]], *other_norm[:2])
    others = (*(other_given or _NOT_GIVEN), *other_kept)
    floats = (norm.momentum, norm.eps, other_norm.momentum, other_norm.eps)
    if given is not None:
        arguments = (*given, *kept, *others, shape.positions, shape.channels, *floats)
        launch_over_channels(finalise_kernel, shape, x, arguments)
    else:
        measured = None if other_given is not None else other
        _launch_statistics(x, measured, shape, (kept[0], None, *kept[1:], *others), floats)
    for updated in kept[2:] + other_kept[2:]:
        if updated is not None:
            mark_updated(updated)
    return results


_RUNNING = ("running_mean_ptr", "running_var_ptr", "other_running_mean_ptr", "other_running_var_ptr")


def _launch_statistics(
    x: Tensor, other: Tensor | None, shape: Geometry, vectors: tuple[Tensor | None, ...], floats: tuple[float, ...]
) -> None:
    tensors = 1 if other is None else 2

    def arguments(plan: Plan) -> tuple[Any, ...]:
        partial = torch.empty(
            tensors * plan.channel_blocks * plan.splits * (2 * plan.block_c + 1), dtype=torch.float32, device=x.device
        )
        arrivals = arrival_counters(x, tensors * plan.channel_blocks)
        return (x, other, partial, arrivals, *vectors, shape.positions, shape.channels, _image(shape), *floats)

    names = dict(zip(statistics_kernel.arg_names[4:], vectors, strict=False))
    launch(
        statistics_kernel, reduce_plan, shape, x, arguments, depth=tensors, partials=True,
        restore=[name for name in _RUNNING if names[name] is not None],
    )  # fmt: skip


def stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count int64 [1], mean [C], M2 [C]) of x [N, C, H, W]."""
    shape, mean, m2 = geometry(x), _vector(x), _vector(x)
    _launch_statistics(x, None, shape, (mean, m2, *[None] * 10), (0.0, 0.0, 0.0, 0.0))
    return torch.full((1,), shape.positions, dtype=torch.int64, device=x.device), mean, m2


# ------------------------------------------------------------------------------------------------------------- forward


class _ByVariance(NamedTuple):
    """A normalisation as evaluation has it: the variance in place of rstd, and what is added to it."""

    norm: tuple[Tensor | None, ...]
    residual_norm: tuple[Tensor | None, ...]
    eps: float
    residual_eps: float


def _keep_scale(dropout_p: float) -> float:
    return 1.0 / (1.0 - dropout_p)


def _forward(
    x: Tensor, shape: Geometry, norms: _ByVariance, residual: Tensor | None, seed: Tensor | None, act: Act,
    saves: bool, variance: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, bits) by one launch, on checked arguments. norms: by rstd unless `variance` says otherwise."""
    y = torch.empty_like(x)
    bits = torch.empty(contract.bits_size(x) if saves else 0, dtype=torch.uint8, device=x.device)
    threshold = contract.dropout_threshold(act.dropout_p)
    arguments = (
        x, residual, y, bits if saves else None, seed if act.dropout_p > 0 else None, *norms.norm,
        *norms.residual_norm, shape.positions, shape.channels, _image(shape), norms.eps, norms.residual_eps,
        # As a signed number, so that the argument has one type whatever its value.
        threshold - 2**32 if threshold >= 2**31 else threshold, _keep_scale(act.dropout_p),
    )  # fmt: skip
    flags = forward_arguments(act)
    besides = residual is not None and (act.dropout_p > 0 or norms.residual_norm[0] is not None)
    crowded = flags["FORWARD"] is not None and besides
    launch(
        apply_kernel, _CROWDED_APPLY if crowded else apply_plan, shape, x, lambda _: arguments, **flags,
        ACT_ADD=residual is not None and act.order == "act_add",
        VARIANCE=variance, FOURS=shape.channels % 4 == 0, WIDE=shape.positions * shape.channels >= 2**34,
    )  # fmt: skip
    return y, bits


_NO_VECTORS = (None, None, None, None)


def apply(
    x: Tensor, norm: Norm, residual: Residual | None, seed: Tensor | None, act: Act, save_bits: bool
) -> tuple[Tensor, Tensor]:
    """Operator batch_norm_act_apply."""
    residual_norm = _NO_VECTORS if residual is None else residual[1:]
    value = None if residual is None else residual.value
    _check(x, [("residual", value)], (*norm, *residual_norm))
    saves = save_bits and act.saves_bits(value is not None)
    return _forward(x, geometry(x), _ByVariance(norm, residual_norm, 0.0, 0.0), value, seed, act, saves, False)


def training(
    x: Tensor, norm: NormParams, statistics: Statistics | None, residual: Tensor | None,
    residual_norm: NormParams | None, residual_statistics: Statistics | None, seed: Tensor | None, act: Act,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_training: two launches."""
    values = [_Measured(x, norm, statistics)]
    if residual is not None and residual_norm is not None:
        values.append(_Measured(residual, residual_norm, residual_statistics))
    for name, value in zip(("statistics_count", "residual_statistics_count"), values, strict=False):
        _check(x, [("residual", residual)], (*value.norm[:4], *(value.given or ())[:2]))
        _check_count(name, None if value.given is None else value.given.count)
    shape = geometry(x)
    (mean, rstd), *of_residual = _batch_statistics(values, shape)
    residual_vectors: tuple[Tensor | None, ...] = _NO_VECTORS
    if residual_norm is not None:
        r_mean, r_rstd = of_residual[0]
        residual_vectors = (r_mean, r_rstd, residual_norm.weight, residual_norm.bias)
    else:
        r_mean, r_rstd = _nothing(x), _nothing(x)
    norms = _ByVariance((mean, rstd, norm.weight, norm.bias), residual_vectors, 0.0, 0.0)
    y, bits = _forward(x, shape, norms, residual, seed, act, act.saves_bits(residual is not None), False)
    return y, mean, rstd, r_mean, r_rstd, bits


def inference(
    x: Tensor, norm: NormParams, residual: Tensor | None, residual_norm: NormParams | None, act: Act, save_bits: bool
) -> tuple[Tensor, Tensor]:
    """Operator batch_norm_act_inference: one launch."""
    residual_vectors = _NO_VECTORS if residual_norm is None else residual_norm[:4]
    residual_eps = 0.0 if residual_norm is None else residual_norm.eps
    norms = _ByVariance(norm[:4], residual_vectors, norm.eps, residual_eps)
    _check(x, [("residual", residual)], (*norm[:4], *residual_vectors))
    act = act._replace(dropout_p=0.0)
    # Backward may have no x to compute the activation's input of.
    return _forward(x, geometry(x), norms, residual, None, act, save_bits and act.gated, True)


# ------------------------------------------------------------------------------------------------------------ backward


def _read_residual(residual: Residual | None, act: Act) -> tuple[Tensor | None, ...]:
    """The residual as the backward kernels take it, (value, mean, rstd, weight, bias): what they read of it."""
    if residual is None or not (_is_normed(residual) or act.reads_residual()):
        return None, *_NO_VECTORS
    # The kernels need its bias for f's input alone.
    return (*residual[:4], residual.bias if act.reads_residual() else None)


def backward_reduce(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Residual | None, bits: Tensor | None, act: Act
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Operator batch_norm_act_backward_reduce: one launch."""
    value, *residual_norm = _read_residual(residual, act)
    _check(x, [("dy", dy), ("dy2", dy2), ("residual", value)], (*norm, *residual_norm), bits)
    shape = geometry(x)
    bits = None if bits is None or bits.numel() == 0 else bits
    normed = _is_normed(residual)
    dz = _nothing(x, x.dtype) if dy2 is None else torch.empty_like(x)
    dweight, dbias = _vector(x), _vector(x)
    r_dweight, r_dbias = (_vector(x), _vector(x)) if normed else (_nothing(x), _nothing(x))
    sums = (4 if act.order == "act_add" else 3) if normed else 2

    def arguments(plan: Plan) -> tuple[Any, ...]:
        partial = torch.empty(
            plan.channel_blocks * plan.splits * sums * plan.block_c, dtype=torch.float32, device=x.device
        )
        return (
            dy, dy2, x, value, bits, None if dy2 is None else dz, partial, arrival_counters(x, plan.channel_blocks),
            *norm, *residual_norm, dweight, dbias, r_dweight if normed else None, r_dbias if normed else None,
            shape.positions, shape.channels, _image(shape), _keep_scale(act.dropout_p),
        )  # fmt: skip

    flags = backward_arguments(act, bits is not None)
    crowded = flags["GRADIENT"] is not None or dy2 is not None
    launch(
        backward_reduce_kernel, _CROWDED_REDUCE if crowded else reduce_plan, shape, x, arguments, partials=True,
        ACT_ADD=act.order == "act_add" and (normed or dy2 is not None), **flags,
    )  # fmt: skip
    return dweight, dbias, r_dweight, r_dbias, dz


def backward_apply(
    dy: Tensor, x: Tensor, norm: Norm, residual: Residual | None, bits: Tensor | None, sums: Sums | None,
    count: Tensor | None, act: Act, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_backward_apply: one launch, or none where no gradient is needed."""
    value, *residual_norm = _read_residual(residual, act)
    normed = _is_normed(residual)
    through: tuple[Tensor | None, ...] = _NO_VECTORS if sums is None else sums
    _check(x, [("dy", dy), ("residual", value)], (*norm, *residual_norm, *through), bits)
    _check_count("count", count)
    shape = geometry(x)
    dx, dr = (torch.empty_like(x) if need else _nothing(x, x.dtype) for need in needs)
    if not any(needs):
        return dx, dr
    bits = None if bits is None or bits.numel() == 0 else bits
    arguments = (
        dy, x, value, bits, dx if needs[0] else None, dr if needs[1] else None, *norm, *residual_norm, *through, count,
        shape.positions, shape.channels, _image(shape), _keep_scale(act.dropout_p),
    )  # fmt: skip
    flags = backward_arguments(act, bits is not None)
    crowded = flags["GRADIENT"] is not None or (normed and bits is None)
    launch(
        backward_apply_kernel, _CROWDED_APPLY if crowded else apply_plan, shape, x, lambda _: arguments, **flags,
        ACT_ADD=act.order == "act_add" and (needs[1] or value is not None),
    )  # fmt: skip
    return dx, dr


def backward(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Residual | None, bits: Tensor | None, act: Act,
    training: bool, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Operator batch_norm_act_backward: two launches, or one: sums alone, or input gradients in evaluation.

    With dy2 the gradient of a plain residual is the dz of the first launch, and nobody writes it again.
    """
    found: Sequence[Tensor] = [_nothing(x) for _ in range(4)]
    sums, dz = None, None
    if dy2 is not None or needs[2] or (training and (needs[0] or needs[1])):
        *found, dz = backward_reduce(dy, dy2, x, norm, residual, bits, act)
        if training:
            sums = Sums(*found) if _is_normed(residual) else Sums(*found[:2])
    if dy2 is None or dz is None:
        dx, dr = backward_apply(dy, x, norm, residual, bits, sums, None, act, needs[:2])
    else:
        if act.order == "add_act":
            act, bits = PLAIN, None
        is_dz = needs[1] and not _is_normed(residual)
        dx, dr = backward_apply(dz, x, norm, residual, bits, sums, None, act, (needs[0], needs[1] and not is_dz))
        dr = dz if is_dz else dr
    if not needs[2]:
        found = [_nothing(x) for _ in range(4)]
    dweight, dbias, r_dweight, r_dbias = found
    return dx, dr, dweight, dbias, r_dweight, r_dbias
