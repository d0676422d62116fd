"""Making checked arguments ready for an operator: memory format, dtype of parameters, dropout's seed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.contract import NormParams


def dense(x: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    """x as it is where memory is contiguous NCHW or channels_last (or as asked), otherwise the one explicit copy."""
    if memory_format is None:
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return x
        memory_format = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return x.contiguous(memory_format=memory_format)


def four_dimensional(x: Tensor) -> Tensor:
    """x [N, C], [N, C, L] or [N, C, D, H, W] as [N, C, 1, 1], [N, C, L, 1] or [N, C, D, H * W], a view wherever memory
    allows one: it does in every contiguous and channels_last format.
    """
    if x.dim() == 5:
        return x.flatten(3)
    return x[:, :, None, None] if x.dim() == 2 else x[..., None]


def cast(norm: NormParams, dtype: torch.dtype) -> NormParams:
    """The norm with parameters and statistics in `dtype` and contiguous; others become copies."""
    for t in norm[:4]:
        if t is not None and (t.dtype != dtype or not t.is_contiguous()):
            break
    else:
        return norm
    mean, var, weight, bias = (None if t is None else t.to(dtype).contiguous() for t in norm[:4])
    return NormParams(mean, var, weight, bias, norm.momentum, norm.eps)


def store_running(norm: NormParams, computed: NormParams) -> None:
    if computed is norm:
        return
    for kept, new in ((norm.running_mean, computed.running_mean), (norm.running_var, computed.running_var)):
        if kept is not None and new is not None and kept is not new:
            kept.copy_(new)


def served(weight: Tensor, x: Tensor) -> Tensor:
    """A convolution's weight in a dtype that the kernels take beside x: float32, or that of x."""
    return weight if weight.dtype in (torch.float32, x.dtype) else weight.to(x.dtype)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
