"""Which algorithm computes a convolution: PyTorch's ("torch"), Winograd's ("winograd"), one matrix product of our own
("gemm"), of a 3x3 kernel over gathered rows, of a 1x1 kernel over pixels, or in groups the direct sum ("grouped").

`choose_algorithm` decides by arithmetic alone, from one `ConvProblem` and `fastres.ops.costs`. docs/convolution.md has
the measurements behind the constants; `python -m benchmarks.convolutions` prints the choice beside the measured times
of all three.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fastres import ordinary
from fastres.contract import ConvProblem, output_size, rows_are_channels
from fastres.ops.costs import COSTS, GROUPS, Direct, Form, Winograd
from fastres.ops.products import multiplies_pairs

ALGORITHMS = ("auto", "torch", "winograd", "gemm", "grouped")

_NARROW_GROUP = 16
# The least channels of a group that Winograd's algorithm goes through for itself; and the copy of an element.
_LEAST_GROUP, _GROUP_COPY = 8, 100
# What Winograd's kernels have.
_WINOGRAD_STRIDES = (1, 2)
# Sides of images up to which they sum directly, without the taps outside, by stride (csrc/cpu/small_images.h); and
# sides with stride 2 from which on a sum over all taps is faster where numbers are multiplied in pairs.
_SMALL_SIDES, _LARGE_FOR_PAIRS = {1: 2, 2: 6}, 5
# Sizes that the kernel for groups has.
GROUPED_KERNELS = (3, 5, 7)
# Output positions of an image that leave multipliers idle in PyTorch's convolution in training; and those, and input
# channels, with which one product is faster than that in inference, in batches as well.
_SMALL_IMAGE = 16
_TINY_IMAGE, _MANY_INPUTS = 4, 256
# Pixels of a 1x1 kernel's product that pay for packing its weights: one for so many weights, and at most; and images of
# one pixel from which on PyTorch's convolution is slower in any case.
_WEIGHTS_PER_PIXEL, _MOST_FEW_PIXELS = 4096, 128
_SMALL_BATCH = 8
# Winograd has to be this much cheaper, for its rounding errors are larger.
_ADVANTAGE = 1.1


class Choice(NamedTuple):
    """An algorithm, one of `ALGORITHMS` but "auto", and why it is the one."""

    algorithm: str
    reason: str


def requested_algorithm(algorithm: str | None) -> str:
    """The argument, or where it is None the environment variable FASTRES_CONV, or "auto".

    Raises:
        ValueError: none of `ALGORITHMS`.
    """
    name, requested = "algorithm", algorithm
    if requested is None:
        name, requested = "FASTRES_CONV", os.environ.get("FASTRES_CONV") or "auto"
    return known_algorithm(name, requested)


def known_algorithm(name: str, algorithm: str) -> str:
    """The algorithm of that name, an argument called `name`.

    Raises:
        ValueError: none of `ALGORITHMS`.
    """
    if algorithm == "direct":
        warnings.warn(f'{name}: "direct" is called "torch" now', DeprecationWarning, stacklevel=3)
        return "torch"
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{name}: expected one of {ALGORITHMS}, got {algorithm!r}")
    return algorithm


def problem_of(
    x: Tensor,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    dilation: int = 1,
    needs_grad: bool,
    followed: bool = False,
    groups: int = 1,
) -> ConvProblem:
    """The problem of convolving x [N, C, H, W]."""
    n, c, h, w = x.shape
    capability = _capability() if x.is_cpu else x.device.type
    return ConvProblem(
        x.dtype, (n, c, h, w), outputs, kernel, stride, rows_are_channels(x), needs_grad, _threads(), capability,
        _has_matrix_units(), followed, groups, dilation, x.is_cpu and multiplies_pairs(),
    )  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    return torch.get_num_threads()


@functools.cache
def _processor() -> tuple[str, bool]:
    """`ConvProblem`'s capability, of a CPU, and matrix_units."""
    return (
        torch.backends.cpu.get_cpu_capability().lower(),
        bool(torch.cpu.get_capabilities().get("amx_bf16", False)),
    )


