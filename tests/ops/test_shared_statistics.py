"""The stages of batch_norm_act with statistics and sums that several processes share: the parts of a batch, each
normalised by the statistics of the whole, give what the whole gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import functional
from fastres.activations import Activation
from fastres.contract import PLAIN, Act, Norm, NormParams, Residual, Statistics, Sums
from fastres.ops import batch_norm_act as ops
from tests import backend
from tests.oracle import DTYPES, LAYOUTS, activation, assert_close, generator, near_zero, norm, output_length

INTERPRETED = backend.NAME == "triton"
RESIDUALS = ["none", "plain", "normalised"]
SHAPE = (5, 9, 3, 3) if INTERPRETED else (7, 37, 5, 3)
PARTS = (2, 3) if INTERPRETED else (1, 4, 2)  # images of each process
FUNCTIONS = {"relu": F.relu, "silu": F.silu}


def split(t: Tensor | None, layout: str) -> list[Tensor | None]:
    if t is None:
        return [None] * len(PARTS)
    return [part.contiguous(memory_format=LAYOUTS[layout]) for part in t.split(PARTS)]


def shared(parts: list[Tensor]) -> Statistics:
    """What a process group makes of each process's (count, mean, M2)."""
    measured = [ops.stats(part) for part in parts]
    return Statistics.combined([Statistics(mean, m2, count) for count, mean, m2 in measured])


def own_running(n: NormParams) -> NormParams:
    """The process's own running statistics."""
    return n._replace(running_mean=n.running_mean.clone(), running_var=n.running_var.clone())


def total(sums: list[tuple[Tensor, ...]]) -> Sums:
    """The sums of all processes; those of a residual without a normalisation are empty."""
    added = [torch.stack(of_all).sum(0) for of_all in zip(*sums, strict=True)]
    return Sums(*[t if t.numel() > 0 else None for t in added])


CASES = [
    (kind, residual, order)
    for kind in FUNCTIONS
    for residual in RESIDUALS
    for order in functional.ORDERS
    if residual != "none" or order == "add_act"
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "residual", "order"), CASES[::3] if INTERPRETED else CASES)
def test_parts_of_a_batch_give_what_the_whole_gives(kind, residual, order, layout, dtype):
    for two_gradients in (False, True):
        gen = generator("shared", kind, residual, order, layout, dtype)
        channels, length = SHAPE[1], SHAPE[0] * SHAPE[2] * SHAPE[3]
        x, r, dy, dy2 = (activation(SHAPE, dtype, layout, gen) for _ in range(4))
        own, other = (norm(channels, dtype, gen) for _ in range(2))

        # ---------------------------------------------------------------------------- the whole batch, in float64
        with torch.enable_grad():
            exact = [
                t.detach().double().requires_grad_() for t in (x, r, own.weight, own.bias, other.weight, other.bias)
            ]
            running = [t.double().clone() for t in (*own[:2], *other[:2])]
            z = F.batch_norm(exact[0], *running[:2], *exact[2:4], True, own.momentum, own.eps)
            added = exact[1] * (residual != "none")
            if residual == "normalised":
                added = F.batch_norm(added, *running[2:], *exact[4:], True, other.momentum, other.eps)
            z = z + added if order == "add_act" else z
            y = FUNCTIONS[kind](z)
            y = y + added if order == "act_add" else y
        doubtful = near_zero(z.detach(), dtype)
        dy, dy2 = (t.masked_fill(doubtful, 0) for t in (dy, dy2))
        whole_dy = dy.double() + dy2.double() if two_gradients else dy.double()
        expected = torch.autograd.grad(y, exact, whole_dy, allow_unused=True)

        # ------------------------------------------------------------------------------------- forward, part by part
        own, other = (n._replace(weight=n.weight.detach(), bias=n.bias.detach()) for n in (own, other))
        act = Act(*Activation.of(kind), 0.0, order)
        xs, dys, dy2s = split(x, layout), split(dy, layout), split(dy2 if two_gradients else None, layout)
        rs = split(None if residual == "none" else r, layout)
        of_x, of_r = shared(xs), shared(rs) if residual == "normalised" else None
        assert int(of_x.count) == length
        norms = [(own_running(own), own_running(other) if of_r else None) for _ in PARTS]
        forward = [ops.training(x, n, of_x, r, m, of_r, None, act) for x, r, (n, m) in zip(xs, rs, norms, strict=True)]
        assert_close(torch.cat([f[0] for f in forward]), y.detach(), "y")
        for n, m in norms:
            found = [*n[:2], *(m[:2] if m else [])]
            for value, wanted in zip(found, running, strict=False):
                assert_close(value, wanted, "running statistics", length=length)

        # ------------------------------------------------------------------------------------ backward, in two stages
        saved = []
        for part, r_part, (_, mean, rstd, r_mean, r_rstd, bits) in zip(xs, rs, forward, strict=True):
            given = None
            if residual == "normalised":
                given = Residual(r_part, r_mean, r_rstd, other.weight, other.bias)
            elif residual == "plain" and act.reads_residual():
                given = Residual(r_part)
            saved.append((part, Norm(mean, rstd, own.weight, own.bias), given, bits))
        reduced = [ops.backward_reduce(g, h, *s, act) for g, h, s in zip(dys, dy2s, saved, strict=True)]
        sums = total([stage[:4] for stage in reduced])
        dx, dr = [], []
        for g, stage, (part, normed, given, bits) in zip(dys, reduced, saved, strict=True):
            plain = two_gradients and order == "add_act"
            found = ops.backward_apply(
                stage[4] if two_gradients else g, part, normed, given, None if plain else bits, sums, of_x.count,
                PLAIN if plain else act, [True, residual != "none"],
            )  # fmt: skip
            dx.append(found[0])
            dr.append(found[1])
        assert_close(torch.cat(dx), expected[0], "dx", length=length)
        if residual != "none":
            assert_close(torch.cat(dr), expected[1], "dresidual", length=length)
        for name, value, wanted in zip(("dweight", "dbias"), sums, expected[2:4], strict=False):
            assert_close(value, wanted, name, length=length)
        if residual == "normalised":
            assert_close(sums.residual_dweight, expected[4], "residual's dweight", length=length)
            assert_close(sums.residual_dbias, expected[5], "residual's dbias", length=length)


