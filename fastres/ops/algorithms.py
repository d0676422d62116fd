"""Which algorithm computes a convolution: PyTorch's ("torch"), Winograd's ("winograd"), one matrix product of our own
("gemm"), of a 3x3 kernel over gathered rows, of a 1x1 kernel over pixels, or in groups the direct sum ("grouped").

`choose_algorithm` decides by arithmetic alone, from one `ConvProblem`. docs/convolution.md has the measurements behind
the constants; `python -m benchmarks.convolutions` prints the choice beside the measured times of all three.
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

ALGORITHMS = ("auto", "torch", "winograd", "gemm", "grouped")


class _Form(NamedTuple):
    """A form of Winograd's algorithm. Costs are in floating-point operations of the products, as measured on one core
    with AVX-512.

    Attributes:
        side: outputs of a tile's side.
        products: a tile and pair of channels.
        tile_cost: the transforms of a tile, a channel.
        weight_cost: the transform of the weights, read from memory, a pair of channels.
    """

    side: int
    products: int
    tile_cost: int
    weight_cost: int


# By stride. csrc/cpu/winograd.h chooses between them.
_FORMS = {
    1: (_Form(4, 36, 1600, 1200), _Form(5, 49, 2400, 1600)),
    2: (_Form(4, 81, 3500, 7500),),
}
_CALL_COST = 1_000_000
# Channels of a group up to which the direct sum is faster than PyTorch's convolution: whatever the number of output
# positions, and where these are enough to pay for packing the weights.
_NARROW_GROUP, _WIDEST_GROUP = 16, 32
_FEW_GROUPED_POSITIONS = 128
# Sizes that the kernel for groups has.
GROUPED_KERNELS = (3, 5, 7)
# The pass over an element of the output that normalises and activates it, which the kernels' epilogues spare.
_PASS_COST = 200
# Output positions up to which one product is faster than PyTorch's convolution, which reorders the weights first; and
# those of one image, and input channels, with which it is faster in batches as well.
_FEW_POSITIONS = 256
_SMALL_IMAGE, _MANY_INPUTS = 16, 256
# How many times as long a direct sum with stride 2 takes in such images.
_SMALL_STRIDED = 1.5
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
        _has_matrix_units(), followed, groups, dilation,
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
        if _grouped_pays(problem):
            return Choice("grouped", "groups are too narrow for PyTorch's convolution")
        return Choice("torch", "PyTorch's convolution is as fast")
    if problem.kernel == 1:
        if _product_pays(problem):
            return Choice("gemm", "it spares the passes of the normalisations beside it")
        return Choice("torch", "pixels are few: to pack the weights is most of the work")
    if _winograd_pays(problem):
        return Choice("winograd", "it saves more multiplications than its transforms cost")
    if not problem.needs_grad:
        images, positions = problem.shape[0], _positions_of_image(problem)
        if _holds(images * positions <= _FEW_POSITIONS):
            return Choice("gemm", "output positions are few: to read the weights is most of the work")
        if problem.shape[1] >= _MANY_INPUTS and _holds(positions <= _SMALL_IMAGE):
            return Choice("gemm", "an image has few output positions, which PyTorch's tiles do not fill")
    return Choice("torch", "output positions are too few for Winograd's transforms to pay")


def choose_packed(problem: ConvProblem, padded: bool, requested: str = "auto") -> Choice:
    """The algorithm for a convolution in inference whose weights are packed, of any square kernel, in one group.

    Args:
        padded: whether they are packed as Winograd's algorithm reads them.
        requested: one of `ALGORITHMS`, for 3x3 kernels with stride 1.
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
    winograds = problem.kernel == 3 and problem.stride == 1
    if winograds and requested == "torch":
        return Choice("torch", "it was requested")
    if winograds and padded and requested == "winograd":
        return Choice("winograd", "it was requested")
    if problem.dtype == torch.bfloat16 and problem.matrix_units:
        return Choice("torch", "the CPU multiplies bfloat16 matrices, which PyTorch's convolution uses")
    if winograds and padded and _winograd_pays(problem):
        return Choice("winograd", "it saves more multiplications than its transforms cost")
    return Choice("gemm", "its weights are packed for it")


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
    if (problem.groups != 1) != (algorithm == "grouped"):
        return "it is for convolutions in groups" if problem.groups == 1 else "it is for convolutions in one group"
    if algorithm == "grouped":
        return None
    if algorithm == "winograd":
        if problem.kernel != 3:
            return "Winograd's algorithm is for 3x3 kernels"
        return None if problem.stride in _FORMS else "Winograd's algorithm is for strides 1 and 2"
    return (
        "the matrix product of a 3x3 kernel is for evaluation" if problem.kernel == 3 and problem.needs_grad else None
    )


def _positions_of_image(problem: ConvProblem) -> int:
    _, _, h, w = problem.shape
    return output_size(h, problem.stride) * output_size(w, problem.stride)


def _winograd_pays(problem: ConvProblem) -> bool:
    """Whether one of the forms for its stride does."""
    return any(_pays(form, problem) for form in _FORMS.get(problem.stride, ()))


def _pays(form: _Form, problem: ConvProblem) -> bool:
    """Whether a form of Winograd's convolution is expected to be clearly faster than the direct sum.

    Both are counted in operations of their inner loops, forward: the direct sum at 2 * 9 a pair of channels and
    position; Winograd at two for each product, channels rounded up to whole vectors, and its transforms. Where a
    normalisation follows, it is a pass of its own after the direct sum.
    """
    n, inputs, h, w = problem.shape
    outputs, height, width = problem.outputs, output_size(h, problem.stride), output_size(w, problem.stride)
    tiles = n * ((height + form.side - 1) // form.side) * ((width + form.side - 1) // form.side)
    direct = (2 * 9 * inputs + (_PASS_COST if problem.followed else 0)) * n * height * width * outputs
    unfilled = problem.stride == 2 and problem.needs_grad and _holds(height * width <= _SMALL_IMAGE)
    slower = round(100 * (_SMALL_STRIDED if unfilled else 1))
    products = 2 * form.products * tiles * ((inputs + 15) // 16 * 16) * ((outputs + 31) // 32 * 32)
    transforms = form.tile_cost * tiles * (inputs + outputs) + form.weight_cost * inputs * outputs
    # In whole numbers, which torch.export can reason about.
    return _holds(slower * direct > round(100 * _ADVANTAGE) * (products + transforms + _CALL_COST))


def _grouped_pays(problem: ConvProblem) -> bool:
    """Whether the direct sum of our own is faster than PyTorch's convolution, as docs/convolution.md has it measured.

    Of each channel alone PyTorch's forward is good, and its gradients are not but for 3x3 kernels. With few positions
    most of the work is to pack the weights; in a frozen network, where a normalisation followed, they are packed.
    """
    width = max(problem.shape[1], problem.outputs) // problem.groups
    if width == 1:
        return problem.kernel > 3 or (problem.needs_grad and problem.stride == 1)
    enough = problem.followed or _holds(problem.shape[0] * _positions_of_image(problem) >= _FEW_GROUPED_POSITIONS)
    return width <= _NARROW_GROUP or (width <= _WIDEST_GROUP and enough)


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
