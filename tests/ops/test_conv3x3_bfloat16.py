"""The 3x3 and 1x1 convolutions and their neighbours in bfloat16: a storage format, with float32 arithmetic between load
and store.

The oracle is float64 on the same inputs, rounded already. What an error may be has three parts.

- float32 arithmetic, with Winograd's amplification, and the half spacing of what is stored: `tests.oracle.bound`.
- Intermediate tensors that are stored as bfloat16. A stored value is off by at most half a spacing, HALF of it, and
  what is linear in it is off by the same sum of these. Where many add up they are independent and have no mean, and
  Hoeffding's inequality bounds them: beyond `ROOMS` times the root of the sum of their squares one falls with a
  probability of 2 * exp(-ROOMS**2 / 2), 2.5e-14. The kernels store the masked gradient g, from which dx is made and
  which the sums are taken of.
- Without kernels PyTorch's own convolution stores more: the activation a, da, a product before its normalisation, a
  weight's gradient, and a float32 weight that it takes in bfloat16.
- Where numbers are multiplied in pairs the 1x1 kernel's products round a and the weight as well, if the channels that
  they sum over are even in number; its weight gradient sums over pixels and rounds a always.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastres import contract, functional, reference
from fastres.activations import IDENTITY, RELU, Activation
from fastres.contract import Act, Norm, output_size
from fastres.functional import NormParams, Statistics
from fastres.nn import FusedBasicBlock
from fastres.ops import algorithms
from fastres.ops import conv3x3 as ops
from fastres.ops import norm_act_conv3x3 as norm_act_ops
from fastres.ops.products import multiplies_pairs
from tests.operators import flat
from tests.ops.test_conv3x3 import (
    COMPILED,
    CONVOLUTIONS,
    OURS,
    WITH_STATISTICS,
    both_kernels,
    convolutions,
    layout_of,
    needs_kernels,
    strides,
)
from tests.ops.test_norm_act_conv3x3 import FUSED
from tests.oracle import (
    LAYOUTS,
    SEED,
    activation,
    assert_close,
    assert_statistics,
    bound,
    form_of,
    generator,
    input_length,
    near_zero,
    norm,
    output_length,
    saved_bytes,
    threads,
    weight_length,
)

OPS = torch.ops.fastres
LOW = torch.bfloat16
HALF = torch.finfo(LOW).eps / 2
ROOMS = 8.0
WEIGHTS = [torch.float32, torch.bfloat16]
Shape = tuple[int, int, int, int, int]

pytestmark = pytest.mark.skipif(
    not COMPILED and not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="here PyTorch's own bfloat16 convolution rounds its sums after every image",
)

# images, inputs, outputs, height, width: few tiles and many, whole tiles and ragged edges, channels that fill vectors
# and odd ones, lone pixels.
SHAPES: list[Shape] = [
    (2, 16, 32, 8, 8),
    (1, 64, 64, 16, 16),
    (40, 20, 9, 9, 7),
    (3, 32, 48, 7, 9),
    (2, 5, 3, 6, 5),
    (5, 1, 1, 1, 1),
    (2, 17, 33, 4, 13),
    (4, 1, 40, 3, 2),
    (2, 40, 1, 1, 11),
    (5, 130, 70, 10, 3),
    (8, 96, 200, 4, 4),
    (4, 24, 40, 10, 10),
    (100, 24, 40, 2, 2),
    (9, 70, 40, 5, 6),
]
ANY_SHAPE = st.tuples(
    st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 14), st.integers(1, 14)
).filter(lambda s: s[0] * s[3] * s[4] > 1)


def name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def stored(value: Tensor) -> Tensor:
    """The largest error of a value that is stored as bfloat16."""
    return HALF * value.abs()


def together(squares: Tensor) -> Tensor:
    """The largest error of a sum, from the sum of its terms' squared errors."""
    return ROOMS * squares.sqrt()


