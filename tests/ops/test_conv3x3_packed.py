"""Packed weights, and the 3x3 convolution that reads them: as one matrix product, and by Winograd's algorithm."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.activations import IDENTITY, KINDS, RELU, Activation
from fastres.ops import conv3x3 as ops
from fastres.ops.fallback import output_size
from fastres.ops.packed import pack, packed_shape, unpack
from tests.operators import flat, opcheck
from tests.ops.test_conv3x3 import layout_of, needs_kernels
from tests.oracle import LAYOUTS, SEED, activation, assert_close, form_of, generator, output_length, threads

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
    size = (n, k, output_size(h, stride), output_size(w, stride))
    bias = torch.randn(k, generator=gen, device="cpu").to(x.device)
    return x, weight, bias, activation(size, dtype, layout, gen)


def check(shape: tuple[int, ...], layout: str, dtype: torch.dtype, kinds: Iterable[str] = ()) -> None:
    c, k, stride = shape[1], shape[2], shape[5]
    x, weight, bias, residual = data(shape, dtype, layout, layout=layout)
    packed = pack(weight)
    y = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
    ends = [(bias, residual, RELU), (None, residual, IDENTITY), (bias, None, IDENTITY), (None, None, RELU)]
    for algorithm in ("gemm", "winograd") if stride <= 2 else ("gemm",):
        for b, r, f in [*ends, *((bias, residual, Activation.of(kind)) for kind in kinds)]:
            wanted = y if b is None else y + b.double()[:, None, None]
            wanted = f.forward(wanted if r is None else wanted + r.double())
            got = ops.packed_inference(x, packed, k, b, r, f, stride, algorithm)
            length = 9 * c if algorithm == "gemm" else output_length(c, form_of(x, stride))
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


@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6, 1), (1, 20, 40, 7, 9, 2)], ids=str)
def test_every_activation_agrees_with_float64(shape):
    check(shape, "channels_last", torch.float32, KINDS)


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
        packed = pack(w)
        assert packed.dtype == torch.float32 and packed.shape == packed_shape(k, c) and packed.is_contiguous()
        assert torch.equal(unpack(packed, k, c), w.float())
        assert int(packed.count_nonzero()) == int(w.count_nonzero())  # zeros elsewhere


def test_the_order_of_packed_weights_is_the_one_that_saved_models_hold():
    """On every processor: element [k // 16, tap * C' + c, k % 16]."""
    weight = torch.arange(40 * 20 * 9.0).reshape(40, 20, 3, 3)
    packed = pack(weight)
    assert packed.shape == (4, 9 * 32, 16)
    for k, c, tap in ((0, 0, 0), (39, 19, 8), (16, 3, 5), (15, 16, 1)):
        assert packed[k // 16, tap * 32 + c, k % 16] == weight[k, c, tap // 3, tap % 3]


@needs_kernels
@pytest.mark.parametrize("algorithm", ["gemm", "winograd"])
def test_packed_and_plain_weights_give_the_same_bits(algorithm):
    for shape in ((1, 64, 96, 4, 4, 1), (9, 20, 33, 8, 9, 1)):
        x, weight, _, _ = data(shape, torch.float32, algorithm)
        plain = ops.inference(x, weight, None, None, IDENTITY, 1, algorithm)
        packed = ops.packed_inference(x, pack(weight), shape[2], None, None, IDENTITY, 1, algorithm)
        assert torch.equal(packed, plain)


@needs_kernels
@pytest.mark.parametrize("algorithm", ["gemm", "winograd"])
def test_threads_change_no_bit(algorithm):
    x, weight, bias, residual = data((3, 48, 100, 5, 5, 1), torch.float32)
    packed, results = pack(weight), []
    for count in (1, 2, 7):
        with threads(count):
            results.append(ops.packed_inference(x, packed, 100, bias, residual, RELU, 1, algorithm))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("stride", "algorithm"), [(1, "gemm"), (1, "winograd"), (2, "gemm")])
def test_opcheck_passes_and_fake_kernels_give_the_layout(stride, algorithm):
    shape = (2, 17, 33, 5, 6, stride)
    x, weight, bias, residual = data(shape, torch.float32, layout="nchw")
    packed = pack(weight)
    for b, r in ((bias, residual), (None, None)):
        arguments = (x, packed, 33, b, r, RELU, stride, algorithm)
        opcheck(ops.packed_inference, *arguments)
        on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in flat(ops.packed_inference, *arguments)]
        real, fake = ops.packed_inference(*arguments), ops.packed_inference.overload(*on_meta)
        assert layout_of(real) == layout_of(fake)


@needs_kernels
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": torch.zeros(2, 9 * 16, 16)}, ValueError, r"packed: expected shape \[4, 288, 16\], got \[2, 144"),
        ({"packed": torch.zeros(4, 288, 16).double()}, TypeError, "packed: expected dtype float32, got Double"),
        ({"outputs": 0}, ValueError, "outputs: expected at least 1, got 0"),
        ({"bias": torch.zeros(32)}, ValueError, r"bias: expected .* \(33,\), got shape \[32\]"),
        ({"residual": torch.zeros(1)}, ValueError, "residual: expected shape"),
        ({"stride": 3, "algorithm": "winograd"}, ValueError, "stride: expected 1"),
        ({"algorithm": "torch"}, ValueError, 'algorithm: expected "winograd" or "gemm", got "torch"'),
        ({"activation": Activation("swish")}, ValueError, 'kind: expected one of .*, got "swish"'),
        ({"x": torch.zeros(2, 17, 5, 6, dtype=torch.float64)}, TypeError, "x: expected dtype float32 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    x, weight, bias, residual = data((2, 17, 33, 5, 6, 1), torch.float32)
    arguments = {
        "x": x, "packed": pack(weight), "outputs": 33, "bias": bias, "residual": residual,
        "activation": RELU, "stride": 1, "algorithm": "gemm",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.packed_inference(*(arguments | change).values())
