"""The operators of batch_norm_act one by one: registration, masks bit for bit, and the stages that others may call."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

from fastres import functional, reference
from tests.oracle import DTYPES, LAYOUTS, activation, assert_close, generator, norm

OPS = torch.ops.fastres


def saved(shape, dtype, layout, *, residual="plain", order="add_act", dropout_p=0.2, relu=True):
    """Arguments of the backward operators, from a forward call: (dy, x, ..., bits) and (relu, dropout_p, order)."""
    gen = generator(shape, dtype, layout, residual, order)
    x, dy = (activation(shape, dtype, layout, gen) for _ in range(2))
    r = None if residual == "none" else activation(shape, dtype, layout, gen)
    own, other = (norm(shape[1], dtype, gen) for _ in range(2))
    act = (relu, dropout_p, order)
    _, mean, m2 = OPS.batch_norm_act_stats(x)
    count = x.numel() // shape[1]
    rstd = torch.rsqrt(m2 / count + own.eps)
    vectors = [mean, rstd, own.weight.detach(), own.bias.detach()]
    r_vectors: list[Tensor | None] = [None] * 4
    if residual == "normalised":
        _, r_mean, r_m2 = OPS.batch_norm_act_stats(r)
        r_rstd = torch.rsqrt(r_m2 / count + other.eps)
        r_vectors = [r_mean, r_rstd, other.weight.detach(), other.bias.detach()]
    seed = torch.tensor([17])
    y, bits = OPS.batch_norm_act_apply(x, *vectors, r, *r_vectors, seed, *act)
    return y, (dy, x, *vectors, r, *r_vectors, bits), act


# ----------------------------------------------------------------------------------------------------------
# registration


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
def test_opcheck_passes_on_every_operator(layout, residual):
    check = torch.library.opcheck
    shape, dtype = (2, 12, 3, 5), torch.float32
    _, tensors, act = saved(shape, dtype, layout, residual=residual)
    _, x, mean, rstd, weight, bias, r, *r_vectors, _ = tensors
    check(OPS.batch_norm_act_stats.default, (x,))
    check(OPS.batch_norm_act_apply.default, (x, mean, rstd, weight, bias, r, *r_vectors, torch.tensor([17]), *act))
    running = [torch.zeros(12), torch.ones(12)]
    r_running = [torch.zeros(12), torch.ones(12)] if residual == "normalised" else [None, None]
    given = (None,) * 4
    check(
        OPS.batch_norm_act_training.default,
        (x, weight, bias, *running, r, *r_vectors[2:], *r_running, *given, torch.tensor([17]), residual == "normalised",
         0.1, 1e-5, 0.2, 1e-4, *act),
    )  # fmt: skip
    check(
        OPS.batch_norm_act_inference.default,
        (x, *running, weight, bias, r, *r_running, *r_vectors[2:], 1e-5, 1e-4, True, act[2], True),
    )
    check(OPS.batch_norm_act_backward_reduce.default, (*tensors, *act))
    sums = OPS.batch_norm_act_backward_reduce(*tensors, *act)
    r_sums = sums[2:] if residual == "normalised" else (None, None)
    check(
        OPS.batch_norm_act_backward_apply.default,
        (*tensors, *sums[:2], *r_sums, torch.tensor([30]), *act, [True, residual != "none"]),
    )
    check(OPS.batch_norm_act_backward.default, (*tensors, True, *act, [True, residual != "none", True]))


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
    "shape", [(2, 64, 4, 4), (3, 37, 5, 7), (1, 3, 9, 2), (2, 4, 1, 1), (2, 1, 3, 3), (1, 130, 2, 3)]
)
@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 1 - 1e-9])
def test_the_mask_is_the_reference_s_bit_for_bit(layout, shape, dropout_p):
    x = activation(shape, torch.float32, layout, generator(shape, layout))
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    for seed in (0, -1, 2**62 + 12345, -(2**63)):
        seed_tensor = torch.tensor([seed])
        _, bits = OPS.batch_norm_act_apply(
            x, zero, one, None, None, None, *[None] * 4, seed_tensor, False, dropout_p, "add_act"
        )
        expected = reference.pack_bits(reference.dropout_keep(x.shape, seed_tensor, dropout_p), x)
        assert torch.equal(bits, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_is_the_same_in_both_layouts(dtype):
    shape, seed = (2, 20, 6, 5), torch.tensor([99])
    one, zero = (
        torch.ones(20).to(reference.statistics_dtype(dtype)),
        torch.zeros(20).to(reference.statistics_dtype(dtype)),
    )
    results = []
    for layout in LAYOUTS:
        x = torch.ones(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        y, bits = OPS.batch_norm_act_apply(x, zero, one, None, None, None, *[None] * 4, seed, True, 0.5, "add_act")
        assert torch.equal(reference.unpack_bits(bits, x), y != 0)
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_is_set_where_dropout_kept_and_relu_passed(layout):
    _, tensors, act = saved((2, 21, 4, 3), torch.float32, layout)
    _, x, mean, rstd, weight, bias, r, *_, bits = tensors
    z = reference.Affine(x.double(), mean.double(), rstd.double(), weight.double(), bias.double()).z() + r
    sure = z.abs() > 1e-4
    expected = reference.dropout_keep(x.shape, torch.tensor([17]), act[1]) & (z > 0)
    assert torch.equal(reference.unpack_bits(bits, x)[sure], expected[sure])
    assert sure.double().mean() > 0.99


# ----------------------------------------------------------------------------------------------------------------
# stages


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "plain", "normalised"])
@pytest.mark.parametrize("order", functional.ORDERS)
def test_the_stages_one_by_one_give_what_the_whole_gives(layout, residual, order):
    y, tensors, act = saved((3, 18, 4, 5), torch.float32, layout, residual=residual, order=order)
    _, x, mean, rstd, weight, bias, r, _, _, r_weight, r_bias, bits = tensors
    whole = OPS.batch_norm_act_training(
        x, weight, bias, None, None, r, r_weight, r_bias, None, None, None, None, None, None, torch.tensor([17]),
        residual == "normalised", 0.1, 0.05, 0.1, 0.05, *act,
    )  # fmt: skip
    assert_close(whole[0], y.double(), "y")
    assert_close(whole[1], mean.double(), "mean")
    assert_close(whole[2], rstd.double(), "rstd")
    assert torch.equal(whole[5], bits)
    backward = OPS.batch_norm_act_backward(*tensors, True, *act, [True, residual != "none", True])
    sums = OPS.batch_norm_act_backward_reduce(*tensors, *act)
    r_sums = sums[2:] if residual == "normalised" else (None, None)
    applied = OPS.batch_norm_act_backward_apply(*tensors, *sums[:2], *r_sums, None, *act, [True, residual != "none"])
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
        statistics = [
            *(OPS.batch_norm_act_stats(x)[1:] if given and x_given else (None, None)),
            *(OPS.batch_norm_act_stats(r)[1:] if given and residual_given else (None, None)),
        ]
        y = OPS.batch_norm_act_training(
            x, own.weight, own.bias, *running[:2], r if normed else None, *(other[2:4] if normed else (None, None)),
            *(running[2:] if normed else (None, None)), *statistics, None, normed, 0.2, 0.05, 0.3, 0.07, True, 0.0,
            "add_act",
        )  # fmt: skip
        results.append((*y, *running))
    for a, b in zip(*results, strict=True):
        if a.dtype == torch.uint8:
            assert torch.equal(a, b)
        else:
            assert_close(a, b.double(), "with known statistics")


def test_two_halves_of_a_batch_reduce_to_the_whole():
    """What a SyncBatchNorm does between the stages: statistics and sums over two processes, gradients of each part."""
    gen = generator("halves")
    x, dy = (activation((6, 10, 4, 4), torch.float32, "channels_last", gen) for _ in range(2))
    weight, bias = norm(10, torch.float32, gen)[2:4]
    weight, bias, eps, act = weight.detach(), bias.detach(), 0.05, (True, 0.0, "add_act")
    parts = [t.contiguous(memory_format=torch.channels_last) for t in x.split([2, 4])]
    dys = [t.contiguous(memory_format=torch.channels_last) for t in dy.split([2, 4])]
    stats = [OPS.batch_norm_act_stats(p) for p in parts]
    total = sum(s[0] for s in stats)
    mean = sum(s[0] * s[1] for s in stats) / total
    m2 = sum(s[2] + s[0] * (s[1] - mean) ** 2 for s in stats)
    rstd = torch.rsqrt(m2 / total + eps)
    exact = x.double().requires_grad_()
    y = reference.batch_norm_act(exact, None, None, weight.double(), bias.double(), training=True, eps=eps)
    (expected,) = torch.autograd.grad(y, exact, dy.double())
    none = [None] * 5
    sums = [OPS.batch_norm_act_backward_reduce(d, p, mean, rstd, weight, bias, *none, None, *act)
            for d, p in zip(dys, parts, strict=True)]  # fmt: skip
    dweight, dbias = sum(s[0] for s in sums), sum(s[1] for s in sums)
    outputs, gradients = [], []
    for d, p in zip(dys, parts, strict=True):
        outputs.append(OPS.batch_norm_act_apply(p, mean, rstd, weight, bias, *none, None, *act)[0])
        gradients.append(
            OPS.batch_norm_act_backward_apply(
                d, p, mean, rstd, weight, bias, *none, None, dweight, dbias, None, None, total, *act, [True, False]
            )[0]
        )
    assert_close(torch.cat(outputs), y.detach(), "y")
    assert_close(torch.cat(gradients), expected, "dx", length=96)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("residual", ["plain", "normalised"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed_are_made(needs, residual, training):
    _, tensors, act = saved((2, 8, 3, 3), torch.float32, "nchw", residual=residual)
    everything = OPS.batch_norm_act_backward(*tensors, training, *act, [True, True, True])
    some = OPS.batch_norm_act_backward(*tensors, training, *act, list(needs))
    wanted = [*needs[:2], *[needs[2]] * 2, *[needs[2] and residual == "normalised"] * 2]
    for is_wanted, a, b in zip(wanted, everything, some, strict=True):
        assert torch.equal(a, b) and a.numel() > 0 if is_wanted else b.numel() == 0


@pytest.mark.skipif(os.environ.get("FASTRES_TEST_BACKEND") == "reference", reason="plain PyTorch trusts its callers")
def test_malformed_calls_of_an_operator_are_refused():
    _, tensors, act = saved((2, 8, 3, 3), torch.float32, "nchw")
    dy, x, *rest, bits = tensors
    with pytest.raises((ValueError, RuntimeError), match=r"dy|size"):
        OPS.batch_norm_act_backward_reduce(dy[:1], x, *rest, bits, *act)
    with pytest.raises((ValueError, RuntimeError), match=r"bits|size|invalid"):
        OPS.batch_norm_act_backward_reduce(dy, x, *rest, bits[:-1], *act)
