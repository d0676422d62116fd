"""Every activation through batch_norm_act, on whatever backend this process has, against torch's own in float64.

The oracle is made of torch.nn.functional and differentiated by autograd; nothing of fastres but the dropout mask is in
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract, functional
from fastres.activations import KINDS, Activation
from fastres.contract import Act, Norm, NormParams, Residual
from fastres.ops import batch_norm_act as ops
from tests import backend
from tests.oracle import (
    DTYPES,
    LAYOUTS,
    Case,
    activation,
    assert_close,
    check_case,
    generator,
    near_zero,
    norm,
    saved_bytes,
)


class Expected(NamedTuple):
    """Attributes:
    function: torch's own.
    alpha: that it has been given.
    kinks: where its derivative jumps.
    gates: dropout or not, its derivative is 1 or 0, so that one bit says all.
    """

    function: Callable[[Tensor], Tensor]
    alpha: float = 0.0
    kinks: tuple[float, ...] = ()
    gates: bool = False


EXPECTED = {
    "identity": Expected(lambda z: z),
    "relu": Expected(F.relu, kinks=(0,), gates=True),
    "leaky_relu": Expected(lambda z: F.leaky_relu(z, 0.2), 0.2, (0,)),
    "relu6": Expected(F.relu6, kinks=(0, 6), gates=True),
    "hardswish": Expected(F.hardswish, kinks=(-3, 3)),
    "silu": Expected(F.silu),
    "gelu": Expected(F.gelu),
    "gelu_tanh": Expected(lambda z: F.gelu(z, approximate="tanh")),
    "elu": Expected(lambda z: F.elu(z, 0.7), 0.7, (0,)),
}
RESIDUALS = ["none", "plain", "normalised"]
INTERPRETED = backend.NAME == "triton"
COMPILED_CPU = backend.NAME in (None, "default", "avx2", "avx512")


def make_case(shape, dtype, layout, gen, residual) -> Case:
    tensors = {"x": activation(shape, dtype, layout, gen).requires_grad_()}
    norms = {"norm": norm(shape[1], dtype, gen)}
    if residual != "none":
        tensors["residual"] = activation(shape, dtype, layout, gen).requires_grad_()
    if residual == "normalised":
        norms["residual_norm"] = norm(shape[1], dtype, gen)
    return Case(tensors, norms)


def normalised(x: Tensor, n: NormParams, training: bool) -> Tensor:
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, training, n.momentum, n.eps)


def preactivation(case: Case, order: str, training: bool) -> tuple[Tensor, Tensor | None]:
    """(f's input, the residual that is added after f)."""
    z, r = normalised(case.tensors["x"], case.norms["norm"], training), case.tensors.get("residual")
    if "residual_norm" in case.norms:
        r = normalised(r, case.norms["residual_norm"], training)
    return (z, r) if order == "act_add" or r is None else (z + r, None)


def check(shape, dtype, layout, kind, *, residual="plain", order="add_act", dropout_p=0.0, training=True) -> None:
    gen = generator(shape, dtype, layout, kind, residual, order, dropout_p, training)
    expected = EXPECTED[kind]
    seed = torch.randint(2**62, (1,), generator=gen, device="cpu").to(backend.DEVICE)
    options = {"training": training, "order": order, "dropout_p": dropout_p, "seed": seed}

    def run(c: Case) -> Tensor:
        n = c.norms["norm"]
        return functional.batch_norm_act(
            c.tensors["x"], *n[:4], momentum=n.momentum, eps=n.eps, residual=c.tensors.get("residual"),
            residual_norm=c.norms.get("residual_norm"), activation=Activation(kind, expected.alpha), **options,
        )  # fmt: skip

    def oracle(c: Case) -> Tensor:
        z, after = preactivation(c, order, training)
        y = expected.function(z)
        if training and dropout_p > 0:
            keep = contract.dropout_keep(y.shape, seed, dropout_p)
            y = torch.where(keep, y / (1 - dropout_p), 0)
        return y if after is None else y + after

    def distance(c: Case) -> Tensor:
        """To the nearest place where the derivative jumps; gradients there say nothing."""
        z, _ = preactivation(c, order, training)
        return torch.stack([(z - kink).abs() for kink in expected.kinks]).amin(0)

    case = make_case(shape, dtype, layout, gen, residual)
    y = check_case(
        case, run, oracle, distance if expected.kinks else None, dtype, gen, length=shape[0] * shape[2] * shape[3]
    )
    assert y.dtype == dtype and y.stride() == case.tensors["x"].stride()


def test_every_kind_has_an_oracle():
    assert set(EXPECTED) == {kind for kind, definition in KINDS.items() if definition.compiled}


FLAGS = list(itertools.product(RESIDUALS, functional.ORDERS, [0.0, 0.3]))


def flags_of(kind: str, layout: str, dtype: torch.dtype) -> list[tuple[str, str, float]]:
    """(residual, order, dropout_p): all of them in one dtype, and in the others some for each kind, all among all.

    In the interpreter, which is slow, there are two for each kind and layout.
    """
    at = 2 * list(EXPECTED).index(kind) + list(LAYOUTS).index(layout)
    if INTERPRETED:
        return [FLAGS[at % len(FLAGS)], FLAGS[(at + 7) % len(FLAGS)]]
    return FLAGS if dtype == DTYPES[0] else FLAGS[(at + DTYPES.index(dtype)) % 3 :: 3]


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", EXPECTED)
def test_training_agrees_with_torch_in_float64(kind, layout, dtype):
    for residual, order, dropout_p in flags_of(kind, layout, dtype):
        shape = (2, 9, 3, 5) if INTERPRETED else (3, 37, 5, 7)
        check(shape, dtype, layout, kind, residual=residual, order=order, dropout_p=dropout_p)


@pytest.mark.parametrize("residual", RESIDUALS[1:2] if INTERPRETED else RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["silu"] if INTERPRETED else EXPECTED)
def test_evaluation_agrees_with_torch_in_float64(kind, layout, residual):
    for order in functional.ORDERS:
        for dtype in DTYPES[:2]:
            check((2, 19, 3, 3), dtype, layout, kind, residual=residual, order=order, training=False)


@pytest.mark.skipif(INTERPRETED, reason="tests/test_functional.py has these shapes for the kernels' tiles")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 64, 8, 8), (9, 3, 1, 1), (1, 1, 5, 3), (5, 512, 2, 2), (2, 130, 7, 7)])
def test_shapes_that_fit_vectors_and_shapes_that_do_not(shape, layout):
    for kind, dtype, dropout_p in itertools.product(["leaky_relu", "gelu"], DTYPES, [0.0, 0.5]):
        check(shape, dtype, layout, kind, residual="normalised", dropout_p=dropout_p)


