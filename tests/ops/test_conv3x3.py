"""The 3x3 convolution: values and both gradients against float64, the choice of algorithm, and the kept weights.

Tolerances follow from the algorithm. Its transforms are sums of products whose terms are larger than their result, so
rounding errors grow by a factor that the matrices determine: `amplification` computes it from the points alone.
"""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import _extension, functional, reference
from fastres.ops import conv3x3 as ops
from tests.oracle import LAYOUTS, SEED, activation, assert_close, generator

OPS = torch.ops.fastres
CAPABILITY = _extension.cpu_capability()
COMPILED = CAPABILITY in ("avx2", "avx512") and _extension.load_cpu() is not None
needs_kernels = pytest.mark.skipif(not COMPILED, reason="Winograd's kernels need AVX2 and a compiled module")

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
]


def toom_cook(points: list[float], outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A^T, G and B^T of the minimal filter with these points and infinity, float64."""
    size = outputs + taps - 1
    a, g, b = (torch.zeros(s, dtype=torch.float64) for s in ((outputs, size), (size, taps), (size, size)))

    def polynomial(roots: list[float]) -> Tensor:
        coefficients = torch.ones(1, dtype=torch.float64)
        for root in roots:
            coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
        return coefficients

    for i, p in enumerate(points):
        others = [q for j, q in enumerate(points) if j != i]
        b[i, : size - 1] = polynomial(others)
        g[i] = torch.tensor([p**k for k in range(taps)], dtype=torch.float64) / math.prod(p - q for q in others)
        a[:, i] = torch.tensor([p**k for k in range(outputs)], dtype=torch.float64)
    b[-1], g[-1, -1], a[-1, -1] = polynomial(points), 1, 1
    return a, g, b


POINTS = [0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2)]
A, G, B = toom_cook(POINTS, 4, 3)


def amplification(last: Tensor, left: Tensor, right: Tensor, terms: int) -> float:
    """How much larger, in root mean square, what is summed at last is than the result, for independent random data.

    Args:
        last: rows of the last transform, in one dimension; left, right: those of the two factors.
        terms: products behind a result in the direct sum.
    """
    squares = last.square() @ (left.square().sum(1) * right.square().sum(1))
    return math.sqrt(float(torch.outer(squares, squares).max()) / terms)


OUTPUT_AMPLIFICATION = amplification(A, G, B, 9)  # 7.1; 31 with the points 0, +-1 and +-2
WEIGHT_AMPLIFICATION = amplification(G.T, A.T, B, 16)  # 6.0; 24


def data(shape: tuple[int, int, int, int, int], *key: object, layout: str = "channels_last") -> tuple[Tensor, ...]:
    """x, weight and dy."""
    n, c, k, h, w = shape
    gen = generator(shape, *key)
    x = activation((n, c, h, w), torch.float32, layout, gen)
    weight = activation((k, c, 3, 3), torch.float32, layout, gen, mean=0.02, std=(9 * c) ** -0.5)
    return x, weight, activation((n, k, h, w), torch.float32, layout, gen, mean=0.1, std=1.0)


def exact(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = reference.conv3x3(x, weight)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy.double()))


def check(shape: tuple[int, int, int, int, int], x: Tensor, weight: Tensor, dy: Tensor) -> None:
    n, c, k, h, w = shape
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = functional.conv3x3(x, weight, algorithm="winograd")
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    expected = exact(x, weight, dy)
    # A tile adds up its 36 points whatever the true sum's length.
    lengths = (36 + 9 * c, 36 + 9 * k, 36 + n * h * w)
    factors = (OUTPUT_AMPLIFICATION, OUTPUT_AMPLIFICATION, WEIGHT_AMPLIFICATION)
    for name, got, wanted, length, factor in zip(
        ("y", "gradient of x", "gradient of weight"), (y, dx, dweight), expected, lengths, factors, strict=True
    ):
        assert_close(got.detach(), wanted, name, length=math.ceil(length * factor**2))


# --------------------------------------------------------------------------------------------------------------- values


def test_the_matrices_are_a_convolution():
    gen = generator("matrices")
    d, g = torch.randn(6, 6, generator=gen, dtype=torch.float64), torch.randn(3, 3, generator=gen, dtype=torch.float64)
    y = A @ ((G @ g @ G.T) * (B @ d @ B.T)) @ A.T
    torch.testing.assert_close(y, F.conv2d(d[None, None], g[None, None])[0, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients_are_those_of_float64(shape, layout):
    check(shape, *data(shape, layout, layout=layout))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 14), st.integers(1, 14)),
    st.sampled_from(sorted(LAYOUTS)),
)
def test_any_shape_agrees_with_float64(shape, layout):
    check(shape, *data(shape, layout, layout=layout))


def test_weights_of_any_strides_are_read_where_they_lie():
    shape = (2, 20, 36, 5, 6)
    x, weight, dy = data(shape)
    check(shape, x, weight.transpose(2, 3).contiguous().transpose(2, 3), dy)
    check(shape, x, weight.repeat(2, 2, 1, 1)[::2, :20], dy)


@needs_kernels
def test_errors_are_as_small_as_documented():
    """docs/convolution.md: at most 1e-5 of the largest value, at the shapes of ResNet-18's stages."""
    for stage in range(4):
        channels, size = 64 << stage, 32 >> stage
        x, weight, dy = data((4, channels, channels, size, size))
        wanted = exact(x, weight, dy)
        y = OPS.conv3x3_forward(x, weight, False)
        for got, value in zip((y, *OPS.conv3x3_backward(dy, x, weight, [True, True])), wanted, strict=True):
            assert float((got - value).abs().max() / value.abs().max()) < 1e-5


@needs_kernels
@pytest.mark.parametrize(("channels", "size"), [(64, 32), (256, 8)])
def test_weight_gradient_at_batch_128_is_close_to_the_direct_one(channels, size):
    x, weight, dy = data((128, channels, channels, size, size))
    x -= 0.5  # a mean would add up to sums so large that they hide the errors
    dy -= 0.1
    wanted = exact(x, weight, dy)[2]
    _, dweight = OPS.conv3x3_backward(dy, x, weight, [False, True])
    _, direct, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    error, direct_error = (float((t - wanted).square().mean().sqrt()) for t in (dweight, direct))
    assert_close(dweight, wanted, "gradient of weight", length=math.ceil(128 * size**2 * WEIGHT_AMPLIFICATION**2))
    assert error < 2 * WEIGHT_AMPLIFICATION * direct_error


# ------------------------------------------------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 6), (1, 1, 1, 1, 1), (2, 8, 8, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_passes_on_both_operators(shape, layout):
    x, weight, dy = data(shape, layout=layout)
    for keep in (True, False):
        torch.library.opcheck(OPS.conv3x3_forward.default, (x, weight, keep))
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(OPS.conv3x3_backward.default, (dy, x, weight, needs))


@pytest.mark.parametrize("algorithm", ops.ALGORITHMS)
def test_the_function_compiles_to_one_graph_with_the_same_results(algorithm):
    x, weight, dy = data((4, 64, 64, 16, 16))
    x.requires_grad_()
    weight.requires_grad_()

    def f(x, weight):
        return functional.conv3x3(x, weight, algorithm=algorithm)

    results = []
    for run in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        y = run(x, weight)
        with torch.no_grad():
            evaluated = run(x, weight)
        results.append([y, evaluated, *torch.autograd.grad(y, (x, weight), dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_environment_is_read_while_compiling(monkeypatch):
    monkeypatch.setenv("FASTRES_CONV", "winograd")
    x, weight, _ = data((1, 8, 8, 5, 5))
    compiled = torch.compile(functional.conv3x3, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), functional.conv3x3(x, weight))


@needs_kernels
@pytest.mark.parametrize("shape", [(8, 64, 96, 12, 11), (4, 256, 256, 4, 4), (40, 32, 40, 32, 32)], ids=str)
def test_results_are_the_same_in_every_run_and_with_any_threads(shape):
    x, weight, dy = data(shape)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3, 7, 20):
            torch.set_num_threads(threads)
            runs = [
                (OPS.conv3x3_forward(x, weight, False), *OPS.conv3x3_backward(dy, x, weight, [True, True]))
                for _ in range(2)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
            results[threads] = runs[0]
    finally:
        torch.set_num_threads(before)
    wanted = exact(x, weight, dy)[2]
    length = math.ceil((36 + x.shape[0] * x.shape[2] * x.shape[3]) * WEIGHT_AMPLIFICATION**2)
    for y, dx, dweight in results.values():
        assert torch.equal(y, results[1][0])
        assert torch.equal(dx, results[1][1])
        # Each thread adds up its share of the tiles.
        assert_close(dweight, wanted, "gradient of weight", length=length)


@needs_kernels
def test_either_order_of_work_gives_the_same_bits():
    # One image goes by channels and 64 by tiles; an image's results know nothing of the others.
    x, weight, _ = data((64, 64, 64, 8, 8))
    together, alone = OPS.conv3x3_forward(x, weight, False), OPS.conv3x3_forward(x[:1], weight, False)
    assert torch.equal(together[:1], alone)


def test_one_gradient_alone_is_that_of_both():
    x, weight, dy = data((2, 24, 40, 6, 6))
    dx, dweight = OPS.conv3x3_backward(dy, x, weight, [True, True])
    assert torch.equal(OPS.conv3x3_backward(dy, x, weight, [True, False])[0], dx)
    assert torch.equal(OPS.conv3x3_backward(dy, x, weight, [False, True])[1], dweight)


def test_double_backward_is_a_clear_error():
    x, weight, _ = data((1, 4, 4, 4, 4))
    weight.requires_grad_()
    y = functional.conv3x3(x, weight, algorithm="winograd")
    (first,) = torch.autograd.grad((y * y).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward"):
        first.sum().backward()


def test_nothing_outside_the_tiles_of_a_nan_is_touched():
    x, weight, _ = data((1, 8, 8, 12, 12))
    clean = functional.conv3x3(x, weight, algorithm="winograd")
    x[0, 3, 0, 0] = math.nan
    y = functional.conv3x3(x, weight, algorithm="winograd")
    assert bool(y[0, :, :2, :2].isnan().all())
    assert torch.equal(y[0, :, 4:], clean[0, :, 4:])
    assert torch.equal(y[0, :, :, 4:], clean[0, :, :, 4:])


# --------------------------------------------------------------------------------------------------------- kept weights


def evaluate(x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.conv3x3(x, weight, algorithm="winograd")


def test_kept_weights_follow_an_update_in_place():
    x, weight, _ = data((16, 8, 8, 8, 8))
    weight.requires_grad_()
    before = evaluate(x, weight)
    assert torch.equal(evaluate(x, weight), before)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(evaluate(x, weight), 2 * before)  # powers of two change no rounding
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
    torch.testing.assert_close(evaluate(x, weight), reference.conv3x3(x, weight.detach()), rtol=1e-4, atol=1e-4)


def test_kept_weights_follow_new_memory_and_views():
    x, weight, _ = data((16, 8, 8, 8, 8))
    before = evaluate(x, weight)
    for factor in (2, 4):
        # As likely as not in the memory that the last one has just freed.
        other = weight * factor
        assert torch.equal(evaluate(x, other), factor * before)
        del other
    weight.data = weight.data * 2
    assert torch.equal(evaluate(x, weight), 2 * before)
    assert torch.equal(evaluate(x, weight.flip(1).flip(1)), 2 * before)
    turned = weight.transpose(0, 1)  # the same memory and version, other strides
    wanted = reference.conv3x3(x, turned)
    torch.testing.assert_close(evaluate(x, turned), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(evaluate(x, weight), 2 * before)


def test_weights_without_a_version_are_not_kept():
    x, weight, _ = data((16, 8, 8, 8, 8))
    before = evaluate(x, weight)
    with torch.inference_mode():
        unversioned = weight.clone()
        assert torch.equal(functional.conv3x3(x, unversioned, algorithm="winograd"), before)
        unversioned.mul_(2)
        assert torch.equal(functional.conv3x3(x, unversioned, algorithm="winograd"), 2 * before)


# ------------------------------------------------------------------------------------------------------------- choosing


def calls(monkeypatch, x: Tensor, weight: Tensor, **options: object) -> bool:
    """Whether the operator served the call."""
    seen = []
    monkeypatch.setattr(ops, "forward", lambda *args: seen.append(args) or OPS.conv3x3_forward(*args))
    functional.conv3x3(x, weight, **options)
    return bool(seen)


def test_auto_takes_winograd_where_it_pays(monkeypatch):
    monkeypatch.delenv("FASTRES_CONV", raising=False)
    x, weight, _ = data((8, 64, 64, 32, 32))
    assert calls(monkeypatch, x, weight)
    assert calls(monkeypatch, x, weight, algorithm="auto")
    assert not calls(monkeypatch, x, weight, algorithm="direct")
    assert not calls(monkeypatch, x.contiguous(), weight)
    assert not calls(monkeypatch, x.double(), weight.double())
    assert not calls(monkeypatch, x.bfloat16(), weight.bfloat16())
    few, thin, _ = data((8, 3, 64, 32, 32))
    assert not calls(monkeypatch, few, thin)
    assert calls(monkeypatch, few, thin, algorithm="winograd")
    deep, wide, _ = data((1, 512, 512, 4, 4))
    assert not calls(monkeypatch, deep, wide)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        # images, inputs, outputs, height, width: as measured, see docs/convolution.md
        ((64, 3, 64, 32, 32), False),
        ((64, 8, 8, 32, 32), False),
        ((64, 16, 16, 32, 32), False),
        ((64, 32, 32, 32, 32), True),
        ((1, 64, 64, 32, 32), True),
        ((1, 128, 128, 16, 16), True),
        ((1, 256, 256, 8, 8), True),
        ((1, 512, 512, 4, 4), False),
        ((8, 512, 512, 4, 4), True),
        ((128, 512, 512, 4, 4), True),
        # not measured: a tile of one pixel takes more multiplications than the pixel
        ((64, 512, 512, 1, 1), False),
    ],
)
def test_the_cost_model_decides_as_was_measured(case, wanted):
    assert ops.pays(*case) is wanted


def test_the_argument_comes_before_the_environment(monkeypatch):
    x, weight, _ = data((2, 8, 8, 5, 5))
    monkeypatch.setenv("FASTRES_CONV", "winograd")
    assert calls(monkeypatch, x, weight)
    assert not calls(monkeypatch, x, weight, algorithm="auto")
    monkeypatch.setenv("FASTRES_CONV", "direct")
    assert not calls(monkeypatch, x, weight)
    assert calls(monkeypatch, x, weight, algorithm="winograd")
    monkeypatch.setenv("FASTRES_CONV", "")
    assert not calls(monkeypatch, x, weight)


def test_other_dtypes_are_the_direct_convolution():
    x, weight, _ = data((2, 8, 8, 5, 5))
    for dtype in (torch.float64, torch.bfloat16):
        a, w = x.to(dtype), weight.to(dtype)
        assert torch.equal(functional.conv3x3(a, w, algorithm="winograd"), reference.conv3x3(a, w))
        assert torch.equal(OPS.conv3x3_forward(a, w, False), reference.conv3x3(a, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv3x3(x, weight, algorithm="winograd").dtype == torch.bfloat16


def test_empty_batches_pass_through():
    x, weight = torch.randn(0, 8, 5, 5), torch.randn(4, 8, 3, 3, requires_grad=True)
    y = functional.conv3x3(x, weight, algorithm="winograd")
    assert y.shape == (0, 4, 5, 5)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert OPS.conv3x3_forward(x, weight, False).shape == (0, 4, 5, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
        ({"weight": None}, TypeError, "weight: expected a Tensor, got NoneType"),
        ({"x": torch.zeros(8, 5, 5)}, ValueError, r"x: expected 4 dimensions.*got shape \(8, 5, 5\)"),
        ({"x": torch.zeros(1, 8, 5, 5, dtype=torch.int32)}, TypeError, "x: expected float32.*got torch.int32"),
        ({"weight": torch.zeros(4, 8, 3, 3).double()}, TypeError, "weight: expected dtype torch.float32"),
        ({"weight": torch.zeros(4, 7, 3, 3)}, ValueError, r"weight: expected shape \(K, 8, 3, 3\).*got \(4, 7, 3, 3\)"),
        ({"weight": torch.zeros(4, 8, 1, 1)}, ValueError, r"weight: expected shape .*got \(4, 8, 1, 1\)"),
        ({"weight": torch.zeros(4, 8, 3, 3, device="meta")}, ValueError, "weight: expected a tensor on cpu"),
        ({"algorithm": "fast"}, ValueError, "algorithm: expected one of .*'winograd'.*got 'fast'"),
        ({"algorithm": 3}, TypeError, "algorithm: expected a string or None, got int"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"x": torch.zeros(1, 8, 5, 5), "weight": torch.zeros(4, 8, 3, 3)} | change
    with pytest.raises(error, match=message):
        functional.conv3x3(arguments.pop("x"), arguments.pop("weight"), **arguments)


def test_a_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("FASTRES_CONV", "quick")
    with pytest.raises(ValueError, match=r"FASTRES_CONV: expected one of .*got 'quick'"):
        functional.conv3x3(torch.zeros(1, 8, 5, 5), torch.zeros(4, 8, 3, 3))


@needs_kernels
def test_the_operators_name_bad_arguments():
    x, weight = torch.zeros(1, 8, 5, 5), torch.zeros(4, 8, 3, 3)
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions"):
        OPS.conv3x3_forward(x[0], weight, False)
    with pytest.raises(ValueError, match=r"weight: expected shape \(K, 8, 3, 3\)"):
        OPS.conv3x3_forward(x, weight[:, :4], False)
    with pytest.raises(TypeError, match=r"weight: expected dtype"):
        OPS.conv3x3_forward(x, weight.double(), False)
    with pytest.raises(ValueError, match=r"dy: expected shape \[1, 4, 5, 5\], got \[1, 4, 5, 4\]"):
        OPS.conv3x3_backward(torch.zeros(1, 4, 5, 4), x, weight, [True, True])
