"""The 3x3 convolution, and in training the 1x1 one: values, statistics and gradients against float64, the end of a
block in evaluation, writes to the weight between calls, and the choice of algorithm."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import _extension, functional, reference
from fastres.activations import IDENTITY, KINDS, RELU, Activation
from fastres.contract import ConvProblem
from fastres.functional import NormParams
from fastres.ops import algorithms
from fastres.ops import conv3x3 as ops
from fastres.ops.fallback import output_size
from tests import backend
from tests.operators import check_compiled, flat, opcheck
from tests.oracle import (
    FIVE_POINTS,
    LAYOUTS,
    PHASE_POINTS,
    POINTS,
    SEED,
    TILE4,
    TILE5,
    Case,
    activation,
    assert_close,
    assert_statistics,
    bound,
    check_case,
    double_norm,
    form_of,
    generator,
    input_length,
    norm,
    output_length,
    threads,
    toom_cook,
    weight_length,
)

OPS = torch.ops.fastres
CAPABILITY = _extension.cpu_capability()
COMPILED = CAPABILITY in ("avx2", "avx512") and _extension.load_cpu() is not None
needs_kernels = pytest.mark.skipif(not COMPILED, reason="the kernels need AVX2 and a compiled module")

OURS = {3: "winograd", 1: "gemm"}
WITH_STATISTICS = {3: functional.conv3x3_with_statistics, 1: functional.conv1x1_with_statistics}
PYTORCHS = {3: reference.conv3x3, 1: reference.conv1x1}
both_kernels = pytest.mark.parametrize("kernel", OURS, ids=lambda k: f"{k}x{k}")
strides = pytest.mark.parametrize("stride", [1, 2])  # of 3x3 kernels
CONVOLUTIONS = [(3, 1), (3, 2), (1, 1)]
convolutions = pytest.mark.parametrize(("kernel", "stride"), CONVOLUTIONS, ids=["3x3", "3x3-strided", "1x1"])

# images, inputs, outputs, height, width: whole tiles, ragged edges and channels, single pixels, more than one chunk.
SHAPES = [
    (2, 16, 32, 8, 8),
    (1, 64, 64, 32, 32),
    (3, 32, 48, 7, 9),
    (2, 5, 3, 6, 5),
    (1, 1, 1, 1, 1),
    (2, 17, 33, 4, 13),
    (4, 1, 40, 3, 2),
    (2, 40, 1, 1, 11),
    (5, 130, 70, 10, 3),
    (2, 96, 200, 4, 4),
    (2, 24, 40, 10, 10),
    (3, 9, 16, 2, 2),
    (300, 40, 70, 2, 2),
    (9, 70, 40, 2, 1),
    (70, 24, 40, 4, 5),
    (33, 20, 36, 6, 3),
    (2, 33, 17, 17, 14),
]


def data(
    shape: tuple[int, int, int, int, int],
    *key: object,
    layout: str = "channels_last",
    kernel: int = 3,
    stride: int = 1,
) -> tuple[Tensor, ...]:
    """x, weight and dy."""
    n, c, k, h, w = shape
    gen = generator(shape, *key, kernel, stride)
    x = activation((n, c, h, w), torch.float32, layout, gen)
    weight = activation((k, c, kernel, kernel), torch.float32, layout, gen, mean=0.02, std=(kernel**2 * c) ** -0.5)
    outputs = (n, k, output_size(h, stride), output_size(w, stride))
    return x, weight, activation(outputs, torch.float32, layout, gen, mean=0.1, std=1.0)


def layout_of(t: Tensor) -> tuple[object, ...]:
    """What a fake kernel has to get right. The stride of a single element says nothing."""
    return t.dtype, t.shape, tuple(stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1)


def exact(x: Tensor, weight: Tensor, dy: Tensor, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = PYTORCHS[weight.shape[2]](x, weight, stride)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy.double()))


def check(shape: tuple[int, int, int, int, int], x: Tensor, weight: Tensor, dy: Tensor, stride: int = 1) -> None:
    """y, its statistics, and both gradients, with another use of x and without."""
    x, weight, kernel = x.detach().requires_grad_(), weight.detach().requires_grad_(), weight.shape[2]
    form = form_of(x, stride, kernel)
    y, statistics, same = WITH_STATISTICS[kernel](x, weight, stride=stride, algorithm=OURS[kernel])
    other = activation(x.shape, torch.float32, "channels_last", generator(shape, "other"))
    dx, dweight = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    both, dweight_again = torch.autograd.grad((y, same), (x, weight), (dy, other))
    expected = exact(x, weight, dy, stride)
    assert_close(y.detach(), expected[0], "y", length=output_length(shape[1], form))
    assert_close(dx, expected[1], "gradient of x", length=input_length(shape[2], form))
    assert_close(dweight, expected[2], "gradient of weight", length=weight_length(x, stride, kernel))
    assert_close(both, expected[1] + other, "gradient of x, added to", length=input_length(shape[2], form))
    assert torch.equal(dweight_again, dweight)
    assert torch.equal(same, x)
    assert_statistics(*statistics[:2], y.detach(), "y")


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("points", "outputs", "taps"), [(POINTS, 4, 3), (FIVE_POINTS, 5, 3), (PHASE_POINTS, 4, 2), (PHASE_POINTS, 4, 1)]
)
def test_the_matrices_are_a_convolution(points, outputs, taps):
    gen = generator("matrices")
    a, g, b = toom_cook(points, outputs, taps)
    x, w = (torch.randn(size, size, generator=gen, dtype=torch.float64) for size in (outputs + taps - 1, taps))
    y = a @ ((g @ w @ g.T) * (b @ x @ b.T)) @ a.T
    torch.testing.assert_close(y, F.conv2d(x[None, None], w[None, None])[0, 0])


@convolutions
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients_are_those_of_float64(shape, layout, kernel, stride):
    check(shape, *data(shape, layout, layout=layout, kernel=kernel, stride=stride), stride)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 14), st.integers(1, 14)),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(CONVOLUTIONS),
)
def test_any_shape_agrees_with_float64(shape, layout, convolution):
    kernel, stride = convolution
    check(shape, *data(shape, layout, layout=layout, kernel=kernel, stride=stride), stride)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [((26, 64, 64, 31, 31), 3, 1), ((52, 64, 64, 45, 45), 3, 2), ((26, 64, 64, 31, 31), 1, 1)],
    ids=str,
)
def test_tensors_larger_than_the_caches_agree_with_float64(shape, kernel, stride):
    # From 6 MiB on results are stored past the caches.
    x, weight, dy = data(shape, kernel=kernel, stride=stride)
    check(shape, x, weight, dy, stride)
    if kernel == 3:
        check_end(x, weight, norm(64, torch.float32, generator(shape)), stride, residual=dy)


@convolutions
def test_weights_of_any_strides_are_read_where_they_lie(kernel, stride):
    shape = (2, 20, 36, 5, 6)
    x, weight, dy = data(shape, kernel=kernel, stride=stride)
    check(shape, x, weight.transpose(2, 3).contiguous().transpose(2, 3), dy, stride)
    check(shape, x, weight.transpose(0, 1).contiguous().transpose(0, 1), dy, stride)
    check(shape, x, weight.repeat(2, 2, 1, 1)[::2, :20], dy, stride)
    check(shape, x, weight.repeat(2, 2, 1, 1)[:36, ::2], dy, stride)


@pytest.mark.parametrize("shape", [(2, 600, 70, 7, 7), (1, 24, 1100, 5, 9), (9, 300, 300, 16, 16)], ids=str)
def test_sums_longer_than_the_caches_agree_with_float64(shape):
    # Weights of 1x1 kernels that take several panels, and more pixels than a chunk of their gradient.
    check(shape, *data(shape, kernel=1))


@pytest.mark.parametrize("algorithm", [None, "gemm"])
@pytest.mark.parametrize("stride", [2, 3])
def test_1x1_kernels_of_other_strides_are_pytorch_s(stride, algorithm):
    x, weight, dy = data((2, 9, 20, 7, 6), kernel=1, stride=stride)
    x.requires_grad_()
    weight.requires_grad_()
    y, statistics, same = functional.conv1x1_with_statistics(x, weight, stride=stride, algorithm=algorithm)
    assert statistics is None and same is x
    found = y.detach(), *torch.autograd.grad(y, (x, weight), dy)
    lengths = {"y": 9, "gradient of x": 20, "gradient of weight": weight_length(x, stride, kernel=1)}
    for value, wanted, (name, length) in zip(found, exact(x, weight, dy, stride), lengths.items(), strict=True):
        assert_close(value, wanted, name, length=length)


@needs_kernels
@pytest.mark.parametrize(("largest", "stride"), [(32, 1), (40, 1), (64, 2)])
def test_errors_are_as_small_as_documented(largest, stride):
    """docs/convolution.md: at most 1e-5 of the largest value, 2e-5 by tiles of 5x5, at ResNet-18's stages."""
    for stage in range(4):
        channels, size = 64 << stage, largest >> stage
        x, weight, dy = data((4, channels, channels, size, size), stride=stride)
        wanted = exact(x, weight, dy, stride)
        y = OPS.conv3x3_forward(x, weight, False, stride)[0]
        gradients = OPS.conv3x3_backward(dy, x, weight, None, [True, True], stride)
        for got, value in zip((y, *gradients), wanted, strict=True):
            assert float((got - value).abs().max() / value.abs().max()) < (
                2e-5 if form_of(x, stride) is TILE5 else 1e-5
            )


