"""Beyond the range of Winograd's transforms: large values, infinities and NaN do to the 3x3 convolution what they do to
the direct sum.

The oracle is the sum by its definition, in float64, where a tap in the padding adds nothing. (PyTorch's convolutions
are not of one mind there: some multiply an infinite weight by the padding's zero.) It is compared element by element,
with the error bound of a direct sum of n terms: n * eps times the sum of the terms' absolute values, in which a large
value appears only where it is read. What it is multiplied by counts as no smaller than its kind is in general, for
Winograd's algorithm multiplies sums of such factors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import functional
from fastres.contract import output_size
from fastres.functional import NormParams
from tests.ops.test_conv3x3 import needs_kernels, strides
from tests.oracle import activation, assert_statistics, generator, norm, threads

pytestmark = needs_kernels

EPS = torch.finfo(torch.float32).eps
INF, NAN = float("inf"), float("nan")
LARGE = [1e3, 1e6, 1e30]
NOT_FINITE = [INF, -INF, NAN]
DTYPES = [torch.float32, torch.bfloat16]

# images, inputs, outputs, height, width
Shape = tuple[int, int, int, int, int]
SHAPES = {
    "one tile": (1, 16, 24, 4, 4),
    "one pixel": (1, 8, 8, 1, 1),
    "by channels": (2, 5, 40, 7, 9),
    "by channels, batch 1": (1, 32, 32, 8, 8),
    "by tiles": (3, 17, 8, 9, 6),
    "small tiles at the edge": (2, 6, 12, 6, 6),
    "tiles of 5x5": (2, 7, 18, 10, 5),
    "tiles of 3x3": (2, 9, 20, 6, 3),
    "small tiles of 5x5 at the edge": (2, 6, 12, 6, 11),
    "by tiles, gradient by shares": (30, 2, 3, 32, 32),
    "small images": (20, 6, 20, 2, 2),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def data(shape: Shape, dtype: torch.dtype, *key: object, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy, of the scale that normalised activations have."""
    n, c, k, h, w = shape
    gen = generator(shape, dtype, *key, stride)
    x = activation((n, c, h, w), dtype, "channels_last", gen, mean=0.0, std=1.0)
    weight = activation((k, c, 3, 3), dtype, "channels_last", gen, mean=0.0, std=(9 * c) ** -0.5)
    outputs = (n, k, output_size(h, stride), output_size(w, stride))
    return x, weight, activation(outputs, dtype, "channels_last", gen, mean=0.0, std=1.0)


