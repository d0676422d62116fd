"""The 3x3 or 1x1 convolution of what a normalisation makes of x: values, statistics and every gradient against float64,
the keep mask bit for bit, and what is kept for backward."""

from __future__ import annotations

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastres import contract, functional, reference
from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import Act, Norm
from fastres.functional import NormParams, Statistics
from fastres.ops import norm_act_conv3x3 as ops
from tests.operators import flat, opcheck
from tests.ops.test_conv3x3 import (
    BAD_CONVOLUTIONS,
    CONVOLUTIONS,
    OURS,
    PYTORCHS,
    WITH_STATISTICS,
    both_kernels,
    convolutions,
    layout_of,
    needs_kernels,
    of_kernel,
)
from tests.oracle import (
    LAYOUTS,
    SEED,
    Case,
    activation,
    assert_close,
    assert_statistics,
    bound,
    check_case,
    form_of,
    generator,
    input_length,
    keep_off_zero,
    near_zero,
    norm,
    output_length,
    saved_bytes,
    threads,
    weight_length,
)

OPS = torch.ops.fastres
EPS = torch.finfo(torch.float32).eps
FUSED = {3: functional.norm_act_conv3x3, 1: functional.norm_act_conv1x1}
EXACT = {3: reference.norm_act_conv3x3, 1: reference.norm_act_conv1x1}

# images, inputs, outputs, height, width: fewer tiles than channels and many more, whole tiles and ragged edges,
# channels that fill vectors and single ones, lone pixels, weight gradients summed at once and by shares.
SHAPES = [
    (8, 96, 200, 4, 4),
    (64, 64, 64, 16, 16),
    (40, 20, 9, 9, 7),
    (3, 32, 48, 7, 9),
    (2, 5, 3, 6, 5),
    (5, 1, 1, 1, 1),
    (2, 17, 33, 4, 13),
    (4, 1, 40, 3, 2),
    (2, 40, 1, 1, 11),
    (5, 130, 70, 10, 3),
    (9, 24, 40, 10, 10),
    (100, 24, 40, 2, 2),
    (9, 70, 40, 5, 6),
]
Shape = tuple[int, int, int, int, int]


def make_case(
    shape: Shape, *key: object, layout: str = "channels_last", residual: bool = False, affine: bool = True,
    running: bool = True, kernel: int = 3,
) -> Case:  # fmt: skip
    n, c, k, h, w = shape
    gen = generator(shape, layout, kernel, *key)
    tensors = {
        "x": activation((n, c, h, w), torch.float32, layout, gen),
        "weight": activation(
            (k, c, kernel, kernel), torch.float32, layout, gen, mean=0.02, std=(kernel**2 * c) ** -0.5
        ),
    }
    if residual:
        tensors["residual"] = activation((n, c, h, w), torch.float32, layout, gen)
    norms = {"norm": norm(c, torch.float32, gen, affine=affine, running=running)}
    return Case({name: t.requires_grad_() for name, t in tensors.items()}, norms)


def kernel_of(case: Case) -> int:
    return case.tensors["weight"].shape[2]


def call(case: Case, functions=FUSED, **options: object):
    return functions[kernel_of(case)](
        case.tensors["x"], case.norms["norm"], case.tensors["weight"], residual=case.tensors.get("residual"), **options
    )


def preactivation(case: Case, order: str = "add_act") -> Tensor:
    n = case.norms["norm"]
    residual = case.tensors.get("residual") if order == "add_act" else None
    return reference.batch_norm_act(
        case.tensors["x"], None, None, n.weight, n.bias, training=True, eps=n.eps, residual=residual,
        activation=IDENTITY,
    )  # fmt: skip


# Where derivatives jump.
KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "elu": (0,)}


def keep_off_kinks(case: Case, f: Activation, order: str = "add_act") -> None:
    """Move elements of x until no element of the activation's input is where its derivative jumps."""

    def nearest() -> Tensor:
        z = preactivation(case.double(), order)
        # Distances from each kink, on the scale of z.
        distances = torch.stack([z - kink for kink in KINKS[f.kind]])
        return distances.gather(0, distances.abs().argmin(0, keepdim=True))[0]

    if f.kind in KINKS:
        keep_off_zero(case.tensors["x"], nearest)


def gradient_of(y: Tensor, gen: torch.Generator) -> Tensor:
    return activation(y.shape, torch.float32, "channels_last", gen, mean=0.1, std=1.0)