@needs_kernels
@pytest.mark.parametrize(("channels", "size"), [(64, 32), (256, 8)])
def test_weight_gradient_at_batch_128_is_close_to_pytorch_s(channels, size):
    x, weight, dy = data((128, channels, channels, size, size))
    x -= 0.5  # a mean would add up to sums so large that they hide the errors
    dy -= 0.1
    wanted = exact(x, weight, dy)[2]
    _, dweight = OPS.conv3x3_backward(dy, x, weight, None, [False, True])
    _, direct, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    error, direct_error = (float((t - wanted).square().mean().sqrt()) for t in (dweight, direct))
    assert_close(dweight, wanted, "gradient of weight", length=math.ceil(128 * size**2 * TILE4.weights**2))
    assert error < 2 * TILE4.weights * direct_error


# ------------------------------------------------------------------------------------------------------------ behaviour


@convolutions
@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6), (1, 1, 1, 1, 1), (2, 8, 8, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_passes_on_every_operator(shape, layout, kernel, stride):
    x, weight, dy = data(shape, layout=layout, kernel=kernel, stride=stride)
    vectors = [t.detach() for t in norm(shape[2], torch.float32, generator(shape))[:4]]
    for statistics in (True, False):
        torch.library.opcheck(OPS.conv3x3_forward.default, (x, weight, statistics, stride))
    for added in (None, torch.ones_like(x)):
        for needs in ([True, True], [True, False], [False, True]):
            torch.library.opcheck(OPS.conv3x3_backward.default, (dy, x, weight, added, needs, stride))
    if kernel == 1:
        return  # in evaluation it is PyTorch's
    opcheck(ops.inference, x, weight, None, None, IDENTITY, stride, "winograd")
    for residual in (None, dy):
        opcheck(ops.inference, x, weight, NormParams(*vectors, eps=0.05), residual, RELU, stride, "winograd")


@convolutions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_kernels_give_the_shapes_strides_and_dtypes_of_real_results(layout, kernel, stride):
    x, weight, dy = data((2, 5, 3, 6, 7), layout=layout, kernel=kernel, stride=stride)
    n = NormParams(torch.zeros(3), torch.ones(3), eps=0.1)
    end = flat(ops.inference, x, data((2, 5, 3, 6, 7))[1], n, dy, RELU, stride, "winograd")
    calls = [
        *((OPS.conv3x3_forward, (x, weight, statistics, stride)) for statistics in (True, False)),
        *(
            (OPS.conv3x3_backward, (dy, x, w, x, [first, second], stride))
            for w in (weight, weight.contiguous(memory_format=torch.channels_last))
            for first in (True, False)
            for second in (True, False)
        ),
        (ops.inference.overload, end),
    ]
    for op, arguments in calls:
        on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
        results, fakes = ([r] if isinstance(r, Tensor) else r for r in (op(*arguments), op(*on_meta)))
        for real, fake in zip(results, fakes, strict=True):
            assert layout_of(real) == layout_of(fake)


@pytest.mark.parametrize("algorithm", algorithms.ALGORITHMS)
def test_the_functions_compile_to_one_graph_with_the_same_results(algorithm):
    torch._dynamo.reset()
    x, weight, dy = data((4, 64, 64, 16, 16))
    x.requires_grad_()
    weight.requires_grad_()
    n = norm(64, torch.float32, generator("compiles"))

    def convolve(x, weight):
        return functional.conv3x3(x, weight, algorithm=algorithm)

    def measure(x, weight):
        y, statistics, same = functional.conv3x3_with_statistics(x, weight, algorithm=algorithm)
        running = torch.zeros(64), torch.ones(64)
        return functional.batch_norm_act(y, *running, training=True, statistics=statistics, residual=same, relu=False)

    def end(x, weight):
        return functional.conv3x3_norm_act(x, weight, n, residual=x, algorithm=algorithm)

    for f in (convolve, measure, end):
        check_compiled(f, x, weight, dy)


@pytest.mark.parametrize(("algorithm", "ours"), [("winograd", True), ("torch", False)])
def test_the_environment_is_read_while_compiling(algorithm, ours, monkeypatch):
    monkeypatch.setenv("FASTRES_CONV", algorithm)
    called = []

    def compiler(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, weight, _ = data((1, 8, 8, 5, 5))
    torch._dynamo.reset()
    torch.compile(functional.conv3x3, fullgraph=True, backend=compiler)(x, weight)
    assert called and any("fastres.conv3x3" in name for name in called) == ours


@needs_kernels
@convolutions
@pytest.mark.parametrize(
    "shape", [(8, 64, 96, 12, 11), (4, 256, 256, 4, 4), (4, 256, 256, 5, 5), (40, 32, 40, 32, 32)], ids=str
)
def test_results_are_the_same_in_every_run_and_with_any_threads(shape, kernel, stride):
    x, weight, dy = data(shape, kernel=kernel, stride=stride)
    results = {}
    for count in (1, 2, 3, 7, 20):
        with threads(count):
            runs = [
                (
                    *OPS.conv3x3_forward(x, weight, True, stride),
                    *OPS.conv3x3_backward(dy, x, weight, x, [True, True], stride),
                )
                for _ in range(2)
            ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        results[count] = runs[0]
    wanted = exact(x, weight, dy, stride)[2]
    for y, mean, m2, dx, dweight in results.values():
        assert torch.equal(y, results[1][0])
        assert torch.equal(dx, results[1][3])
        # Each thread adds up its share of the tiles.
        assert_close(dweight, wanted, "gradient of weight", length=weight_length(x, stride, kernel))
        assert_statistics(mean, m2, y, "y")


@needs_kernels
@pytest.mark.parametrize(("size", "stride"), [(8, 1), (10, 1), (16, 2)])
def test_either_order_of_work_gives_the_same_bits(size, stride):
    # One image goes by channels and 128 by tiles; an image's results know nothing of the others.
    x, weight, dy = data((128, 64, 64, size, size), stride=stride)
    y, alone = (OPS.conv3x3_forward(t, weight, False, stride)[0] for t in (x, x[:1]))
    assert torch.equal(y[:1], alone)
    dx, alone = (
        OPS.conv3x3_backward(g, t, weight, None, [True, False], stride)[0] for g, t in ((dy, x), (dy[:1], x[:1]))
    )
    assert torch.equal(dx[:1], alone)


@convolutions
def test_one_gradient_alone_is_that_of_both(kernel, stride):
    x, weight, dy = data((2, 24, 40, 6, 6), kernel=kernel, stride=stride)
    for added in (None, torch.ones_like(x)):
        dx, dweight = OPS.conv3x3_backward(dy, x, weight, added, [True, True], stride)
        alone, empty = OPS.conv3x3_backward(dy, x, weight, added, [True, False], stride)
        assert torch.equal(alone, dx) and empty.numel() == 0
        empty, alone = OPS.conv3x3_backward(dy, x, weight, added, [False, True], stride)
        assert torch.equal(alone, dweight) and empty.numel() == 0


@convolutions
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 8])
def test_autograd_takes_the_weights_gradient_without_a_copy(size, layout, kernel, stride):
    x, weight, dy = data((2, 17, 33, size, size), layout=layout, kernel=kernel, stride=stride)
    _, dweight = OPS.conv3x3_backward(dy, x, weight, None, [False, True], stride)
    assert dweight.stride() == weight.stride()


def test_nothing_outside_the_tiles_of_a_nan_is_touched():
    x, weight, _ = data((1, 8, 8, 12, 12))
    clean = functional.conv3x3(x, weight, algorithm="winograd")
    x[0, 3, 0, 0] = math.nan
    y = functional.conv3x3(x, weight, algorithm="winograd")
    assert bool(y[0, :, :2, :2].isnan().all())
    assert torch.equal(y[0, :, 4:], clean[0, :, 4:])
    assert torch.equal(y[0, :, :, 4:], clean[0, :, :, 4:])


# ----------------------------------------------------------------------------------------------------------- statistics


@convolutions
@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6), (40, 8, 40, 9, 7)], ids=str)
def test_y_does_not_depend_on_whether_it_is_measured(shape, kernel, stride):
    x, weight, _ = data(shape, kernel=kernel, stride=stride)
    measured, plain = (OPS.conv3x3_forward(x, weight, statistics, stride) for statistics in (True, False))
    assert torch.equal(measured[0], plain[0])
    assert [t.numel() for t in plain[1:]] == [0, 0]
    if kernel == 3:
        assert torch.equal(functional.conv3x3(x, weight, stride=stride, algorithm="winograd"), plain[0])


