"""Max pooling, alone and of a normalised and activated input: values, places and gradients against float64, ties, NaN,
threads, and the checks of arguments."""

from __future__ import annotations

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import _extension, contract, functional
from fastres.activations import Activation
from fastres.contract import Norm, NormParams, Pool, Statistics
from fastres.ops import max_pool as ops
from tests.operators import Operators, opcheck
from tests.oracle import (
    DTYPES,
    LAYOUTS,
    SEED,
    STORED,
    activation,
    assert_close,
    double_norm,
    generator,
    norm,
    saved_bytes,
    threads,
)

COMPILED = _extension.load_cpu() is not None
needs_kernels = pytest.mark.skipif(not COMPILED, reason="the kernels need a compiled module")

# Windows that meet, overlap, leave gaps, lie in the padding, and are the whole image.
WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 0), (2, 3, 1), (5, 2, 2), (1, 1, 0), (4, 4, 2)]
POOLS = [Pool(*window) for window in WINDOWS]
# Single channels, whole vectors of every width, and parts of them; images that windows do not fill.
SHAPES = [(2, 64, 8, 8), (1, 1, 5, 7), (3, 13, 9, 4), (2, 16, 6, 6), (1, 40, 4, 11), (2, 7, 5, 5), (1, 130, 7, 6)]
ACTIVATIONS = ["relu", "leaky_relu", "relu6", "silu", "gelu", "hardswish", "identity"]
pools = pytest.mark.parametrize("pool", POOLS, ids=lambda p: "x".join(map(str, p)))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def gradient_for(y: Tensor, gen: torch.Generator) -> Tensor:
    return activation(tuple(y.shape), y.dtype, "channels_last", gen, mean=0.1, std=1.0)