def unrounded(weight_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Under autocast, and only there, weights may be float32 beside bfloat16."""
    return torch.autocast("cpu", LOW) if weight_dtype == torch.float32 else contextlib.nullcontext()


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


@dataclasses.dataclass
class Convolution:
    """y = conv(a, weight) in float64, its gradients for dy, and what rounded factors make of each.

    Attributes:
        rounds_a, rounds_dy: whether that factor is stored as bfloat16 on its way here.
        computes_a: whether a is no bfloat16 tensor that is given.
    """

    a: Tensor
    weight: Tensor
    dy: Tensor
    rounds_a: bool = False
    rounds_dy: bool = False
    stride: int = 1
    computes_a: bool = False

    def __post_init__(self) -> None:
        # PyTorch's convolution takes a float32 weight in bfloat16, and gives its gradient so.
        self.gives_rounded = not COMPILED and self.weight.dtype == torch.float32
        outputs, inputs, kernel, _ = self.weight.shape
        pairs = COMPILED and kernel == 1 and multiplies_pairs()
        in_y, in_da = (self.gives_rounded or (pairs and channels % 2 == 0) for channels in (inputs, outputs))
        self.weight_in_y, self.weight_in_da = (self.weight.dtype == torch.float32 and used for used in (in_y, in_da))
        self.a_in_y = self.rounds_a or (self.computes_a and pairs and inputs % 2 == 0)
        self.a_in_dweight = self.rounds_a or (self.computes_a and pairs)
        self.padding = self.weight.shape[2] // 2
        self.a, self.weight, self.dy = (t.detach().double() for t in (self.a, self.weight, self.dy))

    def y(self) -> Tensor:
        return self._convolve(self.a, self.weight)

    def da(self) -> Tensor:
        return self._convolve_back(self.weight, self.dy)

    def dweight(self) -> Tensor:
        return self._correlate(self.a, self.dy)

    def _convolve(self, a: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(a, weight, stride=self.stride, padding=self.padding)

    def _convolve_back(self, weight: Tensor, dy: Tensor) -> Tensor:
        return conv2d_input(self.a.shape, weight, dy, self.stride, self.padding)

    def _correlate(self, a: Tensor, dy: Tensor) -> Tensor:
        return conv2d_weight(a, self.weight.shape, dy, self.stride, self.padding)

    def _squares(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a.square(), self.weight.square(), self.dy.square()

    def y_noise(self) -> Tensor:
        a, weight, _ = self._squares()
        return together(HALF**2 * (self.a_in_y + self.weight_in_y) * self._convolve(a, weight))

    def da_noise(self) -> Tensor:
        _, weight, dy = self._squares()
        return together(HALF**2 * (self.rounds_dy + self.weight_in_da) * self._convolve_back(weight, dy))

    def dweight_noise(self) -> Tensor:
        a, _, dy = self._squares()
        noise = together(HALF**2 * (self.a_in_dweight + self.rounds_dy) * self._correlate(a, dy))
        return noise + self.gives_rounded * (stored(self.dweight()) + HALF * noise)


def tensors(
    shape: Shape,
    weight_dtype: torch.dtype,
    *key: object,
    layout: str = "channels_last",
    kernel: int = 3,
    stride: int = 1,
) -> tuple[Tensor, ...]:
    """x, weight and dy."""
    n, c, k, h, w = shape
    gen = generator(shape, weight_dtype, layout, kernel, stride, *key)
    x = activation((n, c, h, w), LOW, layout, gen)
    weight = activation((k, c, kernel, kernel), weight_dtype, layout, gen, mean=0.02, std=(kernel**2 * c) ** -0.5)
    outputs = (n, k, output_size(h, stride), output_size(w, stride))
    return x, weight, activation(outputs, LOW, layout, gen, mean=0.1, std=1.0)


# ---------------------------------------------------------------------------------------------- conv3x3_with_statistics


def check_measured(
    shape: Shape, weight_dtype: torch.dtype, layout: str = "channels_last", kernel: int = 3, stride: int = 1
) -> None:
    """y, its statistics, and both gradients, with another use of x and without."""
    x, weight, dy = tensors(shape, weight_dtype, "measured", layout=layout, kernel=kernel, stride=stride)
    other = activation(x.shape, LOW, layout, generator(shape, "other"))
    exact, form = Convolution(x, weight, dy, stride=stride), form_of(x, stride, kernel)
    x.requires_grad_()
    weight.requires_grad_()
    with unrounded(weight_dtype):
        y, statistics, same = WITH_STATISTICS[kernel](x, weight, stride=stride, algorithm=OURS[kernel])
    assert y.dtype == LOW and torch.equal(same, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y.detach(), exact.y(), "y", length=output_length(shape[1], form), noise=exact.y_noise())
    assert_statistics(*statistics[:2], y.detach(), "y")

    dx, dweight = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    both, dweight_again = torch.autograd.grad((y, same), (x, weight), (dy, other))
    assert dx.dtype == both.dtype == LOW and dweight.dtype == weight_dtype
    da, noise, length = exact.da(), exact.da_noise(), input_length(shape[2], form)
    assert_close(dx, da, "gradient of x", length=length, noise=noise)
    # The kernels add before they round; PyTorch's gradient is stored before `other` is added to it.
    apart = 0 if COMPILED else stored(da) + HALF * noise
    assert_close(both, da + other.double(), "both gradients of x", length=length, noise=noise + apart)
    of_weight = weight_length(x, stride, kernel)
    assert_close(dweight, exact.dweight(), "gradient of weight", length=of_weight, noise=exact.dweight_noise())
    assert torch.equal(dweight_again, dweight)


@convolutions
@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_values_statistics_and_gradients_are_those_of_float64(shape, layout, weight_dtype, kernel, stride):
    check_measured(shape, weight_dtype, layout, kernel, stride)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(ANY_SHAPE, st.sampled_from(WEIGHTS), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(CONVOLUTIONS))
def test_any_shape_of_the_convolution_agrees_with_float64(shape, weight_dtype, layout, convolution):
    check_measured(shape, weight_dtype, layout, *convolution)


@pytest.mark.parametrize("strides", ["nchw", "expanded", "every other"])
def test_an_added_gradient_of_any_strides_is_added_once(strides):
    shape = (3, 17, 33, 5, 6)
    x, weight, dy = tensors(shape, torch.float32)
    added = activation(x.shape, LOW, "nchw", generator(shape, strides))
    if strides == "expanded":
        added = added[:1, :, :1, :1].expand_as(x)
    elif strides == "every other":
        added = added.repeat_interleave(2, 3)[..., ::2]
    exact = Convolution(x, weight, dy)
    dx, dweight = OPS.conv3x3_backward(dy, x, weight, added, [True, True])
    da, noise = exact.da(), exact.da_noise()
    apart = 0 if COMPILED else stored(da) + HALF * noise
    assert_close(dx, da + added.double(), "gradient of x", length=output_length(33), noise=noise + apart)
    assert torch.equal(dweight, OPS.conv3x3_backward(dy, x, weight, None, [False, True])[1])


@both_kernels
def test_the_mean_does_not_drift_with_the_pixels_of_a_chunk(kernel):
    """Differences of bfloat16 from a number with more digits all end alike, and every addition rounds them one way."""
    x, weight, _ = tensors((40, 17, 16, 6, 7), torch.float32, "drift", kernel=kernel)
    with threads(1), unrounded(torch.float32):
        y, statistics, _ = WITH_STATISTICS[kernel](x, weight, algorithm=OURS[kernel])
    assert_close(statistics.mean, y.double().mean((0, 2, 3)), "mean", length=1)


def test_statistics_far_from_zero_are_those_of_what_is_stored():
    # At 300 the spacing of bfloat16 is 2, twice the deviation: those of y as computed are others.
    x = activation((8, 20, 16, 15), LOW, "channels_last", generator("far"), mean=0.0, std=1.0)
    weight = torch.zeros(40, 20, 3, 3)
    weight[torch.arange(40), torch.arange(40) % 19, 1, 1] = 1
    weight[:, 19, 1, 1] = 1
    x[:, 19] = 300
    y, mean, m2 = OPS.conv3x3_forward(x, weight, True)
    exact, count = y.double(), y.numel() // y.shape[1]
    variance = exact.var((0, 2, 3), correction=0)
    computed = F.conv2d(x.double(), weight.double(), padding=1).var((0, 2, 3), correction=0)
    assert ((mean.double() - exact.mean((0, 2, 3))).abs() <= 2 * 2**-16).all()  # half a spacing of 300, and as much
    assert ((m2.double() / count - variance).abs() <= 1e-5 * variance).all()
    assert ((computed - variance).abs() > 1e-2 * variance).all()


# --------------------------------------------------------------------------------------------------- norm_act_conv3x3


def keep_off_zero(x: Tensor, z) -> None:
    """Move elements of x, in place, until no ReLU input z(x) is near zero; by more than half a spacing up to 25."""
    with torch.no_grad():
        while bool((near := near_zero(z(x.double()), LOW)).any()):
            x += 0.1 * near


def check_norm_act(
    shape: Shape, weight_dtype: torch.dtype, *, layout: str = "channels_last", order: str | None = None,
    relu: bool = True, dropout_p: float = 0.0, given: bool = False, affine: bool = True, kernel: int = 3,
    stride: int = 1,
) -> None:  # fmt: skip
    """Everything that a call writes, and every gradient.

    With e an element's error of g, dx = scale * (g - mean(g) - xhat * mean(g * xhat)) is off by at most
    scale * (e + mean(e) + |xhat| * mean(e * |xhat|)).
    """
    key = ("norm_act", order, relu, dropout_p, given, affine)
    x, weight, dy = tensors(shape, weight_dtype, *key, layout=layout, kernel=kernel, stride=stride)
    gen, form = generator(shape, *key), form_of(x, stride, kernel)
    residual = activation(x.shape, LOW, layout, gen) if order is not None else None
    n = norm(shape[1], torch.float32, gen, affine=affine)
    order = order or "add_act"
    seed = torch.randint(2**62, (1,), generator=gen)
    count, channels = x.numel() // x.shape[1], (0, 2, 3)
    gamma = torch.ones(shape[1], dtype=torch.float64) if n.weight is None else n.weight.detach().double()
    before = residual.double() if residual is not None and order == "add_act" else 0
    after = residual.double() if residual is not None and order == "act_add" else 0

    def normed(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xhat, rstd and the ReLU's input."""
        rstd = torch.rsqrt(value.var(channels, correction=0) + n.eps)
        xhat = (value - per_channel(value.mean(channels))) * per_channel(rstd)
        z = xhat * per_channel(gamma) + before
        return xhat, rstd, z if n.bias is None else z + per_channel(n.bias.detach().double())

    if relu:
        keep_off_zero(x, lambda value: normed(value)[2])
    xhat, rstd, z = normed(x.double())
    passed = (z > 0) if relu else torch.ones_like(z, dtype=torch.bool)
    if dropout_p > 0:
        passed = passed & contract.dropout_keep(x.shape, seed, dropout_p)
    gate = passed / (1 - torch.tensor(dropout_p, dtype=torch.float64))
    exact = Convolution(z * gate + after, weight, dy, rounds_a=not COMPILED, stride=stride, computes_a=True)
    running = [0.8 * n.running_mean.double() + 0.2 * x.double().mean(channels)]
    running.append(0.8 * n.running_var.double() + 0.2 * x.double().var(channels))

    inputs = {"x": x, "weight": weight, "residual": residual, "norm.weight": n.weight, "norm.bias": n.bias}
    inputs = {key: t.requires_grad_() for key, t in inputs.items() if t is not None}
    statistics = Statistics(*OPS.batch_norm_act_stats(x.detach())[1:]) if given else None
    with unrounded(weight_dtype):
        y, found = FUSED[kernel](
            x, n, weight, statistics=statistics, residual=residual, relu=relu, dropout_p=dropout_p, order=order,
            seed=seed, stride=stride, algorithm=OURS[kernel],
        )  # fmt: skip
    assert y.dtype == LOW and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y.detach(), exact.y(), "y", length=output_length(shape[1], form), noise=exact.y_noise())
    assert_statistics(*found[:2], y.detach(), "y")
    for value, wanted in zip(n[:2], running, strict=True):
        assert_close(value, wanted, "running statistics", length=count)

    gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
    for key, gradient in gradients.items():
        assert gradient.dtype == inputs[key].dtype, key
    da = exact.da()
    da_noise = exact.da_noise() + float(bound(da, torch.float32, input_length(shape[2], form)).max())
    if not COMPILED:
        da_noise = da_noise + stored(da) + HALF * da_noise
    g, g_noise = da * gate, da_noise * gate
    if residual is not None:
        # It is stored once, by the kernels; and PyTorch's da before that as well.
        dr, noise = (g, g_noise) if order == "add_act" else (da, da_noise)
        assert_close(gradients["residual"], dr, "gradient of residual", noise=noise)
    if COMPILED:
        g_noise = g_noise + stored(g) + HALF * g_noise
    in_sums = g_noise.mean(channels), (g_noise * xhat.abs()).mean(channels)
    dx = g - per_channel(g.mean(channels)) - xhat * per_channel((g * xhat).mean(channels))
    dx_noise = g_noise + per_channel(in_sums[0]) + xhat.abs() * per_channel(in_sums[1])
    scale = per_channel(rstd * gamma)
    assert_close(gradients["x"], scale * dx, "gradient of x", noise=scale * dx_noise)
    assert_close(
        gradients["weight"], exact.dweight(), "gradient of weight", length=weight_length(x, stride, kernel),
        noise=exact.dweight_noise(),
    )  # fmt: skip
    if affine:
        for key, factor in (("norm.weight", xhat), ("norm.bias", torch.ones_like(xhat))):
            noise = together((g_noise * factor).square().sum(channels))
            assert_close(gradients[key], (g * factor).sum(channels), f"gradient of {key}", length=count, noise=noise)


