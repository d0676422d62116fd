"""The operators in plain PyTorch: what runs where nothing is compiled, and what gives every operator its schema.

Notation as in `fastres.ops.formulas`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract, reference
from fastres.activations import Activation
from fastres.contract import PLAIN, Act, ConvShape, Norm, NormParams, Residual, Statistics, Sums, output_size
from fastres.ops.arguments import Ints2, Needs2, Needs3
from fastres.ops.formulas import (
    activate,
    convolution_gradients,
    input_gradient,
    keep_rows,
    masked_gradient,
    sums_of,
    unpack_keep,
)
from fastres.ops.packed import unpack


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _finalise(x: Tensor, norm: NormParams, statistics: Statistics | None) -> Norm:
    """The normalisation by the batch statistics, all its tensors new; the running statistics are updated in place."""
    count: Tensor | int = _count(x)
    if statistics is None:
        _, mean, m2 = stats(x)
    else:
        mean, m2 = statistics.mean.clone(), statistics.m2
        count = count if statistics.count is None else statistics.count
    if norm.running_mean is not None and norm.running_var is not None:
        kept, share = 1 - norm.momentum, norm.momentum
        norm.running_mean.copy_(kept * norm.running_mean + share * mean)
        norm.running_var.copy_(kept * norm.running_var + share * (m2 / (count - 1)))
    return Norm(mean, torch.rsqrt(m2 / count + norm.eps), norm.weight, norm.bias)


def _running(norm: NormParams) -> Norm:
    assert norm.running_mean is not None and norm.running_var is not None
    return Norm(norm.running_mean, torch.rsqrt(norm.running_var + norm.eps), norm.weight, norm.bias)


def _nothing(like: Tensor) -> Tensor:
    """A new empty tensor: an operator may not return one tensor twice."""
    return like.new_empty(0)


# ------------------------------------------------------------------------------------------------------- batch_norm_act


def stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count int64 [1], mean [C], M2 [C]): M2 is the sum of squared deviations from the mean."""
    count = _count(x)
    var, mean = torch.var_mean(x.to(contract.statistics_dtype(x.dtype)), (0, 2, 3), correction=0)
    return torch.full((1,), count, dtype=torch.int64, device=x.device), mean, var * count


def apply(
    x: Tensor, norm: Norm, residual: Residual | None, seed: Tensor | None, act: Act, save_bits: bool
) -> tuple[Tensor, Tensor]:
    """(y, bits): bits is empty where `save_bits` is off or backward can do without (`Act.saves_bits`)."""
    return _forward(x, norm, residual, seed, act, save_bits and act.saves_bits(residual is not None))


def _forward(
    x: Tensor, norm: Norm, residual: Residual | None, seed: Tensor | None, act: Act, saves: bool
) -> tuple[Tensor, Tensor]:
    keep = None
    if act.dropout_p > 0:
        assert seed is not None
        keep = contract.dropout_keep(x.shape, seed, act.dropout_p)
    y, mask = activate(x, norm, residual, act, keep)
    y = torch.empty_like(x).copy_(y)
    if saves:
        assert mask is not None
        return y, contract.pack_bits(mask, x)
    return y, torch.empty(0, dtype=torch.uint8, device=y.device)


