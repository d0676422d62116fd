"""Packed weights, and the convolution that reads them: as one matrix product, and by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import IDENTITY, KINDS, RELU, Activation
from fastres.contract import ConvShape
from fastres.ops import conv3x3
from fastres.ops.packed import pack, packed_shape, unpack
from fastres.ops.packed_convolution import packed_convolution
from fastres.ops.products import multiplies_pairs
from tests.operators import flat, opcheck
from tests.ops.test_conv3x3 import layout_of, needs_kernels
from tests.oracle import LAYOUTS, SEED, activation, assert_close, form_of, generator, output_length, threads

LOW = torch.bfloat16

# images, inputs, outputs, height, width, kernel, stride, padding: whole groups of 16 and 32, ragged ones, one position,
# many blocks, depths of several steps, windows that lie outside altogether.
SHAPES = [
    (1, 64, 96, 4, 4, 3, 1, 1),
    (1, 20, 33, 7, 9, 3, 2, 1),
    (2, 5, 3, 6, 5, 3, 1, 1),
    (1, 1, 1, 1, 1, 3, 1, 1),
    (3, 17, 70, 3, 2, 3, 2, 1),
    (1, 130, 31, 8, 8, 3, 2, 1),
    (1, 500, 40, 6, 9, 3, 1, 1),
    (2, 300, 33, 9, 7, 3, 2, 1),
    (40, 24, 48, 9, 10, 3, 1, 1),
    (30, 24, 48, 2, 2, 3, 1, 1),
    (9, 33, 70, 5, 6, 3, 2, 1),
    (1, 16, 40, 1, 40, 3, 3, 1),
    (2, 64, 64, 7, 7, 1, 1, 0),
    (1, 700, 96, 7, 7, 1, 1, 0),
    (5, 33, 130, 3, 4, 1, 1, 0),
    (2, 48, 64, 9, 8, 1, 2, 0),
    (1, 19, 33, 10, 7, 1, 3, 0),
    (30, 64, 32, 20, 20, 1, 1, 0),
    (2, 3, 64, 32, 31, 7, 2, 3),
    (1, 3, 16, 9, 9, 3, 1, 1),
    (2, 3, 24, 5, 6, 2, 1, 0),
    (1, 4, 8, 2, 3, 5, 2, 5),
]


def data(shape: tuple[int, ...], dtype: torch.dtype, *key: object, layout: str = "channels_last") -> tuple[Tensor, ...]:
    """x, weight, bias and residual."""
    n, c, k, h, w, kernel = shape[:6]
    gen = generator(shape, dtype, *key)
    x = activation((n, c, h, w), dtype, layout, gen)
    size = (k, c, kernel, kernel)
    weight = activation(size, torch.float32, layout, gen, mean=0.02, std=(kernel * kernel * c) ** -0.5)
    conv = conv_of(shape)
    bias = torch.randn(k, generator=gen, device="cpu").to(x.device)
    return x, weight, bias, activation((n, k, conv.output_size(h), conv.output_size(w)), dtype, layout, gen)


def conv_of(shape: tuple[int, ...]) -> ConvShape:
    return ConvShape(shape[2], *shape[5:])


def is_winograds(shape: tuple[int, ...]) -> bool:
    return shape[5:] in ((3, 1, 1), (3, 2, 1))


def check(shape: tuple[int, ...], layout: str, dtype: torch.dtype, kinds: Iterable[str] = ()) -> None:
    c, conv = shape[1], conv_of(shape)
    x, weight, bias, residual = data(shape, dtype, layout, layout=layout)
    ends = [(bias, residual, RELU), (None, residual, IDENTITY), (bias, None, IDENTITY), (None, None, RELU)]
    ways = [("gemm", False), ("gemm", True), *([("winograd", True)] * is_winograds(shape))]
    for algorithm, padded in ways:
        packed = pack(weight, padded=padded)
        # Products in pairs round the weights.
        in_pairs = algorithm == "gemm" and dtype == LOW and multiplies_pairs()
        w = weight.to(LOW) if in_pairs else weight
        y = F.conv2d(x.double(), w.double(), stride=conv.stride, padding=conv.padding)
        for b, r, f in [*ends, *((bias, residual, Activation.of(kind)) for kind in kinds)]:
            wanted = y if b is None else y + b.double()[:, None, None]
            wanted = f.forward(wanted if r is None else wanted + r.double())
            got = packed_convolution(x, packed, b, r, f, conv, algorithm)
            length = conv.kernel**2 * c if algorithm == "gemm" else output_length(c, form_of(x, conv.stride))
            assert_close(got, wanted, f"y by {algorithm}, {f.kind}", length=length)
            assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_are_those_of_float64(shape, layout):
    check(shape, layout, torch.float32)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_bfloat16_is_a_storage_format(shape):
    check(shape, "channels_last", LOW)


@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6, 3, 1, 1), (1, 20, 40, 7, 9, 3, 2, 1), (2, 20, 70, 5, 4, 1, 1, 0)])
def test_every_activation_agrees_with_float64(shape):
    check(shape, "channels_last", torch.float32, KINDS)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 40),
        st.integers(1, 70),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(1, 7),
        st.integers(1, 3),
        st.integers(0, 4),
    ),
    st.sampled_from(sorted(LAYOUTS)),
)
def test_any_shape_agrees_with_float64(shape, layout):
    hypothesis.assume(min(shape[3:5]) + 2 * shape[7] >= shape[5])
    check(shape, layout, torch.float32)


def test_nan_and_infinities_stay_where_they_are():
    x, weight, bias, _ = data((1, 20, 33, 6, 5, 1, 1, 0), torch.float32)
    x[0, 3, 2, 2], x[0, 4, 4, 1] = float("nan"), float("inf")
    y = packed_convolution(x, pack(weight, padded=False), bias, None, RELU, ConvShape(33, 1, 1, 0), "gemm")
    wanted = F.relu(F.conv2d(x, weight, bias))
    assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
    assert y.isnan().any() and y.isinf().any()


@pytest.mark.parametrize(
    ("size", "conv", "wanted"),
    [
        ((0, 8, 4, 4), ConvShape(16, 1, 1, 0), (0, 16, 4, 4)),
        ((2, 8, 0, 4), ConvShape(16, 1, 1, 0), (2, 16, 0, 4)),
        ((1, 8, 2, 9), ConvShape(16, 3, 1, 0), (1, 16, 0, 7)),
    ],
)
def test_an_output_without_elements_is_made(size, conv, wanted):
    weight = torch.zeros(conv.outputs, size[1], conv.kernel, conv.kernel)
    y = packed_convolution(torch.zeros(size), pack(weight, padded=False), None, None, RELU, conv, "gemm")
    assert y.shape == wanted


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, LOW, torch.float64])
@pytest.mark.parametrize("channels", [(1, 1), (16, 32), (17, 33), (32, 16), (5, 48)], ids=str)
def test_unpacking_gives_the_weight_back(channels, dtype, kernel, padded):
    c, k = channels
    weight = torch.randn(k, c, kernel, kernel, generator=generator(channels, dtype), device="cpu").to(dtype)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.transpose(2, 3)):
        packed = pack(w, padded=padded)
        assert packed.shape == packed_shape(k, c, kernel, padded=padded)
        assert packed.dtype == torch.float32 and packed.is_contiguous()
        assert torch.equal(unpack(packed, k, c, kernel), w.float())
        assert int(packed.count_nonzero()) == int(w.count_nonzero())  # zeros elsewhere


@needs_kernels
def test_an_infinite_weight_of_a_later_block_of_inputs_shows_only_where_it_is_read():
    x, weight = torch.ones(1, 500, 6, 9), torch.full((40, 500, 3, 3), 0.01)
    weight[33, 490, 0, 0] = float("inf")  # above and to the left of a pixel
    y = packed_convolution(x, pack(weight, padded=True), None, None, IDENTITY, ConvShape(40, 3, 1, 1), "winograd")
    assert y[0, 33, 1:, 1:].isinf().all() and y[0, 33, 0].isfinite().all() and y[0, 33, :, 0].isfinite().all()
    assert torch.cat([y[0, :33], y[0, 34:]]).isfinite().all()


@pytest.mark.parametrize(("padded", "depth"), [(True, 32), (False, 20)])
def test_the_order_of_packed_weights_is_the_one_that_saved_models_hold(padded, depth):
    """On every processor: element [k // 16, tap * C' + c, k % 16]."""
    weight = torch.arange(40 * 20 * 9.0).reshape(40, 20, 3, 3)
    packed = pack(weight, padded=padded)
    assert packed.shape == (4, 9 * depth, 16)
    for k, c, tap in ((0, 0, 0), (39, 19, 8), (16, 3, 5), (15, 16, 1)):
        assert packed[k // 16, tap * depth + c, k % 16] == weight[k, c, tap // 3, tap % 3]


@needs_kernels
@pytest.mark.parametrize("algorithm", ["gemm", "winograd"])
def test_packed_and_plain_weights_give_the_same_bits(algorithm):
    shapes = [
        (1, 64, 96, 4, 4, 3, 1, 1),
        (9, 20, 33, 8, 9, 3, 1, 1),
        (1, 20, 33, 10, 9, 3, 1, 1),
        (3, 20, 33, 8, 9, 3, 2, 1),
    ]
    for shape in shapes:
        x, weight, _, _ = data(shape, torch.float32, algorithm)
        plain = conv3x3.inference(x, weight, None, None, IDENTITY, shape[6], algorithm)
        packed = packed_convolution(x, pack(weight, padded=True), None, None, IDENTITY, conv_of(shape), algorithm)
        assert torch.equal(packed, plain)


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [
        ((3, 48, 100, 5, 5, 3, 1, 1), "gemm"),
        ((3, 48, 100, 5, 5, 3, 1, 1), "winograd"),
        ((3, 48, 100, 9, 9, 3, 2, 1), "winograd"),
        ((1, 300, 520, 4, 5, 1, 1, 0), "gemm"),
        ((2, 40, 64, 17, 19, 1, 2, 0), "gemm"),
    ],
)
def test_threads_change_no_bit(shape, algorithm):
    x, weight, bias, residual = data(shape, torch.float32)
    packed, results = pack(weight, padded=True), []
    for count in (1, 2, 7):
        with threads(count):
            results.append(packed_convolution(x, packed, bias, residual, RELU, conv_of(shape), algorithm))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [
        ((2, 17, 33, 5, 6, 3, 1, 1), "gemm"),
        ((2, 17, 33, 5, 6, 3, 1, 1), "winograd"),
        ((2, 17, 33, 5, 6, 3, 2, 1), "gemm"),
        ((2, 17, 33, 5, 6, 3, 2, 1), "winograd"),
        ((2, 17, 33, 5, 6, 1, 1, 0), "gemm"),
    ],
)
def test_opcheck_passes_and_fake_kernels_give_the_layout(shape, algorithm):
    x, weight, bias, residual = data(shape, torch.float32, layout="nchw")
    packed = pack(weight, padded=True)
    for b, r in ((bias, residual), (None, None)):
        arguments = (x, packed, b, r, RELU, conv_of(shape), algorithm)
        opcheck(packed_convolution, *arguments)
        on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in flat(packed_convolution, *arguments)]
        real, fake = packed_convolution(*arguments), packed_convolution.overload(*on_meta)
        assert layout_of(real) == layout_of(fake)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(2, 9 * 16, 16)}, ValueError, r"packed: expected shape \[4, 153, 16\], got \[2, 144"),
        ({"packed": torch.zeros(4, 288, 16).double()}, TypeError, "packed: expected dtype float32, got Double"),
        ({"shape": ConvShape(0, 3, 1, 1)}, ValueError, "outputs: expected at least 1, got 0"),
        ({"shape": ConvShape(33, 0, 1, 1)}, ValueError, "kernel: expected at least 1, got 0"),
        ({"shape": ConvShape(33, 3, 1, -1)}, ValueError, "padding: expected at least 0, got -1"),
        ({"bias": torch.zeros(32)}, ValueError, r"bias: expected .* \(33,\), got shape \[32\]"),
        ({"residual": torch.zeros(1)}, ValueError, "residual: expected shape"),
        ({"shape": ConvShape(33, 3, 3, 1), "algorithm": "winograd"}, ValueError, "stride: expected 1 or 2"),
        ({"shape": ConvShape(33, 3, 1, 0), "algorithm": "winograd"}, ValueError, "kernel: expected 3, with padding 1"),
        ({"packed": torch.zeros(4, 153, 16), "algorithm": "winograd"}, ValueError, "packed: expected channels padded"),
        ({"algorithm": "torch"}, ValueError, 'algorithm: expected "winograd" or "gemm", got "torch"'),
        ({"activation": Activation("swish")}, ValueError, 'kind: expected one of .*, got "swish"'),
        ({"x": torch.zeros(2, 0, 5, 6)}, ValueError, "x: expected at least one channel, got shape"),
        ({"x": torch.zeros(2, 17, 5, 6, dtype=torch.float64)}, TypeError, "x: expected dtype float32 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    x, weight, bias, residual = data((2, 17, 33, 5, 6, 3, 1, 1), torch.float32)
    arguments = {
        "x": x, "packed": pack(weight, padded=True), "bias": bias, "residual": residual,
        "activation": RELU, "shape": ConvShape(33, 3, 1, 1), "algorithm": "gemm",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        packed_convolution(*(arguments | change).values())