@convolutions
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_behind_a_normalisation_all_is_that_of_float64(shape, weight_dtype, layout, kernel, stride):
    check_norm_act(shape, weight_dtype, layout=layout, kernel=kernel, stride=stride)


@both_kernels
@pytest.mark.parametrize("shape", [(4, 20, 33, 5, 6), (40, 17, 9, 6, 7)], ids=name)
@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_option_agrees_with_float64(shape, order, relu, dropout_p, kernel):
    options = {"order": order, "relu": relu, "dropout_p": dropout_p, "kernel": kernel}
    for weight_dtype, affine, given in ((torch.float32, True, True), (LOW, True, False), (torch.float32, False, False)):
        check_norm_act(shape, weight_dtype, given=given, affine=affine, **options)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    shape=ANY_SHAPE,
    weight_dtype=st.sampled_from(WEIGHTS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    order=st.sampled_from([None, *functional.ORDERS]),
    relu=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.25]),
    given=st.booleans(),
    convolution=st.sampled_from(CONVOLUTIONS),
)
def test_any_shape_behind_a_normalisation_agrees_with_float64(shape, weight_dtype, convolution, **options):
    kernel, stride = convolution
    check_norm_act(shape, weight_dtype, kernel=kernel, stride=stride, **options)


# ---------------------------------------------------------------------------------------------------------- evaluation


