"""Convolutions in groups and of each channel alone: values, statistics and gradients against float64, padding beside
infinities, threads, and the checks of arguments."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import _extension, functional, reference
from fastres.contract import output_size
from fastres.ops import algorithms
from tests.operators import check_compiled
from tests.oracle import (
    LAYOUTS,
    SEED,
    activation,
    assert_close,
    assert_statistics,
    generator,
    output_length,
    threads,
)

OPS = torch.ops.fastres
COMPILED = _extension.cpu_capability() in ("avx2", "avx512") and _extension.load_cpu() is not None
needs_kernels = pytest.mark.skipif(not COMPILED, reason="the kernels need AVX2 and a compiled module")

# groups, and inputs and outputs of each: single channels, with and without whole vectors of them; pairs of groups, with
# one that has no other; groups of one vector, of several, and of different numbers.
WIDTHS = [(16, 1, 1), (13, 1, 1), (5, 1, 1), (40, 1, 1), (4, 4, 4), (3, 4, 4), (5, 8, 8), (2, 16, 16), (2, 24, 24),
          (2, 32, 32), (2, 8, 16), (3, 16, 8), (2, 24, 40)]  # fmt: skip
KERNELS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]
# images, height, width: single pixels and lines, less than a kernel, what fills tiles and what does not
SIZES = [(1, 1, 1), (2, 5, 5), (3, 13, 17), (2, 10, 10), (1, 2, 7), (1, 1, 14), (2, 7, 7), (1, 12, 4), (2, 3, 24)]
widths = pytest.mark.parametrize("width", WIDTHS, ids=lambda w: "x".join(map(str, w)))
kernels = pytest.mark.parametrize(("kernel", "stride"), KERNELS, ids=lambda v: str(v))


def data(
    width: tuple[int, int, int],
    size: tuple[int, int, int],
    kernel: int = 3,
    stride: int = 1,
    *,
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy."""
    (groups, inputs, outputs), (n, h, w) = width, size
    gen = generator(width, size, kernel, stride, layout, str(dtype))
    x = activation((n, groups * inputs, h, w), dtype, layout, gen)
    std = (kernel**2 * inputs) ** -0.5
    weight = activation((groups * outputs, inputs, kernel, kernel), dtype, layout, gen, mean=0.02, std=std)
    shape = (n, groups * outputs, output_size(h, stride), output_size(w, stride))
    return x, weight, activation(shape, dtype, layout, gen, mean=0.1, std=1.0)


