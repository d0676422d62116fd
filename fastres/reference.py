"""What the operators mean, in differentiable plain PyTorch and in as few lines as that takes: the oracle.

The tests hold every backend against these functions in float64, and `fastres.functional` takes them for calls that ask
for PyTorch's own operators (`fastres.ordinary`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract
from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import Act, NormParams
from fastres.ordinary import is_transformed


def _chosen(relu: bool, activation: Activation | None) -> Activation:
    return activation if activation is not None else RELU if relu else IDENTITY


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.dim() == 4:
        return contract.memory_format(x)
    in_3d = x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if in_3d else torch.contiguous_format


def _normalise(x: Tensor, norm: NormParams, training: bool) -> Tensor:
    dtype = contract.statistics_dtype(x.dtype)
    x = x.to(dtype)
    mean, var, weight, bias = (None if t is None else t.to(dtype) for t in norm[:4])
    if x.numel() == 0:
        # F.batch_norm asks for values in training; no element is there that a statistic would touch.
        mean, var, training = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), False
    # F.batch_norm takes no eps of 0 in training; the smallest number in its place is felt in a constant channel alone.
    eps = norm.eps or (torch.finfo(dtype).tiny if training else 0.0)
    z = F.batch_norm(x, mean, var, weight, bias, training, norm.momentum, eps)
    for kept, new in ((norm.running_mean, mean), (norm.running_var, var)):
        if training and kept is not None and new is not None and kept.dtype != dtype:
            with torch.no_grad():
                kept.copy_(new)
    return z


def follow(z: Tensor, r: Tensor | None, act: Act, seed: Tensor | None) -> Tensor:
    """dropout(f(z)) + r: what follows the normalisation, and in the order "add_act" the addition."""
    z = act.activation.forward(z)
    if act.dropout_p > 0:
        if seed is None:
            seed = contract.draw_seed(z.device)
        keep = contract.dropout_keep((*z.shape[:2], z.shape[2:].numel(), 1), seed, act.dropout_p).reshape(z.shape)
        # The strides that a mask of one image and one line has here make F.batch_norm's backward misread the gradient.
        keep = keep.contiguous()
        z = torch.where(keep, z / (1 - act.dropout_p), 0)
    return z if r is None else z + r


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
    activation: Activation | None = None,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
) -> Tensor:
    """`fastres.functional.batch_norm_act` in plain PyTorch, differentiable by autograd. It trusts its arguments.

    Source: Ioffe and Szegedy 2015, algorithm 1; He et al. 2015, figure 2; Srivastava et al. 2014, section 4.
    """
    z = _normalise(x, NormParams(running_mean, running_var, weight, bias, momentum, eps), training)
    r = residual.to(z.dtype) if residual is not None else None
    if residual is not None and residual_norm is not None:
        r = _normalise(residual, residual_norm, training)
    if order == "add_act" and r is not None:
        z = z + r
    act = Act(*_chosen(relu, activation), dropout_p if training else 0.0, order)
    y = follow(z, None if order == "add_act" else r, act, seed).to(x.dtype)
    # A batched tensor knows of no memory format but the default one.
    if is_transformed():
        return y
    return y.contiguous(memory_format=_memory_format(x))


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
    activation: Activation | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`fastres.functional.projection_shortcut` in plain PyTorch, differentiable; it trusts its arguments."""
    product = F.conv2d(s, conv_weight, stride=stride)
    common: dict[str, Any] = {
        "training": training, "activation": _chosen(relu, activation), "dropout_p": dropout_p, "seed": seed,
    }  # fmt: skip
    if x is None or x_norm is None:
        return batch_norm_act(
            product,
            *norm[:4],
            momentum=norm.momentum,
            eps=norm.eps,
            residual=x,
            **common,
        )
    return batch_norm_act(
        x,
        *x_norm[:4],
        momentum=x_norm.momentum,
        eps=x_norm.eps,
        residual=product,
        residual_norm=norm,
        **common,
    )


def conv3x3(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """`fastres.functional.conv3x3` in plain PyTorch: differentiable any number of times."""
    return F.conv2d(x, weight, padding=dilation, stride=stride, dilation=dilation)


def conv1x1(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """y of `fastres.functional.conv1x1_with_statistics` in plain PyTorch: differentiable any number of times."""
    return F.conv2d(x, weight, stride=stride)


def grouped_conv2d(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """`fastres.functional.grouped_conv2d` in plain PyTorch: differentiable any number of times."""
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, padding=weight.shape[2] // 2, stride=stride, groups=groups)


def norm_act_conv3x3(
    x: Tensor, norm: NormParams, weight: Tensor, *, stride: int = 1, dilation: int = 1, **options: Any
) -> Tensor:
    """y of `fastres.functional.norm_act_conv3x3` in plain PyTorch, differentiable; it trusts its arguments."""
    return conv3x3(_activated(x, norm, **options), weight, stride, dilation)


def norm_act_conv1x1(x: Tensor, norm: NormParams, weight: Tensor, *, stride: int = 1, **options: Any) -> Tensor:
    """y of `fastres.functional.norm_act_conv1x1` in plain PyTorch, differentiable; it trusts its arguments."""
    return conv1x1(_activated(x, norm, **options), weight, stride)


def batch_norm_act_max_pool2d(
    x: Tensor, norm: NormParams, kernel_size: int, stride: int | None = None, padding: int = 0, **options: Any
) -> Tensor:
    """`fastres.functional.batch_norm_act_max_pool2d` in plain PyTorch, differentiable; it trusts its arguments."""
    return F.max_pool2d(_activated(x, norm, **options), kernel_size, stride, padding)


def _activated(x: Tensor, norm: NormParams, *, training: bool = True, **options: Any) -> Tensor:
    """What the operation after a normalisation reads; options as `batch_norm_act`'s."""
    return batch_norm_act(x, *norm[:4], training=training, momentum=norm.momentum, eps=norm.eps, **options)


def conv3x3_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: NormParams,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    activation: Activation | None = None,
    stride: int = 1,
    dilation: int = 1,
) -> Tensor:
    """`fastres.functional.conv3x3_norm_act` in plain PyTorch, differentiable; it trusts its arguments."""
    product = conv3x3(x, weight, stride, dilation)
    return batch_norm_act(product, *norm[:4], eps=norm.eps, residual=residual, activation=_chosen(relu, activation))
