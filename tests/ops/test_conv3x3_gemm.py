"""The 3x3 convolution as one matrix product over gathered rows, which serves few output positions in evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import functional
from fastres.activations import IDENTITY, KINDS, RELU, Activation
from fastres.functional import NormParams
from fastres.ops import conv3x3 as ops
from fastres.ops.algorithms import choose_algorithm, problem_of
from fastres.ops.fallback import output_size
from tests.operators import opcheck
from tests.oracle import LAYOUTS, SEED, activation, assert_close, generator

# images, inputs, outputs, height, width, stride: odd channels and sizes, one position, more than a group of rows.
SHAPES = [
    (1, 64, 96, 4, 4, 1),
    (1, 20, 33, 7, 9, 2),
    (2, 5, 3, 6, 5, 1),
    (1, 1, 1, 1, 1, 1),
    (3, 17, 70, 3, 2, 2),
    (1, 130, 31, 8, 8, 2),
    (64, 16, 32, 1, 1, 1),
    (1, 16, 40, 1, 40, 3),
]


def data(
    shape: tuple[int, ...], *key: object, layout: str = "channels_last"
) -> tuple[Tensor, Tensor, NormParams, Tensor]:
    """x, weight, a normalisation of the output, and a residual."""
    n, c, k, h, w, stride = shape
    gen = generator(shape, *key)
    x = activation((n, c, h, w), torch.float32, layout, gen)
    weight = activation((k, c, 3, 3), torch.float32, layout, gen, mean=0.02, std=(9 * c) ** -0.5)
    vectors = [torch.randn(k, generator=gen) for _ in range(2)] + [torch.rand(k, generator=gen) + 0.5 for _ in range(2)]
    mean, bias, var, scale = vectors
    size = (n, k, output_size(h, stride), output_size(w, stride))
    return x, weight, NormParams(mean, var, scale, bias, eps=1e-3), activation(size, torch.float32, layout, gen)


def exact(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return F.conv2d(x.double(), weight.double(), stride=stride, padding=1)


def gemm(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return ops.inference(x, weight, None, None, IDENTITY, stride, "gemm")


def check(shape: tuple[int, ...], layout: str, kinds: Iterable[str] = ("relu", "identity")) -> None:
    _, c, _, _, _, stride = shape
    x, weight, norm, residual = data(shape, layout, layout=layout)
    y = exact(x, weight, stride)
    assert_close(gemm(x, weight, stride), y, "y", length=9 * c)
    vectors = [v.double() for v in norm[:4]]
    for kind, r in itertools.product(kinds, (residual, None)):
        f = Activation.of(kind)
        z = F.batch_norm(y, *vectors, eps=norm.eps)
        z = z if r is None else z + r.double()
        got = ops.inference(x, weight, norm, r, f, stride, "gemm")
        assert_close(got, f.forward(z), f"normalised, {kind}", length=9 * c)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_are_those_of_float64(shape, layout):
    check(shape, layout)


@pytest.mark.parametrize("shape", [(1, 64, 96, 4, 4, 1), (1, 20, 33, 7, 9, 2)], ids=str)
def test_every_activation_agrees_with_float64(shape):
    check(shape, "channels_last", KINDS)


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
    check(shape, layout)


def test_threads_change_no_bit():
    x, weight, _, _ = data((3, 48, 100, 5, 5, 1))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(gemm(x, weight, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck_passes():
    x, weight, norm, residual = data((2, 17, 33, 5, 6, 2))
    opcheck(ops.inference, x, weight, norm, residual, RELU, 2, "gemm")


@pytest.mark.parametrize("channels", [(32, 48), (21, 37)], ids=str)
def test_weights_of_any_strides_are_read_as_they_are(channels):
    c, k = channels
    x, weight, _, _ = data((1, c, k, 5, 6, 1))
    views = {
        "contiguous": weight.contiguous(),
        "taps exchanged": weight.transpose(2, 3).contiguous().transpose(2, 3),
        "outputs adjacent": weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).transpose(0, 1),
        "channels exchanged": weight.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": weight.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
        "part": torch.cat([weight, weight], 1)[:, :c],
        "expanded": weight[:1].expand_as(weight),
    }
    for name, view in views.items():
        assert_close(gemm(x, view, 1), exact(x, view, 1), name, length=9 * c)


def test_auto_takes_it_for_few_positions_without_gradients(monkeypatch):
    monkeypatch.delenv("FASTRES_CONV", raising=False)
    seen: list[str] = []
    inference = ops.inference

    def noted(*args):
        seen.append(args[-1])
        return inference(*args)

    monkeypatch.setattr(ops, "inference", noted)
    x, weight, norm, residual = data((1, 256, 256, 4, 4, 1))
    functional.conv3x3(x, weight)
    functional.conv3x3_norm_act(x, weight, norm, residual=residual)
    assert seen == ["gemm"] * 2
    functional.conv3x3_norm_act(x, weight, norm, stride=2)
    assert seen == ["gemm"] * 3
    for algorithm in ("torch", "winograd"):
        functional.conv3x3(x, weight, algorithm=algorithm)
    functional.conv3x3(x.contiguous(), weight)
    functional.conv3x3(x.double(), weight.double())
    functional.conv3x3(x, weight.clone().requires_grad_())
    assert seen == ["gemm"] * 3 + ["winograd"]
    # More positions than are few; and few ones, of which Winograd's algorithm still makes more.
    for shape, stride, outputs, taken in (
        ((1, 64, 64, 17, 16, 1), 1, 64, False),
        ((1, 64, 64, 17, 16, 1), 2, 64, True),
        ((1, 128, 128, 16, 16, 1), 1, 128, False),
        ((1, 128, 128, 16, 16, 1), 2, 128, True),
        ((1, 64, 128, 33, 32, 1), 2, 128, False),
    ):
        problem = problem_of(data(shape)[0], outputs, 3, stride, needs_grad=False)
        assert (choose_algorithm(problem).algorithm == "gemm") is taken


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_strided_end_in_evaluation_is_one_function(stride, gradients):
    shape = (1, 20, 33, 9, 8, stride)
    x, weight, norm, residual = data(shape)
    x.requires_grad_(gradients)
    got = functional.conv3x3_norm_act(x, weight, norm, residual=residual, stride=stride)
    wanted = F.relu(F.batch_norm(exact(x, weight, stride), *(v.double() for v in norm[:4]), eps=norm.eps) + residual)
    assert_close(got.detach(), wanted.detach(), "y", length=9 * 20)
    assert got.requires_grad == gradients


@pytest.mark.parametrize(("stride", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_bad_stride_is_named(stride, error):
    x, weight, norm, _ = data((1, 8, 8, 4, 4, 1))
    with pytest.raises(error, match=r"^stride: expected .* got"):
        functional.conv3x3_norm_act(x, weight, norm, stride=stride)


def test_the_operator_refuses_a_stride_that_winograd_cannot_serve():
    x, weight, _, _ = data((1, 8, 8, 4, 4, 1))
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastres::conv3x3_inference", "CPU"):
        pytest.skip("the plain fallback serves any stride")
    with pytest.raises(ValueError, match="stride: expected 1"):
        ops.inference(x, weight, None, None, IDENTITY, 3, "winograd")


@pytest.mark.parametrize("algorithm", ["gemm", "winograd"])
def test_the_operator_refuses_an_input_without_channels(algorithm):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastres::conv3x3_inference", "CPU"):
        pytest.skip("the plain fallback is PyTorch's convolution")
    with pytest.raises(ValueError, match="x: expected at least one channel"):
        ops.inference(torch.zeros(1, 0, 4, 4), torch.zeros(8, 0, 3, 3), None, None, IDENTITY, 1, algorithm)