# A reduction that is written past the caches, and whose rows are shared out among segments.
@pytest.mark.skipif(not COMPILED_CPU, reason="what is large depends on the backend")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["relu6", "silu"])
def test_a_tensor_that_is_larger_than_the_caches(kind, layout):
    check((16, 64, 48, 48), torch.float32, layout, kind, dropout_p=0.1)


@torch.no_grad()
@pytest.mark.skipif(backend.NAME in ("triton", "cuda"), reason="on a GPU the operator has ReLU and the identity alone")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_projection_shortcut_in_evaluation(kind, layout):
    for dtype in DTYPES:
        gen = generator("projection", kind, layout, dtype)
        s, x = activation((2, 5, 7, 5), dtype, layout, gen), activation((2, 13, 4, 3), dtype, layout, gen)
        # Small integers, whose products are exact in every dtype.
        s, weight = s.round(), torch.randint(-2, 3, (13, 5, 1, 1), generator=gen).to(dtype)
        own, other = (norm(13, dtype, gen) for _ in range(2))
        y = functional.projection_shortcut(
            s, weight, own, x, other, stride=2, activation=Activation(kind, EXPECTED[kind].alpha)
        )
        of_s, of_x = (
            F.batch_norm(t, *(v.double() for v in n[:4]), eps=n.eps)
            for t, n in ((F.conv2d(s.double(), weight.double(), stride=2), own), (x.double(), other))
        )
        assert_close(y, EXPECTED[kind].function(of_s + of_x), f"y of {dtype}")


# ------------------------------------------------------------------------------------------------------- single points


