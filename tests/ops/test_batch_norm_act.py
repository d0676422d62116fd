"""The operators of batch_norm_act one by one: registration, masks bit for bit, and the stages that others may call."""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastres import contract, functional
from fastres.activations import Activation
from fastres.contract import PLAIN, Act, Norm, NormParams, Residual, Statistics, Sums
from fastres.ops import batch_norm_act as ops
from tests import backend
from tests.operators import opcheck
from tests.oracle import DTYPES, LAYOUTS, activation, assert_close, generator, norm


class Saved(NamedTuple):
    """Arguments of the backward operators, from a forward call."""

    dy: Tensor
    x: Tensor
    norm: Norm
    residual: Residual | None
    bits: Tensor
    act: Act


def saved(shape, dtype, layout, *, residual="plain", order="add_act", dropout_p=0.2, kind="relu"):
    """(y, what backward takes)."""
    gen = generator(shape, dtype, layout, residual, order)
    x, dy = (activation(shape, dtype, layout, gen) for _ in range(2))
    r = None if residual == "none" else Residual(activation(shape, dtype, layout, gen))
    own, other = (norm(shape[1], dtype, gen) for _ in range(2))
    act = Act(*Activation.of(kind), dropout_p, order)
    normed = measured(x, own)
    if residual == "normalised":
        r = Residual(r.value, *measured(r.value, other))
    y, bits = ops.apply(x, normed, r, torch.tensor([17]), act, True)
    return y, Saved(dy, x, normed, r, bits, act)


