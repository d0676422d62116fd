"""Random cases of the operators, the float64 oracle beside them, and the one table of tolerances.

Winograd's convolution has a tolerance of its own, which follows from the algorithm: its transforms are sums of products
whose terms are larger than their result, so rounding errors grow by a factor that the matrices determine.
`Form` computes it from the points alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract
from fastres.contract import NormParams, statistics_dtype
from tests import backend

# In the environment, so that processes side by side collect the same tests.
SEED = int(os.environ.setdefault("FASTRES_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
"""Fresh at every run, printed in pytest's header."""

DTYPES = backend.DTYPES
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# An element is rounded once when it is stored (half an eps) and the float32 arithmetic before it takes a few roundings
# of its own dtype: 8 eps of the statistics' dtype bound those with room for a cancellation of three bits.
STORED = 0.5
COMPUTED = 8.0


def bound(expected: Tensor, dtype: torch.dtype, length: int = 1) -> Tensor:
    """The absolute error allowed at each element of a float64 `expected`.

    Args:
        dtype: of the result.
        length: of the sums behind each element; rounding errors grow with the square root of it.
    """
    scale = expected.abs().max() if expected.numel() > 0 else expected.new_zeros(())
    computed = COMPUTED * torch.finfo(statistics_dtype(dtype)).eps * math.sqrt(length)
    # Below the smallest normal number the spacing no longer shrinks.
    stored = STORED * torch.maximum(expected.abs() * torch.finfo(dtype).eps, torch.tensor(torch.finfo(dtype).tiny))
    return stored + computed * scale.clamp(min=1.0)


def assert_close(actual: Tensor, expected: Tensor, name: str, *, length: int = 1, noise: float = 0.0) -> None:
    """Assert that `actual` is the float64 `expected` to `bound` and `noise`, an error that came in with its input."""
    error = (actual.double() - expected).abs()
    allowed = bound(expected, actual.dtype, length) + noise
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if error.numel() == 0:
        return
    worst = (error - allowed).argmax()
    allowed_there = allowed.reshape(-1)[worst]
    assert bool((error <= allowed).all()), (
        f"{name}: error {error.reshape(-1)[worst].item():.3e}, allowed {allowed_there.item():.3e}, "
        f"expected {expected.reshape(-1)[worst].item():.6e}; FASTRES_TEST_SEED={SEED}"
    )


def near_zero(z: Tensor, dtype: torch.dtype, product_eps: float = 0.0) -> Tensor:
    """Where a ReLU input is too close to 0 for its sign to be told, for data of `dtype`; see `check_case`."""
    return z.abs() <= (64 * torch.finfo(statistics_dtype(dtype)).eps + 4 * product_eps) * z.abs().max().clamp(min=1)