def check(
    case: Case, *, algorithm: str | None = None, given: bool = False, workers: int | None = None, stride: int = 1,
    **options: object,
) -> None:  # fmt: skip
    """Everything that a call writes, and every gradient, against float64.

    The convolution's input gradient carries the rounding errors of its algorithm, by default ours. They are independent
    from pixel to pixel: sums over M of them grow by sqrt(M), and so do those with xhat, whose squares add up to M at
    most.
    """
    order, dropout_p = options.get("order", "add_act"), options.get("dropout_p", 0.0)
    f = options.get("activation", RELU if options.get("relu", True) else IDENTITY)
    x, n, kernel = case.tensors["x"], case.norms["norm"], kernel_of(case)
    algorithm, form = algorithm or OURS[kernel], form_of(x, stride, kernel)
    gen = generator(x.shape, options, stride)
    seed = torch.randint(2**62, (1,), generator=gen)
    keep_off_kinks(case, f, order)
    exact = case.double()
    wanted = call(exact, EXACT, seed=seed, stride=stride, **options)
    statistics = Statistics(*OPS.batch_norm_act_stats(x.detach())[1:]) if given else None
    inputs, exact_inputs = case.inputs(), exact.inputs()
    with threads(workers or torch.get_num_threads()):
        y, found = call(case, statistics=statistics, seed=seed, stride=stride, algorithm=algorithm, **options)
        dy = gradient_of(y, gen)
        gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    count, outputs = x.numel() // x.shape[1], y.shape[1]
    assert_close(y, wanted, "y", length=output_length(x.shape[1], form))
    if algorithm != "torch":
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not any(t.requires_grad for t in found[:2])
        assert_statistics(*found[:2], y.detach(), "y")
    else:
        assert found is None
    for name, value in case.running().items():
        assert_close(value, exact.running()[name], name, length=count)

    expected = torch.autograd.grad(wanted, list(exact_inputs.values()), dy.double())
    exact_weight = exact.tensors["weight"].detach()
    da = torch.nn.grad.conv2d_input(x.shape, exact_weight, dy.double(), stride, padding=kernel // 2)
    noise = float(bound(da, torch.float32, input_length(outputs, form)).max())
    slope = float(f.gradient(torch.linspace(-8, 8, 4001, dtype=torch.float64)).abs().max())
    g_noise = slope * noise / (1 - dropout_p)
    rstd = torch.rsqrt(exact.tensors["x"].detach().var((0, 2, 3), correction=0) + n.eps)
    scale = float((rstd if n.weight is None else rstd * n.weight.detach().abs()).max())
    noises = {
        # dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat)), and no xhat is beyond sqrt(M)
        "x": 3 * scale * g_noise,
        "residual": g_noise if order == "add_act" else noise,
        "norm.weight": math.sqrt(count) * g_noise,
        "norm.bias": math.sqrt(count) * g_noise,
        "weight": 0.0,
    }
    lengths = {"weight": weight_length(x, stride, kernel), "norm.weight": count, "norm.bias": count}
    for name, gradient, exact_gradient in zip(inputs, gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        length = lengths.get(name, 1)
        assert_close(gradient, exact_gradient, f"gradient of {name}", length=length, noise=noises[name])


# --------------------------------------------------------------------------------------------------------------- values


@convolutions
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients_are_those_of_float64(shape, layout, kernel, stride):
    check(make_case(shape, layout=layout, kernel=kernel), stride=stride)


@needs_kernels
@convolutions
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("shape", [(6, 24, 40, 21, 50), (64, 64, 64, 16, 16)], ids=str)
def test_several_workers_agree_with_float64(shape, workers, kernel, stride):
    # A share may start anywhere in a line of tiles.
    case = make_case(shape, workers, residual=True, kernel=kernel)
    check(case, workers=workers, dropout_p=0.2, stride=stride)


@convolutions
@pytest.mark.parametrize("order", functional.ORDERS)
def test_tensors_larger_than_the_caches_agree_with_float64(order, kernel, stride):
    # From 6 MiB on results are stored past the caches.
    case = make_case((26, 64, 64, 31, 31), order, residual=True, kernel=kernel)
    check(case, order=order, dropout_p=0.2, stride=stride)


@convolutions
@pytest.mark.parametrize("shape", [(4, 20, 33, 5, 6), (40, 17, 9, 6, 7)], ids=str)
@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_option_agrees_with_float64(shape, order, relu, dropout_p, kernel, stride):
    for affine, given in itertools.product((True, False), repeat=2):
        case = make_case(
            shape, order, relu, dropout_p, affine, given, residual=order is not None, affine=affine, kernel=kernel
        )
        check(case, order=order or "add_act", relu=relu, dropout_p=dropout_p, given=given, stride=stride)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 14), st.integers(1, 14)
    ).filter(lambda s: s[0] * s[3] * s[4] > 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
    order=st.sampled_from([None, *functional.ORDERS]),
    relu=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.25]),
    given=st.booleans(),
    convolution=st.sampled_from(CONVOLUTIONS),
)
def test_any_shape_agrees_with_float64(shape, layout, order, relu, dropout_p, given, convolution):
    kernel, stride = convolution
    case = make_case(shape, order, relu, dropout_p, given, layout=layout, residual=order is not None, kernel=kernel)
    check(case, order=order or "add_act", relu=relu, dropout_p=dropout_p, given=given, stride=stride)


@pytest.mark.parametrize(("kernel", "stride"), [*CONVOLUTIONS, (1, 2), (1, 3)])
@pytest.mark.parametrize("order", functional.ORDERS)
def test_pytorch_s_algorithm_is_the_same_function(order, kernel, stride):
    case = make_case((3, 20, 9, 6, 7), order, residual=True, kernel=kernel)
    check(case, algorithm="torch", order=order, dropout_p=0.2, given=True, stride=stride)


@pytest.mark.parametrize("algorithm", [None, "gemm"])
@pytest.mark.parametrize("stride", [2, 3])
def test_1x1_kernels_of_other_strides_are_pytorch_s(stride, algorithm):
    case = make_case((3, 20, 9, 6, 7), kernel=1)
    n = case.norms["norm"]
    case.norms["norm"] = n._replace(running_mean=None, running_var=None)
    y, statistics = call(case, stride=stride, algorithm=algorithm)
    assert statistics is None
    assert torch.equal(y, call(case, stride=stride, algorithm="torch")[0])


