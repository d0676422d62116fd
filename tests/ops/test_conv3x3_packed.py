"""Packed weights, and the 3x3 convolution that reads them: as one product, and by Winograd's algorithm."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops import conv3x3 as ops
from tests.ops.test_conv3x3 import layout_of, needs_kernels
from tests.oracle import LAYOUTS, SEED, activation, assert_close, generator, output_length, threads

OPS = torch.ops.fastres
LOW = torch.bfloat16

# images, inputs, outputs, height, width, stride: whole groups of 16 and 32, ragged ones, one position, many chunks.
SHAPES = [
    (1, 64, 96, 4, 4, 1),
    (1, 20, 33, 7, 9, 2),
    (2, 5, 3, 6, 5, 1),
    (1, 1, 1, 1, 1, 1),
    (3, 17, 70, 3, 2, 2),
    (1, 130, 31, 8, 8, 2),
    (40, 24, 48, 9, 10, 1),
    (1, 16, 40, 1, 40, 3),
]


def data(shape: tuple[int, ...], dtype: torch.dtype, *key: object, layout: str = "channels_last") -> tuple[Tensor, ...]:
    """x, weight, bias and residual."""
    n, c, k, h, w, stride = shape
    gen = generator(shape, dtype, *key)
    x = activation((n, c, h, w), dtype, layout, gen)
    weight = activation((k, c, 3, 3), torch.float32, layout, gen, mean=0.02, std=(9 * c) ** -0.5)
    size = (n, k, ops.output_size(h, stride), ops.output_size(w, stride))
    bias = torch.randn(k, generator=gen, device="cpu").to(x.device)
    return x, weight, bias, activation(size, dtype, layout, gen)


def check(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    c, k, stride = shape[1], shape[2], shape[5]
    x, weight, bias, residual = data(shape, dtype, layout, layout=layout)
    packed = ops.pack(weight)
    y = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
    for product in (True, False) if stride == 1 else (True,):
        for b, r, relu in ((bias, residual, True), (None, residual, False), (bias, None, False), (None, None, True)):
            wanted = y if b is None else y + b.double()[:, None, None]
            wanted = wanted if r is None else wanted + r.double()
            got = OPS.conv3x3_packed(x, packed, k, b, r, relu, stride, product)
            length = 9 * c if product else output_length(c)
            assert_close(got, F.relu(wanted) if relu else wanted, f"y, product={product}", length=length)
            assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_are_those_of_float64(shape, layout):
    check(shape, layout, torch.float32)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_bfloat16_is_a_storage_format(shape):
    check(shape, "channels_last", LOW)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 40),
        st.integers(1, 70),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(1, 3),
    ),
    st.sampled_from(sorted(LAYOUTS)),
)
def test_any_shape_agrees_with_float64(shape, layout):
    check(shape, layout, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, LOW, torch.float64])
@pytest.mark.parametrize("channels", [(1, 1), (16, 32), (17, 33), (32, 16), (5, 48)], ids=str)
def test_unpacking_gives_the_weight_back(channels, dtype):
    c, k = channels
    weight = torch.randn(k, c, 3, 3, generator=generator(channels, dtype), device="cpu").to(dtype)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last), weight.transpose(2, 3)):
        packed = ops.pack(w)
        assert packed.dtype == torch.float32 and packed.shape == ops.packed_shape(k, c) and packed.is_contiguous()
        assert torch.equal(ops.unpack(packed, k, c), w.float())
        assert int(packed.count_nonzero()) == int(w.count_nonzero())  # zeros elsewhere


def test_the_order_of_packed_weights_is_the_one_that_saved_models_hold():
    """On every processor: element [k // 16, tap * C' + c, k % 16]."""
    weight = torch.arange(40 * 20 * 9.0).reshape(40, 20, 3, 3)
    packed = ops.pack(weight)
    assert packed.shape == (4, 9 * 32, 16)
    for k, c, tap in ((0, 0, 0), (39, 19, 8), (16, 3, 5), (15, 16, 1)):
        assert packed[k // 16, tap * 32 + c, k % 16] == weight[k, c, tap // 3, tap % 3]


@needs_kernels
@pytest.mark.parametrize("product", [True, False])
def test_packed_and_plain_weights_give_the_same_bits(product):
    for shape in ((1, 64, 96, 4, 4, 1), (9, 20, 33, 8, 9, 1)):
        x, weight, _, _ = data(shape, torch.float32, product)
        plain = OPS.conv3x3_inference(x, weight, *[None] * 5, 0.0, False, 1, product)
        assert torch.equal(OPS.conv3x3_packed(x, ops.pack(weight), shape[2], None, None, False, 1, product), plain)


@needs_kernels
@pytest.mark.parametrize("product", [True, False])
def test_threads_change_no_bit(product):
    x, weight, bias, residual = data((3, 48, 100, 5, 5, 1), torch.float32)
    packed, results = ops.pack(weight), []
    for count in (1, 2, 7):
        with threads(count):
            results.append(OPS.conv3x3_packed(x, packed, 100, bias, residual, True, 1, product))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("stride", "product"), [(1, True), (1, False), (2, True)])
def test_opcheck_passes_and_fake_kernels_foretell_the_layout(stride, product):
    shape = (2, 17, 33, 5, 6, stride)
    x, weight, bias, residual = data(shape, torch.float32, layout="nchw")
    packed = ops.pack(weight)
    for b, r in ((bias, residual), (None, None)):
        arguments = (x, packed, 33, b, r, True, stride, product)
        torch.library.opcheck(OPS.conv3x3_packed.default, arguments)
        on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
        assert layout_of(OPS.conv3x3_packed(*arguments)) == layout_of(OPS.conv3x3_packed(*on_meta))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(2, 9 * 16, 16)}, ValueError, r"packed: expected shape \[4, 288, 16\], got \[2, 144"),
        ({"packed": torch.zeros(4, 288, 16).double()}, TypeError, "packed: expected dtype float32, got Double"),
        ({"outputs": 0}, ValueError, "outputs: expected at least 1, got 0"),
        ({"bias": torch.zeros(32)}, ValueError, r"bias: expected .* \(33,\), got shape \[32\]"),
        ({"residual": torch.zeros(1)}, ValueError, "residual: expected shape"),
        ({"stride": 2, "product": False}, ValueError, "stride: expected 1"),
        ({"x": torch.zeros(2, 17, 5, 6, dtype=torch.float64)}, TypeError, "x: expected dtype float32 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    x, weight, bias, residual = data((2, 17, 33, 5, 6, 1), torch.float32)
    arguments = {
        "x": x, "packed": ops.pack(weight), "outputs": 33, "bias": bias, "residual": residual, "relu": True,
        "stride": 1, "product": True,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        OPS.conv3x3_packed(*(arguments | change).values())