@torch.no_grad()
def test_a_count_of_its_own_counts_in_the_running_variance_and_in_rstd():
    """Statistics of more values than x has: the variance is m2 / count, the unbiased one m2 / (count - 1)."""
    x = activation((2, 4, 3, 3), torch.float32, "nchw", generator("count"))
    mean, m2 = torch.zeros(4, device=backend.DEVICE), torch.full((4,), 360.0, device=backend.DEVICE)
    count = torch.tensor([180], device=backend.DEVICE)
    running = torch.zeros_like(mean), torch.zeros_like(mean)
    act = Act("identity", 0.0, 0.0, "add_act")
    params = NormParams(*running, None, None, 1.0, 0.0)
    y, _, rstd, *_ = ops.training(x, params, Statistics(mean, m2, count), None, None, None, None, act)
    assert_close(rstd, torch.full((4,), 2.0, dtype=torch.float64).rsqrt().to(rstd.device), "rstd")
    assert_close(running[1], torch.full((4,), 360.0 / 179, dtype=torch.float64).to(rstd.device), "running_var")
    assert_close(y, x.double() / 2**0.5, "y")


@torch.no_grad()
@pytest.mark.skipif(backend.NAME in ("reference", "triton", "cuda"), reason="these trust their callers")
def test_a_count_that_is_no_count_is_refused():
    x = torch.randn(2, 4, 3, 3)
    params, act = NormParams(None, None), Act("relu", 0.0, 0.0, "add_act")
    for count, error in ((torch.tensor([18.0]), TypeError), (torch.tensor([18, 18]), ValueError)):
        with pytest.raises(error, match="count"):
            ops.training(x, params, Statistics(torch.zeros(4), torch.ones(4), count), None, None, None, None, act)


@pytest.mark.parametrize("convolved", [False, True], ids=["alone", "before a convolution"])
def test_statistics_with_a_count_are_of_more_elements_which_are_constants(convolved):
    """The derivative is that of a function of one part of the batch, the others held fixed."""
    gen = generator("constants", convolved)
    whole = activation((5, 8, 4, 4), torch.float32, "channels_last", gen)
    weight = torch.randn(4, 8, 3, 3, generator=gen, device="cpu").to(backend.DEVICE).contiguous(
        memory_format=torch.channels_last
    )  # fmt: skip
    n = norm(8, torch.float32, gen)
    parts = [part.contiguous(memory_format=torch.channels_last) for part in whole.split([2, 3])]
    known, x = shared(parts), parts[0].requires_grad_()
    if convolved:
        y, _ = functional.norm_act_conv3x3(
            x, n, weight, statistics=known, activation="silu", algorithm="auto" if INTERPRETED else "winograd"
        )
    else:
        y = functional.batch_norm_act(
            x, *n[:4], training=True, momentum=n.momentum, eps=n.eps, activation="silu", statistics=known
        )
    exact = x.detach().double().requires_grad_()
    joined = torch.cat([exact, parts[1].detach().double()])
    z = F.batch_norm(joined, None, None, n.weight.double(), n.bias.double(), True, 0.0, n.eps)[:2]
    expected = F.silu(z)
    if convolved:
        expected = F.conv2d(expected, weight.double(), padding=1)
    dy = torch.randn(y.shape, generator=gen, device="cpu").to(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    (wanted,) = torch.autograd.grad(expected, exact, dy.double())
    length = output_length(8) if convolved else 80
    assert_close(y, expected.detach(), "y", length=length)
    assert_close(dx, wanted, "dx", length=length)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (3, TypeError, r"statistics\.count: expected an int64 Tensor or None, got int"),
        (torch.ones(1), ValueError, r"statistics\.count: expected one element of dtype torch\.int64, got 1 of"),
        (torch.ones(2, dtype=torch.int64), ValueError, r"statistics\.count: expected one element .* got 2 of"),
    ],
    ids=["int", "float", "two"],
)
def test_a_count_that_is_none_is_refused_by_name(count, error, message):
    x = activation((2, 3, 2, 2), torch.float32, "nchw", generator("refused"))
    known = Statistics(*ops.stats(x)[1:], count if isinstance(count, int) else count.to(x.device))
    with pytest.raises(error, match=message):
        functional.batch_norm_act(x, None, None, training=True, statistics=known)