@convolutions
def test_tensors_of_any_strides_are_taken(kernel, stride):
    case = make_case((3, 20, 36, 5, 6), residual=True, kernel=kernel)
    t = case.tensors
    for name, view in (
        ("weight", t["weight"].detach().transpose(2, 3).contiguous().transpose(2, 3)),
        ("weight", t["weight"].detach().repeat(2, 2, 1, 1)[::2, :20]),
        ("residual", t["residual"].detach().contiguous()),
        ("residual", t["residual"].detach().repeat_interleave(2, 3)[..., ::2]),
        ("x", t["x"].detach().repeat_interleave(2, 2)[:, :, ::2]),
    ):
        t[name] = view.requires_grad_()
        check(case, dropout_p=0.2, stride=stride)


@convolutions
def test_a_gradient_without_strides_is_taken(kernel, stride):
    case = make_case((2, 9, 20, 5, 6), kernel=kernel)
    keep_off_kinks(case, RELU)
    exact = case.double()
    y, _ = call(case, stride=stride, algorithm=OURS[kernel])
    (dweight,) = torch.autograd.grad(y.sum(), case.tensors["weight"])
    (wanted,) = torch.autograd.grad(call(exact, EXACT, stride=stride).sum(), exact.tensors["weight"])
    assert_close(dweight, wanted, "gradient of weight", length=weight_length(case.tensors["x"], stride, kernel))


@convolutions
def test_a_constant_channel_gives_the_convolution_of_the_bias(kernel, stride):
    case = make_case((4, 12, 20, 6, 7), running=False, kernel=kernel)
    with torch.no_grad():
        case.tensors["x"][:, 3:5] = 0.1
        case.norms["norm"].bias[3], case.norms["norm"].bias[4] = 0.5, -0.5
    case.norms["norm"] = case.norms["norm"]._replace(eps=1e-5)
    check(case, stride=stride)


def test_parameters_of_other_dtypes_are_computed_in_float32():
    case = make_case((3, 9, 20, 5, 6), layout="nchw")
    n = case.norms["norm"]
    low = NormParams(*(t.detach().bfloat16() for t in n[:4]), momentum=n.momentum, eps=n.eps)
    case.norms["norm"] = low._replace(weight=low.weight.requires_grad_())
    exact = case.double()
    y, _ = call(case, algorithm="winograd")
    assert_close(y, call(exact, EXACT).detach(), "y", length=output_length(9))
    for name, value in case.running().items():
        assert_close(value, exact.running()[name], name)
    assert torch.autograd.grad(y.sum(), case.norms["norm"].weight)[0].dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------- known statistics


@convolutions
@pytest.mark.parametrize("shape", [(8, 20, 40, 7, 9), (2, 40, 24, 4, 6)], ids=str)
@pytest.mark.parametrize("mean", [0.5, 1e4])
@pytest.mark.parametrize("order", functional.ORDERS)
def test_known_statistics_are_taken_as_they_are(shape, mean, order, kernel, stride):
    """Against the formulas of backward in float64 with the same mean and M2, which here are not quite those of x.

    A mean of 10000 leaves no room for x * scale + shift: its terms are 10000 times the result.
    """
    n, c, k, h, w = shape
    gen, count = generator(shape, mean, order), shape[0] * h * w
    x = activation((n, c, h, w), torch.float32, "channels_last", gen, mean=mean, std=1.0)
    case = make_case(shape, mean, order, residual=True, kernel=kernel)
    weight, residual = (case.tensors[name].detach() for name in ("weight", "residual"))
    p = case.norms["norm"]
    gamma, beta, running = p.weight.detach(), p.bias.detach(), [t.clone() for t in p[:2]]
    x_mean = x.double().mean((0, 2, 3)).float() + 0.125
    x_m2 = x.double().var((0, 2, 3), correction=0).float() * (1.5 * count)
    seed, dropout_p = torch.tensor([8]), 0.2

    exact_rstd = torch.rsqrt(x_m2.double() / count + p.eps)
    spread = [v.double()[:, None, None] for v in (x_mean, exact_rstd, gamma, beta)]

    def xhat() -> Tensor:
        return (x.double() - spread[0]) * spread[1]

    def z() -> Tensor:
        return xhat() * spread[2] + spread[3] + (residual if order == "add_act" else 0)

    keep_off_zero(x, z)
    keep = contract.dropout_keep(x.shape, seed, dropout_p)
    gate = (z() > 0) * keep / torch.tensor(1 - dropout_p, dtype=torch.float64)
    a = (z() * gate + (residual if order == "act_add" else 0)).requires_grad_()
    exact_weight = weight.double().requires_grad_()
    wanted = PYTORCHS[kernel](a, exact_weight, stride)
    form = form_of(x, stride, kernel)

    act, params = Act(*RELU, dropout_p, order), NormParams(*running, gamma, beta, 0.2, p.eps)
    y, y_mean, y_m2, saved_mean, saved_rstd, bits = ops.forward(
        x, params, Statistics(x_mean, x_m2), residual, seed, weight, act, True, stride
    )
    assert_close(y, wanted.detach(), "y", length=output_length(c, form))
    assert_statistics(y_mean, y_m2, y, "y")
    assert torch.equal(saved_mean, x_mean)
    assert saved_mean.data_ptr() != x_mean.data_ptr()
    assert_close(saved_rstd, exact_rstd, "rstd")
    assert torch.equal(bits, contract.pack_bits(keep, x))
    updated = 0.2 * x_mean.double(), 0.2 * x_m2.double() / (count - 1)
    for value, old, new in zip(running, p[:2], updated, strict=True):
        assert_close(value, 0.8 * old.double() + new, "running statistics")

    dy = gradient_of(y, gen)
    da, dweight = torch.autograd.grad(wanted, (a, exact_weight), dy.double())
    g = da * gate
    sums = g.sum((0, 2, 3)), (g * xhat()).sum((0, 2, 3))
    dx = spread[1] * spread[2] * (g - (sums[0] / count)[:, None, None] - xhat() * (sums[1] / count)[:, None, None])
    noise = float(bound(da, torch.float32, input_length(k, form)).max())
    g_noise = noise / (1 - dropout_p)
    own = Norm(saved_mean, saved_rstd, gamma, beta)
    found = ops.backward(dy, x, own, residual, bits, weight, act, [True] * 3, stride)
    assert_close(found[0], dx, "dx", noise=3 * g_noise * float((exact_rstd * gamma).max()))
    assert_close(found[1], g if order == "add_act" else da, "dresidual", noise=g_noise)
    assert_close(found[2], dweight, "dweight", length=weight_length(x, stride, kernel))
    assert_close(found[3], sums[1], "dnorm_weight", length=count, noise=math.sqrt(count) * g_noise)
    assert_close(found[4], sums[0], "dnorm_bias", length=count, noise=math.sqrt(count) * g_noise)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 20, 24, 16, 16), (2, 24, 40, 5, 6)], ids=str)