@needs_kernels
@convolutions
@pytest.mark.parametrize("shape", [(40, 32, 40, 30, 31), (4, 256, 256, 3, 4), (9, 3, 70, 5, 5)], ids=str)
def test_statistics_of_many_chunks_by_several_workers(shape, kernel, stride):
    x, weight, _ = data(shape, kernel=kernel, stride=stride)
    for workers in (1, 2, 3, 5):
        with threads(workers):
            y, mean, m2 = OPS.conv3x3_forward(x, weight, True, stride)
        assert_statistics(mean, m2, y, f"y by {workers} workers")


@convolutions
@pytest.mark.parametrize("shape", [(8, 20, 40, 16, 15), (2, 20, 40, 4, 6)], ids=str)
def test_statistics_far_from_zero_lose_no_precision(shape, kernel, stride):
    n, c, k, h, w = shape
    x = activation((n, c, h, w), torch.float32, "channels_last", generator(shape), mean=1e4, std=1.0)
    weight = torch.zeros(k, c, kernel, kernel)
    weight[torch.arange(k), torch.arange(k) % c, kernel // 2, kernel // 2] = 1  # padding's zeros stay out of the sums
    y, mean, m2 = OPS.conv3x3_forward(x, weight, True, stride)
    exact = y.double()
    exact_m2 = (exact - exact.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    # The mean is stored in float32, half a spacing of 1e4 away at best; its own error takes as much again.
    assert (mean.double() - exact.mean((0, 2, 3))).abs().max() <= 2 * 2**-11
    assert ((m2.double() - exact_m2).abs() / exact_m2).max() < 1e-5


@convolutions
@pytest.mark.parametrize("shape", [(37, 12, 20, 1, 1), (300, 8, 5, 1, 1), (2, 3, 40, 1, 1)], ids=str)
def test_the_variance_of_a_constant_channel_is_nothing(shape, kernel, stride):
    n, c, k, h, w = shape
    x, weight, _ = data((1, c, k, h, w), kernel=kernel)
    weight[0] = 0
    y, mean, m2 = OPS.conv3x3_forward(x.expand(n, -1, -1, -1), weight, True, stride)
    assert torch.equal(y, y[:1].expand_as(y))
    value = y[0, :, 0, 0]
    assert ((mean - value).abs() <= 2 * torch.finfo(torch.float32).eps * value.abs()).all()
    assert (m2 <= n * (2 * torch.finfo(torch.float32).eps * value).square()).all()
    assert mean[0] == 0 and m2[0] == 0


# ------------------------------------------------------------------------------------------------------- added gradient


@convolutions
@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6), (40, 8, 40, 9, 7)], ids=str)
@pytest.mark.parametrize("memory", ["nchw", "channels_last", "expanded", "every other"])
def test_an_added_gradient_of_any_strides_is_added_once(shape, memory, kernel, stride):
    x, weight, dy = data(shape, kernel=kernel, stride=stride)
    added = activation(x.shape, torch.float32, "channels_last", generator(shape, memory))
    if memory in LAYOUTS:
        added = added.contiguous(memory_format=LAYOUTS[memory])
    elif memory == "expanded":
        added = added[:1, :, :1, :1].expand_as(x)
    else:
        added = added.repeat_interleave(2, 3)[..., ::2]
    alone, dweight = OPS.conv3x3_backward(dy, x, weight, None, [True, True], stride)
    dx, same = OPS.conv3x3_backward(dy, x, weight, added, [True, True], stride)
    assert_close(dx, alone.double() + added, "gradient of x")
    assert torch.equal(same, dweight)


