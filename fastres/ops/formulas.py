"""The mathematics of batch_norm_act in plain PyTorch: expressions of their inputs, which can be differentiated again
and batched. Backward passes for gradients of gradients are made of them, and so is the fallback.

Notation: x is [N, C, H, W], M = N * H * W elements a channel, xhat = (x - mean) * rstd, f the activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastres import contract
from fastres.contract import Act, Norm, Residual, Sums


def channels(v: Tensor) -> Tensor:
    """[C] as [C, 1, 1]."""
    return v[:, None, None]


def xhat(x: Tensor, norm: Norm) -> Tensor:
    """(x - mean) * rstd in the dtype of the statistics."""
    return (x.to(norm.mean.dtype) - channels(norm.mean)) * channels(norm.rstd)


def _scale(norm: Norm) -> Tensor:
    return norm.rstd if norm.weight is None else norm.rstd * norm.weight


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """weight * (x - mean) * rstd + bias in the dtype of the statistics."""
    z = (x.to(norm.mean.dtype) - channels(norm.mean)) * channels(_scale(norm))
    return z if norm.bias is None else z + channels(norm.bias)


def _added(residual: Residual | None) -> Tensor | None:
    if residual is None:
        return None
    return residual.value if residual.norm is None else normalise(residual.value, residual.norm)


def preactivation(x: Tensor, norm: Norm, residual: Residual | None, act: Act) -> Tensor:
    """f's input: z, or z + r where the residual is added before f."""
    z = normalise(x, norm)
    r = _added(residual)
    return z if r is None or act.order == "act_add" else z + r


def activate(
    x: Tensor, norm: Norm, residual: Residual | None, act: Act, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y in the dtype of the statistics, the mask that `Act.saves_bits` speaks of); `keep` is dropout's mask."""
    z = preactivation(x, norm, residual, act)
    y, mask = act.activation.forward(z), keep
    if act.gated:
        mask = contract.passes(act, z) if keep is None else contract.passes(act, z) & keep
    if keep is not None:
        y = torch.where(keep, y / (1 - act.dropout_p), 0)
    r = _added(residual)
    return y if r is None or act.order == "add_act" else y + r, mask


def masked_gradient(
    dy: Tensor, x: Tensor, norm: Norm, residual: Residual | None, act: Act, mask: Tensor | None
) -> Tensor:
    """g, the gradient of z, in the dtype of the statistics: dy * keep / (1 - p) * f'(z)."""
    g = dy.to(norm.mean.dtype)
    if mask is not None and act.gated:
        return torch.where(mask, g / (1 - act.dropout_p), g * act.leak if act.leak else 0)
    if act.recomputes(False):
        g = g * act.activation.gradient(preactivation(x, norm, residual, act))
    return g if mask is None else torch.where(mask, g / (1 - act.dropout_p), 0)


def sums_of(dz: Tensor, dr: Tensor, x: Tensor, norm: Norm, residual: Residual | None) -> Sums:
    """The backward sums from the gradients of z and of the residual's own normalised value."""
    dweight, dbias = (dz * xhat(x, norm)).sum((0, 2, 3)), dz.sum((0, 2, 3))
    if residual is None or residual.norm is None:
        return Sums(dweight, dbias)
    return Sums(dweight, dbias, (dr * xhat(residual.value, residual.norm)).sum((0, 2, 3)), dr.sum((0, 2, 3)))


def input_gradient(
    g: Tensor, x: Tensor, norm: Norm, sums: tuple[Tensor | None, Tensor | None] | None, count: Tensor | int
) -> Tensor:
    """weight * rstd * (g - dbias / M - xhat * dweight / M), or without (dweight, dbias) weight * rstd * g.

    Source: Ioffe and Szegedy 2015, section 3.
    """
    if sums is not None:
        dweight, dbias = sums
        assert dweight is not None and dbias is not None
        g = g - channels(dbias / count) - xhat(x, norm) * channels(dweight / count)
    return g * channels(_scale(norm))


def gradients(
    dy: Tensor, x: Tensor, norm: Norm, residual: Residual | None, act: Act, mask: Tensor | None, training: bool
) -> tuple[Tensor, Tensor, Sums]:
    """(dx, dresidual, sums) as expressions of their inputs, which can be differentiated again and batched.

    Args:
        norm, residual: in training with statistics that are expressions of their values, see `batch_statistics`.
        mask: as `activate` returns it.
    """
    g = masked_gradient(dy, x, norm, residual, act, mask)
    dr = g if act.order == "add_act" else dy.to(g.dtype)
    sums, count = sums_of(g, dr, x, norm, residual), x.numel() // x.shape[1]
    dx = input_gradient(g, x, norm, sums[:2] if training else None, count)
    if residual is not None and residual.norm is not None:
        dr = input_gradient(dr, residual.value, residual.norm, sums[2:] if training else None, count)
    return dx.to(x.dtype), dr.to(dy.dtype), sums


def batch_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the batch as expressions of x, which can be differentiated."""
    var, mean = torch.var_mean(x.to(contract.statistics_dtype(x.dtype)), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(var + eps)


def keep_rows(x: Tensor) -> Tensor:
    """[N * H * W, C, 1, 1]: the rows of channels that the keep mask packs, also where x has a single channel."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1)


def unpack_keep(keep: Tensor, x: Tensor) -> Tensor | None:
    """Dropout's mask as `norm_act_conv3x3_forward` keeps it, bool [N, C, H, W]; None where there is none."""
    if keep.numel() == 0:
        return None
    n, c, h, w = x.shape
    return contract.unpack_bits(keep, keep_rows(x)).reshape(n, h, w, c).permute(0, 3, 1, 2)


def convolution_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) of a convolution whose padding is half its kernel, None where not needed, by PyTorch's operator,
    which is differentiable itself. The weight's shape says how many groups there are.
    """
    kernel, w = weight.shape[2], weight.to(x.dtype)
    dx, dweight = None, None
    if needs[0]:
        dx = _convolution_backward(dy, x, w, stride, (True, False))[0]
    if needs[1]:
        if kernel == 1:
            # The stride is left to a slice: with it, and with fewer inputs than a vector has elements, oneDNN writes
            # past its own memory in channels_last (https://github.com/uxlfoundation/oneDNN/issues/6035).
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        dweight = _convolution_backward(dy, x, w, stride, (False, True))[1].to(weight.dtype)
    return dx, dweight


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    padding, groups = [weight.shape[2] // 2] * 2, max(1, x.shape[1] // max(1, weight.shape[1]))
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], groups, [*mask, False]
    )
    return dx, dweight
