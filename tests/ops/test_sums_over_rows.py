"""Batch statistics and backward's sums where rows are many, long or few: they are summed in panels of channels, blocks
of rows, groups of rows and, where channels are few, several pixels a row, none of which may show.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastres.contract import Act, Norm, Residual
from fastres.ops import batch_norm_act as ops
from tests.oracle import DTYPES, LAYOUTS, activation, assert_close, generator, norm, threads

SHAPES = [
    (3, 515, 2, 1),  # a panel of 512 channels and three more, six rows
    (1, 1030, 1, 3),  # three rows
    (1, 513, 17, 31),  # several blocks, of which none is full at the end
    (5, 33, 11, 7),
    (2, 1, 129, 2),
    (4, 16, 33, 31),  # channels of two pixels, or of four, fill a unit of the loops
    (3, 24, 5, 4),
    (1, 8, 7, 9),  # which these pixels have no whole number of
    (2, 120, 3, 5),
]
OVER_CHANNELS = (0, 2, 3)


def doubled(value):
    return value.double()[:, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mean", [0.5, 100.0])
def test_statistics_are_those_of_float64(shape, layout, dtype, mean):
    x = activation(shape, dtype, layout, generator("statistics", shape, layout, dtype, mean), mean=mean)
    count, found_mean, found_m2 = ops.stats(x)
    values = x.double()
    assert count.item() == x.numel() // shape[1]
    assert_close(found_mean, values.mean(OVER_CHANNELS), "mean", length=count.item())
    variance = values.var(OVER_CHANNELS, correction=0)
    assert_close(found_m2 / count, variance, "variance", length=count.item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["identity", "relu", "silu"])
@pytest.mark.parametrize("dual", [False, True])
def test_backward_s_sums_are_those_of_float64(shape, layout, dtype, kind, dual):
    gen = generator("sums", shape, layout, dtype, kind, dual)
    x, r, dy = (activation(shape, dtype, layout, gen) for _ in range(3))
    own, other = (norm(shape[1], dtype, gen) for _ in range(2))
    normed = Norm(own.running_mean, own.running_var.rsqrt(), own.weight.detach(), own.bias.detach())
    of_r = Norm(other.running_mean, other.running_var.rsqrt(), other.weight.detach(), other.bias.detach())
    residual = Residual(r, *of_r) if dual else None
    act = Act(kind, 0.0, 0.0, "add_act")
    y, bits = ops.apply(x, normed, residual, None, act, True)
    *sums, dz = ops.backward_reduce(dy, None, x, normed, residual, bits, act)
    assert dz.numel() == 0

    def xhat(value, n):
        return (value.double() - doubled(n.mean)) * doubled(n.rstd)

    z = doubled(normed.weight) * xhat(x, normed) + doubled(normed.bias)
    if dual:
        z = z + doubled(of_r.weight) * xhat(r, of_r) + doubled(of_r.bias)
    if kind == "identity":
        g = dy.double()
    elif kind == "relu":
        g = torch.where(y > 0, dy.double(), 0.0)  # the sign that forward saw, which rounding may have turned
    else:
        z.requires_grad_()
        (g,) = torch.autograd.grad(torch.nn.functional.silu(z), z, dy.double())
    expected = [(g * xhat(x, normed)).sum(OVER_CHANNELS), g.sum(OVER_CHANNELS)]
    if dual:
        expected += [(g * xhat(r, of_r)).sum(OVER_CHANNELS), expected[1]]
    length = x.numel() // shape[1]
    for name, found, wanted in zip(
        ("dweight", "dbias", "residual dweight", "residual dbias"), sums, expected, strict=False
    ):
        # A sum of `length` terms of its own size: rounding grows with its square root, as the sum does.
        assert_close(found / math.sqrt(length), wanted / math.sqrt(length), name, length=length)
    assert all(sum_.numel() == 0 for sum_ in sums[len(expected) :])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_results_are_the_same_in_every_run_and_with_any_number_of_threads(layout, dropout_p):
    shape = (3, 530, 13, 15)  # several segments of the sums, with a rest in each cut
    gen = generator("threads", layout, dropout_p)
    x, r, dy = (activation(shape, torch.float32, layout, gen) for _ in range(3))
    own = norm(shape[1], torch.float32, gen)
    params = own._replace(weight=own.weight.detach(), bias=own.bias.detach())
    act = Act("relu", 0.0, dropout_p, "add_act")

    def run():
        running = params._replace(running_mean=own.running_mean.clone(), running_var=own.running_var.clone())
        y, mean, rstd, _, _, bits = ops.training(x, running, None, r, None, None, torch.tensor([5]), act)
        normed = Norm(mean, rstd, params.weight, params.bias)
        gradients = ops.backward(dy, None, x, normed, None, bits, act, True, [True, True, True])
        return [y, mean, rstd, bits, running.running_mean, running.running_var, *gradients]

    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            results.append(run())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