@convolutions
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("asked", ["x", "weight", "both"])
@pytest.mark.parametrize("used", ["y", "x", "both"])
def test_every_use_of_the_input_sends_its_gradient_back(ours, asked, used, kernel, stride):
    algorithm = OURS[kernel] if ours else "torch"
    x, weight, dy = data((3, 20, 36, 6, 7), algorithm, asked, used, kernel=kernel, stride=stride)
    other = activation(x.shape, torch.float32, "nchw", generator(algorithm, asked, used))
    _, dx, dweight = exact(x, weight, dy, stride)
    x.requires_grad_(asked != "weight")
    weight.requires_grad_(asked != "x")
    y, _, same = WITH_STATISTICS[kernel](x, weight, stride=stride, algorithm=algorithm)
    loss = torch.zeros((), requires_grad=True)
    if used != "x":
        loss = loss + (y * dy).sum()
    if used != "y":
        loss = loss + (same * other).sum()
    loss.backward()
    if asked == "weight":
        assert x.grad is None
    else:
        length = input_length(36, form_of(x, stride, kernel))
        assert_close(x.grad, (used != "x") * dx + (used != "y") * other, "gradient of x", length=length)
    if asked == "x" or used == "x":
        assert weight.grad is None
    else:
        assert_close(weight.grad, dweight, "gradient of weight", length=weight_length(x, stride, kernel))