def check_end(
    shape: Shape, weight_dtype: torch.dtype, *, layout: str = "channels_last", with_residual: bool = True,
    relu: bool = True, stride: int = 1, gemm: bool = False,
) -> None:  # fmt: skip
    """The convolution alone, and with the normalisation that follows it, by Winograd's algorithm or as one product."""
    x, weight, _ = tensors(shape, weight_dtype, "end", stride, gemm, layout=layout)
    gen = generator(shape, weight_dtype, stride, relu)
    n = norm(shape[2], torch.float32, gen)
    y = F.conv2d(x.double(), weight.double(), padding=1, stride=stride)
    residual = activation(y.shape, LOW, layout, gen) if with_residual else None
    length = 9 * shape[1] if gemm else output_length(shape[1], form_of(x, stride))
    noise = torch.zeros_like(y)
    if not COMPILED and weight_dtype == torch.float32:
        noise = together(HALF**2 * F.conv2d(x.double().square(), weight.double().square(), padding=1, stride=stride))

    algorithm = "gemm" if gemm else "winograd"

    def found(n: NormParams | None) -> list[Tensor]:
        """What the operator gives, and what the function that calls it does."""
        with torch.no_grad(), unrounded(weight_dtype):
            if n is None:
                own = ops.inference(x, weight, None, None, IDENTITY, stride, algorithm)
                return [own] if gemm else [own, functional.conv3x3(x, weight, stride=stride, algorithm="winograd")]
            own = ops.inference(x, weight, n, residual, RELU if relu else IDENTITY, stride, algorithm)
            options = {"residual": residual, "relu": relu, "stride": stride, "algorithm": "winograd"}
            return [own] if gemm else [own, functional.conv3x3_norm_act(x, weight, n, **options)]

    for result in found(None):
        assert_close(result, y, "y", length=length, noise=noise)
    exact_residual = None if residual is None else residual.double()
    vectors = [t.detach().double() for t in n[:4]]
    z = reference.batch_norm_act(y, *vectors, eps=n.eps, relu=relu, residual=exact_residual)
    noise = noise + bound(y, torch.float32, length)
    if not COMPILED:
        noise = noise + stored(y) + HALF * noise
    scale = per_channel(torch.rsqrt(n.running_var.double() + n.eps) * n.weight.detach().double())
    for result in found(n):
        assert result.dtype == LOW and result.is_contiguous(memory_format=torch.channels_last)
        assert_close(result, z, "normalised", noise=noise * scale)