def places(h: int, w: int) -> dict[str, list[tuple[int, int]]]:
    """Pixels: in corners and on edges of images and tiles, inside a tile, and all together."""
    single = {
        "first": (0, 0),
        "last": (h - 1, w - 1),
        "edge": (0, w // 2),
        "corner of a tile": (min(3, h - 1), min(4, w - 1)),
        "inside a tile": (min(5, h - 1), min(1, w - 1)),
    }
    return {name: [place] for name, place in single.items()} | {"several": sorted(set(single.values()))}


def put(t: Tensor, value: float, pixels: list[tuple[int, int]]) -> Tensor:
    """A copy of t with `value` at these pixels of its last image, in one channel, where there are such pixels."""
    t = t.clone()
    for y, x in pixels:
        if y < t.shape[2] and x < t.shape[3]:
            t[-1, t.shape[1] // 2, y, x] = value
    return t


def under(tap: int, size: int, stride: int) -> tuple[slice, slice]:
    """The outputs along an axis, and the inputs that they read under a tap, without those in the padding."""
    outputs = [i for i in range(output_size(size, stride)) if 0 <= stride * i + tap - 1 < size]
    if not outputs:
        return slice(0, 0), slice(0, 0)
    read = slice(stride * outputs[0] + tap - 1, stride * outputs[-1] + tap, stride)
    return slice(outputs[0], outputs[-1] + 1), read


def convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """The definition: tap by tap over the pixels that it reads."""
    n, _, h, w = x.shape
    y = x.new_zeros(n, weight.shape[0], output_size(h, stride), output_size(w, stride))
    for u in range(3):
        for v in range(3):
            (rows, from_rows), (columns, from_columns) = under(u, h, stride), under(v, w, stride)
            read = x[:, :, from_rows, from_columns]
            y[:, :, rows, columns] += torch.einsum("kc,nchw->nkhw", weight[:, :, u, v], read)
    return y


def gradients(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dweight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = f(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def winograd(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    return functional.conv3x3(x, weight, stride=stride, algorithm="winograd")


def kinds(t: Tensor) -> Tensor:
    """0 where finite, else which of inf, -inf and NaN."""
    return t.isposinf() + 2 * t.isneginf() + 3 * t.isnan()


def assert_direct(actual: Tensor, expected: Tensor, sizes: Tensor, terms: int, name: str) -> None:
    """`actual` is as good as the direct sum of so many terms, `sizes` the sum of their absolute values, in float64."""
    assert torch.equal(kinds(actual), kinds(expected.to(actual.dtype))), f"{name}: not finite in other places"
    finite = actual.isfinite()
    stored = torch.finfo(actual.dtype).eps * expected.abs() + torch.finfo(actual.dtype).tiny
    error, allowed = (actual.double() - expected).abs(), terms * EPS * sizes + stored
    worst = torch.where(finite, error / allowed, 0).max()
    assert worst <= 1, f"{name}: {worst.item():.1f} times the direct sum's bound"


def size(t: Tensor) -> Tensor:
    """Absolute values, none smaller than is general in t, whose zeros were put there."""
    size = t.double().abs()
    return size.maximum(size[size != 0].nanmedian())


def size_in_padding(x: Tensor, weight: Tensor, dy: Tensor, stride: int) -> Tensor:
    """What the padding's zeros add to the sizes of dweight: to a tile's products they are factors like any other."""
    general = min(size(x)[x.isfinite()].tolist(), default=0.0)
    padding = F.pad(torch.zeros_like(x, dtype=torch.float64), (1, 1, 1, 1), value=general)
    return torch.nn.grad.conv2d_weight(padding, list(weight.shape), size(dy).nan_to_num(0, 0, 0), stride)


def check(x: Tensor, weight: Tensor, dy: Tensor, stride: int = 1) -> None:
    results = gradients(partial(winograd, stride=stride), x, weight, dy)
    exact = gradients(partial(convolution, stride=stride), x.double(), weight.double(), dy.double())
    sizes = gradients(partial(convolution, stride=stride), size(x), size(weight), size(dy))
    sizes[2] = sizes[2] + size_in_padding(x, weight, dy, stride)
    if min(x.shape[2:]) <= stride:  # some taps of the weight read nothing but padding
        sizes[2] = sizes[2].nan_to_num().amax((2, 3), keepdim=True).expand_as(sizes[2])
    terms = (9 * x.shape[1], 9 * weight.shape[0], x.numel() // x.shape[1])
    for name, *compared, count in zip(("y", "dx", "dweight"), results, exact, sizes, terms, strict=True):
        # The inverse transform has 36 points, however few the terms are.
        assert_direct(*compared, count + 36, name)


# ----------------------------------------------------------------------------------------------------- one convolution


@shapes
@strides
@dtypes
@pytest.mark.parametrize("value", LARGE)
def test_a_large_value_shows_only_where_it_is_read(shape, stride, dtype, value):
    x, weight, dy = data(shape, dtype, value, stride=stride)
    for pixels in places(*shape[3:]).values():
        check(put(x, value, pixels), weight, dy, stride)
    for pixels in places(*dy.shape[2:]).values():
        check(x, weight, put(dy, value, pixels), stride)
    check(put(x, value, [(0, 0)]), weight, put(dy, 1e3, [(dy.shape[2] - 1, 0)]), stride)


@strides
@dtypes
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("pixels", [(4, 2), (3, 6), (6, 6), (2, 3), (5, 7), (10, 10), (11, 14)], ids=str)
def test_a_large_edge_of_an_image_shows_only_where_it_is_read(pixels, axis, dtype, stride):
    """Some taps of the weight's gradient do not read it, and of the tiles there one or two outputs are in the image."""
    x, weight, dy = data((2, 16, 20, *pixels), dtype, axis, stride=stride)
    for large in (x, dy):
        for edge in (0, -1):
            changed = large.clone()
            changed.select(axis, edge).mul_(1e5)
            check(*(changed if t is large else t for t in (x, weight, dy)), stride)


@shapes
@strides
@dtypes
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_what_is_not_finite_reaches_what_it_reaches_in_the_direct_sum(shape, stride, dtype, value):
    x, weight, dy = data(shape, dtype, value, stride=stride)
    for pixels in places(*shape[3:]).values():
        check(put(x, value, pixels), weight, dy, stride)
    for pixels in places(*dy.shape[2:]).values():
        check(x, weight, put(dy, value, pixels), stride)


@shapes
@strides
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_pytorch_has_the_same_infinities_and_nan(shape, stride, value):
    x, weight, dy = data(shape, torch.float32, value, stride=stride)
    for pixels in places(*shape[3:]).values():
        bad = put(x, value, pixels)
        expected = gradients(lambda x, weight: F.conv2d(x, weight, padding=1, stride=stride), bad, weight, dy)
        found = gradients(partial(winograd, stride=stride), bad, weight, dy)
        for name, a, b in zip(("y", "dx", "dweight"), found, expected, strict=True):
            assert torch.equal(kinds(a), kinds(b)), name


@shapes
@strides
def test_opposite_infinities_and_zeros_under_an_infinity_are_nan(shape, stride):
    x, weight, dy = data(shape, torch.float32, stride=stride)
    x, dy = put(x, INF, [(0, 0)]), put(dy, -INF, [(dy.shape[2] - 1, dy.shape[3] - 1)])
    weight[::2, :, 1, 1] = 0
    x[:, 0] = 0
    check(x, weight, dy, stride)
    x[-1, -1, 0, 0] = -INF
    check(x, weight, dy, stride)


@shapes
@strides
def test_values_near_float32s_largest_do_not_overflow(shape, stride):
    x, weight, dy = data(shape, torch.float32, stride=stride)
    weight = weight.sign() * 1e-3
    check(x.sign() * 1.5e38, weight, dy * 1e-38, stride)
    check(x * 1e-38, weight, dy.sign() * 1.5e38, stride)
    check(x.sign() * 1e19, weight, dy.sign() * 1e15, stride)


@shapes
@strides
@dtypes
@pytest.mark.parametrize("value", [*NOT_FINITE, 1e30], ids=str)
def test_weights_that_are_not_finite_or_large_are_summed_directly(shape, stride, dtype, value):
    x, weight, dy = data(shape, dtype, value, stride=stride)
    weight[shape[2] // 2, shape[1] // 2, 0, 1] = value
    weight[0, 0, 2, 2] = -value
    check(x, weight, dy, stride)


@shapes
@strides
@dtypes
def test_an_input_of_nan_alone(shape, stride, dtype):
    x, weight, dy = data(shape, dtype, stride=stride)
    for bad_x, bad_dy in ((x * NAN, dy), (x, dy * NAN), (x * NAN, dy * NAN)):
        check(bad_x, weight, bad_dy, stride)


@strides
@pytest.mark.parametrize("shape", [SHAPES["by channels"], SHAPES["by tiles, gradient by shares"]], ids=str)
def test_results_are_the_same_in_every_run_and_with_any_number_of_threads(shape, stride):
    x, weight, dy = data(shape, torch.float32, stride=stride)
    x = put(x, 1e6, places(*shape[3:])["several"])
    dy = put(dy, 1e6, places(*dy.shape[2:])["first"])
    convolve = partial(winograd, stride=stride)
    first, again = gradients(convolve, x, weight, dy), gradients(convolve, x, weight, dy)
    with threads(1):
        alone = gradients(convolve, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], alone[0])
    assert torch.equal(first[1], alone[1])


# ------------------------------------------------------------------------------------------- which tiles are summed so


def tiles(y: Tensor, side: int) -> Tensor:
    """[images, down, across, the rest] of an [N, K, H, W] of whole tiles."""
    n, k, h, w = y.shape
    return y.reshape(n, k, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5).flatten(3)


# Of whole tiles; their sides, and the stride.
whole = pytest.mark.parametrize(
    ("shape", "side", "stride"),
    [
        ((1, 16, 40, 8, 8), 4, 1),
        ((4, 16, 8, 12, 8), 4, 1),
        ((1, 16, 40, 10, 10), 5, 1),
        ((4, 16, 8, 15, 10), 5, 1),
        ((1, 16, 40, 16, 16), 4, 2),
        ((4, 16, 8, 24, 16), 4, 2),
    ],
    ids=str,
)


def direct(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Every tile summed directly, as a filter with an infinite weight has it; that filter, the last, is cut off."""
    odd = torch.cat((weight, torch.full_like(weight[:1], INF)))
    y = winograd(x, odd, stride)[:, :-1]
    assert y.isfinite().all()
    return y


@whole
def test_other_tiles_keep_every_bit(shape, side, stride):
    x, weight, _ = data(shape, torch.float32, stride=stride)
    clean = tiles(winograd(x, weight, stride), side)
    for value in (1e6, INF, NAN):
        same = (tiles(winograd(put(x, value, [(1, 1)]), weight, stride), side) == clean).all(3)
        assert same.sum() == same.numel() - 1
        assert not same[-1, 0, 0]


@whole
def test_ordinary_activations_are_transformed_and_only_tiles_with_a_large_value_are_not(shape, side, stride):
    x, weight, _ = data(shape, torch.float32, stride=stride)

    def transformed(x: Tensor) -> Tensor:
        return (tiles(winograd(x, weight, stride), side) != tiles(direct(x, weight, stride), side)).any(3)

    gen = generator(shape, "ordinary")
    keep = torch.rand(x.shape, generator=gen) < 0.5
    blank = x.clone()
    blank[:, :, :5] = 0
    constant = x.clone()
    constant[:, :, :5] = 0.05 if side == 4 else 0.1
    for ordinary in (x, x.relu(), x * 1e-6, x * 1e6, x.relu() * keep, blank, constant, x.exp()):
        zero = tiles(F.max_pool2d(ordinary.abs().amax(1, keepdim=True), 3, stride, 1), side).amax(3) == 0
        assert (transformed(ordinary) | zero).all()
    large = transformed(put(x, 1e6, [(1, 1)]))
    assert large.sum() == large.numel() - 1
    assert not large[-1, 0, 0]


# ----------------------------------------------------------------------------------- what stands around a convolution


@shapes
@strides
@dtypes
@pytest.mark.parametrize("value", [1e3, 1e6, INF, NAN], ids=str)
def test_statistics_are_those_of_the_output(shape, stride, dtype, value):
    if shape[0] * shape[3] * shape[4] == 1:
        shape = (2, *shape[1:])
    x, weight, _ = data(shape, dtype, value, stride=stride)
    x = put(x, value, [(0, 0), (shape[3] - 1, shape[4] - 1)])
    y, statistics, _ = functional.conv3x3_with_statistics(x, weight, stride=stride, algorithm="winograd")
    assert statistics is not None
    if value in (1e3, 1e6):
        assert_statistics(*statistics[:2], y, "y")
    else:
        bad = ~y.isfinite().all(3).all(2).all(0)
        assert torch.equal(~statistics.mean.isfinite(), bad)
        assert torch.equal(~statistics.m2.isfinite(), bad)


@shapes
@strides
@dtypes
@pytest.mark.parametrize("value", [1e3, 1e6, 1e30, INF, NAN], ids=str)
def test_large_values_behind_a_normalisation(shape, stride, dtype, value):
    """The residual brings them, so that the batch statistics are ordinary and the prologue's output is not."""
    if shape[0] * shape[3] * shape[4] == 1:
        shape = (2, *shape[1:])
    x, weight, dy = data(shape, dtype, value, stride=stride)
    residual = data(shape, dtype, value, "residual")[0]
    n = norm(shape[1], dtype, generator(shape, value))
    for pixels in places(*shape[3:]).values():
        r = put(residual, value, pixels).requires_grad_()
        w = weight.detach().requires_grad_()
        y, _ = functional.norm_act_conv3x3(x, n, w, residual=r, stride=stride, algorithm="winograd")
        dr, dw = torch.autograd.grad(y, (r, w), dy)
        mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
        assert n.weight is not None
        assert n.bias is not None
        scale = n.weight.detach().double() / (var + n.eps).sqrt()
        z = (x.double() - mean[:, None, None]) * scale[:, None, None] + n.bias.detach().double()[:, None, None]
        z = z + r.detach().double()
        results = gradients(partial(convolution, stride=stride), z.relu(), weight.double(), dy.double())
        sizes = gradients(partial(convolution, stride=stride), z.relu() + 4, size(weight), size(dy))
        # A few roundings before the sum: of the statistics, and of the normalised values, of the size of 4.
        assert_direct(y.detach(), results[0], sizes[0], 9 * shape[1] + 100, "y")
        assert_direct(dw, results[2], sizes[2], x.numel() // shape[1] + 100, "dweight")
        sure = (z.abs() > 1e-3) | z.isnan()  # the mask's sign is not in doubt
        passed = torch.where(z <= 0, 0, results[1])
        assert_direct(dr * sure, passed * sure, sizes[1], 9 * shape[2] + 36, "dresidual")


@shapes
@dtypes
@pytest.mark.parametrize("value", [1e3, 1e6, 1e30, INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("relu", [True, False])
@strides
def test_large_values_before_a_normalisation(shape, dtype, value, relu, stride):
    x, weight, residual = data(shape, dtype, value, stride=stride)
    vectors = [t.detach().float() for t in norm(shape[2], dtype, generator(shape, value))[:4] if t is not None]
    n = NormParams(*vectors, eps=0.05)
    mean, var, gamma, beta = (t.double()[:, None, None] for t in vectors)
    scale = gamma / (var + n.eps).sqrt()
    for pixels in places(*shape[3:]).values():
        bad = put(x, value, pixels)
        y = functional.conv3x3_norm_act(
            bad, weight, n, residual=residual, relu=relu, stride=stride, algorithm="winograd"
        )
        z = (convolution(bad.double(), weight.double(), stride) - mean) * scale + beta + residual.double()
        sizes = convolution(size(bad), size(weight), stride) * scale + 4
        assert_direct(y, z.relu() if relu else z, sizes, 9 * shape[1] + 36, "y")
