"""norm_act_conv3x3 and norm_act_conv1x1 with every activation against float64, and their backward in two stages, by
which the parts of a batch share their statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastres import functional
from fastres.activations import KINDS, Activation
from fastres.contract import PLAIN, Act, Norm, NormParams, Statistics, Sums
from fastres.ops import batch_norm_act, norm_act_conv3x3
from tests.ops.test_conv3x3 import both_kernels
from tests.ops.test_norm_act_conv3x3 import EXACT, check, gradient_of, keep_off_kinks, make_case, saved
from tests.oracle import (
    Case,
    assert_close,
    assert_statistics,
    bound,
    form_of,
    generator,
    input_length,
    output_length,
    saved_bytes,
    threads,
    weight_length,
)

# Whole tiles and ragged ones, by tiles and by channels; channels that fill vectors and that do not.
SHAPES = [(4, 20, 33, 5, 6), (2, 64, 96, 8, 4), (40, 17, 9, 6, 7)]
kinds = pytest.mark.parametrize("kind", KINDS)
orders = pytest.mark.parametrize("order", functional.ORDERS)


@kinds
@both_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_values_and_every_gradient_are_those_of_float64(shape, kind, dropout_p, kernel):
    for order in (None, *functional.ORDERS):
        case = make_case(shape, kind, order, dropout_p, residual=order is not None, kernel=kernel)
        check(case, order=order or "add_act", dropout_p=dropout_p, activation=Activation.of(kind))


@pytest.mark.parametrize("f", [Activation("leaky_relu", 0.25), Activation("elu", 1.75)], ids=str)
def test_the_parameter_of_an_activation_is_taken(f):
    for order, dropout_p in itertools.product(functional.ORDERS, (0.0, 0.2)):
        case = make_case((3, 20, 36, 6, 5), f, order, dropout_p, residual=True)
        check(case, order=order, dropout_p=dropout_p, activation=f)


@kinds
def test_no_activation_keeps_a_tensor_of_its_own(kind):
    case = make_case((2, 20, 16, 8, 8), kind, residual=True)
    inputs = 4 * sum(t.numel() for t in case.tensors.values())
    x, n, weight = case.tensors["x"], case.norms["norm"], case.tensors["weight"]

    def run() -> Tensor:
        options = {"residual": case.tensors["residual"], "activation": kind, "algorithm": "winograd"}
        return functional.norm_act_conv3x3(x, n, weight, **options)[0]

    assert saved_bytes(run) == inputs


@kinds
@orders
@both_kernels
def test_the_first_stage_and_the_second_are_backward(kind, order, kernel):
    _, (dy, x, own, residual, keep, weight, act) = saved((3, 20, 36, 6, 5), order, 0.2, kind, kernel)
    arguments = (dy, x, own, residual, keep, weight, act)
    dx, dr, dweight, *sums = norm_act_conv3x3.backward(*arguments, [True] * 3)
    dz, da, same_dweight, *same = norm_act_conv3x3.backward_reduce(*arguments, [True] * 3)
    second, none = batch_norm_act.backward_apply(dz, x, own, None, None, Sums(*same), None, PLAIN, [True, False])
    assert torch.equal(second, dx) and none.numel() == 0
    assert torch.equal(dz if order == "add_act" else da, dr)
    assert da.numel() == (0 if order == "add_act" else x.numel())
    assert torch.equal(same_dweight, dweight)
    assert all(torch.equal(a, b) for a, b in zip(same, sums, strict=True))


def test_only_the_results_of_the_first_stage_that_are_needed_are_made():
    _, arguments = saved((3, 20, 36, 6, 5), "act_add", 0.2, "silu")
    everything = norm_act_conv3x3.backward_reduce(*arguments, [True] * 3)
    for needs in ([True, False, False], [False, False, True], [True, False, True], [False] * 3):
        some = norm_act_conv3x3.backward_reduce(*arguments, needs)
        wanted = (*needs, needs[0], needs[0])
        for need, a, b in zip(wanted, everything, some, strict=True):
            assert torch.equal(a, b) if need else b.numel() == 0


# --------------------------------------------------------------------------------------------------- shared statistics


def parts_of(t: Tensor | None, sizes: tuple[int, int]) -> list[Tensor | None]:
    if t is None:
        return [None] * len(sizes)
    return [part.contiguous(memory_format=torch.channels_last) for part in t.detach().split(list(sizes))]


@both_kernels
@pytest.mark.parametrize("kind", ["relu", "silu", "leaky_relu", "identity"])
@pytest.mark.parametrize("order", [None, *functional.ORDERS])
@pytest.mark.parametrize(("shape", "sizes"), [((6, 20, 33, 5, 6), (3, 3)), ((7, 64, 40, 8, 9), (2, 5))], ids=str)
def test_two_parts_of_a_batch_that_share_their_statistics_are_the_whole(shape, sizes, order, kind, kernel):
    """Forward and backward of each part by itself, with nothing exchanged but sums of [C], against float64 on both."""
    f, order_or_default = Activation.of(kind), order or "add_act"
    case = make_case(shape, kind, order, residual=order is not None, kernel=kernel)
    keep_off_kinks(case, f, order_or_default)
    exact = case.double()
    wanted = EXACT[kernel](
        exact.tensors["x"], exact.norms["norm"], exact.tensors["weight"], residual=exact.tensors.get("residual"),
        activation=f, order=order_or_default,
    )  # fmt: skip
    act, n = Act(*f, 0.0, order_or_default), case.norms["norm"]
    x, weight = case.tensors["x"].detach(), case.tensors["weight"].detach()
    xs, residuals = parts_of(x, sizes), parts_of(case.tensors.get("residual"), sizes)

    measured = [batch_norm_act.stats(part) for part in xs]
    shared = Statistics.combined([Statistics(mean, m2, count) for count, mean, m2 in measured])
    forwards, running = [], []
    for part, residual in zip(xs, residuals, strict=True):
        params = NormParams(*(v.detach().clone() for v in n[:4]), n.momentum, n.eps)
        forwards.append(norm_act_conv3x3.forward(part, params, shared, residual, None, weight, act, True))
        running.append(params[:2])
    y = torch.cat([found[0] for found in forwards])
    assert_close(y, wanted.detach(), "y", length=output_length(shape[1], form_of(case.tensors["x"], kernel=kernel)))
    for found in forwards:
        assert_statistics(found[1], found[2], found[0], "y of a part")
    for name, *values in zip(("running_mean", "running_var"), *running, strict=True):
        for value in values:
            assert_close(value, exact.running()[f"norm.{name}"], name, length=x.numel() // x.shape[1])

    dy = gradient_of(y, generator(shape, kind, order))
    own = Norm(*forwards[0][3:5], n.weight.detach(), n.bias.detach())
    needs = [True, order is not None, True]
    reduced = [
        norm_act_conv3x3.backward_reduce(dy_part, part, own, residual, found[5], weight, act, needs)
        for dy_part, part, residual, found in zip(parts_of(dy, sizes), xs, residuals, forwards, strict=True)
    ]
    dweight, *sums = (sum(found[i] for found in reduced) for i in (2, 3, 4))
    dx = torch.cat([
        batch_norm_act.backward_apply(
            found[0], part, own, None, None, Sums(*sums), shared.count, PLAIN, [True, False]
        )[0]
        for found, part in zip(reduced, xs, strict=True)
    ])  # fmt: skip
    check_gradients(case, exact, wanted, dy, f, order, (dx, dweight, *sums, reduced))


def check_gradients(
    case: Case, exact: Case, wanted: Tensor, dy: Tensor, f: Activation, order: str | None, found: tuple
) -> None:
    """The gradients against float64; what they may carry of the convolution's own errors is as in `check`."""
    dx, dweight, dnorm_weight, dnorm_bias, reduced = found
    inputs = exact.inputs()
    expected = dict(zip(inputs, torch.autograd.grad(wanted, list(inputs.values()), dy.double()), strict=True))
    x, n, count, kernel = case.tensors["x"], case.norms["norm"], dx.numel() // dx.shape[1], dweight.shape[2]
    da = torch.nn.grad.conv2d_input(x.shape, exact.tensors["weight"].detach(), dy.double(), padding=kernel // 2)
    noise = float(bound(da, torch.float32, input_length(dy.shape[1], form_of(x, kernel=kernel))).max())
    g_noise = noise * float(f.gradient(torch.linspace(-8, 8, 4001, dtype=torch.float64)).abs().max())
    rstd = torch.rsqrt(x.detach().double().var((0, 2, 3), correction=0) + n.eps)
    assert_close(dx, expected["x"], "dx", noise=3 * g_noise * float((rstd * n.weight.detach()).max()))
    assert_close(dweight, expected["weight"], "dweight", length=weight_length(x, kernel=kernel))
    for name, value in (("weight", dnorm_weight), ("bias", dnorm_bias)):
        assert_close(value, expected[f"norm.{name}"], f"dnorm_{name}", length=count, noise=math.sqrt(count) * g_noise)
    if order is not None:
        dr = torch.cat([results[0 if order == "add_act" else 1] for results in reduced])
        assert_close(dr, expected["residual"], "dresidual", noise=g_noise)


def test_a_shared_count_is_taken_for_the_variance():
    """The same moments with twice the count are half the variance."""
    (x, params, _, residual, seed, weight, act, _), _ = saved((3, 9, 5, 4, 6), "add_act", 0.0)
    count, mean, m2 = batch_norm_act.stats(x)
    for factor in (1, 2, 5):
        running = [v.clone() for v in params[:2]]
        statistics = Statistics(mean, m2, factor * count)
        found = norm_act_conv3x3.forward(
            x, NormParams(*running, *params[2:]), statistics, residual, seed, weight, act, False
        )
        exact_m2, m = m2.double(), factor * int(count)
        assert_close(found[4], torch.rsqrt(exact_m2 / m + params.eps), "rstd")
        share = params.momentum
        assert_close(running[1], (1 - share) * params.running_var.double() + share * exact_m2 / (m - 1), "running_var")


@both_kernels
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_bit_of_g(workers, kernel):
    _, arguments = saved((40, 32, 40, 15, 14), "add_act", 0.1, "gelu", kernel)
    first = norm_act_conv3x3.backward_reduce(*arguments, [True] * 3)[0]
    with threads(workers):
        again = norm_act_conv3x3.backward_reduce(*arguments, [True] * 3)[0]
    assert torch.equal(again, first)
