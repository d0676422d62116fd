"""A gradient that arrives in two parts: backward adds them while it reads, and gives what their sum gives."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract, functional
from fastres.activations import Activation
from fastres.contract import PLAIN, Act, Norm, NormParams, Residual, Sums
from fastres.functional.norm import norm_act
from fastres.ops import batch_norm_act as ops
from tests import backend
from tests.oracle import DTYPES, LAYOUTS, STORED, activation, assert_close, generator, near_zero, norm

INTERPRETED = backend.NAME == "triton"
RESIDUALS = ["none", "plain", "normalised"]
FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "silu": F.silu, "identity": lambda z: z}
SHAPE = (2, 9, 3, 5) if INTERPRETED else (3, 37, 5, 7)


class Backward(NamedTuple):
    """What the backward operators are given, and in float64 what they are to find for dy + dy2.

    Attributes:
        noise: of dx and dresidual, which are made of a dz in the dtype of x.
    """

    dy: Tensor
    dy2: Tensor
    x: Tensor
    norm: Norm
    residual: Residual | None
    bits: Tensor
    act: Act
    expected: list[Tensor]
    noise: float


def make(shape, dtype, layout, kind, residual, order, dropout_p, training=True) -> Backward:
    gen = generator("two", shape, dtype, layout, kind, residual, order, dropout_p, training)
    x, r, dy, dy2 = (activation(shape, dtype, layout, gen) for _ in range(4))
    own, other = (norm(shape[1], dtype, gen) for _ in range(2))
    seed, act = torch.tensor([31], device=backend.DEVICE), Act(*Activation.of(kind), dropout_p, order)

    exact = {"x": x, "r": r, "weight": own.weight, "bias": own.bias, "r_weight": other.weight, "r_bias": other.bias}
    exact = {name: t.detach().double().requires_grad_() for name, t in exact.items()}

    def normalised(value: Tensor, n: NormParams, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = n.running_mean.double().clone(), n.running_var.double().clone()
        return F.batch_norm(value, mean, var, weight, bias, training, n.momentum, n.eps)

    z = normalised(exact["x"], own, exact["weight"], exact["bias"])
    added = exact["r"]
    if residual == "normalised":
        added = normalised(added, other, exact["r_weight"], exact["r_bias"])
    if residual == "none":
        added = torch.zeros_like(added)
    z = z + added if order == "add_act" else z
    y = FUNCTIONS[kind](z)
    if dropout_p > 0:
        y = torch.where(contract.dropout_keep(shape, seed, dropout_p), y / (1 - dropout_p), 0)
    y = y + added if order == "act_add" else y
    doubtful = near_zero(z.detach(), dtype) | near_zero(z.detach() - 6, dtype)
    dy, dy2 = (t.masked_fill(doubtful, 0) for t in (dy, dy2))

    names = ["x", "r", "weight", "bias"] if residual != "none" else ["x", "weight", "bias"]
    names += ["r_weight", "r_bias"] if residual == "normalised" else []
    found = dict(zip(names, torch.autograd.grad(y, [exact[n] for n in names], dy.double() + dy2.double()), strict=True))
    expected = [found.get(name, torch.empty(0)) for name in ("x", "r", "weight", "bias", "r_weight", "r_bias")]

    with torch.no_grad():
        own, other = (n._replace(weight=n.weight.detach(), bias=n.bias.detach()) for n in (own, other))
        value, r_params = (None if residual == "none" else r), (other if residual == "normalised" else None)
        if training:
            _, mean, rstd, r_mean, r_rstd, bits = ops.training(x, own, None, value, r_params, None, seed, act)
        else:
            (mean, rstd), (r_mean, r_rstd) = (
                (n.running_mean, torch.rsqrt(n.running_var + n.eps)) for n in (own, other)
            )
            _, bits = ops.apply(
                x, Norm(mean, rstd, own.weight, own.bias),
                None if value is None
                else Residual(value) if r_params is None
                else Residual(value, r_mean, r_rstd, other.weight, other.bias),
                seed, act, True,
            )  # fmt: skip
        given = None
        if residual == "normalised":
            given = Residual(r, r_mean, r_rstd, other.weight, other.bias)
        elif residual == "plain" and act.reads_residual():
            given = Residual(r)
        # Both stages are linear in dz, which is rounded to the dtype of x in between.
        scale = max(
            float((rstd * own.weight).abs().max()), float((r_rstd * other.weight).abs().max()) if r_params else 1
        )
        dz = (dy.double() + dy2.double()).abs().max() / (1 - dropout_p) * 1.2
        noise = STORED * torch.finfo(dtype).eps * float(dz) * scale
    return Backward(dy, dy2, x, Norm(mean, rstd, own.weight, own.bias), given, bits, act, expected, noise)


FLAGS = [
    flags
    for flags in itertools.product(FUNCTIONS, RESIDUALS, functional.ORDERS, [0.0, 0.3])
    if flags[1] != "none" or flags[2] == "add_act"
]
"""(kind, residual, order, dropout_p)"""
if INTERPRETED:
    FLAGS = FLAGS[::7]  # every kind, residual and order, with dropout and without

NAMES = ("dx", "dresidual", "dweight", "dbias", "residual's dweight", "residual's dbias")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_parts_give_what_their_sum_gives(layout, dtype):
    # All flags in one dtype; the others have a third of them, each another.
    for flags in FLAGS if dtype == DTYPES[0] else FLAGS[DTYPES.index(dtype) % 3 :: 3]:
        with torch.enable_grad():
            b = make(SHAPE, dtype, layout, *flags)
        needs = [True, flags[1] != "none", True]
        found = ops.backward(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act, True, needs)
        length = SHAPE[0] * SHAPE[2] * SHAPE[3]
        for name, a, wanted in zip(NAMES, found, b.expected, strict=True):
            assert_close(
                a, wanted, f"{name} with {flags}", length=length, noise=b.noise * name.startswith(("dx", "dr"))
            )


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [(9, 3, 1, 1), (1, 1, 5, 3)] if INTERPRETED else [(9, 3, 1, 1), (1, 1, 5, 3), (16, 64, 24, 24), (2, 512, 3, 3)],
)
def test_other_shapes(shape, layout):
    for kind, residual in [("relu", "plain"), ("silu", "normalised")]:
        with torch.enable_grad():
            b = make(shape, torch.float32, layout, kind, residual, "add_act", 0.0)
        found = ops.backward(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act, True, [True, True, True])
        for name, a, wanted in zip(NAMES, found, b.expected, strict=True):
            assert_close(a, wanted, name, length=shape[0] * shape[2] * shape[3], noise=b.noise)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_statistics(layout):
    for kind, residual, order in [("relu", "plain", "add_act"), ("silu", "normalised", "act_add")]:
        with torch.enable_grad():
            b = make(SHAPE, torch.float32, layout, kind, residual, order, 0.0, training=False)
        found = ops.backward(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act, False, [True, True, True])
        for name, a, wanted in zip(NAMES, found, b.expected, strict=True):
            assert_close(a, wanted, name, length=SHAPE[0] * SHAPE[2] * SHAPE[3])


@torch.no_grad()
@pytest.mark.parametrize("order", functional.ORDERS)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stages_hand_dz_on_and_a_plain_residual_s_gradient_is_dz(layout, residual, order):
    for kind, dropout_p in [("relu", 0.3), ("silu", 0.0)]:
        with torch.enable_grad():
            b = make(SHAPE, torch.float32, layout, kind, residual, order, dropout_p)
        needs = [True, residual != "none", True]
        dx, dr, *whole = ops.backward(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act, True, needs)
        *sums, dz = ops.backward_reduce(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act)
        assert dz.dtype == b.x.dtype and dz.stride() == b.x.stride()
        if order == "act_add":
            assert torch.equal(dz, b.dy + b.dy2)
        for one, other in zip(whole, sums, strict=True):
            assert torch.equal(one, other)
        act, bits = (PLAIN, None) if order == "add_act" else (b.act, b.bits)
        given = Sums(*sums[: 4 if residual == "normalised" else 2])
        staged = ops.backward_apply(dz, b.x, b.norm, b.residual, bits, given, None, act, needs[:2])
        assert torch.equal(dx, staged[0]) and torch.equal(dr, staged[1])
        if residual == "plain":
            assert torch.equal(dr, dz)


@torch.no_grad()
def test_a_single_gradient_makes_no_dz():
    b = make_without_gradients()
    assert ops.backward_reduce(b.dy, None, b.x, b.norm, b.residual, b.bits, b.act)[4].numel() == 0


def make_without_gradients() -> Backward:
    with torch.enable_grad():
        return make(SHAPE, torch.float32, "nchw", "relu", "plain", "add_act", 0.0)


@torch.no_grad()
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed_are_made(needs):
    b = make_without_gradients()
    everything = ops.backward(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act, True, [True, True, True])
    some = ops.backward(b.dy, b.dy2, b.x, b.norm, b.residual, b.bits, b.act, True, list(needs))
    for wanted, a, s in zip([*needs[:2], needs[2], needs[2], False, False], everything, some, strict=True):
        assert torch.equal(a, s) and a.numel() > 0 if wanted else s.numel() == 0


@pytest.mark.skipif(backend.NAME == "reference", reason="plain PyTorch trusts its callers")
@torch.no_grad()
def test_a_second_part_of_another_shape_is_refused():
    b = make_without_gradients()
    with pytest.raises((ValueError, RuntimeError), match=r"dy2|size|shape"):
        ops.backward(b.dy, b.dy2[:1], b.x, b.norm, b.residual, b.bits, b.act, True, [True, True, True])


@pytest.mark.parametrize("used", ["both", "first", "second"])
@pytest.mark.parametrize("residual", [False, True])
def test_an_output_for_two_readers_has_the_gradient_of_both(used, residual):
    """Through autograd, and where only one of the readers sends a gradient."""
    gen = generator("readers", used, residual)
    x, r, *dys = (activation(SHAPE, torch.float32, "channels_last", gen) for _ in range(4))
    n = norm(SHAPE[1], torch.float32, gen)
    inputs = [t.requires_grad_() for t in (x, r, n.weight, n.bias)][: None if residual else 4]
    if not residual:
        inputs.pop(1)
    results = []
    for readers in (2, 1):
        fresh = NormParams(n.running_mean.clone(), n.running_var.clone(), *n[2:])
        y = norm_act(
            x,
            fresh,
            r if residual else None,
            None,
            act=Act("relu", 0.0, 0.0, "add_act"),
            training=True,
            readers=readers,
        )
        parts = list(y) if readers == 2 else [y, y]
        loss = sum(
            (part * dy).sum()
            for part, dy, name in zip(parts, dys, ("first", "second"), strict=True)
            if used in ("both", name)
        )
        results.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*results, strict=True):
        assert_close(a, b.double(), "with two readers", length=x.numel() // x.shape[1])