def keep_off_zero(x: Tensor, relu_input: Callable[[], Tensor]) -> None:
    """Move elements of x, in place, until no element of the ReLU input that it is part of is near zero.

    Behind a convolution a flipped element would say something about all its neighbours.
    """
    with torch.no_grad():
        while bool((near := near_zero(relu_input(), x.dtype)).any()):
            x += 0.01 * near


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads(count), and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def saved_bytes(f: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, without parameters and statistics of [C]."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dim() != 1 or t.dtype == torch.uint8:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = f()
    assert out.requires_grad
    return sum(storages.values())


# ------------------------------------------------------------------------------------------- Winograd's rounding errors


def toom_cook(points: list[float], outputs: int, taps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A^T, G and B^T of the minimal filter with these points, and infinity where a product more is needed, float64."""
    size = outputs + taps - 1
    a, g, b = (torch.zeros(s, dtype=torch.float64) for s in ((outputs, size), (size, taps), (size, size)))

    def polynomial(roots: list[float]) -> Tensor:
        coefficients = torch.ones(1, dtype=torch.float64)
        for root in roots:
            coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
        return coefficients

    for i, p in enumerate(points):
        others = [q for j, q in enumerate(points) if j != i]
        b[i, : len(points)] = polynomial(others)
        g[i] = torch.tensor([p**k for k in range(taps)], dtype=torch.float64) / math.prod(p - q for q in others)
        a[:, i] = torch.tensor([p**k for k in range(outputs)], dtype=torch.float64)
    if size > len(points):
        b[-1], g[-1, -1], a[-1, -1] = polynomial(points), 1, 1
    return a, g, b


def terms(last: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The mean square of what is summed at last for each result, in one dimension, for independent random data.

    Args:
        last: rows of the last transform; left, right: those of the two factors.
    """
    return last.square() @ (left.square().sum(1) * right.square().sum(1))


def amplification(down: Tensor, across: Tensor, products: int) -> float:
    """How much larger, in root mean square, what is summed at last is than a result of so many products."""
    return math.sqrt(float(torch.outer(down, across).max()) / products)


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of Winograd's convolution, see csrc/cpu/winograd_forms.h, or a direct sum.

    Attributes:
        points: products of a tile that are summed up.
        outputs, inputs, weights: the amplification in the outputs and in the gradients of the inputs and weights.
        taps: of the kernel.
    """

    points: int
    outputs: float
    inputs: float
    weights: float
    taps: int = 9

    @classmethod
    def of_stride_1(cls, points: list[float], side: int) -> Form:
        a, g, b = toom_cook(points, side, 3)
        outputs, weights = terms(a, g, b), terms(g.T, a.T, b)
        of_outputs = amplification(outputs, outputs, 9)
        return cls((side + 2) ** 2, of_outputs, of_outputs, amplification(weights, weights, side**2))

    @classmethod
    def of_stride_2(cls, points: list[float]) -> Form:
        # Of an axis with two taps, and of one with one.
        filters = [toom_cook(points, 4, taps) for taps in (2, 1)]
        outputs = [terms(a, g, b) for a, g, b in filters]
        weights = [terms(g.T, a.T, b) for a, g, b in filters]
        both = outputs[0] + outputs[1]
        return cls(
            81,
            amplification(both, both, 9),
            max(amplification(outputs[i], outputs[j], (2 - i) * (2 - j)) for i in (0, 1) for j in (0, 1)),
            max(amplification(down, across, 16) for down in weights for across in weights),
        )


def pairs(*points: float) -> list[float]:
    return [sign * p for p in points for sign in (1, -1)]


POINTS, FIVE_POINTS, PHASE_POINTS = [0, *pairs(0.5**0.5, 2**0.5)], pairs(0.3, 0.85, 1.75), pairs(0.5, 1.25)
TILE3 = Form.of_stride_1(pairs(0.4, 1.25), 3)  # amplifications of 3.2
TILE4 = Form.of_stride_1(POINTS, 4)  # amplifications of 7.1, 7.1 and 6.0; 31 and 24 with the points 0, +-1 and +-2
TILE5 = Form.of_stride_1(FIVE_POINTS, 5)  # 17.7, 17.7 and 12.0
STRIDE2 = Form.of_stride_2(PHASE_POINTS)  # 4.3, 5.5 and 3.3
POINTWISE = Form(0, 1.0, 1.0, 1.0, taps=1)
DIRECT = Form(0, 1.0, 1.0, 1.0)
# Sides of images up to which that is what "winograd" computes, by stride.
SMALL = {1: 2, 2: 6}


def form_of(x: Tensor, stride: int = 1, kernel: int = 3) -> Form:
    """The form that serves a convolution of x: of stride 1 others where they save a fifth of 4x4 tiles' products."""
    if kernel == 1:
        return POINTWISE
    if max(x.shape[2:]) <= SMALL[stride]:
        return DIRECT
    if stride == 2:
        return STRIDE2
    three, four, five = (
        form.points * math.prod(math.ceil(size / side) for size in x.shape[2:])
        for form, side in ((TILE3, 3), (TILE4, 4), (TILE5, 5))
    )
    if 5 * min(three, five) > 4 * four:
        return TILE4
    return TILE3 if three <= five else TILE5


def output_length(channels: int, form: Form = TILE4) -> int:
    """The `length` of an output of the convolution over that many channels."""
    # A tile adds up its points whatever the true sum's length.
    return math.ceil((form.points + form.taps * channels) * form.outputs**2)


def input_length(channels: int, form: Form = TILE4) -> int:
    """The `length` of the gradient of the convolution's input, over that many channels of the output."""
    return math.ceil((form.points + form.taps * channels) * form.inputs**2)


def weight_length(x: Tensor, stride: int = 1, kernel: int = 3) -> int:
    """The `length` of the gradient of the convolution's weight, with x its input."""
    form = form_of(x, stride, kernel)
    return math.ceil((form.points + x.numel() // x.shape[1]) * form.weights**2)


# What the convolution measures it sums up in float32 over a chunk of tiles, in float64 from there on. With 36 points of
# at least 24 channels, inputs and outputs together, a chunk has to fit into 448 KiB. One of a 1x1 kernel has at most
# 2048 pixels.
CHUNK_PIXELS = 448 * 1024 // 4 // 36 // 24 * 16


def assert_statistics(mean: Tensor, m2: Tensor, y: Tensor, name: str) -> None:
    """Assert that mean and M2, a channel each, are those of the convolution's output."""
    exact, count = y.double(), y.numel() // y.shape[1]
    length = min(count, CHUNK_PIXELS)
    assert_close(mean, exact.mean((0, 2, 3)), f"mean of {name}", length=length)
    assert_close(m2 / count, exact.var((0, 2, 3), correction=0), f"variance of {name}", length=length)


# ----------------------------------------------------------------------------------------------------------------- data


def generator(*key: object) -> torch.Generator:
    """A generator of its own for each test case, fixed by the run's seed and the case's key; it lives on the CPU.

    Raises:
        ValueError: the key holds an object that prints its address, which is another in every process.
    """
    if " at 0x" in str(key):
        raise ValueError(f"key: expected what is the same in every process, got {key}")
    return torch.Generator("cpu").manual_seed(random.Random(f"{SEED}{key}").randrange(2**62))


def activation(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    gen: torch.Generator,
    *,
    mean: float = 0.5,
    std: float = 2.0,
) -> Tensor:
    x = torch.randn(shape, generator=gen, dtype=torch.float64, device="cpu") * std + mean
    return x.to(backend.DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])


def norm(
    channels: int, dtype: torch.dtype, gen: torch.Generator, *, affine: bool = True, running: bool = True
) -> NormParams:
    """A normalisation with nothing at its default; eps bounds how far two close values magnify rounding."""

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(channels, generator=gen, dtype=torch.float64, device="cpu") * (high - low) + low
        return values.to(backend.DEVICE, statistics_dtype(dtype))

    return NormParams(
        uniform(-1, 1) if running else None,
        uniform(0.5, 2) if running else None,
        uniform(0.5, 1.5).requires_grad_() if affine else None,
        uniform(-1, 1).requires_grad_() if affine else None,
        momentum=0.2,
        eps=0.05,
    )


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double().clone().requires_grad_(t.requires_grad)


def double_norm(n: NormParams | None) -> NormParams | None:
    return None if n is None else NormParams(*(_double(t) for t in n[:4]), momentum=n.momentum, eps=n.eps)


@dataclasses.dataclass
class Case:
    """One call: a function of named differentiable tensors and of norms whose running statistics it may update."""

    tensors: dict[str, Tensor]
    norms: dict[str, NormParams]

    def double(self) -> Case:
        tensors = {name: _double(t) for name, t in self.tensors.items()}
        norms = {name: double_norm(n) for name, n in self.norms.items()}
        return Case(tensors, norms)  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        """Everything that a gradient is asked for."""
        found = dict(self.tensors)
        for name, n in self.norms.items():
            found |= {f"{name}.{k}": t for k, t in (("weight", n.weight), ("bias", n.bias)) if t is not None}
        return found

    def running(self) -> dict[str, Tensor]:
        return {
            f"{name}.{k}": t
            for name, n in self.norms.items()
            for k, t in (("running_mean", n.running_mean), ("running_var", n.running_var))
            if t is not None
        }


def check_case(
    case: Case,
    run: Callable[[Case], Tensor],
    oracle: Callable[[Case], Tensor],
    relu_input: Callable[[Case], Tensor] | None,
    dtype: torch.dtype,
    gen: torch.Generator,
    *,
    length: int,
    product_eps: float = 0.0,
) -> Tensor:
    """Outputs, gradients of every input and running statistics of `run` against the oracle in float64.

    Args:
        relu_input: the oracle's ReLU input. Where it is too close to 0 to tell its sign, dy is set to 0, so that a
            flipped element says nothing.
        product_eps: relative error that an intermediate of x's dtype carries.
    Returns:
        The output of `run`.
    """
    exact = case.double()
    if relu_input is not None:
        with torch.no_grad():
            z = relu_input(case.double())
        doubtful = near_zero(z, dtype, product_eps)
    y, expected = run(case), oracle(exact)
    stretch = length * (1 + (product_eps / torch.finfo(statistics_dtype(dtype)).eps) ** 2)
    assert_close(y, expected, "y", length=max(1, int(stretch / length)))
    dy = (
        torch.randn(y.shape, generator=gen, dtype=torch.float64, device="cpu")
        .to(backend.DEVICE, dtype)
        .contiguous(memory_format=contract.memory_format(y))
    )
    if relu_input is not None:
        dy = torch.where(doubtful, torch.zeros((), dtype=dtype), dy)
    inputs, exact_inputs = case.inputs(), exact.inputs()
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    expected_gradients = torch.autograd.grad(expected, list(exact_inputs.values()), dy.double())
    for name, gradient, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        assert gradient.dtype == inputs[name].dtype
        assert_close(gradient, wanted, f"gradient of {name}", length=int(stretch))
    for name, value in case.running().items():
        assert_close(value, exact.running()[name], name, length=int(stretch))
    return y
