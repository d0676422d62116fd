"""3x3 convolutions with dilation, by the phases of their images, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import functional, reference
from fastres.activations import Activation
from fastres.functional import Convolved
from fastres.functional.phases import are_whole, join, split
from fastres.ops.algorithms import choose_algorithm, problem_of
from tests.operators import Operators
from tests.ops.test_conv3x3 import needs_kernels
from tests.oracle import (
    LAYOUTS,
    activation,
    assert_close,
    assert_statistics,
    double_norm,
    generator,
    input_length,
    norm,
    output_length,
    weight_length,
)

# (images, inputs, outputs, height, width), dilation: whole phases, ragged ones, phases without a row.
CASES = [
    ((2, 16, 24, 8, 12), 2),
    ((1, 24, 16, 7, 9), 2),
    ((2, 8, 8, 6, 9), 3),
    ((1, 17, 5, 9, 5), 4),
    ((1, 16, 16, 2, 3), 4),
]
cases = pytest.mark.parametrize(("shape", "dilation"), CASES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
# A step through a sum of float32 noise and back is amplified by the chain's own derivatives, which are below 2.
AMPLIFIED = 4


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str, *key: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy."""
    n, inputs, outputs, height, width = shape
    gen = generator("dilation", shape, dtype, layout, *key)
    x = activation((n, inputs, height, width), dtype, layout, gen)
    weight = (0.3 * torch.randn(outputs, inputs, 3, 3, generator=gen, dtype=torch.float64)).to(dtype)
    dy = torch.randn(n, outputs, height, width, generator=gen, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def lengths(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    outputs, inputs = weight.shape[:2]
    return output_length(inputs), input_length(outputs), 4 * weight_length(x)


@layouts
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_kernels
def test_values_and_gradients_are_those_of_float64(shape, dilation, layout, dtype):
    x, weight, dy = drawn(shape, dtype, layout)
    with Operators() as seen:
        y = functional.conv3x3(x, weight, dilation=dilation, algorithm="winograd")
    assert "conv3x3_forward" in seen.names
    y.backward(dy)
    exact = doubles(x, weight)
    wanted = F.conv2d(*exact, padding=dilation, dilation=dilation)
    wanted.backward(dy.double())
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    for name, value, expected, length in zip(
        ("y", "gradient of x", "gradient of weight"),
        (y, x.grad, weight.grad),
        (wanted, exact[0].grad, exact[1].grad),
        lengths(x, weight),
        strict=True,
    ):
        assert_close(value.detach(), expected.detach(), name, length=length)


@cases
@pytest.mark.parametrize("algorithm", ["winograd", "gemm"])
@needs_kernels
def test_evaluation_is_that_of_float64(shape, dilation, algorithm):
    x, weight, _ = drawn(shape, torch.float32, "channels_last", algorithm)
    gen = generator("residual", shape)
    residual = activation((shape[0], shape[2], *shape[3:]), torch.float32, "channels_last", gen)
    params = norm(shape[2], torch.float32, gen)
    with torch.no_grad():
        y = functional.conv3x3_norm_act(
            x, weight, params, residual=residual, activation="silu", dilation=dilation, algorithm=algorithm
        )
        wanted = reference.conv3x3_norm_act(
            x.double(), weight.double(), double_norm(params), residual=residual.double(),
            activation=Activation("silu"), dilation=dilation,
        )  # fmt: skip
    assert_close(y, wanted, "y", length=AMPLIFIED * output_length(shape[1]))


@pytest.mark.parametrize("gradient_of", ["x", "norm"])
@needs_kernels
def test_evaluation_with_gradients_is_that_of_float64(gradient_of):
    x, weight, dy = drawn((2, 16, 24, 8, 12), torch.float32, "channels_last")
    if gradient_of == "norm":
        x, weight = x.detach(), weight.detach()
    params = norm(24, torch.float32, generator("evaluation"))
    exact_x, exact_weight, exact_params = x.detach().double(), weight.detach().double(), double_norm(params)
    exact_x.requires_grad_(x.requires_grad)
    y = functional.conv3x3_norm_act(x, weight, params, activation="silu", dilation=2, algorithm="winograd")
    wanted = reference.conv3x3_norm_act(exact_x, exact_weight, exact_params, activation=Activation("silu"), dilation=2)
    y.backward(dy)
    wanted.backward(dy.double())
    assert_close(y.detach(), wanted.detach(), "y", length=AMPLIFIED * output_length(16))
    length = AMPLIFIED * (output_length(16) + weight_length(x))
    assert_close(params.weight.grad, exact_params.weight.grad, "gradient of the norm's weight", length=length)
    if gradient_of == "x":
        assert_close(x.grad, exact_x.grad, "gradient of x", length=AMPLIFIED * input_length(24))


@layouts
@cases
@needs_kernels
def test_statistics_are_those_of_the_output(shape, dilation, layout):
    x, weight, _ = drawn(shape, torch.float32, layout)
    y, statistics, same = functional.conv3x3_with_statistics(x, weight, dilation=dilation, algorithm="winograd")
    assert same is x
    assert (statistics is not None) == are_whole(x, dilation)
    if statistics is not None:
        assert_statistics(statistics.mean, statistics.m2, y, "y")


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@cases
@needs_kernels
def test_behind_a_normalisation_it_trains_as_in_float64(shape, dilation, residual, dropout_p):
    x, weight, dy = drawn(shape, torch.float32, "channels_last", residual)
    gen = generator("norm", shape)
    params = norm(shape[1], torch.float32, gen)
    exact_params = double_norm(params)
    r = activation(x.shape, torch.float32, "channels_last", gen).requires_grad_() if residual else None
    seed = torch.tensor([57]) if dropout_p > 0 else None
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "dilation": dilation}
    with Operators() as seen:
        y, statistics = functional.norm_act_conv3x3(
            x, params, weight, residual=r, activation="silu", algorithm="winograd", **options
        )
    whole = are_whole(x, dilation)
    assert ("norm_act_conv3x3_forward" in seen.names) == (whole and dropout_p == 0)
    assert (statistics is not None) == whole
    y.backward(dy)
    exact = doubles(x, weight)
    exact_r = None if r is None else doubles(r)[0]
    wanted = reference.norm_act_conv3x3(
        exact[0], exact_params, exact[1], residual=exact_r, activation=Activation("silu"), **options
    )
    wanted.backward(dy.double())
    length = AMPLIFIED * (output_length(shape[1]) + weight_length(x))
    pairs = {"y": (y.detach(), wanted.detach()), "gradient of x": (x.grad, exact[0].grad)}
    pairs["gradient of weight"] = (weight.grad, exact[1].grad)
    pairs["gradient of the norm's weight"] = (params.weight.grad, exact_params.weight.grad)
    pairs["running mean"] = (params.running_mean, exact_params.running_mean)
    pairs["running variance"] = (params.running_var, exact_params.running_var)
    if r is not None and exact_r is not None:
        pairs["gradient of the residual"] = (r.grad, exact_r.grad)
    for name, (value, expected) in pairs.items():
        assert_close(value, expected, name, length=length)
    if statistics is not None:
        assert_statistics(statistics.mean, statistics.m2, y, "y")


@layouts
@pytest.mark.parametrize("dilation", [2, 3, 5])
def test_what_is_split_is_joined(layout, dilation):
    x = activation((2, 3, 7, 10), torch.float32, layout, generator("split"))
    phases = split(x, dilation)
    assert phases.shape == (2 * dilation**2, 3, -(-7 // dilation), -(-10 // dilation))
    assert phases.is_contiguous(memory_format=torch.channels_last)
    for a in range(dilation):
        for b in range(dilation):
            own = x[:, :, a::dilation, b::dilation]
            phase = phases[a * dilation + b :: dilation**2]
            assert torch.equal(phase[:, :, : own.shape[2], : own.shape[3]], own)
    assert torch.equal(join(phases, dilation, x), x)


@pytest.mark.parametrize("kind", ["stride", "requested", "double"])
def test_what_phases_do_not_serve_is_pytorchs(kind):
    x, weight, _ = drawn((2, 64, 64, 16, 16), torch.float64 if kind == "double" else torch.float32, "channels_last")
    stride, algorithm = (2, "winograd") if kind == "stride" else (1, "torch" if kind == "requested" else "winograd")
    with Operators() as seen:
        y = functional.conv3x3(x, weight, stride=stride, dilation=2, algorithm=algorithm)
    assert seen.names == []
    torch.testing.assert_close(y, F.conv2d(x, weight, stride=stride, padding=2, dilation=2))


@pytest.mark.parametrize(
    "convolve",
    [
        lambda x, w, **options: functional.conv3x3(x, w, **options),
        lambda x, w, **options: functional.conv3x3_with_statistics(x, w, **options),
        lambda x, w, **options: functional.norm_act_conv3x3(x, norm(8, x.dtype, generator("bad")), w, **options),
        lambda x, w, **options: functional.conv3x3_norm_act(x, w, norm(8, x.dtype, generator("bad")), **options),
    ],
)
def test_a_dilation_that_is_none_is_refused(convolve):
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3)
    for dilation, error, message in ((0, ValueError, "at least 1, got 0"), ((2, 2), TypeError, "an int, got tuple")):
        with pytest.raises(error, match=rf"^dilation: expected {message}"):
            convolve(x, weight, dilation=dilation)


@needs_kernels
def test_the_choice_is_that_of_the_phases():
    x = torch.empty(4, 256, 28, 28).contiguous(memory_format=torch.channels_last)
    phases = torch.empty(16, 256, 14, 14).contiguous(memory_format=torch.channels_last)
    for needs_grad in (True, False):
        dilated = choose_algorithm(problem_of(x, 256, dilation=2, needs_grad=needs_grad))
        assert dilated == choose_algorithm(problem_of(phases, 256, needs_grad=needs_grad))
        assert dilated.algorithm == "winograd"
    for options in ({"kernel": 1}, {"stride": 2}, {"kernel": 5, "groups": 32}):
        choice = choose_algorithm(problem_of(x, 256, needs_grad=True, dilation=2, **options))
        assert choice.algorithm == "torch" and "dilated" in choice.reason


@needs_kernels
def test_autocast_takes_the_weight_unrounded():
    x, weight, _ = drawn((2, 16, 24, 8, 12), torch.float32, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        y: Convolved = functional.conv3x3_with_statistics(x, weight, dilation=2, algorithm="winograd")
    exact = F.conv2d(x.detach().bfloat16().double(), weight.detach().double(), padding=2, dilation=2)
    assert y.y.dtype == torch.bfloat16
    assert_close(y.y.detach(), exact, "y", length=output_length(16))