# Dynamo traces through the cache itself, so it does not go on these.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability() -> str:
    return _processor()[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_matrix_units() -> bool:
    return _processor()[1]


def choose_algorithm(problem: ConvProblem, requested: str = "auto") -> Choice:
    """The algorithm for a convolution without bias whose padding is half its kernel.

    Args:
        requested: one of `ALGORITHMS`. Ours are taken wherever they serve the problem at all.
    """
    # A compiler's sizes may be symbols, which are not hashed.
    return _choose(problem, requested) if torch.compiler.is_compiling() else _chosen(problem, requested)


@functools.lru_cache(maxsize=4096)
def _chosen(problem: ConvProblem, requested: str) -> Choice:
    return _choose(problem, requested)


def _choose(problem: ConvProblem, requested: str) -> Choice:
    if requested == "torch":
        return Choice("torch", "it was requested")
    if problem.dilation > 1:
        if problem.kernel != 3 or problem.stride != 1 or problem.groups != 1:
            return Choice("torch", "the kernels for dilated convolutions are for 3x3 with stride 1, in one group")
        return _choose(problem.phases(), requested)
    unserved = _why_not_served(problem)
    if unserved is not None:
        return Choice("torch", unserved)
    if requested != "auto":
        unfit = _why_not(requested, problem)
        return Choice(requested, "it was requested") if unfit is None else Choice("torch", unfit)
    if problem.dtype == torch.bfloat16 and problem.matrix_units:
        return Choice("torch", "the CPU multiplies bfloat16 matrices, which PyTorch's convolution uses")
    if not problem.channels_last:
        return Choice("torch", "the input is not in channels_last, which the kernels read")
    if problem.groups != 1:
        if _group_by_group_pays(problem):
            return Choice("winograd", "it saves more multiplications than its transforms and copies of the groups cost")
        if _grouped_pays(problem):
            return Choice("grouped", "groups are too narrow for PyTorch's convolution")
        return Choice("torch", "PyTorch's convolution is as fast")
    if problem.kernel == 1:
        if _product_pays(problem):
            return Choice("gemm", "it spares the passes of the normalisations beside it")
        return Choice("torch", "pixels are few: to pack the weights is most of the work")
    images, positions = problem.shape[0], _positions_of_image(problem)
    few = not problem.needs_grad and _few_pay(problem, images * positions)
    winograd = _winograd_where_it_pays(problem, "gemm" if few else "pairs" if _in_pairs(problem) else "torch")
    if winograd is not None:
        return winograd
    if few:
        return Choice("gemm", "output positions are few: to read the weights is most of the work")
    if not problem.needs_grad and problem.shape[1] >= _MANY_INPUTS and _holds(positions <= _TINY_IMAGE):
        return Choice("gemm", "an image has few output positions, which PyTorch's tiles do not fill")
    return Choice("torch", "output positions are too few for Winograd's transforms to pay")


def choose_packed(problem: ConvProblem, padded: bool, requested: str = "auto") -> Choice:
    """The algorithm for a convolution in inference whose weights are packed, of any square kernel, in one group.

    Args:
        padded: whether they are packed as Winograd's algorithm reads them.
        requested: one of `ALGORITHMS`, for 3x3 kernels; "torch" makes those with another stride than 1 "gemm".
    """
    return (
        _choose_packed(problem, padded, requested)
        if torch.compiler.is_compiling()
        else _chosen_packed(problem, padded, requested)
    )


@functools.lru_cache(maxsize=4096)
def _chosen_packed(problem: ConvProblem, padded: bool, requested: str) -> Choice:
    return _choose_packed(problem, padded, requested)


def _choose_packed(problem: ConvProblem, padded: bool, requested: str) -> Choice:
    unserved = _why_not_served(problem._replace(kernel=3))
    if unserved is not None:
        return Choice("torch", unserved)
    winograds = problem.kernel == 3 and problem.stride in _WINOGRAD_STRIDES
    if problem.kernel == 3 and problem.stride == 1 and requested == "torch":
        return Choice("torch", "it was requested")
    if winograds and (requested == "gemm" or (padded and requested == "winograd")):
        return Choice(requested, "it was requested")
    if problem.dtype == torch.bfloat16 and problem.matrix_units:
        return Choice("torch", "the CPU multiplies bfloat16 matrices, which PyTorch's convolution uses")
    winograd = None
    if winograds and padded and requested != "torch":
        winograd = _winograd_where_it_pays(problem, "packed")
    return winograd or Choice("gemm", "its weights are packed for it")


def _in_pairs(problem: ConvProblem) -> bool:
    return problem.pairs and problem.dtype == torch.bfloat16


def is_served(problem: ConvProblem) -> bool:
    """Whether kernels of our own take the problem's input at all, in channels_last."""
    return _why_not_served(problem) is None


def _why_not_served(problem: ConvProblem) -> str | None:
    n, c, h, w = problem.shape
    if problem.groups != 1:
        inputs, outputs = c // problem.groups, problem.outputs // problem.groups
        unserved = why_not_grouped(inputs, outputs, problem.kernel, problem.stride)
        if unserved is not None:
            return unserved
    elif problem.kernel not in (1, 3):
        return "there is no kernel of our own for this size"
    elif problem.kernel == 1 and (problem.stride != 1 or not problem.needs_grad):
        return "the kernel for this size is for training with stride 1"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return "there is no kernel of our own for this dtype"
    if problem.capability not in ("avx2", "avx512"):
        return f"there is no kernel of our own for {problem.capability}"
    return "the input is empty" if n * c * h * w == 0 else None


def why_not_grouped(inputs: int, outputs: int, kernel: int, stride: int) -> str | None:
    """Why no kernel of our own serves a convolution in groups of so many inputs and outputs; None where one does."""
    if kernel not in GROUPED_KERNELS:
        return "there is no kernel of our own for this size in groups"
    if stride not in (1, 2):
        return "the kernel for groups is for strides 1 and 2"
    if inputs == outputs and inputs in (1, 4):
        return None
    if inputs % 8 == 0 and outputs % 8 == 0 and outputs > 0:
        return None
    return f"there is no kernel of our own for groups of {inputs} inputs and {outputs} outputs"


def _why_not(algorithm: str, problem: ConvProblem) -> str | None:
    """Why one of our algorithms does not serve a problem that another of them does."""
    if algorithm == "grouped":
        return "it is for convolutions in groups" if problem.groups == 1 else None
    if algorithm == "gemm" and problem.groups != 1:
        return "it is for convolutions in one group"
    if algorithm == "winograd":
        if problem.groups != 1 and min(problem.shape[1], problem.outputs) < _LEAST_GROUP * problem.groups:
            return f"Winograd's algorithm is for groups of {_LEAST_GROUP} channels and more"
        if problem.kernel != 3:
            return "Winograd's algorithm is for 3x3 kernels"
        return None if problem.stride in _WINOGRAD_STRIDES else "Winograd's algorithm is for strides 1 and 2"
    return (
        "the matrix product of a 3x3 kernel is for evaluation" if problem.kernel == 3 and problem.needs_grad else None
    )


def _positions_of_image(problem: ConvProblem) -> int:
    _, _, h, w = problem.shape
    return output_size(h, problem.stride) * output_size(w, problem.stride)


def _few_pay(problem: ConvProblem, positions: int) -> bool:
    """Whether so few output positions are faster in one product than in PyTorch's, which reorders the weights first."""
    direct = COSTS[problem.capability]["gemm"].direct
    return _holds(positions <= direct.get(problem.stride, direct[1]).few)


def _winograd_where_it_pays(problem: ConvProblem, against: str) -> Choice | None:
    if _is_small(problem):
        pays, reason = _small_sum_pays(problem, against), "images are small, and it leaves out the taps outside of them"
    else:
        pays, reason = _winograd_pays(problem, against), "it saves more multiplications than its transforms cost"
    return Choice("winograd", reason) if pays else None


def _is_small(problem: ConvProblem) -> bool:
    """Whether images are so small that most taps of most outputs lie outside of them."""
    _, _, h, w = problem.shape
    most = _SMALL_SIDES.get(problem.stride, 0)
    return _holds(h <= most) and _holds(w <= most)


def _small_sum_pays(problem: ConvProblem, against: str) -> bool:
    """Whether the direct sum of small images, without the taps outside of them, is faster than another algorithm."""
    images, _, h, w = problem.shape
    if _in_pairs(problem) and problem.stride != 1:
        smaller = _holds(h < _LARGE_FOR_PAIRS) and _holds(w < _LARGE_FOR_PAIRS)
        if against == "packed" or not smaller:
            return False
    return _holds(images > COSTS[problem.capability][against].few_small)


def _winograd_pays(problem: ConvProblem, against: str) -> bool:
    """Whether one of Winograd's forms is expected to be clearly faster than another algorithm, forward."""
    winograd, direct, _ = COSTS[problem.capability][against]
    if problem.stride not in direct:
        return False
    return _is_cheaper(winograd, problem, _sums(direct[problem.stride], problem))


def _is_cheaper(winograd: Winograd, problem: ConvProblem, sums: int, more: int = 0) -> bool:
    """Whether one of Winograd's forms, and what else it takes, is clearly below a direct sum, given in hundredths."""
    return any(
        # In whole numbers, which torch.export can reason about.
        _holds(sums > round(100 * _ADVANTAGE) * (_tiles(form, winograd.lanes, problem) + winograd.call + more))
        for form in winograd.forms[problem.stride]
    )


def _sums(direct: Direct, problem: ConvProblem) -> int:
    """What a direct sum takes, in hundredths."""
    images, inputs, _, _ = problem.shape
    outputs, positions = problem.outputs, _positions_of_image(problem)
    of_position = 2 * 9 * inputs * _round_up(outputs, direct.columns)
    of_position += (direct.output + (direct.norm if problem.followed else 0)) * outputs
    unfilled = problem.needs_grad and _holds(positions <= _SMALL_IMAGE) and _holds(images > 1)
    percent = direct.unfilled if unfilled else direct.pairs if _in_pairs(problem) else direct.percent
    return percent * (of_position * images * positions + direct.weight * inputs * outputs + direct.call)


def _tiles(form: Form, lanes: int, problem: ConvProblem) -> int:
    """What a form of Winograd's takes, without the call."""
    images, inputs, h, w = problem.shape
    down, across = ((output_size(size, problem.stride) + form.side - 1) // form.side for size in (h, w))
    tiles, outputs = images * down * across, problem.outputs
    products = form.products * tiles * _round_up(inputs, lanes) * _round_up(outputs, lanes)
    counts = form.shared > 0 and not problem.needs_grad
    if counts and not (_holds(tiles * inputs <= form.shared) or _holds(inputs * outputs <= form.shared)):
        products = products * form.beyond // 100
    return products + form.tile * tiles * (inputs + outputs) + form.weight * inputs * outputs


def _group_by_group_pays(problem: ConvProblem) -> bool:
    """Whether Winograd's algorithm for each group alone is faster than PyTorch's convolution, copies included."""
    if problem.stride != 1 or _why_not("winograd", problem) is not None:
        return False
    images, channels, h, w = problem.shape
    inputs, outputs = channels // problem.groups, problem.outputs // problem.groups
    alone = problem._replace(shape=(images, inputs, h, w), outputs=outputs, groups=1, followed=False)
    winograd, direct, _ = COSTS[problem.capability]["torch"]
    groups = GROUPS[problem.capability]
    percent = groups.percent if problem.needs_grad else 100
    sums = percent * (_sums(direct[1]._replace(call=0, weight=groups.weight), alone) // 100)
    return _is_cheaper(
        winograd._replace(call=groups.call), alone, sums, _GROUP_COPY * images * h * w * (inputs + outputs)
    )


def _round_up(channels: int, multiple: int) -> int:
    return (channels + multiple - 1) // multiple * multiple


def _grouped_pays(problem: ConvProblem) -> bool:
    """Whether the direct sum of our own is faster than PyTorch's convolution, as docs/convolution.md has it measured.

    Of each channel alone PyTorch's forward is good, and its gradients are not but for 3x3 kernels. With few positions
    most of the work is to pack the weights; in a frozen network, where a normalisation followed, they are packed.
    """
    width = max(problem.shape[1], problem.outputs) // problem.groups
    if width == 1:
        return problem.kernel > 3 or (problem.needs_grad and problem.stride == 1)
    groups = GROUPS[problem.capability]
    enough = problem.followed or _holds(problem.shape[0] * _positions_of_image(problem) >= groups.few)
    widest = groups.widest_training if problem.needs_grad and problem.kernel == 3 else groups.widest
    return width <= _NARROW_GROUP or (width <= widest and enough)


def _product_pays(problem: ConvProblem) -> bool:
    """Whether a 1x1 kernel's product pays in training, where PyTorch's convolution has passes of its own beside it.

    Products are as fast as PyTorch's, so it does, but for few pixels: then most of the work is to read the weights,
    which are packed in each of the three products. PyTorch in turn is slow with many images of one pixel.
    """
    images, positions = problem.shape[0], _positions_of_image(problem)
    enough = min(_MOST_FEW_PIXELS, problem.shape[1] * problem.outputs // _WEIGHTS_PER_PIXEL)
    return _holds(images * positions >= enough) or (_holds(positions == 1) and _holds(images >= _SMALL_BATCH))


def _holds(condition: bool) -> bool:
    """The condition; for an exported graph, which serves a range of sizes, whether it is known to hold for all."""
    if not ordinary.is_exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