def measured(x: Tensor, params: NormParams) -> Norm:
    _, mean, m2 = ops.stats(x)
    rstd = torch.rsqrt(m2 / (x.numel() // x.shape[1]) + params.eps)
    return Norm(mean, rstd, params.weight.detach(), params.bias.detach())


def is_normalised(residual: Residual | None) -> bool:
    return residual is not None and residual.norm is not None


# ----------------------------------------------------------------------------------------------------------
# registration


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
def test_opcheck_passes_on_every_operator(layout, residual):
    shape, seed = (2, 12, 3, 5), torch.tensor([17])
    _, (dy, x, normed, r, bits, act) = saved(shape, torch.float32, layout, residual=residual)
    opcheck(ops.stats, x)
    opcheck(ops.apply, x, normed, r, seed, act, True)
    params = NormParams(torch.zeros(12), torch.ones(12), *normed[2:], 0.1, 1e-5)
    value, other = None if r is None else r.value, None
    if is_normalised(r):
        other = NormParams(torch.zeros(12), torch.ones(12), r.weight, r.bias, 0.2, 1e-4)
    opcheck(ops.training, x, params, None, value, other, None, seed, act)
    opcheck(ops.inference, x, params, value, other, act, True)
    for second in (None, dy.clone()):
        opcheck(ops.backward_reduce, dy, second, x, normed, r, bits, act)
        opcheck(ops.backward, dy, second, x, normed, r, bits, act, True, [True, r is not None, True])
    sums = Sums(*ops.backward_reduce(dy, None, x, normed, r, bits, act)[: 4 if is_normalised(r) else 2])
    opcheck(ops.backward_apply, dy, x, normed, r, bits, sums, torch.tensor([30]), act, [True, r is not None])


@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("training", [True, False])
def test_the_function_compiles_to_one_graph_with_the_same_results(residual, training):
    gen = generator("compile", residual, training)
    x = activation((2, 8, 4, 4), torch.float32, "channels_last", gen).requires_grad_()
    r = None if residual == "none" else activation((2, 8, 4, 4), torch.float32, "channels_last", gen).requires_grad_()
    own = norm(8, torch.float32, gen)
    other = norm(8, torch.float32, gen) if residual == "normalised" else None
    seed = torch.tensor([5])

    def f(x: Tensor, r: Tensor | None) -> Tensor:
        return functional.batch_norm_act(
            x, *own[:4], training=training, residual=r, residual_norm=other, dropout_p=0.2, seed=seed
        )

    inputs = [t for t in (x, r, own.weight, own.bias) if t is not None]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    start = [t.clone() for t in own[:2]]
    results = []
    for run in (f, compiled):
        for kept, value in zip(own[:2], start, strict=True):
            kept.copy_(value)
        y = run(x, r)
        results.append(
            [y, *torch.autograd.grad((y * y).sum(), inputs), own.running_mean.clone(), own.running_var.clone()]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# -----------------------------------------------------------------------------------------------------------------
# masks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 64, 4, 4), (3, 37, 5, 7), (1, 3, 9, 2), (2, 4, 1, 1), (2, 1, 3, 3), (1, 130, 2, 3), (3, 24, 4, 5)]
)
@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 1 - 1e-9])
def test_the_mask_is_the_reference_s_bit_for_bit(layout, shape, dropout_p):
    x = activation(shape, torch.float32, layout, generator(shape, layout))
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    for seed in (0, -1, 2**62 + 12345, -(2**63)):
        seed_tensor = torch.tensor([seed])
        act = PLAIN._replace(dropout_p=dropout_p)
        _, bits = ops.apply(x, Norm(zero, one, None, None), None, seed_tensor, act, True)
        expected = contract.pack_bits(contract.dropout_keep(x.shape, seed_tensor, dropout_p), x)
        assert torch.equal(bits, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_the_same_in_both_layouts(dtype):
    shape, seed = (2, 20, 6, 5), torch.tensor([99])
    one, zero = (
        torch.ones(20).to(contract.statistics_dtype(dtype)),
        torch.zeros(20).to(contract.statistics_dtype(dtype)),
    )
    results = []
    for layout in LAYOUTS:
        x = torch.ones(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        y, bits = ops.apply(x, Norm(zero, one, None, None), None, seed, Act("relu", 0.0, 0.5, "add_act"), True)
        assert torch.equal(contract.unpack_bits(bits, x), y != 0)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_is_set_where_dropout_kept_and_relu_passed(layout):
    _, (_, x, normed, r, bits, act) = saved((2, 21, 4, 3), torch.float32, layout)
    mean, rstd, weight, bias = (v.double()[:, None, None] for v in normed)
    z = weight * (x.double() - mean) * rstd + bias + r.value
    sure = z.abs() > 1e-4
    expected = contract.dropout_keep(x.shape, torch.tensor([17]), act.dropout_p) & (z > 0)
    assert torch.equal(contract.unpack_bits(bits, x)[sure], expected[sure])
    assert sure.double().mean() > 0.99


# ----------------------------------------------------------------------------------------------------------------
# stages


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("order", functional.ORDERS)
def test_the_stages_one_by_one_give_what_the_whole_gives(layout, residual, order):
    y, (dy, x, normed, r, bits, act) = saved((3, 18, 4, 5), torch.float32, layout, residual=residual, order=order)
    params = NormParams(None, None, *normed[2:], 0.1, 0.05)
    other = NormParams(None, None, r.weight, r.bias, 0.1, 0.05) if is_normalised(r) else None
    value = None if r is None else r.value
    whole = ops.training(x, params, None, value, other, None, torch.tensor([17]), act)
    assert_close(whole[0], y.double(), "y")
    assert_close(whole[1], normed.mean.double(), "mean")
    assert_close(whole[2], normed.rstd.double(), "rstd")
    assert torch.equal(whole[5], bits)
    needs_dr = r is not None
    backward = ops.backward(dy, None, x, normed, r, bits, act, True, [True, needs_dr, True])
    *sums, dz = ops.backward_reduce(dy, None, x, normed, r, bits, act)
    assert dz.numel() == 0
    given = Sums(*sums[: 4 if is_normalised(r) else 2])
    applied = ops.backward_apply(dy, x, normed, r, bits, given, None, act, [True, needs_dr])
    for a, b in zip(backward, (*applied, *sums), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("x_given", [False, True])
@pytest.mark.parametrize("residual_given", [None, False, True])
def test_known_statistics_give_what_computed_ones_give(x_given, residual_given):
    """Whoever has taken mean and M2 already, as the projection shortcut does, hands them over in any combination."""
    gen, shape = generator("given", x_given, residual_given), (3, 18, 4, 5)
    x, r = (activation(shape, torch.float32, "channels_last", gen) for _ in range(2))
    own, other = (norm(18, torch.float32, gen) for _ in range(2))
    normed = residual_given is not None
    results = []
    for given in (False, True):
        running = [t.clone() for t in (*own[:2], *other[:2])]
        taken = [
            Statistics(*ops.stats(t)[1:]) if given and has else None for t, has in ((x, x_given), (r, residual_given))
        ]
        params = NormParams(*running[:2], own.weight, own.bias, 0.2, 0.05)
        r_params = NormParams(*running[2:], other.weight, other.bias, 0.3, 0.07) if normed else None
        act = Act("relu", 0.0, 0.0, "add_act")
        y = ops.training(x, params, taken[0], r if normed else None, r_params, taken[1], None, act)
        results.append((*y, *running))
    for a, b in zip(*results, strict=True):
        if a.dtype == torch.uint8:
            assert torch.equal(a, b)
        else:
            assert_close(a, b.double(), "with known statistics")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("residual", ["plain", "normalised"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed_are_made(needs, residual, training):
    _, (*tensors, act) = saved((2, 8, 3, 3), torch.float32, "nchw", residual=residual)
    dy, *tensors = tensors
    everything = ops.backward(dy, None, *tensors, act, training, [True, True, True])
    some = ops.backward(dy, None, *tensors, act, training, list(needs))
    wanted = [*needs[:2], *[needs[2]] * 2, *[needs[2] and residual == "normalised"] * 2]
    for is_wanted, a, b in zip(wanted, everything, some, strict=True):
        assert torch.equal(a, b) and a.numel() > 0 if is_wanted else b.numel() == 0


@pytest.mark.skipif(os.environ.get("FASTRES_TEST_BACKEND") == "reference", reason="plain PyTorch trusts its callers")
def test_malformed_calls_of_an_operator_are_refused():
    _, (dy, x, normed, r, bits, act) = saved((2, 8, 3, 3), torch.float32, "nchw")
    with pytest.raises((ValueError, RuntimeError), match=r"dy|size"):
        ops.backward_reduce(dy[:1], None, x, normed, r, bits, act)
    with pytest.raises((ValueError, RuntimeError), match=r"bits|size|invalid"):
        ops.backward_reduce(dy, None, x, normed, r, bits[:-1], act)


@torch.no_grad()
@pytest.mark.skipif(backend.NAME in ("reference", "triton", "cuda"), reason="these trust their callers")
@pytest.mark.parametrize(
    ("residual", "error"),
    [(torch.zeros(2, 4, 3, 3).double(), TypeError), (torch.zeros(2, 4, 3, 1), ValueError)],
)
def test_a_refused_residual_leaves_the_running_statistics_alone(residual, error):
    running = torch.zeros(4), torch.ones(4)
    act = Act("relu", 0.0, 0.0, "add_act")
    with pytest.raises(error, match="residual: expected"):
        ops.training(torch.randn(2, 4, 3, 3), NormParams(*running), None, residual, None, None, None, act)
    assert torch.equal(running[0], torch.zeros(4)) and torch.equal(running[1], torch.ones(4))
    assert [t._version for t in running] == [0, 0]


@torch.no_grad()
@pytest.mark.skipif(backend.NAME in ("triton", "cuda"), reason="their launchers are for tensors with elements")
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_the_sums_of_no_elements_are_zero(shape):
    x = torch.empty(shape)
    count, mean, m2 = ops.stats(x)
    assert count.item() == 0 and mean.shape == m2.shape == (4,)
    act = Act("relu", 0.0, 0.0, "add_act")
    normed = Norm(torch.zeros(4), torch.ones(4), None, None)
    dweight, dbias, *_ = ops.backward_reduce(x, None, x, normed, None, None, act)
    assert torch.equal(dweight, torch.zeros(4)) and torch.equal(dbias, torch.zeros(4))
    assert ops.training(x, NormParams(None, None), None, None, None, None, None, act)[0].shape == shape