def training(
    x: Tensor,
    norm: NormParams,
    statistics: Statistics | None,
    residual: Tensor | None,
    residual_norm: NormParams | None,
    residual_statistics: Statistics | None,
    seed: Tensor | None,
    act: Act,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, residual mean, residual rstd, bits), by the batch statistics of x and of a normalised residual.

    The residual's are empty where it has no normalisation of its own.
    """
    own = _finalise(x, norm, statistics)
    added = None if residual is None else Residual(residual)
    r_mean, r_rstd = _nothing(own.mean), _nothing(own.mean)
    if residual is not None and residual_norm is not None:
        of_residual = _finalise(residual, residual_norm, residual_statistics)
        added, r_mean, r_rstd = Residual(residual, *of_residual), of_residual.mean, of_residual.rstd
    y, bits = apply(x, own, added, seed, act, True)
    return y, own.mean, own.rstd, r_mean, r_rstd, bits


def inference(
    x: Tensor, norm: NormParams, residual: Tensor | None, residual_norm: NormParams | None, act: Act, save_bits: bool
) -> tuple[Tensor, Tensor]:
    """(y, bits), by running statistics and without dropout; the bits of every gated activation where they are saved."""
    added = None if residual is None else Residual(residual)
    if residual is not None and residual_norm is not None:
        added = Residual(residual, *_running(residual_norm))
    act = act._replace(dropout_p=0.0)
    return _forward(x, _running(norm), added, None, act, save_bits and act.gated)


def _mask(bits: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bits is None or bits.numel() == 0 else contract.unpack_bits(bits, x)


def backward_reduce(
    dy: Tensor, dy2: Tensor | None, x: Tensor, norm: Norm, residual: Residual | None, bits: Tensor | None, act: Act
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dweight, dbias, residual dweight, residual dbias, dz): the first stage, sums over the batch, of `Sums`.

    The residual's sums are empty where it has no normalisation of its own.

    Args:
        dy, dy2: the gradient of y in one part, or in two that are added while they are read.
        residual: it is read where it has a normalisation of its own or `Act.reads_residual`.
    Returns:
        dz: what the second stage takes in dy's place where there are two parts, and else empty. In the order "add_act"
            it is g, and the second stage has `PLAIN` for act and no bits; in the order "act_add" dy + dy2.
    """
    whole = dy if dy2 is None else dy.to(norm.mean.dtype) + dy2
    g = masked_gradient(whole, x, norm, residual, act, _mask(bits, x))
    dr = g if act.order == "add_act" else whole.to(g.dtype)
    sums = sums_of(g, dr, x, norm, residual)
    dz = _nothing(x) if dy2 is None else torch.empty_like(x).copy_(dr)
    r_dweight = _nothing(sums.dweight) if sums.residual_dweight is None else sums.residual_dweight
    r_dbias = _nothing(sums.dweight) if sums.residual_dbias is None else sums.residual_dbias
    return sums.dweight, sums.dbias, r_dweight, r_dbias, dz


def backward_apply(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Residual | None,
    bits: Tensor | None,
    sums: Sums | None,
    count: Tensor | None,
    act: Act,
    needs: Needs2,
) -> tuple[Tensor, Tensor]:
    """(dx, dresidual): the second stage; what is not needed is empty.

    A residual without a normalisation of its own gets g ("add_act") or dy itself ("act_add").

    Args:
        sums: of the first stage; None: the statistics are constants, as in evaluation.
        count: int64 [1], elements a channel behind the sums; None: those of x.
    """
    g = masked_gradient(dy, x, norm, residual, act, _mask(bits, x))
    m: Tensor | int = _count(x) if count is None else count
    dx, dr = _nothing(dy), _nothing(dy)
    if needs[0]:
        dx = torch.empty_like(x).copy_(input_gradient(g, x, norm, None if sums is None else sums[:2], m))
    if needs[1]:
        dz = g if act.order == "add_act" else dy.to(g.dtype)
        if residual is not None and residual.norm is not None:
            dz = input_gradient(dz, residual.value, residual.norm, None if sums is None else sums[2:], m)
        dr = torch.empty_like(x).copy_(dz)
    return dx, dr


def backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    norm: Norm,
    residual: Residual | None,
    bits: Tensor | None,
    act: Act,
    training: bool,
    needs: Needs3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias, residual dweight, residual dbias): both stages.

    Args:
        training: the statistics are the batch's, so that dx depends on the sums.
        needs: dx, dresidual, and the four sums as results, which are empty otherwise.
    """
    none = [_nothing(norm.mean) for _ in range(4)]
    found, sums = none, None
    if dy2 is not None or needs[2] or (training and (needs[0] or needs[1])):
        *found, dz = backward_reduce(dy, dy2, x, norm, residual, bits, act)
        normed = residual is not None and residual.norm is not None
        sums = Sums(*found[: 4 if normed else 2]) if training else None
        if dy2 is not None:
            dy, act, bits = (dz, PLAIN, None) if act.order == "add_act" else (dz, act, bits)
    dx, dr = backward_apply(dy, x, norm, residual, bits, sums, None, act, needs[:2])
    dweight, dbias, r_dweight, r_dbias = found if needs[2] else none
    return dx, dr, dweight, dbias, r_dweight, r_dbias


# ---------------------------------------------------------------------------------------------------------- convolution


def empty_output(x: Tensor, outputs: int, stride: Sequence[int], memory_format: torch.memory_format) -> Tensor:
    """The output of such a convolution, uninitialised."""
    height, width = (output_size(size, s) for size, s in zip(x.shape[2:], stride, strict=True))
    shape = (x.shape[0], outputs, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _measured(y: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, M2), the last two empty where they are not asked for."""
    if statistics:
        return (y, *stats(y)[1:])
    none = y.new_empty(0, dtype=contract.statistics_dtype(y.dtype))
    return y, none, none.clone()


