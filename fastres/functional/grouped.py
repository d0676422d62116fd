"""The convolution in groups, depthwise ones among them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import reference
from fastres.contract import Statistics
from fastres.functional.checks import autocast, checked_groups
from fastres.functional.conv import Convolved, conv3x3, conv3x3_with_statistics
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
    x. Where 3x3 kernels have groups of many channels, by Winograd's algorithm over a copy of each group, with the
    errors that `conv3x3` has. Results are the same in every run; the rounding of the weight's gradient, and nothing
    else, depends on the number of threads. Elsewhere PyTorch's convolution.

    Args:
        x: [N, C, H, W]; dtypes as in `batch_norm_act`. Our sum reads float32 and bfloat16 in channels_last.
        weight: [K, C / groups, k, k], dtype of x, with k odd. Its shape says how many groups there are. Under autocast
            our sum takes a float32 weight unrounded.
        stride: both axes.
        algorithm: "auto" takes either where x is channels_last and measurements say that it pays (never for bfloat16
            on a CPU with AMX); "grouped" the sum, and "winograd" the other, wherever it serves x at all (other memory
            formats are copied once); any other of `conv3x3`'s leaves all to PyTorch. None: the environment variable
            FASTRES_CONV, or "auto". Under torch.compile the variable is read when the function is traced.
    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], dtype of x; channels_last by ours, and else as PyTorch's convolution
        makes it.
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
        y as `grouped_conv2d`; by ours with its statistics, and x itself. See `Convolved`.
    """
    return _convolve(x, weight, stride, algorithm, True)


def _convolve(x: Tensor, weight: Tensor, stride: int, algorithm: str | None, statistics: bool) -> Convolved:
    x = autocast(x)
    groups = checked_groups(x, weight, stride, algorithm)
    requested = requested_algorithm(algorithm)
    gradients = statistics or needs_grad(x, weight)
    chosen = _algorithm(x, weight, stride, groups, requested, gradients)
    if chosen == "torch":
        return Convolved(reference.grouped_conv2d(x, weight.to(x.dtype), stride), None, x)
    if chosen == "winograd":
        y, found = _group_by_group(x, weight, stride, groups, statistics)
        return Convolved(y, found, x)
    read, weight = dense(x, torch.channels_last), served(weight, x)
    if gradients:
        y, mean, m2 = ops.GroupedConv.apply(read, weight, statistics, stride)
    else:
        y, mean, m2 = ops.forward(read, weight, False, stride)
    return Convolved(y, Statistics(mean, m2) if statistics else None, x)


def _algorithm(x: Tensor, weight: Tensor, stride: int, groups: int, requested: str, needs_grad: bool) -> str:
    if x.is_cuda or why_not_ordinary() is not None:
        return "torch"
    outputs, _, kernel, _ = weight.shape
    problem = problem_of(x, outputs, kernel, stride, needs_grad=needs_grad, groups=groups)
    chosen = choose_algorithm(problem, requested).algorithm
    # Of one group alone there is the matrix product, too.
    return chosen if chosen in ("grouped", "winograd") else "torch"


def _group_by_group(
    x: Tensor, weight: Tensor, stride: int, groups: int, statistics: bool
) -> tuple[Tensor, Statistics | None]:
    """The convolution by Winograd's algorithm of each group alone, over a copy of its channels."""
    n, c, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, h, w, groups, c // groups).movedim(3, 0).contiguous()
    parts = [
        conv3x3_with_statistics(part.permute(0, 3, 1, 2), own, stride=stride, algorithm="winograd")
        if statistics
        else Convolved(conv3x3(part.permute(0, 3, 1, 2), own, stride=stride, algorithm="winograd"), None, part)
        for part, own in zip(pixels.unbind(), weight.chunk(groups), strict=True)
    ]
    y = torch.cat([part.y.permute(0, 2, 3, 1) for part in parts], 3).permute(0, 3, 1, 2)
    measured = [part.statistics for part in parts if part.statistics is not None]
    if not measured:
        return y, None
    return y, Statistics(torch.cat([one.mean for one in measured]), torch.cat([one.m2 for one in measured]))