def test_a_mean_of_10000_with_a_standard_deviation_of_1(shape, layout):
    n, c, k, h, w = shape
    gen = generator(shape, layout)
    x = activation((n, c, h, w), torch.float32, layout, gen, mean=1e4, std=1.0)
    weight = activation((k, c, 3, 3), torch.float32, layout, gen, mean=0.0, std=(9 * c) ** -0.5)
    for given in (False, True):
        statistics = Statistics(*OPS.batch_norm_act_stats(x)[1:]) if given else None
        params, act = NormParams(None, None, eps=0.0), Act(*RELU, 0.0, "add_act")
        y, _, _, mean, rstd, _ = ops.forward(x, params, statistics, None, None, weight, act, False)
        exact = x.double()
        assert (mean - exact.mean((0, 2, 3))).abs().max() <= 2 * 2**-11  # half a spacing of 1e4, and as much again
        assert (rstd * exact.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
        a = ((exact - mean[:, None, None]) * rstd[:, None, None]).clamp(min=0)
        assert_close(y, reference.conv3x3(a, weight.double()), "y", length=output_length(c))


# -------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    "shape", [(2, 64, 3, 4, 4), (3, 37, 5, 5, 7), (2, 4, 3, 1, 1), (2, 1, 3, 3, 5), (1, 130, 3, 2, 3)], ids=str
)
@convolutions
@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 1 - 1e-9])
def test_the_mask_is_the_reference_s_bit_for_bit(shape, dropout_p, kernel, stride):
    case = make_case(shape, kernel=kernel)
    x, weight = (case.tensors[name].detach() for name in ("x", "weight"))
    for value in (0, -1, 2**62 + 12345, -(2**63)):
        seed = torch.tensor([value])
        act = Act(*RELU, dropout_p, "add_act")
        *_, bits = ops.forward(x, NormParams(None, None), None, None, seed, weight, act, False, stride)
        # Rows of channels, also where there is one channel.
        rows = contract.dropout_keep(x.shape, seed, dropout_p).permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1)
        assert torch.equal(bits, contract.pack_bits(rows, rows))