@convolutions
def test_gradients_of_sums_have_no_strides_and_are_taken(kernel, stride):
    x, weight, dy = data((2, 9, 20, 5, 6), kernel=kernel, stride=stride)
    x.requires_grad_()
    weight.requires_grad_()
    y, _, same = WITH_STATISTICS[kernel](x, weight, stride=stride, algorithm=OURS[kernel])
    (y.sum() + same.sum()).backward()
    _, dx, dweight = exact(x, weight, torch.ones_like(dy), stride)
    assert_close(x.grad, dx + 1, "gradient of x", length=input_length(20, form_of(x, stride, kernel)))
    assert_close(weight.grad, dweight, "gradient of weight", length=weight_length(x, stride, kernel))


# ----------------------------------------------------------------------------------------------------------- evaluation


def end(x: Tensor, weight: Tensor, n: NormParams, stride: int = 1, **options: object) -> Tensor:
    with torch.no_grad():
        return functional.conv3x3_norm_act(x, weight, n, stride=stride, algorithm="winograd", **options)


def check_end(
    x: Tensor, weight: Tensor, n: NormParams, stride: int = 1, **options: Tensor | bool | Activation | None
) -> None:
    exact = [t.detach().double() if isinstance(t, Tensor) else t for t in options.values()]
    product = reference.conv3x3(x.double(), weight.double(), stride)
    wanted = reference.batch_norm_act(product, *double_norm(n)[:4], eps=n.eps, **dict(zip(options, exact, strict=True)))
    scale = torch.rsqrt(n.running_var + n.eps) * (1 if n.weight is None else n.weight.detach().abs())
    noise = float(bound(product, torch.float32, output_length(x.shape[1], form_of(x, stride))).max() * scale.max())
    y = end(x, weight, n, stride, **options)
    assert_close(y, wanted.detach(), "y", noise=noise)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@strides
def test_the_end_of_a_block_in_evaluation_agrees_with_float64(shape, layout, stride):
    x, weight, residual = data(shape, "end", layout, layout=layout, stride=stride)
    n = norm(shape[2], torch.float32, generator(shape, layout))
    for relu in (True, False):
        for r in (None, residual):
            check_end(x, weight, n, stride, residual=r, relu=relu)
        check_end(x, weight, n._replace(weight=None, bias=None), stride, residual=residual, relu=relu)
        check_end(x, weight, n._replace(weight=None), stride, relu=relu)
        check_end(x, weight, n._replace(bias=None), stride, residual=residual, relu=relu)


def test_the_end_of_a_block_takes_any_strides_and_parameters_of_other_dtypes():
    shape = (3, 20, 36, 5, 6)
    x, weight, residual = data(shape)
    n = norm(36, torch.float32, generator(shape))
    check_end(x, weight.transpose(2, 3).contiguous().transpose(2, 3), n, residual=residual)
    check_end(x, weight.repeat(2, 2, 1, 1)[::2, :20], n, residual=residual.contiguous())
    check_end(x[:1].expand_as(x), weight, n, residual=residual[:, :, :1].expand_as(residual))
    check_end(x, weight, NormParams(*(t.detach().bfloat16().double() for t in n[:4]), eps=n.eps), residual=residual)
    check_end(x, weight, n._replace(eps=3.0))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_end_of_a_block_with_gradients_is_the_same_function(stride):
    shape = (3, 20, 36, 5, 6)
    x, weight, residual = data(shape, stride)
    residual = residual[:, :, : output_size(5, stride), : output_size(6, stride)]
    x, weight, residual = (t.detach().requires_grad_() for t in (x, weight, residual))
    case = Case({"x": x, "weight": weight, "residual": residual}, {"norm": norm(36, torch.float32, generator(shape))})

    def call(f, c: Case, **options) -> Tensor:
        return f(*(c.tensors[k] for k in ("x", "weight")), c.norms["norm"], residual=c.tensors["residual"], **options)

    check_case(
        case,
        lambda c: call(functional.conv3x3_norm_act, c, stride=stride, algorithm="winograd"),
        lambda c: call(reference.conv3x3_norm_act, c, stride=stride),
        lambda c: call(reference.conv3x3_norm_act, c, stride=stride, relu=False),
        torch.float32,
        generator(shape, "dy"),
        length=output_length(36),
        product_eps=torch.finfo(torch.float32).eps * math.sqrt(output_length(20)),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6), (9, 20, 40, 8, 9)], ids=str)
def test_every_activation_ends_a_block_in_evaluation(shape, kind):
    """No derivative is beyond 1.13: an activation lets the error of its input through, and adds one of its own."""
    x, weight, residual = data(shape, kind)
    n, act = norm(shape[2], torch.float32, generator(shape, kind)), Activation.of(kind)
    for f in (act, act._replace(alpha=2 * act.alpha)):
        for r in (residual, None):
            check_end(x, weight, n, residual=r, activation=f)


def test_nan_passes_the_relu_at_the_end_of_a_block():
    x, weight, residual = data((1, 8, 20, 12, 12))
    residual[0, 3, 5, 7] = math.nan
    y = end(x, weight, norm(20, torch.float32, generator()), residual=residual)
    assert bool(y[0, 3, 5, 7].isnan()) and int(y.isnan().sum()) == 1


# ----------------------------------------------------------------------------------------------------- updated weights


def _by_fused_optimizer(weight: Tensor) -> None:
    weight.grad = -weight.detach().clone()
    torch.optim.SGD([weight], lr=1.0, fused=True).step()


def _by_numpy(weight: Tensor) -> None:
    alias = weight.detach().numpy()
    alias *= 2


def _by_storage(weight: Tensor) -> None:
    weight.untyped_storage().copy_((2 * weight.detach()).untyped_storage())