@strides
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_the_end_of_a_block_in_evaluation_agrees_with_float64(shape, layout, stride):
    for weight_dtype, (with_residual, relu) in itertools.product(WEIGHTS, [(True, True), (False, False)]):
        check_end(shape, weight_dtype, layout=layout, with_residual=with_residual, relu=relu, stride=stride)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    "shape", [(1, 64, 96, 4, 4), (1, 20, 33, 7, 9), (2, 5, 3, 6, 5), (1, 1, 1, 1, 1), (3, 17, 70, 3, 2)], ids=name
)
def test_one_product_in_evaluation_agrees_with_float64(shape, stride):
    for weight_dtype, layout, (with_residual, relu) in itertools.product(
        WEIGHTS, LAYOUTS, [(True, True), (False, False)]
    ):
        check_end(shape, weight_dtype, layout=layout, with_residual=with_residual, relu=relu, stride=stride, gemm=True)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=False)
@hypothesis.seed(SEED)
@hypothesis.given(
    ANY_SHAPE, st.sampled_from(WEIGHTS), st.sampled_from(sorted(LAYOUTS)), st.booleans(), st.booleans(),
    st.sampled_from([(1, False), (1, True), (2, True), (3, True)]),
)  # fmt: skip
def test_any_shape_in_evaluation_agrees_with_float64(shape, weight_dtype, layout, with_residual, relu, way):
    check_end(shape, weight_dtype, layout=layout, with_residual=with_residual, relu=relu, stride=way[0], gemm=way[1])


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_the_end_of_a_block_with_gradients_is_the_same_function(relu, weight_dtype):
    """With gradients the product is stored before it is normalised, and its gradient before it goes further."""
    shape, channels = (5, 20, 36, 6, 7), (0, 2, 3)
    x, weight, dy = tensors(shape, weight_dtype, "gradients", relu)
    gen = generator(shape, "gradients", relu)
    residual, n = activation(dy.shape, LOW, "channels_last", gen), norm(36, torch.float32, gen)
    forward = Convolution(x, weight, dy)
    product = forward.y()
    noise = forward.y_noise() + bound(product, torch.float32, output_length(20))
    noise = noise + stored(product) + HALF * noise
    rstd = torch.rsqrt(n.running_var.double() + n.eps)
    scale = per_channel(rstd * n.weight.detach().double())
    centred = product - per_channel(n.running_mean.double())
    z = centred * scale + per_channel(n.bias.detach().double()) + residual.double()
    # Where the sign is in doubt, no gradient comes.
    doubtful = near_zero(z, LOW) | (z.abs() <= noise * scale)
    dy = dy.masked_fill(doubtful & relu, 0)
    g = dy.double() * ((z > 0) | (not relu))
    back = Convolution(x, weight, g * scale, rounds_dy=True)

    inputs = {"x": x, "weight": weight, "residual": residual, "norm.weight": n.weight, "norm.bias": n.bias}
    for t in inputs.values():
        t.requires_grad_()
    with unrounded(weight_dtype):
        y = functional.conv3x3_norm_act(x, weight, n, residual=residual, relu=relu, algorithm="winograd")
    assert_close(y.detach(), z.clamp(min=0) if relu else z, "y", noise=noise * scale)
    gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
    for key, gradient in gradients.items():
        assert gradient.dtype == inputs[key].dtype, key
    assert torch.equal(gradients["residual"].double(), g)
    xhat, count = centred * per_channel(rstd), x.numel() // x.shape[1]
    assert_close(gradients["norm.bias"], g.sum(channels), "gradient of norm.bias", length=count)
    of_weight = together((g * noise * per_channel(rstd)).square().sum(channels))
    assert_close(
        gradients["norm.weight"], (g * xhat).sum(channels), "gradient of norm.weight", length=count, noise=of_weight
    )
    assert_close(gradients["x"], back.da(), "gradient of x", length=output_length(36), noise=back.da_noise())
    assert_close(
        gradients["weight"], back.dweight(), "gradient of weight", length=weight_length(x), noise=back.dweight_noise()
    )


# ------------------------------------------------------------------------------------------------ weights in float32


@needs_kernels
@pytest.mark.parametrize("algorithm", ["winograd", "gemm"])
def test_outputs_are_made_of_the_weight_unrounded(algorithm):
    """A weight beside its own rounding, and an input beside its negative: what is left is the rounding error."""
    x, weight, _ = tensors((2, 9, 21, 5, 6), torch.float32, "unrounded", algorithm)
    rounded = weight.bfloat16()
    error = weight.double() - rounded.double()
    both, x2 = torch.cat([weight, rounded.float()], 1), torch.cat([x, -x], 1)
    wanted = F.conv2d(x.double(), error, padding=1)
    length = 9 * 18 if algorithm == "gemm" else output_length(18)
    results = [ops.inference(x2, w, None, None, IDENTITY, 1, algorithm) for w in (both, both.bfloat16())]
    if algorithm == "winograd":
        results += [OPS.conv3x3_forward(x2, w, False)[0] for w in (both, both.bfloat16())]
    for of_float32, of_bfloat16 in zip(results[::2], results[1::2], strict=True):
        assert_close(of_float32, wanted, "y", length=length)
        assert_close(of_bfloat16, torch.zeros_like(wanted), "y of the rounded weight", length=length)
    assert wanted.abs().max() > 4 * bound(wanted, LOW, length).max()