def exact(x: Tensor, weight: Tensor, dy: Tensor, stride: int) -> tuple[Tensor, ...]:
    """y, dx and dweight by PyTorch in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    groups = x.shape[1] // weight.shape[1]
    y = F.conv2d(x, weight, padding=weight.shape[2] // 2, stride=stride, groups=groups)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy.double()))


def check(
    x: Tensor, weight: Tensor, dy: Tensor, stride: int, algorithm: str = "grouped",
    lengths: tuple[int, int, int] | None = None,
) -> None:  # fmt: skip
    """y, its statistics and both gradients.

    Args:
        lengths: of the sums behind y and both gradients; None: the direct sum's.
    """
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    outputs, inputs, kernel, _ = weight.shape
    if lengths is None:
        lengths = (kernel**2 * inputs, kernel**2 * (outputs * inputs // x.shape[1]), dy.numel() // outputs)
    made = functional.grouped_conv2d_with_statistics(x, weight, stride=stride, algorithm=algorithm)
    y, found = made.y.detach(), torch.autograd.grad(made.y, (x, weight), dy)
    names = ("y", "gradient of x", "gradient of weight")
    for actual, wanted, name, length in zip((y, *found), exact(x, weight, dy, stride), names, lengths, strict=True):
        assert_close(actual, wanted, name, length=length)
    dx, dweight = found
    assert (
        dweight.stride() == torch.empty_like(weight).stride() and dx.dtype == x.dtype and dweight.dtype == weight.dtype
    )
    if COMPILED:
        assert made.input is x and made.statistics is not None and y.is_contiguous(memory_format=torch.channels_last)
        assert_statistics(*made.statistics[:2], y, "y")
        with torch.no_grad():
            assert torch.equal(functional.grouped_conv2d(x, weight, stride=stride, algorithm=algorithm), y)


# --------------------------------------------------------------------------------------------------------------- values


@widths
@kernels
def test_values_and_gradients_are_those_of_float64(width, kernel, stride):
    which = WIDTHS.index(width) * len(KERNELS) + KERNELS.index((kernel, stride))
    for i, layout in enumerate(LAYOUTS):
        size = SIZES[(which + 4 * i) % len(SIZES)]
        check(*data(width, size, kernel, stride, layout=layout), stride)


# PyTorch's own gradients of depthwise convolutions are rounded to bfloat16 between the taps.
@needs_kernels
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("width", [(9, 1, 1), (3, 4, 4), (2, 8, 8), (2, 24, 16)], ids=str)
@kernels
def test_values_and_gradients_in_bfloat16_are_those_of_float64(width, size, kernel, stride):
    x, weight, dy = data(width, size, kernel, stride, dtype=torch.bfloat16)
    check(x, weight, dy, stride)


@needs_kernels
@pytest.mark.parametrize("width", [(9, 1, 1), (3, 4, 4), (2, 8, 8)], ids=str)
def test_a_float32_weight_beside_bfloat16_is_not_rounded(width):
    x, _, dy = data(width, (2, 9, 8), dtype=torch.bfloat16)
    weight = data(width, (2, 9, 8))[1]
    y, _, _ = OPS.grouped_conv_forward(x, weight, False)
    dx, dweight = OPS.grouped_conv_backward(dy, x, weight, [True, True])
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for found, wanted, length in zip((y, dx, dweight), exact(x, weight, dy, 1), (72, 72, 144), strict=True):
        assert_close(found, wanted, "result", length=length)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    st.one_of(
        st.tuples(st.integers(2, 40), st.just(1), st.just(1)),
        st.tuples(st.integers(2, 9), st.just(4), st.just(4)),
        st.tuples(st.integers(2, 4), st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 24])),
    ),
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(KERNELS),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_agrees_with_float64(width, size, kernel, layout, dtype):
    check(*data(width, size, *kernel, layout=layout, dtype=dtype), kernel[1])


@pytest.mark.parametrize(
    ("width", "size"),
    [((48, 1, 1), (2, 90, 70)), ((9, 8, 8), (1, 120, 64)), ((11, 4, 4), (1, 100, 90)), ((40, 1, 1), (40, 6, 7))],
    ids=str,
)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_images_of_several_chunks_agree_with_float64(width, size, kernel, stride):
    check(*data(width, size, kernel, stride), stride)


@pytest.mark.parametrize("width", [(9, 1, 1), (3, 4, 4), (2, 8, 16)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_weights_of_any_strides_are_read_where_they_lie(width, stride):
    x, weight, dy = data(width, (2, 5, 6), 3, stride)
    check(x, weight.contiguous(), dy, stride)
    check(x, weight.transpose(2, 3).contiguous().transpose(2, 3), dy, stride)
    check(x, weight.transpose(0, 1).contiguous().transpose(0, 1), dy, stride)
    check(x, weight.repeat(2, 1, 1, 1)[::2], dy, stride)
    check(x, weight.repeat(1, 1, 2, 2)[..., ::2, ::2], dy, stride)


# ----------------------------------------------------------------------------------------------- infinities and padding


def pairs(offset: int, stride: int, outputs: int, inputs: int) -> list[tuple[int, int]]:
    """(output, input) along an axis for a tap that lies so far from the first one under the kernel's middle."""
    return [(i, i * stride + offset) for i in range(outputs) if 0 <= i * stride + offset < inputs]