def _by_assignment(weight: Tensor) -> None:
    weight.data = weight.data * 2  # as likely as not in memory that was used before


DOUBLE = {
    "in place": lambda weight: weight.detach().mul_(2),
    "data": lambda weight: weight.data.mul_(2),
    "data assigned": _by_assignment,
    "numpy": _by_numpy,
    "storage": _by_storage,
    "fused optimizer": _by_fused_optimizer,
}


@pytest.mark.skipif(backend.DEVICE.type != "cpu", reason="numpy shares memory with CPU tensors only")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("write", DOUBLE)
@pytest.mark.parametrize(
    ("images", "size", "algorithm"), [(16, 8, "winograd"), (1, 4, "winograd"), (1, 4, "auto")], ids=str
)
def test_every_write_to_the_weight_is_seen_by_the_next_call(images, size, algorithm, write, layout):
    x, weight, _ = data((images, 32, 32, size, size), write)
    weight = weight.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

    def evaluate() -> Tensor:
        with torch.no_grad():
            return functional.conv3x3(x, weight, algorithm=algorithm)

    before = evaluate()
    for factor in (2, 4):
        DOUBLE[write](weight)
        assert torch.equal(evaluate(), factor * before)  # powers of two change no rounding


def test_the_memory_of_one_call_says_nothing_to_the_next():
    # Calls take their memory from those before them: larger and smaller ones, ragged ones and those of other kernels.
    shapes = [(16, 8, 8, 8, 8), (1, 70, 33, 4, 4), (1, 130, 40, 9, 9), (8, 64, 64, 16, 16), (1, 5, 3, 2, 2)]
    cases = [data(shape) for shape in shapes]

    def run(x: Tensor, weight: Tensor) -> list[Tensor]:
        found = [functional.conv3x3(x, weight, algorithm=algorithm) for algorithm in ("winograd", "auto")]
        return [*found, *OPS.conv3x3_backward(found[0], x, weight, None, [True, True])]

    first = [run(x, weight) for x, weight, _ in cases]
    for order in (list(range(5)), [4, 1, 3, 0, 2]):
        for i in order:
            assert all(torch.equal(a, b) for a, b in zip(run(*cases[i][:2]), first[i], strict=True))
    y = first[0][0].clone()
    run(*cases[3][:2])
    assert torch.equal(first[0][0], y)  # results are the caller's own


# ------------------------------------------------------------------------------------------------------------- choosing


def calls(monkeypatch, x: Tensor, weight: Tensor, **options: object) -> bool:
    """Whether Winograd's kernels served the call."""
    seen, inference = [], ops.inference
    monkeypatch.setattr(ops, "inference", lambda *args: seen.append(args) or inference(*args))
    functional.conv3x3(x, weight, **options)
    return any(args[-1] == "winograd" for args in seen)


def test_auto_takes_winograd_where_it_pays(monkeypatch):
    monkeypatch.delenv("FASTRES_CONV", raising=False)
    x, weight, _ = data((8, 64, 64, 32, 32))
    assert calls(monkeypatch, x, weight)
    assert calls(monkeypatch, x, weight, algorithm="auto")
    assert not calls(monkeypatch, x, weight, algorithm="torch")
    assert not calls(monkeypatch, x.contiguous(), weight)
    assert not calls(monkeypatch, x.double(), weight.double())
    for tiles in (True, False):
        monkeypatch.setattr(algorithms, "_has_matrix_units", lambda tiles=tiles: tiles)
        low = x.bfloat16(), weight.bfloat16()
        assert calls(monkeypatch, *low) is not tiles
        assert calls(monkeypatch, *low, algorithm="winograd")
        assert not calls(monkeypatch, *low, algorithm="torch")
        assert not calls(monkeypatch, low[0].contiguous(), low[1])
        assert calls(monkeypatch, x, weight)
    few, thin, _ = data((8, 3, 64, 32, 32))
    assert not calls(monkeypatch, few, thin)
    assert calls(monkeypatch, few, thin, algorithm="winograd")
    small, wide, _ = data((70, 64, 64, 1, 1))
    assert calls(monkeypatch, small, wide)
    assert not calls(monkeypatch, small[:1], wide)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        # images, inputs, outputs, height, width: as measured, see docs/convolution.md
        ((64, 3, 64, 32, 32), False),
        ((64, 8, 8, 32, 32), False),
        ((64, 8, 16, 32, 32), False),
        ((64, 16, 8, 32, 32), True),
        ((64, 16, 16, 32, 32), True),
        ((64, 24, 24, 16, 16), True),
        ((64, 32, 16, 32, 32), True),
        ((64, 32, 32, 32, 32), True),
        ((1, 64, 64, 32, 32), True),
        ((1, 128, 128, 16, 16), True),
        ((1, 256, 256, 8, 8), True),
        ((2, 256, 256, 8, 8), True),
        ((1, 512, 512, 4, 4), True),
        ((8, 512, 512, 4, 4), True),
        ((128, 512, 512, 4, 4), True),
        ((1, 512, 512, 1, 1), False),
        ((4, 512, 512, 1, 1), True),
        ((512, 512, 512, 1, 1), True),
        ((4, 64, 64, 2, 2), True),
        ((128, 512, 512, 2, 2), True),
    ],
)
def test_the_cost_model_decides_as_was_measured(case, wanted):
    n, inputs, outputs, h, w = case
    problem = ConvProblem(torch.float32, (n, inputs, h, w), outputs, 3, 1, True, True, 1, "avx512", False)
    assert (algorithms.choose_algorithm(problem).algorithm == "winograd") is wanted