@needs_kernels
def test_gradients_are_made_of_the_weight_unrounded():
    x, weight, dy = tensors((2, 21, 9, 5, 6), torch.float32, "unrounded")
    rounded = weight.bfloat16()
    both, dy2 = torch.cat([weight, rounded.float()]), torch.cat([dy, -dy], 1)
    wanted = conv2d_input(x.shape, weight.double() - rounded.double(), dy.double(), padding=1)
    for w, value in ((both, wanted), (both.bfloat16(), torch.zeros_like(wanted))):
        dx, _ = OPS.conv3x3_backward(dy2, x, w, None, [True, False])
        assert_close(dx, value, "gradient of x", length=output_length(18))
    assert wanted.abs().max() > 4 * bound(wanted, LOW, output_length(18)).max()


@needs_kernels
def test_behind_a_normalisation_too_the_weight_is_unrounded_and_so_is_the_activation():
    """Two channels alike with weights of opposite sign leave their difference: nothing, but for what was rounded."""
    x, weight, _ = tensors((2, 9, 21, 5, 6), torch.float32, "unrounded normed")
    rounded = weight.bfloat16()
    x2, both = torch.cat([x, x], 1), torch.cat([weight, -rounded.float()], 1)
    n = NormParams(None, None)
    exact = x.double()
    exact = exact - per_channel(exact.mean((0, 2, 3)))
    a = exact * per_channel(torch.rsqrt(exact.square().mean((0, 2, 3)) + n.eps))
    with torch.autocast("cpu", LOW):
        found = [
            functional.norm_act_conv3x3(x2, n, w, relu=False, algorithm="winograd")[0] for w in (both, both.bfloat16())
        ]
    wanted = F.conv2d(a, weight.double() - rounded.double(), padding=1)
    for y, value in zip(found, (wanted, torch.zeros_like(wanted)), strict=True):
        assert_close(y, value, "y", length=output_length(18))
    assert wanted.abs().max() > 4 * bound(wanted, LOW, output_length(18)).max()
    # The rounding of a would stay behind the difference of two bfloat16 weights.
    doubled = torch.cat([2 * rounded, -rounded], 1)
    y, _ = functional.norm_act_conv3x3(x2, n, doubled, relu=False, algorithm="winograd")
    assert_close(y, F.conv2d(a, rounded.double(), padding=1), "y", length=output_length(18))


# ----------------------------------------------------------------------------------------------------------- behaviour


def operator_calls(weight_dtype: torch.dtype, layout: str) -> list[tuple[object, tuple[object, ...]]]:
    """Every operator, with arguments that take it through each of its ways."""
    shape = (2, 17, 9, 5, 6)
    x, weight, dy = tensors(shape, weight_dtype, "operators", layout=layout)
    gen = generator(shape, "operators")
    residual = activation(x.shape, LOW, layout, gen)
    n, of_y = ([t.detach() for t in norm(c, torch.float32, gen)[:4]] for c in (17, 9))
    calls: list[tuple[object, tuple[object, ...]]] = [
        *((OPS.conv3x3_forward, (x, weight, statistics)) for statistics in (True, False)),
        *((OPS.conv3x3_backward, (dy, x, weight, r, [True, True])) for r in (None, residual)),
        *((OPS.conv3x3_backward, (dy, x, weight, None, needs)) for needs in ([True, False], [False, True])),
        *(
            (ops.inference.overload, flat(ops.inference, x, weight, *end, 1, algorithm))
            for end in ((None, None, IDENTITY), (NormParams(*of_y, eps=0.05), dy, RELU))
            for algorithm in ("winograd", "gemm")
        ),
    ]
    # norm_act_conv3x3 brings its arguments to channels_last.
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    for order, r in ((None, None), *((order, residual) for order in functional.ORDERS)):
        for kind in ("relu", "silu"):
            act = Act(*Activation.of(kind), 0.25, order or "add_act")
            params = NormParams(*(t.clone() for t in n), eps=1e-3)
            forward = (x, params, None, r, torch.tensor([17]), weight, act, True)
            calls.append((norm_act_ops.forward.overload, flat(norm_act_ops.forward, *forward)))
            _, _, _, mean, rstd, keep = norm_act_ops.forward(*forward)
            own = Norm(mean, rstd, n[2], n[3])
            for needs in ([True, r is not None, True], [True, False, False], [False, False, True]):
                for op in (norm_act_ops.backward, norm_act_ops.backward_reduce):
                    calls.append((op.overload, flat(op, dy, x, own, r, keep, weight, act, needs)))
    return calls


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
def test_opcheck_passes_on_every_operator(weight_dtype):
    for op, arguments in operator_calls(weight_dtype, "channels_last"):
        torch.library.opcheck(op if isinstance(op, torch._ops.OpOverload) else op.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
def test_fake_kernels_give_the_shapes_strides_and_dtypes_of_real_results(weight_dtype, layout):
    for op, arguments in operator_calls(weight_dtype, layout):
        on_meta = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
        results, fakes = ([r] if isinstance(r, Tensor) else r for r in (op(*arguments), op(*on_meta)))
        for real, fake in zip(results, fakes, strict=True):
            assert layout_of(real) == layout_of(fake)


@needs_kernels
@pytest.mark.parametrize("count", [2, 3])
def test_several_threads_agree_with_float64(count):
    # A share may start anywhere in a line of tiles.
    with threads(count):
        for shape in ((6, 24, 40, 21, 50), (4, 200, 256, 4, 4)):
            for kernel, stride in CONVOLUTIONS:
                check_measured(shape, torch.float32, kernel=kernel, stride=stride)
                check_norm_act(shape, torch.float32, order="add_act", dropout_p=0.2, kernel=kernel, stride=stride)
            check_end(shape, torch.float32)
        check_end((1, 64, 200, 8, 8), torch.float32, gemm=True)


@needs_kernels
@pytest.mark.parametrize("shape", [(40, 32, 40, 15, 14), (4, 200, 256, 4, 4)], ids=name)
def test_results_are_the_same_in_every_run_by_as_many_threads(shape):
    x, weight, dy = tensors(shape, torch.float32, "threads")
    n = [t.detach() for t in norm(shape[1], torch.float32, generator(shape))[:4]]
    residual, seed = activation(x.shape, LOW, "channels_last", generator(shape, "threads")), torch.tensor([17])
    act = Act(*RELU, 0.1, "add_act")

    def run() -> list[Tensor]:
        params = NormParams(None, None, *n[2:], eps=1e-3)
        behind = norm_act_ops.forward(x, params, None, residual, seed, weight, act, True)
        own = Norm(*behind[3:5], *n[2:])
        return [
            *OPS.conv3x3_forward(x, weight, True),
            *OPS.conv3x3_backward(dy, x, weight, x, [True, True]),
            *behind,
            *norm_act_ops.backward(dy, x, own, residual, behind[5], weight, act, [True] * 3),
            ops.inference(x[:1], weight, None, None, IDENTITY, 1, "gemm"),
        ]

    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run())
            again = run()
        assert all(torch.equal(a, b) for a, b in zip(results[-1], again, strict=True))
    first = results[0]
    of_weight = conv2d_weight(x.double(), weight.shape, dy.double(), padding=1)
    for found in results:
        # All but the sums over pixels, which are cut where each thread's share ends. dx behind a normalisation is
        # made of such sums.
        for i in (0, 3, 5, 8, 9, 10, 12, 16):
            assert torch.equal(found[i], first[i]), i
        assert_statistics(*found[1:3], found[0], "y")
        assert_statistics(*found[6:8], found[5], "y behind a normalisation")
        assert_close(found[4], of_weight, "gradient of weight", length=weight_length(x))