@convolutions
def test_the_mask_is_the_same_in_both_layouts_and_where_it_is_applied(kernel, stride):
    seed, results = torch.tensor([99]), []
    case = make_case((2, 20, 20, 6, 5))
    identity = torch.zeros(20, 20, kernel, kernel)
    identity[torch.arange(20), torch.arange(20), kernel // 2, kernel // 2] = 1
    for layout in LAYOUTS.values():
        x = case.tensors["x"].detach().contiguous(memory_format=layout)
        n = NormParams(None, None, None, torch.full((20,), 9.0))  # nothing is near 0 but what was dropped
        y, _ = FUSED[kernel](x, n, identity, dropout_p=0.5, seed=seed, stride=stride, algorithm=OURS[kernel])
        assert torch.equal(y.abs() > 1, contract.dropout_keep(x.shape, seed, 0.5)[..., ::stride, ::stride])
        results.append(y)
    assert torch.equal(*results)


def test_manual_seed_decides_the_mask():
    case = make_case((2, 8, 8, 4, 4))

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return call(case, dropout_p=0.5, algorithm="winograd")[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


# ------------------------------------------------------------------------------------------------------------ gradients


def saved(
    shape: Shape, order: str | None, dropout_p: float, kind: str = "relu", kernel: int = 3, stride: int = 1
) -> tuple[tuple, tuple]:
    """Arguments of forward, but for the stride, and of backward, but for what it is to make and the stride."""
    case = make_case(shape, order, dropout_p, residual=order is not None, kernel=kernel)
    t, n = {name: v.detach() for name, v in case.tensors.items()}, case.norms["norm"]
    act, residual = Act(*Activation.of(kind), dropout_p, order or "add_act"), t.get("residual")
    params = NormParams(*(v.detach() for v in n[:4]), 0.1, 1e-3)
    forward = (t["x"], params, None, residual, torch.tensor([17]), t["weight"], act, True)
    y, _, _, mean, rstd, keep = ops.forward(*forward, stride)
    dy = gradient_of(y, generator(shape, order))
    return forward, (dy, t["x"], Norm(mean, rstd, *params[2:4]), residual, keep, t["weight"], act)


@convolutions
@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_only_the_gradients_that_are_needed_are_made(order, dropout_p, kernel, stride):
    _, arguments = saved((3, 20, 36, 6, 5), order, dropout_p, kernel=kernel, stride=stride)
    has_residual = order is not None
    everything = ops.backward(*arguments, [True, has_residual, True], stride)
    for of_x, of_residual, of_weight in itertools.product((True, False), repeat=3):
        if of_residual and not (of_x and has_residual):
            continue  # the sums that the residual's gradient comes with are those of x
        some = ops.backward(*arguments, [of_x, of_residual, of_weight], stride)
        wanted = (of_x, of_residual, of_weight, of_x, of_x)
        for name, need, a, b in zip(("dx", "dr", "dw", "dnw", "dnb"), wanted, everything, some, strict=True):
            assert torch.equal(a, b) if need else b.numel() == 0, name


@pytest.mark.parametrize("algorithm", ["winograd", "torch"])
@pytest.mark.parametrize("asked", ["x", "weight", "residual", "norm.weight", "norm.bias"])
def test_each_gradient_alone_is_that_of_all(asked, algorithm):
    case = make_case((3, 20, 36, 6, 5), residual=True)
    y, _ = call(case, algorithm=algorithm)
    dy = gradient_of(y, generator(asked))
    wanted = dict(zip(case.inputs(), torch.autograd.grad(y, list(case.inputs().values()), dy), strict=True))
    for name, t in case.inputs().items():
        t.requires_grad_(name == asked)
    y, _ = call(case, algorithm=algorithm)
    y.backward(dy)
    for name, t in case.inputs().items():
        if name == asked:
            assert torch.equal(t.grad, wanted[name])
        else:
            assert t.grad is None


def test_nothing_is_saved_without_gradients_and_the_running_statistics_follow():
    case = make_case((2, 8, 4, 4, 4))
    exact = case.double()
    call(exact, EXACT)
    with torch.no_grad():
        y, _ = call(case, algorithm="winograd")
    assert y.grad_fn is None
    for name, value in case.running().items():
        assert_close(value, exact.running()[name], name, length=32)


@convolutions
@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_activation_is_not_among_what_is_saved(order, dropout_p, kernel, stride):
    case = make_case((2, 20, 16, 8, 8), residual=order is not None, kernel=kernel)
    options = {"order": order or "add_act", "dropout_p": dropout_p, "algorithm": OURS[kernel], "stride": stride}
    bits = 2 * 8 * 8 * 3 if dropout_p > 0 else 0
    assert saved_bytes(lambda: call(case, **options)[0]) == 4 * sum(t.numel() for t in case.tensors.values()) + bits


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    case = make_case((2, 8, 12, 4, 5), residual=True)
    inputs = list(case.inputs().values())

    def f(*_: Tensor) -> Tensor:
        return call(case, dropout_p=0.4, algorithm="winograd")[0]

    gradients = []
    for run in (f, lambda *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        for t in inputs:
            t.grad = None
        (run(*inputs) ** 2).sum().backward()
        gradients.append([t.grad.clone() for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# -------------------------------------------------------------------------------------------------- a block, end to end


def block(case: Case, algorithm: str) -> Tensor:
    """A block of two convolutions in training, each with its neighbours."""
    t, first, second = case.tensors, case.norms["first"], case.norms["second"]
    kernel = t["up"].shape[2]
    y, statistics, x = WITH_STATISTICS[kernel](t["x"], t["up"], algorithm=algorithm)
    y, statistics = FUSED[kernel](y, first, t["down"], statistics=statistics, algorithm=algorithm)
    return functional.batch_norm_act(
        y, *second[:4], training=True, momentum=second.momentum, eps=second.eps, residual=x, statistics=statistics
    )


def exact_block(case: Case, relu: bool = True) -> Tensor:
    t, first, second = case.tensors, case.norms["first"], case.norms["second"]
    kernel = t["up"].shape[2]
    y = EXACT[kernel](PYTORCHS[kernel](t["x"], t["up"]), first, t["down"])
    return reference.batch_norm_act(
        y, *second[:4], training=True, momentum=second.momentum, eps=second.eps, residual=t["x"], relu=relu
    )


def make_block(shape: Shape, *key: object, kernel: int = 3) -> Case:
    """One whose first ReLU has no input near 0."""
    n, c, k, h, w = shape
    for attempt in itertools.count():
        gen = generator(shape, kernel, *key, attempt)
        tensors = {
            name: activation(
                (*channels, kernel, kernel), torch.float32, "channels_last", gen, mean=0.02,
                std=(kernel**2 * channels[1]) ** -0.5,
            )
            for name, channels in (("up", (k, c)), ("down", (c, k)))
        }  # fmt: skip
        tensors["x"] = activation((n, c, h, w), torch.float32, "channels_last", gen)
        norms = {"first": norm(k, torch.float32, gen), "second": norm(c, torch.float32, gen)}
        case = Case({name: t.requires_grad_() for name, t in tensors.items()}, norms)
        exact = case.double()
        product = PYTORCHS[kernel](exact.tensors["x"], exact.tensors["up"])
        z = preactivation(Case({"x": product}, {"norm": exact.norms["first"]}))
        length = output_length(c, form_of(product, 1, kernel))
        if not near_zero(z, torch.float32, product_eps=EPS * math.sqrt(length)).any():
            return case


@pytest.mark.parametrize(("algorithm", "kernel"), [("winograd", 3), ("torch", 3), ("gemm", 1), ("torch", 1)])
@pytest.mark.parametrize("shape", [(3, 20, 12, 5, 6), (2, 9, 33, 4, 4)], ids=str)
def test_a_block_s_values_and_gradients_are_those_of_float64(shape, algorithm, kernel):
    case = make_block(shape, algorithm, kernel=kernel)
    check_case(
        case,
        lambda c: block(c, algorithm),
        exact_block,
        lambda c: exact_block(c, relu=False),
        torch.float32,
        generator(shape, "dy"),
        length=max(36 + 9 * max(shape[1:3]), shape[0] * shape[3] * shape[4]),
        product_eps=EPS * math.sqrt(output_length(max(shape[1:3]), form_of(case.tensors["x"], 1, kernel))),
    )


@both_kernels
def test_a_block_keeps_what_its_two_convolutions_and_its_end_read(kernel):
    case = make_block((2, 16, 24, 8, 8), kernel=kernel)
    t = case.tensors
    pixels = 2 * 8 * 8
    # x, the two products and the weights; the last ReLU's bits.
    kept = 4 * (t["x"].numel() + pixels * (24 + 16) + t["up"].numel() + t["down"].numel()) + pixels * 2
    assert saved_bytes(lambda: block(case, OURS[kernel])) == kept


# --------------------------------------------------------------------------------------------------------- registration


@convolutions
@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize("shape", [(2, 17, 9, 5, 6), (3, 1, 4, 2, 3)], ids=str)
def test_opcheck_passes_on_every_operator(shape, order, kernel, stride):
    forward, backward = saved(shape, order, 0.25, kernel=kernel, stride=stride)
    opcheck(ops.forward, *forward, stride)
    count, mean, m2 = OPS.batch_norm_act_stats(forward[0])
    for statistics in (Statistics(mean, m2), Statistics(mean, m2, 2 * count)):
        opcheck(ops.forward, forward[0], NormParams(None, None), statistics, *forward[3:-1], False, stride)
    for needs in ([True, order is not None, True], [True, False, False], [False, False, True]):
        opcheck(ops.backward, *backward, needs, stride)
        opcheck(ops.backward_reduce, *backward, needs, stride)


@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 17, 9, 5, 6), (2, 1, 4, 2, 3), (3, 20, 4, 1, 1)], ids=str)
@convolutions
def test_fake_kernels_give_the_shapes_strides_and_dtypes_of_real_results(shape, dropout_p, order, kernel, stride):
    forward, backward = saved(shape, order, dropout_p, kernel=kernel, stride=stride)
    calls = [(ops.forward, (*forward[:-1], measure, stride)) for measure in (True, False)]
    calls += [
        (op, (*backward, needs, stride))
        for op in (ops.backward, ops.backward_reduce)
        for needs in ([True, order is not None, True], [True, False, False], [False, False, True], [False] * 3)
    ]
    for (op, arguments), layout in itertools.product(calls, LAYOUTS.values()):
        tensors = [
            t.contiguous(memory_format=layout) if isinstance(t, Tensor) and t.dim() == 4 else t
            for t in flat(op, *arguments)
        ]
        on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in tensors]
        for real, fake in zip(op.overload(*tensors), op.overload(*on_meta), strict=True):
            assert layout_of(real) == layout_of(fake)


@pytest.mark.parametrize("algorithm", ["winograd", "torch", "auto"])
def test_the_function_compiles_to_one_graph_with_the_same_results(algorithm):
    case = make_case((4, 64, 64, 12, 12), algorithm, residual=True)
    inputs, seed = list(case.inputs().values()), torch.tensor([5])
    start = [t.clone() for t in case.running().values()]

    def f(x: Tensor, residual: Tensor) -> tuple[Tensor, Statistics | None]:
        called = Case(case.tensors | {"x": x, "residual": residual}, case.norms)
        return call(called, dropout_p=0.2, seed=seed, algorithm=algorithm)

    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        for kept, value in zip(case.running().values(), start, strict=True):
            kept.copy_(value)
        y, statistics = run(case.tensors["x"], case.tensors["residual"])
        gradients = torch.autograd.grad((y * y).sum(), inputs)
        running = [t.clone() for t in case.running().values()]
        results.append([y, *(statistics or ())[:2], *gradients, *running])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_block_compiles_to_one_graph_with_the_same_results():
    case = make_block((2, 20, 12, 5, 6))
    start = [t.clone() for t in case.running().values()]

    def f(x: Tensor) -> Tensor:
        return block(Case(case.tensors | {"x": x}, case.norms), "winograd")

    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        for kept, value in zip(case.running().values(), start, strict=True):
            kept.copy_(value)
        y = run(case.tensors["x"])
        running = [t.clone() for t in case.running().values()]
        results.append([y, *torch.autograd.grad((y * y).sum(), list(case.inputs().values())), *running])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------------------ behaviour


@needs_kernels
@convolutions
@pytest.mark.parametrize("shape", [(40, 32, 40, 15, 14), (4, 200, 256, 4, 4), (64, 64, 64, 16, 16)], ids=str)
def test_results_are_the_same_in_every_run_by_as_many_workers(shape, kernel, stride):
    forward, backward = saved(shape, "add_act", 0.1, kernel=kernel, stride=stride)
    results = {}
    for workers in (1, 2, 3):
        with threads(workers):
            runs = [(*ops.forward(*forward, stride), *ops.backward(*backward, [True] * 3, stride)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        results[workers] = runs[0]
    first, count = results[1], shape[0] * shape[3] * shape[4]
    noise = float(bound(first[7].double(), torch.float32, count).max())
    for found in results.values():
        assert_statistics(found[1], found[2], found[0], "y")
        # Everything but the sums over pixels, which are cut where each worker's share ends.
        for i in (0, 3, 4, 5, 7):
            assert torch.equal(found[i], first[i])
        of_weight = weight_length(forward[0], stride, kernel)
        assert_close(found[8], first[8].double(), "gradient of weight", length=of_weight)
        for i in (9, 10):
            assert_close(found[i], first[i].double(), "sums", length=count, noise=noise)


def test_inf_and_nan_reach_what_they_reach_in_pytorch():
    case = make_case((1, 8, 6, 12, 12), residual=True)
    x, residual = (case.tensors[name].detach() for name in ("x", "residual"))
    clean, _ = call(case, algorithm="winograd")
    residual[0, 3, 0, 0] = math.nan
    dirty, _ = functional.norm_act_conv3x3(
        x, case.norms["norm"], case.tensors["weight"], residual=residual, algorithm="winograd"
    )
    assert bool(dirty[0, :, :2, :2].isnan().all())
    assert torch.equal(dirty[0, :, 4:], clean[0, :, 4:])
    assert torch.equal(dirty[0, :, :, 4:], clean[0, :, :, 4:])


def test_auto_takes_winograd_where_it_pays(monkeypatch):
    monkeypatch.delenv("FASTRES_CONV", raising=False)
    case = make_case((8, 64, 64, 32, 32))
    x, n, weight = case.tensors["x"], case.norms["norm"], case.tensors["weight"]
    assert functional.norm_act_conv3x3(x, n, weight)[1] is not None
    assert functional.norm_act_conv3x3(x, n, weight, algorithm="torch")[1] is None
    assert functional.norm_act_conv3x3(x.contiguous(), n, weight)[1] is None
    monkeypatch.setenv("FASTRES_CONV", "torch")
    assert functional.norm_act_conv3x3(x, n, weight)[1] is None
    assert functional.norm_act_conv3x3(x, n, weight, algorithm="auto")[1] is not None


@pytest.mark.parametrize(
    ("dtype", "algorithm"),
    [(torch.float64, "winograd"), (torch.float16, "winograd"), (torch.bfloat16, "torch")],
    ids=str,
)
def test_other_dtypes_are_the_two_one_after_the_other(dtype, algorithm):
    case = make_case((3, 9, 5, 4, 6), residual=True)
    x, weight, residual = (case.tensors[name].detach().to(dtype) for name in ("x", "weight", "residual"))
    n = case.norms["norm"]
    seed = torch.tensor([3])
    y, statistics = functional.norm_act_conv3x3(
        x, n._replace(running_mean=None, running_var=None), weight, residual=residual, dropout_p=0.2, seed=seed,
        algorithm=algorithm,
    )  # fmt: skip
    a = functional.batch_norm_act(
        x, None, None, n.weight, n.bias, training=True, eps=n.eps, residual=residual, dropout_p=0.2, seed=seed
    )
    assert statistics is None
    assert torch.equal(y, reference.conv3x3(a, weight))


def test_autocast_brings_all_to_its_dtype():
    case = make_case((2, 6, 4, 4, 4), residual=True)
    start = [t.clone() for t in case.running().values()]
    with torch.autocast("cpu", torch.bfloat16):
        y, statistics = call(case, algorithm="winograd")
        assert y.dtype == torch.bfloat16
        assert_statistics(*statistics[:2], y.detach(), "y")
        for value, before in zip(case.running().values(), start, strict=True):
            value.copy_(before)
        for name in ("x", "residual"):
            case.tensors[name] = case.tensors[name].detach().bfloat16()
        assert torch.equal(call(case, algorithm="winograd")[0], y)


def test_empty_batches_pass_through():
    case = make_case((0, 8, 4, 5, 5), residual=True)
    before = [t.clone() for t in case.running().values()]
    y, statistics = call(case, algorithm="winograd", dropout_p=0.5)
    assert y.shape == (0, 4, 5, 5) and statistics is None
    y.sum().backward()
    assert torch.equal(case.tensors["weight"].grad, torch.zeros(4, 8, 3, 3))
    assert all(torch.equal(a, b) for a, b in zip(before, case.running().values(), strict=True))


# ------------------------------------------------------------------------------------------------------------ bad input

V = torch.ones(8)
PLANE = torch.zeros(1, 8, 5, 5)


@both_kernels
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_CONVOLUTIONS,
        ({"x": PLANE[..., :1, :1]}, ValueError, r"^x: expected more than 1 value a channel in training"),
        ({"norm": (V, V)}, TypeError, r"^norm: expected NormParams, got tuple"),
        ({"norm": {"running_var": None}}, ValueError, r"^norm\.running_mean and norm\.running_var: expected both"),
        ({"norm": {"running_mean": V[:3]}}, ValueError, r"^norm\.running_mean: expected shape \(8,\).*got \(3,\)"),
        ({"norm": {"weight": V[:1]}}, ValueError, r"^norm\.weight: expected shape \(8,\).*got \(1,\)"),
        ({"norm": {"weight": [1.0]}}, TypeError, r"^norm\.weight: expected a Tensor or None, got list"),
        ({"norm": {"bias": V.long()}}, TypeError, r"^norm\.bias: expected a floating-point dtype, got torch.int64"),
        ({"norm": {"bias": V.to("meta")}}, ValueError, r"^norm\.bias: expected a tensor on cpu, got one on meta"),
        ({"norm": {"eps": -1}}, ValueError, r"^norm\.eps: expected at least 0, got -1"),
        ({"norm": {"momentum": None}}, TypeError, r"^norm\.momentum: expected a number, got NoneType"),
        ({"statistics": (V, V)}, TypeError, r"^statistics: expected Statistics or None, got tuple"),
        ({"statistics": Statistics(V[:3], V)}, ValueError, r"^statistics\.mean: expected shape \(8,\).*got \(3,\)"),
        ({"statistics": Statistics(V, V.double())}, TypeError, r"^statistics\.m2: expected dtype torch.float32"),
        ({"statistics": Statistics(V, None)}, TypeError, r"^statistics\.m2: expected a Tensor.*got NoneType"),
        ({"statistics": Statistics(V.to("meta"), V)}, ValueError, r"^statistics\.mean: expected a tensor on cpu"),
        ({"residual": [1.0]}, TypeError, r"^residual: expected a Tensor, got list"),
        ({"residual": PLANE[:, :3]}, ValueError, r"^residual: expected shape \(1, 8, 5, 5\), got \(1, 3, 5, 5\)"),
        ({"residual": PLANE.double()}, TypeError, r"^residual: expected dtype torch.float32, got torch.float64"),
        ({"residual": PLANE.to("meta")}, ValueError, r"^residual: expected a tensor on cpu, got one on meta"),
        ({"relu": 1}, TypeError, r"^relu: expected a bool, got int"),
        ({"dropout_p": "0.1"}, TypeError, r"^dropout_p: expected a number, got str"),
        ({"dropout_p": 1.0}, ValueError, r"^dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
        ({"dropout_p": math.nan}, ValueError, r"^dropout_p: expected 0 <= dropout_p < 1, got nan"),
        ({"order": "add"}, ValueError, r"^order: expected one of .*'act_add'.*got 'add'"),
        ({"seed": 3}, TypeError, r"^seed: expected an int64 Tensor of one element or None, got int"),
        ({"seed": torch.zeros(1)}, TypeError, r"^seed: expected dtype torch.int64, got torch.float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"^seed: expected one element, got shape \(2,\)"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change, error, message, ours, kernel):
    n, algorithm = NormParams(torch.zeros(8), torch.ones(8)), OURS[kernel] if ours else "torch"
    arguments = {"x": torch.randn(1, 8, 5, 5), "weight": torch.zeros(4, 8, 3, 3), "algorithm": algorithm} | change
    arguments = of_kernel(arguments, kernel)
    given = arguments.pop("norm", {})
    given = n._replace(**given) if isinstance(given, dict) else given
    with pytest.raises(error, match=message):
        FUSED[kernel](arguments.pop("x"), given, arguments.pop("weight"), **arguments)
    assert torch.equal(n.running_mean, torch.zeros(8)) and torch.equal(n.running_var, torch.ones(8))


@needs_kernels
def test_the_operators_name_bad_arguments():
    (x, params, *_, weight, act, _), backward = saved((2, 9, 5, 4, 6), "add_act", 0.2)
    params = params._replace(running_mean=None, running_var=None)

    def forward(x=x, statistics=None, weight=weight, residual=None, seed=torch.tensor([1]), act=act, stride=1):  # noqa: B008
        ops.forward(x, params, statistics, residual, seed, weight, act, True, stride)

    with pytest.raises(ValueError, match=r"weight: expected shape \(K, 9, 3, 3\)"):
        forward(weight=weight[:, :4])
    for kernel, stride in ((1, 2), (3, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"stride: expected 1, or 2 with a 3x3 kernel, got {stride}"):
            forward(weight=weight[..., :kernel, :kernel], stride=stride)
    with pytest.raises(TypeError, match=r"x: expected dtype float32"):
        forward(x=x.double(), weight=weight.double())
    with pytest.raises(ValueError, match=r"residual: expected shape"):
        forward(residual=x[:1])
    with pytest.raises(ValueError, match=r"statistics_mean: expected .* \(9,\), got shape \[3\]"):
        forward(statistics=Statistics(torch.zeros(3), torch.zeros(3)))
    with pytest.raises(TypeError, match=r"statistics_count: expected dtype int64, got Float"):
        forward(statistics=Statistics(torch.zeros(9), torch.zeros(9), torch.ones(1)))
    with pytest.raises(ValueError, match=r"seed: expected one element"):
        forward(seed=None)
    with pytest.raises(ValueError, match=r'order: expected .*, got "add"'):
        forward(act=act._replace(order="add"))
    with pytest.raises(ValueError, match=r'kind: expected one of .*, got "swish"'):
        forward(act=act._replace(kind="swish"))

    dy, x, own, residual, keep, weight, act = backward

    def back(dy=dy, keep=keep, needs=(True, True, True), residual=residual, weight=weight, stride=1):
        for op in (ops.backward, ops.backward_reduce):
            op(dy, x, own, residual, keep, weight, act, list(needs), stride)

    for kernel, stride in ((1, 2), (3, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"stride: expected 1, or 2 with a 3x3 kernel, got {stride}"):
            back(weight=weight[..., :kernel, :kernel], stride=stride)
    with pytest.raises(ValueError, match=r"dy: expected shape"):
        back(dy=dy[:1])
    with pytest.raises(ValueError, match=r"keep: expected uint8"):
        back(keep=keep[:-1])
    with pytest.raises(ValueError, match=r"needs: the residual's gradient"):
        back(needs=(False, True, True))
    with pytest.raises(ValueError, match=r"needs: the residual's gradient"):
        back(residual=None)