def test_the_argument_comes_before_the_environment(monkeypatch):
    x, weight, _ = data((2, 8, 8, 5, 5))
    x = x.contiguous()  # which "auto" leaves to PyTorch
    monkeypatch.setenv("FASTRES_CONV", "winograd")
    assert calls(monkeypatch, x, weight)
    assert not calls(monkeypatch, x, weight, algorithm="auto")
    monkeypatch.setenv("FASTRES_CONV", "torch")
    assert not calls(monkeypatch, x, weight)
    assert calls(monkeypatch, x, weight, algorithm="winograd")
    monkeypatch.setenv("FASTRES_CONV", "")
    assert not calls(monkeypatch, x, weight)


def test_other_strides_are_pytorch_s_convolution():
    x, weight, _ = data((2, 8, 8, 9, 10))
    assert torch.equal(functional.conv3x3(x, weight, stride=3, algorithm="winograd"), reference.conv3x3(x, weight, 3))
    assert functional.conv3x3_with_statistics(x, weight, stride=3, algorithm="winograd").statistics is None


def test_other_dtypes_are_pytorch_s_convolution():
    x, weight, _ = data((2, 8, 8, 5, 5))
    for dtype in (torch.float64, torch.float16):
        a, w = x.to(dtype), weight.to(dtype)
        assert torch.equal(functional.conv3x3(a, w, algorithm="winograd"), reference.conv3x3(a, w))
        assert functional.conv3x3_with_statistics(a, w, algorithm="winograd").statistics is None
        if COMPILED:
            with pytest.raises(TypeError, match=r"x: expected dtype float32 or bfloat16"):
                OPS.conv3x3_forward(a, w, False)
        else:
            assert torch.equal(OPS.conv3x3_forward(a, w, False)[0], reference.conv3x3(a, w))
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv3x3(x, weight, algorithm="winograd")
        assert y.dtype == torch.bfloat16
        assert torch.equal(functional.conv3x3(x.bfloat16(), weight, algorithm="winograd"), y)


@both_kernels
def test_empty_batches_are_measured_by_nobody(kernel):
    x, weight = torch.randn(0, 8, 5, 5), torch.randn(4, 8, kernel, kernel, requires_grad=True)
    y, statistics, same = WITH_STATISTICS[kernel](x, weight, algorithm=OURS[kernel])
    assert y.shape == (0, 4, 5, 5) and statistics is None and same.shape == x.shape
    assert OPS.conv3x3_forward(x, weight.detach(), False)[0].shape == (0, 4, 5, 5)
    dx, dweight = OPS.conv3x3_backward(y.detach(), x, weight.detach(), None, [True, True])
    assert dx.shape == x.shape and torch.equal(dweight, torch.zeros_like(weight))


def test_empty_batches_pass_through():
    x, weight = torch.randn(0, 8, 5, 5), torch.randn(4, 8, 3, 3, requires_grad=True)
    y = functional.conv3x3(x, weight, algorithm="winograd")
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    n = norm(4, torch.float32, generator())
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert functional.conv3x3_norm_act(x, weight, n, algorithm="winograd").shape == (0, 4, 5, 5)
    assert ops.inference(x, weight.detach(), None, None, IDENTITY, 1, "winograd").shape == (0, 4, 5, 5)


def of_kernel(arguments: dict[str, object], kernel: int) -> dict[str, object]:
    """Arguments of a function with a 3x3 kernel for one of this size; a weight of a wrong size becomes another such."""
    weight = arguments["weight"]
    if kernel == 1 and isinstance(weight, Tensor):
        size = 3 if weight.shape[2] == 1 else 1
        arguments["weight"] = weight.new_zeros(*weight.shape[:2], size, size)
    return arguments


BAD_CONVOLUTIONS = [
    ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
    ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
    ({"x": torch.zeros(8, 5, 5)}, ValueError, r"x: expected 4 dimensions.*got shape \(8, 5, 5\)"),
    ({"x": torch.zeros(1, 8, 5, 5, dtype=torch.int32)}, TypeError, "x: expected float32.*got torch.int32"),
    ({"weight": torch.zeros(4, 8, 3, 3).double()}, TypeError, "weight: expected dtype torch.float32"),
    ({"weight": torch.zeros(4, 7, 3, 3)}, ValueError, r"weight: expected shape \(K, 8, (3|1), \1\).*got \(4, 7"),
    ({"weight": torch.zeros(4, 8, 1, 1)}, ValueError, r"weight: expected shape \(K, 8, (3|1), \1\).*got \(4, 8"),
    ({"weight": torch.zeros(4, 8, 3, 3, device="meta")}, ValueError, "weight: expected a tensor on cpu"),
    ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
    ({"stride": (2, 2)}, TypeError, "stride: expected an int, got tuple"),
    ({"stride": True}, TypeError, "stride: expected an int, got bool"),
    ({"algorithm": "fast"}, ValueError, "algorithm: expected one of .*'winograd'.*got 'fast'"),
    ({"algorithm": 3}, TypeError, "algorithm: expected a string or None, got int"),
]


@pytest.mark.parametrize(
    ("function", "kernel"),
    [(functional.conv3x3, 3), (functional.conv3x3_with_statistics, 3), (functional.conv1x1_with_statistics, 1)],
)
@pytest.mark.parametrize(("change", "error", "message"), BAD_CONVOLUTIONS)
def test_bad_arguments_are_named(function, kernel, change, error, message):
    arguments = of_kernel({"x": torch.zeros(1, 8, 5, 5), "weight": torch.zeros(4, 8, 3, 3)} | change, kernel)
    with pytest.raises(error, match=message):
        function(arguments.pop("x"), arguments.pop("weight"), **arguments)