def test_auto_leaves_bfloat16_to_pytorch_where_there_are_tiles(monkeypatch):
    monkeypatch.delenv("FASTRES_CONV", raising=False)
    x, weight, _ = tensors((8, 64, 64, 32, 32), torch.float32)
    n, end = (norm(64, torch.float32, generator()) for _ in range(2))
    few = x[:1, :, :8, :8].contiguous(memory_format=torch.channels_last)
    for tiles in (True, False):
        monkeypatch.setattr(algorithms, "_has_matrix_units", lambda tiles=tiles: tiles)
        for asked, taken in ((None, not tiles), ("auto", not tiles), ("winograd", True), ("torch", False)):
            with torch.autocast("cpu", LOW):
                assert (functional.norm_act_conv3x3(x, n, weight, algorithm=asked)[1] is not None) == taken
                assert (functional.conv3x3_with_statistics(x, weight, algorithm=asked).statistics is not None) == taken
        problem = algorithms.problem_of(few, 64, 3, 2, needs_grad=False)
        assert (algorithms.choose_algorithm(problem).algorithm == "gemm") is not tiles
        with torch.no_grad(), torch.autocast("cpu", LOW):
            y = functional.conv3x3_norm_act(few, weight, end, stride=2)
        vectors = [t.detach() for t in end[:4]]
        product = ops.inference(few, weight, NormParams(*vectors, eps=end.eps), None, RELU, 2, "gemm")
        assert not COMPILED or torch.equal(y, product) is not tiles


# ------------------------------------------------------------------------------------------------- a block, end to end


def make_block(*key: object) -> tuple[FusedBasicBlock, FusedBasicBlock]:
    """A block by Winograd's algorithm, and the same by PyTorch's in float64; nothing is at its default."""
    gen = generator("block", *key)
    block = FusedBasicBlock(20, 20, conv_algorithm="winograd")
    for own in (block.bn1, block.bn2):
        values = norm(20, torch.float32, gen)
        with torch.no_grad():
            for to, value in zip((own.running_mean, own.running_var, own.weight, own.bias), values[:4], strict=True):
                to.copy_(value)
    for conv in (block.conv1, block.conv2):
        with torch.no_grad():
            conv.weight.copy_(activation(conv.weight.shape, torch.float32, "nchw", gen, mean=0.02, std=180**-0.5))
    exact = copy.deepcopy(block).double()
    exact.conv_algorithm = "torch"
    return block, exact


def exact_block(block: FusedBasicBlock, x: Tensor, shake) -> Tensor:
    """The block in torch's words; `shake` is given every tensor that is stored as bfloat16."""

    def normed(bn, value: Tensor) -> Tensor:
        return F.batch_norm(value, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.1, bn.eps)

    weights = [w if COMPILED else shake(w) for w in (block.conv1.weight, block.conv2.weight)]
    y = shake(F.conv2d(x, weights[0], padding=1))
    z = normed(block.bn1, y)
    # In training the kernels store the masked gradient alone; else the activation is stored, and what comes back to it.
    a = F.relu(shake.backward(z)) if COMPILED and block.training else shake(F.relu(z))
    y = shake(F.conv2d(a, weights[1], padding=1))
    return shake.forward(F.relu(normed(block.bn2, y) + x))


