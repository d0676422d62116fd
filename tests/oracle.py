"""Random cases of the two operators, the float64 oracle beside them, and the one table of tolerances."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from collections.abc import Callable

import torch
from torch import Tensor

from fastres import reference
from fastres.reference import NormParams, statistics_dtype
from tests import backend

SEED = int(os.environ.get("FASTRES_TEST_SEED", random.SystemRandom().randrange(2**31)))
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


def assert_close(actual: Tensor, expected: Tensor, name: str, *, length: int = 1) -> None:
    error = (actual.double() - expected).abs()
    allowed = bound(expected, actual.dtype, length)
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if error.numel() == 0:
        return
    worst = (error - allowed).argmax()
    allowed_there = allowed.reshape(-1)[worst]
    assert bool((error <= allowed).all()), (
        f"{name}: error {error.reshape(-1)[worst].item():.3e}, allowed {allowed_there.item():.3e}, "
        f"expected {expected.reshape(-1)[worst].item():.6e}; FASTRES_TEST_SEED={SEED}"
    )


def generator(*key: object) -> torch.Generator:
    """A generator of its own for each test case, fixed by the run's seed and the case's key; it lives on the CPU."""
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
        doubtful = z.abs() <= (64 * torch.finfo(statistics_dtype(dtype)).eps + 4 * product_eps) * z.abs().max().clamp(
            min=1
        )
    y, expected = run(case), oracle(exact)
    stretch = length * (1 + (product_eps / torch.finfo(statistics_dtype(dtype)).eps) ** 2)
    assert_close(y, expected, "y", length=max(1, int(stretch / length)))
    dy = (
        torch.randn(y.shape, generator=gen, dtype=torch.float64, device="cpu")
        .to(backend.DEVICE, dtype)
        .contiguous(memory_format=reference.memory_format(y))
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