V, PLANE = torch.ones(4), torch.zeros(1, 4, 5, 5)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("algorithm", ["winograd", "torch"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_CONVOLUTIONS,
        ({"norm": (V, V)}, TypeError, "^norm: expected NormParams, got tuple"),
        ({"norm": NormParams(None, None)}, ValueError, r"^norm\.running_mean: expected running statistics.*got None"),
        ({"norm": NormParams(V, None)}, ValueError, r"^norm\.running_mean and norm\.running_var: expected both"),
        ({"norm": NormParams(V[:3], V)}, ValueError, r"^norm\.running_mean: expected shape \(4,\).*got \(3,\)"),
        ({"norm": NormParams(V, V, V[:1])}, ValueError, r"^norm\.weight: expected shape \(4,\).*got \(1,\)"),
        (
            {"norm": NormParams(V, V, V, V.long())},
            TypeError,
            r"^norm\.bias: expected a floating-point.*got torch.int64",
        ),
        ({"norm": NormParams(V, V, [1.0])}, TypeError, r"^norm\.weight: expected a Tensor or None, got list"),
        ({"norm": NormParams(V, V, V, V.to("meta"))}, ValueError, r"^norm\.bias: expected a tensor on cpu.*on meta"),
        ({"norm": NormParams(V, V, eps=-1)}, ValueError, r"^norm\.eps: expected at least 0, got -1"),
        ({"norm": NormParams(V, V, eps="1")}, TypeError, r"^norm\.eps: expected a number, got str"),
        ({"residual": [1.0]}, TypeError, "^residual: expected a Tensor, got list"),
        ({"residual": PLANE[:, :3]}, ValueError, r"^residual: expected shape \(1, 4, 5, 5\), got \(1, 3, 5, 5\)"),
        ({"residual": PLANE.double()}, TypeError, "^residual: expected dtype torch.float32, got torch.float64"),
        ({"residual": PLANE.to("meta")}, ValueError, "^residual: expected a tensor on cpu, got one on meta"),
        ({"relu": 1}, TypeError, "^relu: expected a bool, got int"),
    ],
)
def test_bad_arguments_of_the_end_of_a_block_are_named(change, error, message, algorithm, gradients):
    arguments = {"x": torch.zeros(1, 8, 5, 5), "weight": torch.zeros(4, 8, 3, 3, requires_grad=gradients)}
    arguments |= {"norm": NormParams(V, V), "algorithm": algorithm} | change
    with pytest.raises(error, match=message):
        functional.conv3x3_norm_act(arguments.pop("x"), arguments.pop("weight"), arguments.pop("norm"), **arguments)


def test_a_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("FASTRES_CONV", "quick")
    with pytest.raises(ValueError, match=r"FASTRES_CONV: expected one of .*got 'quick'"):
        functional.conv3x3(torch.zeros(1, 8, 5, 5), torch.zeros(4, 8, 3, 3))


@needs_kernels
def test_the_operators_name_bad_arguments():
    x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(4, 8, 3, 3)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions"):
        OPS.conv3x3_forward(x[0], weight, False)
    with pytest.raises(ValueError, match=r"weight: expected shape \(K, 8, 3, 3\) or \(K, 8, 1, 1\)"):
        OPS.conv3x3_forward(x, weight[:, :4], False)
    with pytest.raises(ValueError, match=r"weight: expected shape \(K, 8, 3, 3\) or \(K, 8, 1, 1\)"):
        OPS.conv3x3_forward(x, weight[..., :1], False)
    with pytest.raises(ValueError, match=r"conv_weight: expected a 3x3 kernel, got \[4, 8, 1, 1\]"):
        ops.inference(x, weight[..., :1, :1], None, None, IDENTITY, 1, "gemm")
    with pytest.raises(TypeError, match=r"weight: expected dtype"):
        OPS.conv3x3_forward(x, weight.double(), False)
    for kernel, stride in ((1, 2), (3, 3), (3, 0)):
        w = weight[..., :kernel, :kernel]
        with pytest.raises(ValueError, match=f"stride: expected 1, or 2 with a 3x3 kernel, got {stride}"):
            OPS.conv3x3_forward(x, w, False, stride)
        with pytest.raises(ValueError, match=f"stride: expected 1, or 2 with a 3x3 kernel, got {stride}"):
            OPS.conv3x3_backward(PLANE, x, w, None, [True, True], stride)
    with pytest.raises(ValueError, match=r"dy: expected shape \[1, 4, 5, 5\], got \[1, 4, 5, 4\]"):
        OPS.conv3x3_backward(torch.zeros(1, 4, 5, 4), x, weight, None, [True, True])
    with pytest.raises(ValueError, match=r"dy: expected shape \[1, 4, 3, 3\], got \[1, 4, 5, 5\]"):
        OPS.conv3x3_backward(PLANE, x, weight, None, [True, True], 2)
    with pytest.raises(ValueError, match=r"added: expected shape"):
        OPS.conv3x3_backward(PLANE, x, weight, PLANE, [True, True])
    with pytest.raises(ValueError, match=r"added: expected shape"):
        OPS.conv3x3_backward(PLANE, x, weight, x.double(), [True, True])
    with pytest.raises(TypeError, match=r"x: expected dtype float32"):
        ops.inference(x.double(), weight.double(), None, None, IDENTITY, 1, "winograd")
    with pytest.raises(ValueError, match=r"residual: expected shape"):
        ops.inference(x, weight, NormParams(V, V), x, IDENTITY, 1, "winograd")
    with pytest.raises(ValueError, match=r"mean: expected"):
        ops.inference(x, weight, NormParams(V[:3], V), None, IDENTITY, 1, "winograd")
    with pytest.raises(ValueError, match=r'algorithm: expected "winograd" or "gemm", got "torch"'):
        ops.inference(x, weight, None, None, IDENTITY, 1, "torch")
    with pytest.raises(ValueError, match=r'kind: expected one of .*, got "swish"'):
        ops.inference(x, weight, NormParams(V, V), None, Activation("swish"), 1, "winograd")