class Shake:
    """Moves values, and the gradients that come back through them, by half a spacing up or down."""

    def __init__(self, gen: torch.Generator):
        self.gen = gen

    def by_half_a_spacing(self, value: Tensor) -> Tensor:
        up = torch.randint(2, value.shape, generator=self.gen, dtype=torch.int64) * 2 - 1
        return value + stored(value) * up

    def forward(self, value: Tensor) -> Tensor:
        return value + (self.by_half_a_spacing(value.detach()) - value.detach())

    def backward(self, value: Tensor) -> Tensor:
        value.register_hook(self.by_half_a_spacing)
        return value

    def __call__(self, value: Tensor) -> Tensor:
        return self.backward(self.forward(value)) if value.requires_grad else self.forward(value)


class Still(Shake):
    def by_half_a_spacing(self, value: Tensor) -> Tensor:
        return value


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_under_autocast_is_that_of_float64(layout, training):
    """Root mean squares of the errors, a tensor each, for the block's ReLUs may flip.

    What they may be is found by Monte Carlo arithmetic (Parker 1997): in float64 every tensor that is stored is moved
    by half a spacing, up or down. That is 1.7 times as much as roundings have in root mean square. The few ReLUs that
    flip make the errors of the small tensors vary from draw to draw: ROOMS deviations of them are allowed. Wrong
    statistics, weights or residuals are errors of the size of the values.
    """
    block, exact = (b.train(training) for b in make_block(layout, training))
    gen = generator("autocast", layout, training)
    x = activation((4, 20, 9, 7), LOW, layout, gen)
    dy = activation(x.shape, LOW, layout, gen, mean=0.1, std=1.0)
    state = copy.deepcopy(exact.state_dict())

    def run(shake: Shake) -> dict[str, Tensor]:
        exact.load_state_dict(state)
        value = x.double().requires_grad_()
        y = exact_block(exact, value, shake)
        inputs = {"x": value, **dict(exact.named_parameters())}
        gradients = torch.autograd.grad(y, list(inputs.values()), dy.double())
        buffers = {key: b for key, b in exact.named_buffers() if b.is_floating_point()}
        # What leaves is stored as well: x's gradient always, the weights' by PyTorch alone.
        found = {f"gradient of {key}": g for key, g in zip(inputs, gradients, strict=True)}
        for key in found:
            if key == "gradient of x" or (not COMPILED and "conv" in key):
                found[key] = shake.by_half_a_spacing(found[key])
        return {"y": y.detach(), **found, **{key: b.clone() for key, b in buffers.items()}}

    wanted, draws = run(Still(gen)), [run(Shake(gen)) for _ in range(16)]
    value = x.float().requires_grad_()
    with torch.autocast("cpu", LOW):
        y = block(value)
    y.backward(dy)
    assert y.dtype == LOW and value.grad.dtype == torch.float32
    found = {"y": y.detach(), "gradient of x": value.grad}
    for key, p in block.named_parameters():
        assert p.grad.dtype == p.dtype == torch.float32, key
        found[f"gradient of {key}"] = p.grad
    found |= {key: b for key, b in block.named_buffers() if b.is_floating_point()}
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        error = (value.double() - wanted[key]).square().mean().sqrt()
        shaken = torch.stack([(draw[key] - wanted[key]).square().mean().sqrt() for draw in draws])
        shaken = shaken.mean() + ROOMS * shaken.std()
        single = bound(wanted[key], torch.float32, output_length(20)).max()
        assert error <= shaken + single, f"{key}: error {error:.3e}, allowed {shaken:.3e}; FASTRES_TEST_SEED={SEED}"


def test_evaluation_under_autocast_follows_a_hidden_update():
    block, _ = make_block("updated")
    block.eval()
    # Two sizes, for Winograd's algorithm and for one product.
    for shape, algorithm in (((16, 20, 9, 7), "winograd"), ((1, 20, 6, 7), "auto")):
        block.conv_algorithm = algorithm
        x = activation(shape, LOW, "channels_last", generator("updated", shape))

        def evaluate(module: FusedBasicBlock, x: Tensor = x) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", LOW):
                return module(x)

        first = evaluate(block)
        assert torch.equal(evaluate(block), first)
        for weight in (block.conv1.weight, block.conv2.weight):
            weight.data.mul_(1.25)
            updated = evaluate(block)
            assert not torch.equal(updated, first)
            assert torch.equal(evaluate(copy.deepcopy(block)), updated)
            first = updated


def test_a_block_keeps_half_as_many_bytes_of_activations():
    block, _ = make_block("bytes")
    x = torch.randn(4, 20, 8, 8).contiguous(memory_format=torch.channels_last)
    weights, bits = 4 * (block.conv1.weight.numel() + block.conv2.weight.numel()), 4 * 8 * 8 * 3
    activations = 3 * x.numel()  # x and the two products

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", LOW):
            return block(x)

    assert saved_bytes(lambda: block(x)) == 4 * activations + weights + bits
    assert saved_bytes(under_autocast) == 2 * activations + weights + bits
