"""The 3x3 and 1x1 convolutions, alone and with the normalisation before or after them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastres import contract, reference
from fastres.activations import IDENTITY, Activation
from fastres.contract import NormParams, Statistics, output_size
from fastres.functional.checks import (
    autocast,
    check_convolution,
    check_norm,
    check_statistics,
    check_tensor,
    check_training,
    checked_act,
    checked_group,
)
from fastres.functional.norm import batch_norm_act, is_compiled
from fastres.functional.phases import are_whole, join, split
from fastres.functional.prepare import cast, dense, needs_grad, served, store_running
from fastres.ops import conv3x3 as ops
from fastres.ops import norm_act_conv3x3 as norm_act_ops
from fastres.ops.algorithms import choose_algorithm, problem_of, requested_algorithm
from fastres.ordinary import why_not_ordinary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Convolved(NamedTuple):
    """A convolution's results.

    Attributes:
        y: [N, K, H, W].
        statistics: those of y where the convolution took them, for the normalisation that follows; or None.
        input: the convolution's input, for whatever else reads it (a residual, say). A gradient that comes back through
            it is added where the convolution writes its own, instead of in a pass over three tensors.
    """

    y: Tensor
    statistics: Statistics | None
    input: Tensor

    @property
    def x(self) -> Tensor:
        """The old name of `input`."""
        warnings.warn("Convolved.x is called Convolved.input now", DeprecationWarning, stacklevel=2)
        return self.input


def _algorithm(
    x: Tensor,
    weight: Tensor,
    stride: int,
    requested: str,
    *,
    dilation: int = 1,
    needs_grad: bool,
    followed: bool = False,
) -> str:
    """What computes this call; "torch" where it is not an ordinary one."""
    # A GPU's convolutions are PyTorch's, and there the time to say so counts.
    if x.is_cuda or why_not_ordinary() is not None:
        return "torch"
    problem = problem_of(
        x, weight.shape[0], weight.shape[2], stride, dilation=dilation, needs_grad=needs_grad, followed=followed
    )
    return choose_algorithm(problem, requested).algorithm


def conv3x3(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, algorithm: str | None = None) -> Tensor:
    """3x3 convolution with padding as its dilation d, one group and no bias.

        y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, c, stride * i + d (u - 1), stride * j + d (v - 1)]

    On the CPU in float32 and bfloat16 by Winograd's algorithm: with stride 1 by tiles of 4x4 outputs, or of 3x3 or 5x5
    where they fit better, which take a quarter of the multiplications (25 for 81, 36 for 144, 49 for 225), with stride
    2 by four phases of the input, 81 multiplications for 144. In float32 its rounding errors are up to six times those
    of the direct sum; in bfloat16, which it computes in float32, they are no larger. Tiles with values too large
    for its transforms, infinities or NaN are summed directly, so that these show only where they are read
    (docs/convolution.md, "Range"). Results are the same in every run; the rounding of the weight's gradient, and
    nothing else, depends on the number of threads. Elsewhere PyTorch's convolution.

    Where no gradient is asked for and output positions are few (a small image at batch 1), "auto" takes the direct sum
    as one matrix product of our own, with the direct sum's rounding errors.

    The weight is read at every call; nothing of it is kept for the next one.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`. Winograd's algorithm reads float32 and bfloat16 in
            channels_last, and computes in float32.
        weight: [K, C, 3, 3], dtype of x. Under autocast Winograd's algorithm takes a float32 weight unrounded.
        stride: both axes. Winograd's algorithm serves 1 and 2, PyTorch's convolution all others.
        dilation: both axes. With stride 1 the algorithms compute the phases of the images, which are copied; with
            another stride PyTorch's convolution does.
        algorithm: "auto" takes Winograd's where x is channels_last and a cost model says that it pays (never for
            bfloat16 on a CPU with AMX, which PyTorch's convolution uses); "winograd" wherever it serves x at all
            (other memory formats are copied once); "gemm" takes that matrix product wherever no gradient is asked for;
            "torch" and "grouped" leave all to PyTorch. None: the environment variable FASTRES_CONV, or "auto". Under
            torch.compile the variable is read when the function is traced.
    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], dtype of x; channels_last by Winograd's algorithm, and else as
        PyTorch's convolution makes it.
    Raises:
        TypeError: not a tensor, an unsupported dtype, dtypes of x and weight differ, stride or dilation not an int,
            algorithm not a string.
        ValueError: shapes or devices disagree; stride or dilation below 1; an unknown algorithm.
    Source: Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.
    """
    x = autocast(x)
    check_convolution(x, weight, 3, stride, algorithm, dilation)
    requested = requested_algorithm(algorithm)
    gradients = needs_grad(x, weight)
    chosen = _algorithm(x, weight, stride, requested, dilation=dilation, needs_grad=gradients)
    if chosen == "torch":
        return reference.conv3x3(x, weight.to(x.dtype), stride, dilation)
    if dilation > 1:
        return join(conv3x3(split(x, dilation), weight, algorithm=chosen), dilation, x)
    x, weight = dense(x, torch.channels_last), served(weight, x)
    if gradients:
        return ops.Conv3x3.apply(x, weight, False, stride)[0]  # type: ignore[no-any-return]
    return ops.inference(x, weight, None, None, IDENTITY, stride, chosen)  # type: ignore[no-any-return]


def conv3x3_with_statistics(
    x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, algorithm: str | None = None
) -> Convolved:
    """`conv3x3` in training, with the batch statistics of its output, and its input for other readers.

    Args, Raises, Source: as `conv3x3`.
    Returns:
        y as `conv3x3`; by Winograd's algorithm with its statistics (with a dilation that divides height and width),
        and x. See `Convolved`.
    """
    return _conv_with_statistics(x, weight, 3, stride, algorithm, dilation)


def conv1x1_with_statistics(x: Tensor, weight: Tensor, *, stride: int = 1, algorithm: str | None = None) -> Convolved:
    """1x1 convolution without padding, one group and no bias in training, with the batch statistics of its output.

        y[n, k, i, j] = sum over c of weight[k, c] * x[n, c, stride * i, stride * j]

    On the CPU in float32 and bfloat16 with stride 1 as a matrix product of our own, which measures y while it is in
    registers, with PyTorch's rounding errors. Elsewhere PyTorch's convolution.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`. The matrix product reads float32 and bfloat16 in channels_last,
            and computes in float32.
        weight: [K, C, 1, 1], dtype of x. Under autocast the matrix product takes a float32 weight unrounded.
        stride: both axes; all but 1 are left to PyTorch.
        algorithm: "auto" takes the matrix product where x is channels_last and a cost model says that it pays; "gemm"
            wherever it serves x at all (other memory formats are copied once); the others leave all to
            PyTorch. None: as in `conv3x3`.
    Returns:
        y of the dtype of x, channels_last by the matrix product; with its statistics then, and x. See `Convolved`.
    Raises:
        TypeError, ValueError: as `conv3x3`.
    """
    return _conv_with_statistics(x, weight, 1, stride, algorithm)


def _conv_with_statistics(
    x: Tensor, weight: Tensor, kernel: int, stride: int, algorithm: str | None, dilation: int = 1
) -> Convolved:
    x = autocast(x)
    check_convolution(x, weight, kernel, stride, algorithm, dilation)
    chosen = _algorithm(x, weight, stride, requested_algorithm(algorithm), dilation=dilation, needs_grad=True)
    if chosen == "torch":
        return Convolved(_pytorchs(x, weight, stride, dilation), None, x)
    if dilation > 1:
        y, statistics, _ = _conv_with_statistics(split(x, dilation), weight, kernel, 1, chosen)
        return Convolved(join(y, dilation, x), statistics if are_whole(x, dilation) else None, x)
    x = dense(x, torch.channels_last)
    y, mean, m2, same = ops.Conv3x3.apply(x, served(weight, x), True, stride)
    # Otherwise x would ask for a gradient that nobody reads, where only the weight does.
    return Convolved(y, Statistics(mean, m2), same if x.requires_grad else x)


def _pytorchs(x: Tensor, weight: Tensor, stride: int, dilation: int = 1) -> Tensor:
    weight = weight.to(x.dtype)
    return (
        reference.conv1x1(x, weight, stride) if weight.shape[2] == 1 else reference.conv3x3(x, weight, stride, dilation)
    )


def measured_conv3x3(x: Tensor, weight: Tensor, *, algorithm: str | None = None) -> Convolved:
    """The old name of `conv3x3_with_statistics`."""
    warnings.warn("measured_conv3x3 is called conv3x3_with_statistics now", DeprecationWarning, stacklevel=2)
    return conv3x3_with_statistics(x, weight, algorithm=algorithm)


def norm_act_conv3x3(
    x: Tensor,
    norm: NormParams,
    weight: Tensor,
    *,
    statistics: Statistics | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    activation: Activation | str | None = None,
    dropout_p: float = 0.0,
    order: str = "add_act",
    seed: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    algorithm: str | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Statistics | None]:
    """conv3x3(batch_norm_act(x)) in training: normalisation by the batch's statistics, and the convolution after it.

        a = batch_norm_act(x, *norm, training=True, ...)        y = conv3x3(a, weight, stride=stride)

    By Winograd's algorithm a is applied in the convolution's input transform: it is neither written nor saved for
    backward, but with dropout before a dilated convolution, or a dilation that does not divide height and width. Saved
    are x, mean, rstd, the weight, the residual, and with dropout one bit an element.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`.
        norm: normalisation of x; running statistics are updated in place.
        weight: [K, C, 3, 3], dtype of x, of the convolution.
        statistics, residual, relu, activation, dropout_p, order, seed, group: as in `batch_norm_act`, training=True.
        stride, dilation: as in `conv3x3`.
        algorithm: as in `conv3x3`; "torch" computes the one after the other.
    Returns:
        y: [N, K, ceil(H / stride), ceil(W / stride)], dtype of x; memory format as `conv3x3`'s.
        statistics: those of y, of this process alone, or None where they have not been taken.
    Raises:
        TypeError, ValueError, RuntimeError: as `batch_norm_act` and `conv3x3`.
    Source: Ioffe and Szegedy 2015, algorithm 1; Lavin and Gray 2016, section 4.
    """
    return _norm_act_conv(
        (3, stride, dilation), x, norm, weight, (relu, activation, dropout_p, order), statistics=statistics,
        residual=residual, seed=seed, algorithm=algorithm, group=group,
    )  # fmt: skip


def norm_act_conv1x1(
    x: Tensor,
    norm: NormParams,
    weight: Tensor,
    *,
    relu: bool = True,
    activation: Activation | str | None = None,
    dropout_p: float = 0.0,
    order: str = "add_act",
    stride: int = 1,
    **options: Any,
) -> tuple[Tensor, Statistics | None]:
    """conv1x1(batch_norm_act(x)) in training, as `norm_act_conv3x3` with a 1x1 convolution without padding.

    By the matrix product a is made where the product reads it: it is neither written nor saved for backward.

    Args:
        weight: [K, C, 1, 1], dtype of x, of the convolution.
        x, norm, relu, activation, dropout_p, order: as in `norm_act_conv3x3`.
        stride: as in `conv1x1_with_statistics`.
        options: algorithm as in `conv1x1_with_statistics`, where "torch" computes the one after the other;
            statistics, residual, seed and group as in `norm_act_conv3x3`.
    Returns, Raises: as `norm_act_conv3x3`.
    Source: Ioffe and Szegedy 2015, algorithm 1.
    """
    return _norm_act_conv((1, stride, 1), x, norm, weight, (relu, activation, dropout_p, order), **options)


def _norm_act_conv(
    shape: tuple[int, int, int],
    x: Tensor,
    norm: NormParams,
    weight: Tensor,
    given: tuple[bool, Activation | str | None, float, str],
    *,
    statistics: Statistics | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    algorithm: str | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Statistics | None]:
    """`shape`: kernel, stride and dilation; `given`: relu, activation, dropout_p and order."""
    kernel, stride, dilation = shape
    x, residual = autocast(x), None if residual is None else autocast(residual)
    check_convolution(x, weight, kernel, stride, algorithm, dilation)
    if not isinstance(norm, NormParams):
        raise TypeError(f"norm: expected NormParams, got {type(norm).__name__}")
    act = checked_act(*given)
    if residual is not None:
        check_tensor("residual", residual, x, x.shape)
    check_norm("norm.", norm, x, x.shape[1], True)
    shared = checked_group(group, True)
    check_statistics("statistics", statistics, x, True, shared)
    check_training(True, seed, x, tuple(x.shape), shared)
    requested = requested_algorithm(algorithm)
    chosen = _algorithm(x, weight, stride, requested, dilation=dilation, needs_grad=True)
    # The images' own elements are dropped, and padding is none of what is normalised.
    apart = dilation > 1 and (act.dropout_p > 0 or not are_whole(x, dilation))
    if not is_compiled(act) or chosen == "torch" or apart:
        a = batch_norm_act(
            x, *norm[:4], training=True, momentum=norm.momentum, eps=norm.eps, residual=residual,
            activation=act.activation, dropout_p=act.dropout_p, order=act.order, seed=seed, statistics=statistics,
            group=group,
        )  # fmt: skip
        return _conv_with_statistics(a, weight, kernel, stride, chosen if apart else "torch", dilation)[:2]
    if dilation > 1:
        phases = None if residual is None else split(residual, dilation)
        y, own_statistics = _norm_act_conv(
            (kernel, 1, 1), split(x, dilation), norm, weight, given, statistics=statistics, residual=phases,
            algorithm=chosen, group=group,
        )  # fmt: skip
        return join(y, dilation, x), own_statistics
    if residual is not None:
        residual = dense(residual, torch.channels_last)
    if act.dropout_p > 0 and seed is None:
        seed = contract.draw_seed(x.device)
    own = cast(norm, torch.float32)
    y, mean, m2 = norm_act_ops.NormActConv3x3.apply(
        dense(x, torch.channels_last), own.weight, own.bias, residual, served(weight, x),
        norm_act_ops.Call(own, statistics, seed, act, True, shared, stride),
    )  # fmt: skip
    store_running(norm, own)
    return y, Statistics(mean, m2)


def conv3x3_norm_act(
    x: Tensor,
    weight: Tensor,
    norm: NormParams,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    activation: Activation | str | None = None,
    stride: int = 1,
    dilation: int = 1,
    algorithm: str | None = None,
) -> Tensor:
    """batch_norm_act(conv3x3(x)) in evaluation: the convolution, and the normalisation by running statistics after it.

        y = f(bn(conv3x3(x)) + residual)

    Where `conv3x3` takes kernels of its own and no gradient is asked for, one pass: what follows the sum is applied
    to outputs in registers.

    Args:
        x, weight, algorithm: as in `conv3x3`.
        norm: normalisation of the convolution's output, [K]; running statistics are needed.
        residual: [N, K, ceil(H / stride), ceil(W / stride)], dtype and device of x.
        relu, activation: as in `batch_norm_act`.
        stride, dilation: as in `conv3x3`.
    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], dtype of x; memory format as `conv3x3`'s.
    Raises:
        TypeError, ValueError: as `batch_norm_act` and `conv3x3`.
    """
    x = autocast(x)
    check_convolution(x, weight, 3, stride, algorithm, dilation)
    if not isinstance(norm, NormParams):
        raise TypeError(f"norm: expected NormParams, got {type(norm).__name__}")
    height, width = (output_size(size, stride) for size in x.shape[2:])
    shape = torch.Size((x.shape[0], weight.shape[0], height, width))
    if residual is not None:
        residual = autocast(residual)
        check_tensor("residual", residual, x, shape)
    check_norm("norm.", norm, x, shape[1], False)
    act = checked_act(relu, activation, 0.0)
    requested = requested_algorithm(algorithm)
    gradients = needs_grad(x, weight, norm.weight, norm.bias, residual)
    chosen = _algorithm(x, weight, stride, requested, dilation=dilation, needs_grad=gradients, followed=not gradients)
    if gradients or chosen == "torch" or not is_compiled(act):
        # A matrix product was chosen for its epilogue, which is not asked for here.
        y = conv3x3(x, weight, stride=stride, dilation=dilation, algorithm="torch" if chosen == "gemm" else chosen)
        return batch_norm_act(
            y, *norm[:4], momentum=norm.momentum, eps=norm.eps, residual=residual, activation=act.activation
        )
    if dilation > 1:
        phases = None if residual is None else split(residual, dilation)
        y = conv3x3_norm_act(
            split(x, dilation), weight, norm, residual=phases, activation=act.activation, algorithm=chosen
        )
        return join(y, dilation, x)
    if residual is not None:
        residual = dense(residual, torch.channels_last)
    return ops.inference(  # type: ignore[no-any-return]
        dense(x, torch.channels_last), served(weight, x), cast(norm, torch.float32), residual, act.activation, stride,
        chosen,
    )  # fmt: skip