def tap_by_tap(x: Tensor, weight: Tensor, dy: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight in float64 as sums over what lies in the image, without padding."""
    x, weight, dy = x.double(), weight.double(), dy.double()
    outputs, inputs, kernel, _ = weight.shape
    (n, _, h, w), groups = x.shape, x.shape[1] // inputs
    y, dx, dweight = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(weight)
    for u in range(kernel):
        for v in range(kernel):
            rows = pairs(u - kernel // 2, stride, dy.shape[2], h)
            columns = pairs(v - kernel // 2, stride, dy.shape[3], w)
            for i, row in rows:
                for j, column in columns:
                    values = x[:, :, row, column].view(n, groups, 1, inputs)
                    gradients = dy[:, :, i, j].view(n, groups, outputs // groups, 1)
                    factors = weight[:, :, u, v].view(groups, outputs // groups, inputs)
                    y[:, :, i, j] += (values * factors).sum(3).flatten(1)
                    dx[:, :, row, column] += (gradients * factors).sum(2).flatten(1)
                    dweight[:, :, u, v] += (gradients * values).sum(0).flatten(0, 1)
    return y, dx, dweight


def assert_same_where_finite(found: Tensor, wanted: Tensor, name: str, length: int) -> None:
    assert torch.equal(found.isnan(), wanted.isnan()), name
    assert torch.equal(found.isinf(), wanted.isinf()), name
    assert torch.equal(found[found.isinf()].double(), wanted[wanted.isinf()]), name
    assert_close(found.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), name, length=length)


@needs_kernels
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
@pytest.mark.parametrize("width", [(9, 1, 1), (3, 4, 4), (2, 8, 8), (2, 8, 24)], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (7, 1)])
def test_an_infinity_shows_only_where_it_meets_an_element(width, kernel, stride, where, value):
    tensors = dict(zip(("x", "weight", "dy"), data(width, (1, 6, 5), kernel, stride), strict=True))
    for corner in (0, -1):
        changed = {name: t.clone() for name, t in tensors.items()}
        changed[where][0, 0, corner, corner] = value
        x, weight, dy = changed.values()
        y, _, _ = OPS.grouped_conv_forward(x, weight, False, stride)
        found = y, *OPS.grouped_conv_backward(dy, x, weight, [True, True], stride)
        for name, got, wanted in zip(("y", "dx", "dweight"), found, tap_by_tap(x, weight, dy, stride), strict=True):
            assert_same_where_finite(got, wanted, f"{name}, {where}", kernel**2 * max(width[1:]))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_the_sums_over_taps_are_those_of_pytorch(kernel, stride):
    tensors = data((2, 4, 4), (2, 6, 5), kernel, stride)
    for got, wanted in zip(tap_by_tap(*tensors, stride), exact(*tensors, stride), strict=True):
        torch.testing.assert_close(got, wanted)


# ------------------------------------------------------------------------------------------------------------ behaviour


@needs_kernels
@pytest.mark.parametrize("width", [(72, 1, 1), (10, 4, 4), (19, 8, 8), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("size", [(1, 9, 9), (16, 5, 5), (2, 64, 40)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_results_are_the_same_in_every_run_and_with_any_threads(width, size, stride):
    x, weight, dy = data(width, size, 3, stride)
    results = {}
    for count in (1, 2, 3, 7):
        with threads(count):
            runs = [
                (*OPS.grouped_conv_forward(x, weight, True, stride),
                 *OPS.grouped_conv_backward(dy, x, weight, [True, True], stride))
                for _ in range(2)
            ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        results[count] = runs[0]
    wanted = exact(x, weight, dy, stride)[2]
    for *others, dweight in results.values():
        assert all(torch.equal(a, b) for a, b in zip(others, results[1], strict=False))
        assert_close(dweight, wanted, "gradient of weight", length=dy.numel() // dy.shape[1])


@needs_kernels
@pytest.mark.parametrize("width", [(20, 1, 1), (3, 4, 4), (5, 8, 16)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_one_gradient_alone_is_that_of_both(width, stride):
    x, weight, dy = data(width, (3, 9, 8), 5, stride)
    dx, dweight = OPS.grouped_conv_backward(dy, x, weight, [True, True], stride)
    alone, nothing = OPS.grouped_conv_backward(dy, x, weight, [True, False], stride)
    assert torch.equal(alone, dx) and nothing.numel() == 0
    nothing, alone = OPS.grouped_conv_backward(dy, x, weight, [False, True], stride)
    assert torch.equal(alone, dweight) and nothing.numel() == 0


@needs_kernels
@pytest.mark.parametrize("width", [(24, 1, 1), (6, 4, 4), (4, 8, 8)], ids=str)
def test_statistics_far_from_zero_lose_no_precision(width):
    groups, inputs, outputs = width
    gen = generator(width)
    x = activation((8, groups * inputs, 16, 15), torch.float32, "channels_last", gen, mean=1e4, std=1.0)
    weight = torch.zeros(groups * outputs, inputs, 3, 3)
    weight[:, 0, 1, 1] = 1  # padding's zeros stay out of the sums
    y, mean, m2 = OPS.grouped_conv_forward(x, weight, True)
    exact_y = y.double()
    exact_m2 = (exact_y - exact_y.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    assert (mean.double() - exact_y.mean((0, 2, 3))).abs().max() <= 2**-10
    assert ((m2.double() - exact_m2).abs() / exact_m2).max() < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batches_give_empty_results_and_gradients_of_zero(stride):
    x, weight = torch.randn(0, 16, 5, 5).requires_grad_(), torch.randn(16, 8, 3, 3).requires_grad_()
    y = functional.grouped_conv2d(x, weight, stride=stride, algorithm="grouped")
    assert y.shape == (0, 16, output_size(5, stride), output_size(5, stride))
    y.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros_like(weight))


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 16, 5, 5), (2, 16, 0, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_operators_serve_tensors_without_elements(shape, stride):
    x, weight = torch.randn(shape), torch.randn(16, 8, 3, 3)
    y, mean, m2 = OPS.grouped_conv_forward(x, weight, False, stride)
    dx, dweight = OPS.grouped_conv_backward(y, x, weight, [True, True], stride)
    assert y.shape == (shape[0], 16, *(output_size(size, stride) for size in shape[2:]))
    assert mean.numel() == m2.numel() == 0 and dx.shape == x.shape and not dweight.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [(9, 1, 1), (3, 4, 4), (2, 8, 16)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck_passes_on_both_operators(width, layout, stride):
    x, weight, dy = data(width, (2, 5, 6), 3, stride, layout=layout)
    for statistics in (True, False):
        torch.library.opcheck(OPS.grouped_conv_forward.default, (x, weight, statistics, stride))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(OPS.grouped_conv_backward.default, (dy, x, weight, needs, stride))


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
def test_the_functions_compile_to_one_graph_with_the_same_results(algorithm):
    torch._dynamo.reset()
    x, weight, dy = data((8, 8, 8), (4, 12, 12))
    x.requires_grad_()
    weight.requires_grad_()

    def convolve(x, weight):
        return functional.grouped_conv2d(x, weight, algorithm=algorithm)

    def measure(x, weight):
        y, statistics, _ = functional.grouped_conv2d_with_statistics(x, weight, algorithm=algorithm)
        running = torch.zeros(64), torch.ones(64)
        return functional.batch_norm_act(y, *running, training=True, statistics=statistics, relu=False)

    for f in (convolve, measure):
        check_compiled(f, x, weight, dy)


@pytest.mark.parametrize(
    ("width", "kernel", "stride"),
    [((2, 3, 3), 3, 1), ((6, 1, 2), 3, 1), ((2, 8, 8), 9, 1), ((2, 8, 8), 1, 1), ((2, 8, 8), 3, 3), ((1, 8, 8), 3, 1)],
    ids=str,
)
def test_what_the_kernel_does_not_serve_is_pytorchs(width, kernel, stride):
    x, weight, _ = data(width, (2, 7, 6), kernel, stride)
    x.requires_grad_()
    weight.requires_grad_()
    made = functional.grouped_conv2d_with_statistics(x, weight, stride=stride, algorithm="grouped")
    assert made.statistics is None and made.input is x
    plain = reference.grouped_conv2d(x, weight, stride)
    assert torch.equal(made.y, plain)
    assert torch.equal(functional.grouped_conv2d(x, weight, stride=stride, algorithm="grouped"), plain)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("algorithm", ["auto", "gemm"])
@pytest.mark.parametrize(("channels", "kernel"), [(3, 3), (8, 3), (8, 1)], ids=str)
def test_a_single_group_is_served_whatever_is_chosen(channels, kernel, algorithm, gradients):
    x, weight, _ = data((1, channels, channels), (2, 4, 4), kernel)
    weight.requires_grad_(gradients)
    exact = reference.grouped_conv2d(x.double(), weight.double()).detach()
    for convolve in (functional.grouped_conv2d, functional.grouped_conv2d_with_statistics):
        made = convolve(x, weight, algorithm=algorithm)
        y = made if isinstance(made, Tensor) else made.y
        assert_close(y.detach(), exact, convolve.__name__, length=output_length(channels))


@needs_kernels
@pytest.mark.parametrize(
    ("algorithm", "ours"), [("grouped", True), ("torch", False), ("winograd", True), ("gemm", False)]
)
def test_the_environment_decides_where_the_argument_is_none(algorithm, ours, monkeypatch):
    monkeypatch.setenv("FASTRES_CONV", algorithm)
    x, weight, _ = data((2, 8, 8), (2, 7, 6))
    assert (functional.grouped_conv2d_with_statistics(x, weight).statistics is not None) == ours


@needs_kernels
@pytest.mark.parametrize("algorithm", ["grouped", "winograd"])
def test_autocast_gives_its_dtype_and_gradients_of_the_weights_own(algorithm):
    x, weight, _ = data((2, 8, 8), (2, 7, 6))
    x.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.grouped_conv2d(x, weight, algorithm=algorithm)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- refusals

X, W = torch.zeros(1, 16, 5, 5), torch.zeros(16, 8, 3, 3)


@pytest.mark.parametrize("function", [functional.grouped_conv2d, functional.grouped_conv2d_with_statistics])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "^x: expected a Tensor, got NoneType"),
        ({"x": X[0]}, ValueError, "^x: expected 4 dimensions"),
        ({"x": X.long()}, TypeError, "^x: expected float32, bfloat16"),
        ({"weight": W.double()}, TypeError, "^weight: expected dtype torch.float32, got torch.float64"),
        ({"weight": W.to("meta")}, ValueError, "^weight: expected a tensor on cpu, got one on meta"),
        ({"weight": W[:, :3]}, ValueError, r"^weight: expected shape \(K, C / groups, k, k\).*got \(16, 3, 3, 3\)"),
        ({"weight": W[:15]}, ValueError, r"^weight: expected shape \(K, C / groups, k, k\).*got \(15, 8, 3, 3\)"),
        ({"weight": W[:, :0]}, ValueError, r"^weight: expected shape \(K, C / groups, k, k\).*got \(16, 0, 3, 3\)"),
        ({"weight": W[..., :2]}, ValueError, "^weight: expected a square kernel of odd size"),
        ({"weight": W[..., :2, :2]}, ValueError, "^weight: expected a square kernel of odd size"),
        ({"stride": 0}, ValueError, "^stride: expected at least 1, got 0"),
        ({"stride": (1, 1)}, TypeError, "^stride: expected an int, got tuple"),
        ({"algorithm": 3}, TypeError, "^algorithm: expected a string or None, got int"),
        ({"algorithm": "fft"}, ValueError, "^algorithm: expected one of .*, got 'fft'"),
    ],
)
def test_bad_arguments_are_named(function, change, error, message):
    arguments = {"x": X, "weight": W} | change
    with pytest.raises(error, match=message):
        function(arguments.pop("x"), arguments.pop("weight"), **arguments)


@needs_kernels
def test_the_operators_name_bad_arguments():
    for weight, error, message in (
        (W[..., :1, :1], ValueError, r"weight: expected a kernel of 3x3, 5x5 or 7x7, got shape \[16, 8, 1, 1\]"),
        (W[:, :3], ValueError, r"weight: expected shape \(K, C / groups, k, k\) for x of 16 channels"),
        (W[:, :2], ValueError, "weight: expected groups of 1, 4 or multiples of 8 channels, got 2 and 2"),
        (W[:8, :4], ValueError, "weight: expected groups of 1, 4 or multiples of 8 channels, got 4 and 2"),
        (W.double(), TypeError, "weight: expected dtype"),
    ):
        with pytest.raises(error, match=message):
            OPS.grouped_conv_forward(X, weight, False)
        with pytest.raises(error, match=message):
            OPS.grouped_conv_backward(X, X, weight, [True, True])
    with pytest.raises(ValueError, match="stride: expected 1 or 2, got 3"):
        OPS.grouped_conv_forward(X, W, False, 3)
    with pytest.raises(ValueError, match="x: expected at least one element to measure"):
        OPS.grouped_conv_forward(X[:0], W, True)
    with pytest.raises(ValueError, match=r"dy: expected shape \[1, 16, 3, 3\], got \[1, 16, 5, 5\]"):
        OPS.grouped_conv_backward(X, X, W, [True, True], 2)
    with pytest.raises(TypeError, match="dy: expected dtype"):
        OPS.grouped_conv_backward(X.double(), X, W, [True, True])