def _convolution_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], results: tuple[Tensor, Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) by PyTorch, written into `results` where they are needed."""
    found = convolution_gradients(dy, x, weight, stride, needs)
    for to, gradient in zip(results, found, strict=True):
        if gradient is not None:
            to.copy_(gradient)
    return results


def empty_gradients(
    x: Tensor, weight: Tensor, needs: Sequence[bool], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), uninitialised, and empty where not needed."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if needs[1]:
        layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device, memory_format=layout)
    return dx, dweight


def conv3x3_forward(x: Tensor, weight: Tensor, statistics: bool, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, M2): y channels_last; the statistics empty where they are not asked for."""
    y = empty_output(x, weight.shape[0], (stride, stride), torch.channels_last)
    convolved = F.conv2d(x, weight.to(x.dtype), padding=weight.shape[2] // 2, stride=stride)
    return _measured(y.copy_(convolved), statistics)


def conv3x3_backward(
    dy: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, needs: Needs2, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """(dx + added, dweight), dx channels_last; what is not needed is empty."""
    results = empty_gradients(x, weight, needs, torch.channels_last)
    dx, dweight = _convolution_gradients(dy, x, weight, [stride, stride], results, needs)
    return dx.add_(added) if needs[0] and added is not None else dx, dweight


def grouped_conv_forward(x: Tensor, weight: Tensor, statistics: bool, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, M2): y channels_last; the statistics empty where they are not asked for."""
    y = empty_output(x, weight.shape[0], (stride, stride), torch.channels_last)
    return _measured(y.copy_(reference.grouped_conv2d(x, weight.to(x.dtype), stride)), statistics)


def grouped_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Needs2, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), dx channels_last; what is not needed is empty."""
    results = empty_gradients(x, weight, needs, torch.channels_last)
    return _convolution_gradients(dy, x, weight, [stride, stride], results, needs)


def conv3x3_inference(
    x: Tensor,
    conv_weight: Tensor,
    norm: NormParams | None,
    residual: Tensor | None,
    activation: Activation,
    stride: int,
    algorithm: str,
) -> Tensor:
    """f(bn(conv3x3(x)) + residual), channels_last, bn by running statistics; without `norm` the convolution alone.

    Args:
        algorithm: "winograd" or "gemm", of the compiled kernels.
    """
    y = F.conv2d(x, conv_weight.to(x.dtype), padding=1, stride=stride)
    if norm is not None:
        y, _ = inference(y, norm, residual, None, Act(*activation, 0.0, "add_act"), False)
    return empty_output(x, conv_weight.shape[0], (stride, stride), torch.channels_last).copy_(y)


def empty_packed_output(x: Tensor, shape: ConvShape) -> Tensor:
    """The output of packed_convolution, uninitialised, channels_last."""
    height, width = (shape.output_size(size) for size in x.shape[2:])
    size = (x.shape[0], shape.outputs, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def packed_convolution(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    shape: ConvShape,
    algorithm: str,
) -> Tensor:
    """f(conv(x) + bias + residual), channels_last, with weights that `pack` made."""
    y = empty_packed_output(x, shape)
    if y.numel() == 0:
        return y
    weight = unpack(packed, shape.outputs, x.shape[1], shape.kernel).to(x.dtype)
    z = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), shape.stride, shape.padding)
    return y.copy_(activation.forward(z if residual is None else z + residual))


# ----------------------------------------------------------------------------------------------------- norm_act_conv3x3


def norm_act_conv3x3_forward(
    x: Tensor,
    norm: NormParams,
    statistics: Statistics | None,
    residual: Tensor | None,
    seed: Tensor | None,
    weight: Tensor,
    act: Act,
    measure: bool,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean and M2 of y, mean and rstd of x, keep): y = conv3x3(dropout(f(bn(x) + residual))), channels_last.

    keep is dropout's mask, rows of channels packed to bits; empty without dropout. `measure` asks for mean and M2.
    """
    own = _finalise(x, norm, statistics)
    packed, keep = torch.empty(0, dtype=torch.uint8, device=x.device), None
    if act.dropout_p > 0:
        assert seed is not None
        keep = contract.dropout_keep(x.shape, seed, act.dropout_p)
        packed = contract.pack_bits(keep_rows(keep), keep_rows(x))
    a, _ = activate(x, own, None if residual is None else Residual(residual), act, keep)
    y = conv3x3_forward(torch.empty_like(x).copy_(a), weight, measure, stride)
    return *y, own.mean, own.rstd, packed


def norm_act_conv3x3_backward_reduce(
    dy: Tensor, x: Tensor, norm: Norm, residual: Tensor | None, keep: Tensor, weight: Tensor, act: Act, needs: Needs3,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz, dresidual, dweight, dnorm_weight, dnorm_bias): the first stage of backward.

    The second is batch_norm_act's `backward_apply` of dz with `PLAIN` for act.

    Args:
        needs: dx, dresidual, dweight; what is not needed is empty, and so are the sums without dx.
    Returns:
        dz: g, channels_last.
        dresidual: in the order "act_add"; in the order "add_act" it is dz and this is empty.
    """
    g, da, dweight, sums = _norm_act_conv3x3_sums(dy, x, norm, residual, keep, weight, act, needs, stride)
    dz, dr = _nothing(x), _nothing(x)
    if needs[0]:
        dz = torch.empty_like(x, memory_format=torch.channels_last).copy_(g)
        dr = da if needs[1] and act.order == "act_add" else dr
    return dz, dr, dweight, sums.dweight, sums.dbias


def _norm_act_conv3x3_sums(
    dy: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    keep: Tensor,
    weight: Tensor,
    act: Act,
    needs: Sequence[bool],
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Sums]:
    """(g in the dtype of the statistics, da, dweight, sums); all but dweight empty where dx is not needed."""
    added = None if residual is None else Residual(residual)
    a, mask = activate(x, norm, added, act, unpack_keep(keep, x))
    a = torch.empty_like(x).copy_(a)
    results = empty_gradients(x, weight, (needs[0], needs[2]), torch.channels_last)
    da, dweight = _convolution_gradients(dy, a, weight, [stride, stride], results, (needs[0], needs[2]))
    if not needs[0]:
        return da, da, dweight, Sums(_nothing(norm.mean), _nothing(norm.mean))
    g = masked_gradient(da, x, norm, added, act, mask)
    return g, da, dweight, sums_of(g, g, x, norm, None)


def norm_act_conv3x3_backward(
    dy: Tensor, x: Tensor, norm: Norm, residual: Tensor | None, keep: Tensor, weight: Tensor, act: Act, needs: Needs3,
    stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dnorm_weight, dnorm_bias): both stages, dx and dresidual channels_last.

    Args:
        needs: dx, dresidual, dweight; what is not needed is empty, and so are the sums without dx. dresidual without dx
            is not served.
    """
    g, da, dweight, sums = _norm_act_conv3x3_sums(dy, x, norm, residual, keep, weight, act, needs, stride)
    dx, dr = _nothing(x), _nothing(x)
    if needs[0]:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        dx.copy_(input_gradient(g, x, norm, sums[:2], _count(x)))
    if needs[1]:
        dr = torch.empty_like(x, memory_format=torch.channels_last).copy_(g if act.order == "add_act" else da)
    return dx, dr, dweight, sums.dweight, sums.dbias


# -------------------------------------------------------------------------------------------------- projection_shortcut


def projection_shortcut_forward(
    s: Tensor, weight: Tensor, stride: Ints2, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(product, mean, M2) of the strided 1x1 convolution; the statistics empty where they are not asked for."""
    product = empty_output(s, weight.shape[0], stride, contract.memory_format(s))
    return _measured(product.copy_(F.conv2d(s, weight, stride=stride)), statistics)


def projection_shortcut_backward(
    dproduct: Tensor, s: Tensor, weight: Tensor, stride: Ints2, needs: Needs2
) -> tuple[Tensor, Tensor]:
    """(ds, dweight); what is not needed is empty."""
    ds = torch.empty_like(s) if needs[0] else s.new_empty(0)
    dweight = torch.empty_like(weight) if needs[1] else s.new_empty(0)
    return _convolution_gradients(dproduct, s, weight, stride, (ds, dweight), needs)


def projection_shortcut_inference(
    s: Tensor,
    conv_weight: Tensor,
    norm: NormParams,
    x: Tensor | None,
    x_norm: NormParams | None,
    stride: Ints2,
    activation: Activation,
) -> Tensor:
    """f(bn_x(x) + bn(conv1x1(s))) by running statistics, in the memory format of s; without x f(bn(conv1x1(s)))."""
    product, act = F.conv2d(s, conv_weight, stride=stride), Act(*activation, 0.0, "add_act")
    if x is None or x_norm is None:
        y, _ = inference(product, norm, x, None, act, False)
    else:
        y, _ = inference(x, x_norm, product, norm, act, False)
    return empty_output(s, conv_weight.shape[0], stride, contract.memory_format(s)).copy_(y)