def at_points(kind: str, points: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, dx, torch's y, torch's dx) of f at these points, by a normalisation that changes nothing."""
    expected = EXPECTED[kind]
    values = torch.tensor(points, device=backend.DEVICE)
    x = values.reshape(1, 1, 1, -1).clone().requires_grad_()
    zero, one = torch.zeros(1, device=backend.DEVICE), torch.ones(1, device=backend.DEVICE)
    y = functional.batch_norm_act(x, zero, one, eps=0.0, activation=Activation(kind, expected.alpha))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    z = values.double().requires_grad_()
    wanted = expected.function(z)
    return y.flatten(), dx.flatten(), wanted.detach(), *torch.autograd.grad(wanted, z, torch.ones_like(wanted))


@pytest.mark.parametrize("kind", EXPECTED)
def test_at_the_kinks_and_far_away_the_derivative_is_torch_s(kind):
    y, dx, wanted, wanted_dx = at_points(kind, [0.0, -0.0, -3.0, 3.0, 6.0, -50.0, 50.0, 1e-30, -1e-30])
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", EXPECTED)
def test_nan_is_passed_on(kind):
    y, dx, wanted, wanted_dx = at_points(kind, [float("nan"), 1.0])
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    if EXPECTED[kind].gates:
        torch.testing.assert_close(dx.double(), wanted_dx, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------- saved for backward


@pytest.mark.parametrize("order", functional.ORDERS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "silu", "identity"] if INTERPRETED else EXPECTED)
def test_what_is_saved_is_x_and_at_most_a_bit_an_element(kind, residual, dropout_p, order):
    gen = generator("saved", kind, residual, dropout_p, order)
    case = make_case((2, 20, 3, 5), torch.float32, "channels_last", gen, residual)
    x, r, n = case.tensors["x"], case.tensors.get("residual"), case.norms["norm"]
    kept = saved_bytes(
        lambda: functional.batch_norm_act(
            x, *n[:4], training=True, residual=r, residual_norm=case.norms.get("residual_norm"), dropout_p=dropout_p,
            activation=Activation(kind, EXPECTED[kind].alpha), order=order,
        )
    )  # fmt: skip
    by_bits = EXPECTED[kind].gates or (kind == "leaky_relu" and dropout_p == 0)
    before = residual != "none" and order == "add_act"
    bits = 2 * 3 * 5 * 3 if dropout_p > 0 or (by_bits and before) else 0  # rows of 20 channels: 3 bytes each
    added = residual == "normalised" or (before and kind != "identity" and not by_bits)
    assert kept == x.nbytes * (1 + added) + bits


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_bits_are_what_dropout_kept_and_the_activation_passed(kind, dropout_p, layout):
    shape = (2, 13, 3, 5)
    gen = generator("bits", kind, dropout_p, layout)
    x, r = (activation(shape, torch.float32, layout, gen, std=4.0) for _ in range(2))
    n = norm(13, torch.float32, gen)
    of_x = Norm(n.running_mean, torch.rsqrt(n.running_var + n.eps), n.weight.detach(), n.bias.detach())
    seed = torch.tensor([23], device=backend.DEVICE)
    act = Act(kind, EXPECTED[kind].alpha, dropout_p, "add_act")
    _, bits = ops.apply(x, of_x, Residual(r), seed, act, True)
    z = F.batch_norm(x.double(), *(t.double() for t in n[:4]), eps=n.eps) + r
    expected = contract.dropout_keep(shape, seed, dropout_p) if dropout_p > 0 else torch.ones_like(z, dtype=torch.bool)
    if EXPECTED[kind].gates or (kind == "leaky_relu" and dropout_p == 0):
        expected &= (z > 0) & (z < 6) if kind == "relu6" else z > 0
    elif dropout_p == 0:
        assert bits.numel() == 0
        return
    sure = torch.ones_like(expected)
    for kink in EXPECTED[kind].kinks:
        sure &= (z - kink).abs() > 1e-4
    assert torch.equal(contract.unpack_bits(bits, x)[sure], expected[sure])
    assert sure.double().mean() > 0.99


@pytest.mark.skipif(
    not COMPILED_CPU, reason="plain PyTorch and the launchers are called with names that Python checked"
)
def test_an_unknown_activation_is_refused():
    x, one = torch.ones(2, 3, 2, 2), torch.ones(3)
    with pytest.raises(ValueError, match=r'kind: expected one of .*silu.*, got "swish"'):
        ops.apply(x, Norm(one, one, None, None), None, None, Act("swish", 0.0, 0.0, "add_act"), True)


FROZEN = ["identity", "relu", "leaky_relu", "relu6", "silu"]


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["relu"] if INTERPRETED else FROZEN)
def test_a_frozen_normalisation_saves_a_bit_an_element_and_nothing_else(kind, layout, residual):
    """Its gradient is weight * rstd * g: neither x nor the residual is part of it."""
    expected = EXPECTED[kind]
    for order, dtype in itertools.product(functional.ORDERS, DTYPES):
        gen = generator("frozen", kind, layout, residual, order, dtype)
        case = make_case((3, 13, 5, 4), dtype, layout, gen, residual)
        for n in case.norms.values():
            n.weight.requires_grad_(False), n.bias.requires_grad_(False)
        exact = case.double()
        n, x = case.norms["norm"], case.tensors["x"]

        def run(n=n, x=x, case=case, order=order) -> Tensor:
            return functional.batch_norm_act(
                x, *n[:4], momentum=n.momentum, eps=n.eps, residual=case.tensors.get("residual"), order=order,
                residual_norm=case.norms.get("residual_norm"), activation=Activation(kind, expected.alpha),
            )  # fmt: skip

        y = run()
        z, after = preactivation(exact, order, False)
        wanted = expected.function(z) if after is None else expected.function(z) + after
        dy = torch.randn(y.shape, generator=gen, dtype=torch.float64, device="cpu").to(x.device, dtype)
        for kink in expected.kinks:
            dy[near_zero(z.detach() - kink, dtype)] = 0
        gradients = torch.autograd.grad(y, list(case.tensors.values()), dy)
        exactly = torch.autograd.grad(wanted, list(exact.tensors.values()), dy.double())
        assert_close(y, wanted, f"{order}, {dtype}: y")
        for name, gradient, true in zip(case.tensors, gradients, exactly, strict=True):
            assert_close(gradient, true, f"{order}, {dtype}: gradient of {name}")
        gated = KINDS[kind].passes is not None
        if gated or kind == "identity":
            assert saved_bytes(run) == (contract.bits_size(x) if gated else 0)
