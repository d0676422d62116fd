"""The convolution in groups, depthwise ones among them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import reference
from fastres.contract import Statistics
from fastres.functional.checks import autocast, checked_groups
from fastres.functional.conv import Convolved
from fastres.functional.prepare import dense, needs_grad, served
from fastres.ops import grouped_conv as ops
from fastres.ops.algorithms import choose_algorithm, problem_of, requested_algorithm
from fastres.ordinary import why_not_ordinary


def grouped_conv2d(x: Tensor, weight: Tensor, *, stride: int = 1, algorithm: str | None = None) -> Tensor:
    """Convolution in groups with padding of half its kernel and no bias; depthwise where C / groups is 1.

        y[n, k, i, j] = sum over c, u, v of weight[k, c, u, v] * x[n, g + c, stride * i + u - p, stride * j + v - p]

    g is the first channel of the group of k, and p half the kernel. On the CPU in float32 and bfloat16 by a direct sum
    of our own, for kernels of 3x3, 5x5 and 7x7, strides 1 and 2, and groups with as many inputs as outputs, 1 or 4, or
    with multiples of 8 of either. Its rounding errors are those of PyTorch's convolution in float32; bfloat16 is
    computed in float32. Padding has no part in the sums: an infinite weight shows only where it meets an element of
    x. Results are the same in every run; the rounding of the weight's gradient, and nothing else, depends on the number
    of threads. Elsewhere PyTorch's convolution.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`. Our sum reads float32 and bfloat16 in channels_last.
        weight: [K, C / groups, k, k], dtype of x, with k odd. Its shape says how many groups there are. Under autocast
            our sum takes a float32 weight unrounded.
        stride: both axes.
        algorithm: "auto" takes our sum where x is channels_last and measurements say that it pays (never for bfloat16
            on a CPU with AMX); "grouped" wherever it serves x at all (other memory formats are copied once); any other
            of `conv3x3`'s leaves all to PyTorch. None: the environment variable FASTRES_CONV, or "auto". Under
            torch.compile the variable is read when the function is traced.
    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], dtype of x; channels_last by our sum, and else as PyTorch's
        convolution makes it.
    Raises:
        TypeError: not a tensor, an unsupported dtype, dtypes of x and weight differ, stride not an int, algorithm not a
            string.
        ValueError: shapes or devices disagree; a kernel that is not square or even; stride below 1; an unknown
            algorithm.
    Source: Krizhevsky, Sutskever and Hinton 2012, section 3.5; Howard et al. 2017, section 3.1.
    """
    return _convolve(x, weight, stride, algorithm, False).y


def grouped_conv2d_with_statistics(
    x: Tensor, weight: Tensor, *, stride: int = 1, algorithm: str | None = None
) -> Convolved:
    """`grouped_conv2d` in training, with the batch statistics of its output.

    Args, Raises, Source: as `grouped_conv2d`.
    Returns:
        y as `grouped_conv2d`; by our sum with its statistics, and x itself. See `Convolved`.
    """
    return _convolve(x, weight, stride, algorithm, True)


def _convolve(x: Tensor, weight: Tensor, stride: int, algorithm: str | None, statistics: bool) -> Convolved:
    x = autocast(x)
    groups = checked_groups(x, weight, stride, algorithm)
    requested = requested_algorithm(algorithm)
    gradients = statistics or needs_grad(x, weight)
    if not _is_ours(x, weight, stride, groups, requested, gradients):
        return Convolved(reference.grouped_conv2d(x, weight.to(x.dtype), stride), None, x)
    read, weight = dense(x, torch.channels_last), served(weight, x)
    if gradients:
        y, mean, m2 = ops.GroupedConv.apply(read, weight, statistics, stride)
    else:
        y, mean, m2 = ops.forward(read, weight, False, stride)
    return Convolved(y, Statistics(mean, m2) if statistics else None, x)


def _is_ours(x: Tensor, weight: Tensor, stride: int, groups: int, requested: str, needs_grad: bool) -> bool:
    if x.is_cuda or why_not_ordinary() is not None:
        return False
    outputs, _, kernel, _ = weight.shape
    problem = problem_of(x, outputs, kernel, stride, needs_grad=needs_grad, groups=groups)
    return choose_algorithm(problem, requested).algorithm == "grouped"