def places(a: Tensor, pool: Pool) -> Tensor:
    """Where in its window each maximum is, out of PyTorch's indices."""
    y, at = F.max_pool2d(a, *pool, return_indices=True)
    rows, columns = (torch.arange(n) * pool.stride - pool.padding for n in y.shape[2:])
    return (at // a.shape[3] - rows[:, None]) * pool.kernel + at % a.shape[3] - columns


# ------------------------------------------------------------------------------------------------------- pooling alone


def check_pool(x: Tensor, pool: Pool, gen: torch.Generator) -> None:
    """Values and places are PyTorch's, bit for bit; the gradient is that of float64, which chooses the same."""
    exact_x = x.double().requires_grad_()
    wanted = F.max_pool2d(exact_x, *pool)
    with torch.no_grad():
        assert torch.equal(functional.max_pool2d(x, *pool), wanted.to(x.dtype))
    x.requires_grad_()
    y = functional.max_pool2d(x, *pool)
    assert torch.equal(y.double(), wanted) and y.dtype == x.dtype
    assert y.stride() == F.max_pool2d(x, *pool).stride()
    dy = gradient_for(y, gen)
    (dx,) = torch.autograd.grad(y, x, dy)
    (exact_dx,) = torch.autograd.grad(wanted, exact_x, dy.double())
    assert dx.dtype == x.dtype and dx.is_contiguous(memory_format=contract.memory_format(x))
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        assert_close(dx, exact_dx, "gradient of x", length=pool.kernel**2)
    else:  # PyTorch's, which rounds between the windows
        assert torch.equal(dx, torch.autograd.grad(F.max_pool2d(x, *pool), x, dy)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pools
def test_pooling_is_pytorchs(pool, layout, dtype):
    for shape in SHAPES:
        gen = generator(shape, pool, layout, str(dtype))
        check_pool(activation(shape, dtype, layout, gen), pool, gen)


@pytest.mark.parametrize("dtype", DTYPES)
@pools
def test_of_equal_values_the_first_is_chosen(pool, dtype):
    for shape in SHAPES:
        gen = generator("ties", shape, pool, str(dtype))
        x = activation(shape, dtype, "channels_last", gen).round().clamp(0, 2)
        check_pool(x, pool, gen)
        _, position = ops.forward(x.detach(), pool, True)
        assert torch.equal(position.long(), places(x.detach(), pool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pools
def test_infinities_and_nan_are_chosen_as_pytorch_does(pool, dtype):
    for shape in SHAPES:
        gen = generator("nan", shape, pool, str(dtype))
        x = activation(shape, dtype, "channels_last", gen)
        kind = torch.randint(12, x.shape, generator=gen)
        for number, value in enumerate((math.nan, math.inf, -math.inf, -math.inf, -math.inf)):
            x = torch.where(kind == number, torch.tensor(value, dtype=dtype), x)
        x = x.contiguous(memory_format=torch.channels_last)
        y, position = ops.forward(x, pool, True)
        wanted = F.max_pool2d(x, *pool)
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert torch.equal(position.long(), places(x, pool))
        assert torch.equal(ops.forward(x, pool, False)[0].nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_a_row_of_padding_alone_is_never_chosen():
    x = torch.full((1, 8, 4, 4), -math.inf).contiguous(memory_format=torch.channels_last)
    y, position = ops.forward(x, Pool(3, 2, 1), True)
    assert torch.equal(y, torch.full((1, 8, 2, 2), -math.inf))
    assert torch.equal(position[0, 0], torch.tensor([[4, 3], [1, 0]], dtype=torch.uint8))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 15), st.integers(1, 4), st.integers(0, 7)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_window_agrees_with_pytorch(shape, window, dtype):
    kernel, stride, padding = window
    padding = min(padding, kernel // 2)
    hypothesis.assume(min(shape[2:]) + 2 * padding >= kernel)
    gen = generator(shape, window, str(dtype))
    check_pool(activation(shape, dtype, "channels_last", gen), Pool(kernel, stride, padding), gen)


@pytest.mark.parametrize("shape", [(3, 64, 60, 50), (40, 32, 9, 9)], ids=str)
def test_many_segments_agree_with_pytorch(shape):
    for pool in POOLS[:3]:
        gen = generator(shape, pool)
        check_pool(activation(shape, torch.float32, "channels_last", gen), pool, gen)


# ------------------------------------------------------------------------------------- of a normalised, activated input


@dataclasses.dataclass
class Data:
    x: Tensor
    norm: NormParams
    act: Activation
    pool: Pool
    gen: torch.Generator

    @classmethod
    def of(cls, shape, kind, pool, dtype=torch.float32, layout="channels_last", *, affine=True, running=True) -> Data:
        gen = generator(shape, kind, pool, str(dtype), layout, affine, running)
        x = activation(shape, dtype, layout, gen).requires_grad_()
        n = norm(shape[1], dtype, gen, affine=affine, running=running)
        if affine:
            with torch.no_grad():  # a maximum of bn(x) is a minimum of x
                n.weight[::3] *= -1
        return cls(x, n, Activation.of(kind), pool, gen)

    def double(self) -> Data:
        return dataclasses.replace(self, x=self.x.detach().double().requires_grad_(), norm=double_norm(self.norm))

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.x, self.norm.weight, self.norm.bias) if t is not None]


def run(d: Data, *, training: bool, **options) -> Tensor:
    return functional.batch_norm_act_max_pool2d(d.x, d.norm, *d.pool, training=training, activation=d.act, **options)


def activated(d: Data, training: bool) -> Tensor:
    n = d.norm
    z = F.batch_norm(d.x, n.running_mean, n.running_var, n.weight, n.bias, training, n.momentum, n.eps)
    return d.act.forward(z)


def is_clear(a: Tensor, d: Data, dtype: torch.dtype) -> Tensor:
    """Where no rounding in this dtype changes which element of a window of the float64 activation is chosen, or whether
    the activation passes a gradient on there."""
    eps = torch.finfo(dtype).eps
    padded = F.pad(a, (d.pool.padding,) * 4, value=-math.inf)
    windows = padded.unfold(2, d.pool.kernel, d.pool.stride).unfold(3, d.pool.kernel, d.pool.stride).flatten(-2)
    error = 4 * eps * a.abs() + 64 * torch.finfo(torch.float32).eps * a.abs().max()
    allowed = F.max_pool2d(error, *d.pool)
    first = windows.max(-1).values
    second = windows.topk(2).values[..., 1] if windows.shape[-1] > 1 else torch.full_like(first, -math.inf)
    clear = first - second > 2 * allowed
    for kink in {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-0.375, 3)}.get(d.act.kind, ()):
        clear &= (first - kink).abs() > 2 * allowed
    if d.act.kind in ("relu", "relu6"):
        clear |= first == 0  # nothing passes, whichever is chosen
    return clear


def check(d: Data, *, training: bool = True, **options) -> None:
    exact, dtype = d.double(), d.x.dtype
    wanted_a = activated(exact, training)
    wanted = F.max_pool2d(wanted_a, *d.pool)
    count = d.x.numel() // d.x.shape[1]
    y = run(d, training=training, **options)
    assert y.dtype == dtype
    assert_close(y, wanted, "y", length=4)
    if d.norm.running_mean is not None:
        for name in ("running_mean", "running_var"):
            assert_close(getattr(d.norm, name), getattr(exact.norm, name), name, length=count)
    clear = is_clear(wanted_a.detach(), d, dtype)
    dy = torch.where(clear, gradient_for(y, d.gen), torch.zeros((), dtype=dtype))
    found = torch.autograd.grad(y, d.inputs(), dy)
    exact_found = torch.autograd.grad(wanted, exact.inputs(), dy.double())
    # In 16 bits the sum over overlapping windows is rounded before the normalisation's backward reads it.
    windows = math.ceil(d.pool.kernel / d.pool.stride) ** 2
    rounding = STORED * torch.finfo(dtype).eps * windows * float(dy.abs().max()) if windows > 1 else 0.0
    largest = float(exact.x.detach().abs().max()) * 3  # more than |xhat| and than weight * rstd
    noise = rounding * largest * math.sqrt(count) if torch.finfo(dtype).eps > 1e-6 else 0.0
    for name, got, want in zip(("x", "weight", "bias"), found, exact_found, strict=False):
        assert_close(got, want, f"gradient of {name}", length=count, noise=noise if name != "x" else rounding * largest)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@shapes
def test_training_is_that_of_float64(shape, kind):
    for pool in (POOLS[0], POOLS[1], POOLS[(SHAPES.index(shape) + ACTIVATIONS.index(kind)) % len(POOLS)]):
        check(Data.of(shape, kind, pool))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pools
def test_dtypes_and_layouts(pool, layout, dtype):
    for kind in ("relu", "silu"):
        check(Data.of((3, 24, 9, 7), kind, pool, dtype, layout))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_parameters_and_running_statistics_may_be_missing(affine, running):
    check(Data.of((2, 16, 8, 8), "relu", POOLS[0], affine=affine, running=running))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_evaluation_is_that_of_float64(kind, dtype):
    for pool in POOLS[:3]:
        d = Data.of((2, 24, 9, 7), kind, pool, dtype)
        check(d, training=False)
        with torch.no_grad():
            assert_close(run(d, training=False), F.max_pool2d(activated(d.double(), False), *pool), "y", length=4)


def test_statistics_that_are_given_are_not_taken_again():
    d = Data.of((4, 16, 8, 8), "relu", POOLS[0])
    var, mean = torch.var_mean(d.x.detach(), (0, 2, 3), correction=0)
    check(d, statistics=Statistics(mean, var * (d.x.numel() // 16)))
    moved = Statistics(mean + 1, var * (d.x.numel() // 16))
    x = d.x.detach()
    wanted = F.max_pool2d(functional.batch_norm_act(x, None, None, training=True, statistics=moved), *d.pool)
    ours = functional.batch_norm_act_max_pool2d(x, NormParams(None, None), *d.pool, training=True, statistics=moved)
    torch.testing.assert_close(ours, wanted)


def test_statistics_of_more_elements_go_one_after_the_other():
    d = Data.of((4, 16, 8, 8), "relu", POOLS[0])
    shared = Statistics(torch.zeros(16), torch.full((16,), 1000.0), torch.tensor([500]))
    y = run(d, training=True, statistics=shared)
    n = d.norm
    a = functional.batch_norm_act(
        d.x, None, None, n.weight, n.bias, training=True, eps=n.eps, statistics=shared
    )  # fmt: skip
    assert torch.equal(y, F.max_pool2d(a, *d.pool))
    dy = gradient_for(y, d.gen)
    da = ops.unpool(dy, ops.forward(a.detach(), d.pool, True)[1], a, d.pool)
    for got, want in zip(
        torch.autograd.grad(y, d.inputs(), dy), torch.autograd.grad(a, d.inputs(), da), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------------------ behaviour


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 64, 33, 40), (16, 40, 9, 9)], ids=str)
def test_results_are_the_same_in_every_run_and_with_any_threads(shape):
    d = Data.of(shape, "relu", POOLS[0])
    results = []
    for count in (1, 1, 2, 3, 7):
        with threads(count):
            y = run(d, training=True)
            dy = gradient_for(y, generator("dy", shape))
            pooled = functional.max_pool2d(d.x, *d.pool)
            results.append([y, pooled, *torch.autograd.grad(y, d.inputs(), dy), *torch.autograd.grad(pooled, d.x, dy)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_only_the_input_and_a_byte_an_output_are_saved():
    d = Data.of((2, 64, 16, 16), "relu", Pool(3, 2, 1))
    outputs = 2 * 64 * 8 * 8
    assert saved_bytes(lambda: run(d, training=True)) == d.x.numel() * 4 + outputs
    assert saved_bytes(lambda: functional.max_pool2d(d.x, 3, 2, 1)) == outputs


@needs_kernels
def test_who_runs_the_operators():
    x = torch.randn(2, 16, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    n = NormParams(torch.zeros(16), torch.ones(16))
    for given, expected in (
        (last, ["norm_act_max_pool_inference", "max_pool_forward"]),
        (x, ["batch_norm_act_inference"]),
    ):
        with Operators() as seen:
            functional.batch_norm_act_max_pool2d(given, n, 3, 2, 1)
            functional.max_pool2d(given, 3, 2, 1)
        assert seen.names == expected
    with Operators() as seen:
        functional.max_pool2d(last, 16, 1, 8)
    assert seen.names == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_passes_on_all_operators(dtype):
    d = Data.of((2, 16, 7, 6), "relu", POOLS[0], dtype)
    x, n = d.x.detach(), NormParams(*(None if t is None else t.detach() for t in d.norm[:4]), 0.1, 1e-5)
    y, position = ops.forward(x, d.pool, True)
    dy = gradient_for(y, d.gen)
    opcheck(ops.forward, x, d.pool, True)
    opcheck(ops.forward, x, d.pool, False)
    opcheck(ops.backward, dy, position, x, d.pool)
    opcheck(ops.norm_act_training, x, n, None, d.act, d.pool)
    opcheck(ops.norm_act_inference, x, n, d.act, d.pool)
    opcheck(ops.norm_act_backward, dy, position, x, Norm(torch.zeros(16), torch.ones(16), None, None), d.act, d.pool)


def test_the_functions_compile_to_one_graph_with_the_same_results():
    torch._dynamo.reset()
    d = Data.of((4, 16, 12, 12), "silu", POOLS[0])
    dy = gradient_for(run(d, training=True), d.gen)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        running = torch.zeros(16), torch.ones(16)
        a = functional.batch_norm_act_max_pool2d(x, NormParams(*running, weight), 3, 2, 1, training=True)
        return a + functional.max_pool2d(x, 3, 2, 1)

    results = []
    for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        y = f(d.x, d.norm.weight)
        results.append([y, *torch.autograd.grad(y, (d.x, d.norm.weight), dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_gradients_and_batches_of_gradients_are_those_of_pytorch():
    d = Data.of((2, 8, 6, 6), "silu", Pool(3, 2, 1), torch.float64)

    def twice(f) -> list[Tensor]:
        y = f()
        dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).requires_grad_()
        first = torch.autograd.grad(y, d.x, dy, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), [d.x, dy], allow_unused=True, materialize_grads=True)
        batch = torch.autograd.grad(f(), d.x, torch.stack([dy, 2 * dy]).detach(), is_grads_batched=True)[0]
        return [first, *second, batch]

    pairs = [
        (lambda: run(d, training=True), lambda: F.max_pool2d(activated(d, True), *d.pool)),
        (lambda: functional.max_pool2d(d.x * d.x, *d.pool), lambda: F.max_pool2d(d.x * d.x, *d.pool)),
    ]
    for ours, pytorchs in pairs:
        for got, want in zip(twice(ours), twice(pytorchs), strict=True):
            torch.testing.assert_close(got, want)


def test_transforms_are_pytorchs():
    x = torch.randn(3, 2, 8, 6, 6, dtype=torch.float64)
    pooled = torch.func.vmap(lambda t: functional.max_pool2d(t, 3, 2, 1))(x)
    assert torch.equal(pooled, F.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, (3, 2)))
    tangent = torch.randn_like(x[0])
    _, got = torch.func.jvp(lambda t: functional.max_pool2d(t, 3, 2, 1), (x[0],), (tangent,))
    _, want = torch.func.jvp(lambda t: F.max_pool2d(t, 3, 2, 1), (x[0],), (tangent,))
    assert torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_result(training):
    x = torch.randn(0, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    n = NormParams(torch.zeros(16), torch.ones(16), torch.ones(16).requires_grad_())
    for y in (
        functional.max_pool2d(x, 3, 2, 1),
        functional.batch_norm_act_max_pool2d(x, n, 3, 2, 1, training=training),
    ):
        assert y.shape == (0, 16, 4, 4)
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert torch.equal(n.running_var, torch.ones(16))


X = torch.randn(2, 8, 6, 6)
NORM = NormParams(torch.zeros(8), torch.ones(8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1],), TypeError, "x: expected a Tensor, got list"),
        ((X[0], 2), ValueError, r"x: expected 4 dimensions \[N, C, H, W\], got shape \(8, 6, 6\)"),
        ((X.int(), 2), TypeError, "x: expected float32, bfloat16, float16 or float64, got torch.int32"),
        ((X, 2.0), TypeError, "kernel_size: expected an int, got float"),
        ((X, (2, 2)), TypeError, "kernel_size: expected an int, got tuple"),
        ((X, True), TypeError, "kernel_size: expected an int, got bool"),
        ((X, 0), ValueError, "kernel_size: expected at least 1, got 0"),
        ((X, 2, 0), ValueError, "stride: expected at least 1, got 0"),
        ((X, 2, 1, -1), ValueError, "padding: expected at least 0, got -1"),
        ((X, 3, 1, 2), ValueError, "padding: expected at most half of kernel_size 3, got 2"),
        ((X, 9, 1, 1), ValueError, r"kernel_size: expected at most the size of x with its padding, got 9 for shape"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = (*arguments, 2)[: max(2, len(arguments))]
    with pytest.raises(error, match=message):
        functional.max_pool2d(*arguments)
    with pytest.raises(error, match=message):
        functional.batch_norm_act_max_pool2d(arguments[0], NORM, *arguments[1:])


def test_bad_normalisations_are_named():
    with pytest.raises(TypeError, match="norm: expected NormParams, got tuple"):
        functional.batch_norm_act_max_pool2d(X, tuple(NORM), 2)
    with pytest.raises(ValueError, match=r"norm.running_mean: expected shape \(8,\), one value a channel"):
        functional.batch_norm_act_max_pool2d(X, NORM._replace(running_mean=torch.zeros(7)), 2)
    with pytest.raises(ValueError, match=r"norm.running_mean: expected running statistics with training=False"):
        functional.batch_norm_act_max_pool2d(X, NormParams(None, None), 2)


@needs_kernels
def test_the_operators_check_what_they_read_memory_by():
    last = X.contiguous(memory_format=torch.channels_last)
    y, position = ops.forward(last, Pool(2, 2, 0), True)
    for call, error, message in (
        (lambda: ops.forward(X, Pool(2, 2, 0), True), ValueError, "x: expected channels_last memory"),
        (lambda: ops.forward(last, Pool(16, 2, 0), True), ValueError, "kernel: expected 1 to 15, got 16"),
        (lambda: ops.forward(last, Pool(2, 0, 0), True), ValueError, "stride: expected at least 1, got 0"),
        (lambda: ops.forward(last, Pool(2, 2, 2), True), ValueError, "padding: expected 0 to half the kernel, got 2"),
        (lambda: ops.forward(last, Pool(9, 2, 0), True), ValueError, "kernel: expected at most the size of x"),
        (lambda: ops.backward(y, position, X[..., :4], Pool(2, 2, 0)), ValueError, "dy: expected shape"),
        (lambda: ops.backward(y, position[:1], X, Pool(2, 2, 0)), ValueError, "position: expected shape"),
        (lambda: ops.backward(y, position.int(), X, Pool(2, 2, 0)), TypeError, "position: expected dtype"),
        (lambda: ops.forward(last[:, :, :0], Pool(2, 2, 1), True), ValueError, "x: expected at least one element"),
        (lambda: ops.forward(last[:, :0], Pool(2, 2, 1), True), ValueError, "x: expected at least one element"),
        (lambda: ops.norm_act_inference(X, NORM, Activation.of("relu"), Pool(2, 2, 0)), ValueError, "x: expected chan"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@needs_kernels
def test_positions_out_of_a_window_choose_nobody():
    last = X.contiguous(memory_format=torch.channels_last)
    y, position = ops.forward(last, Pool(2, 2, 0), True)
    assert not ops.backward(y, torch.full_like(position, 200), X, Pool(2, 2, 0)).any()
