"""The oracle itself: against torch's own operators, and Philox against its published definition and answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres import contract, reference
from tests.oracle import LAYOUTS, activation, generator, norm


def philox_by_the_book(seed: int, index: int) -> list[int]:
    """Philox-4x32-10 on Python's integers, from the paper's figure."""
    counter = [index & 0xFFFFFFFF, index >> 32, 0, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, third = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (third >> 32) ^ counter[1] ^ key[0],
            third & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_philox_gives_the_published_answer():
    # Random123's known-answer test for counter 0, key 0.
    words = contract.philox_4x32(torch.tensor([0]), torch.tensor([0]))
    assert words.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.parametrize("seed", [1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_philox_for_any_key_and_counter(seed):
    counters = [0, 1, 2, 12345, 2**31, 2**32 - 1, 2**32, 2**40 + 5]
    words = contract.philox_4x32(torch.tensor([seed]), torch.tensor(counters))
    assert words.tolist() == [philox_by_the_book(seed, c) for c in counters]


def test_an_element_s_mask_does_not_depend_on_what_else_there_is():
    seed = torch.tensor([42])
    whole = contract.dropout_keep((3, 6, 4, 5), seed, 0.4)
    assert torch.equal(whole[:2], contract.dropout_keep((2, 6, 4, 5), seed, 0.4))
    n, c, h, w = 2, 5, 3, 4
    i = ((n * 4 + h) * 5 + w) * 6 + c
    word = philox_by_the_book(42, i // 4)[i % 4]
    assert whole[n, c, h, w].item() == (word >= round(0.4 * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_asked_for(p):
    count = 2**20
    dropped = count - contract.dropout_keep((1, 1024, 32, 32), torch.tensor([9]), p).sum().item()
    # Six standard deviations of a binomial.
    assert abs(dropped - count * p) < 6 * (count * p * (1 - p)) ** 0.5


def test_a_rate_next_to_one_has_a_threshold_of_32_bits():
    assert contract.dropout_threshold(1 - 2**-40) == 2**32 - 1
    assert contract.dropout_threshold(0.5) == 2**31


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (1, 16, 2, 2), (2, 9, 1, 1), (3, 1, 2, 5), (1, 1, 1, 1)])
def test_bits_survive_packing(layout, shape):
    like = activation(shape, torch.float32, layout, generator(shape))
    mask = torch.rand(shape, generator=generator(shape, layout)) < 0.5
    bits = contract.pack_bits(mask, like)
    assert bits.numel() == contract.bits_size(like)
    assert torch.equal(contract.unpack_bits(bits, like), mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("order", ["add_act", "act_add"])
def test_the_oracle_agrees_with_torch_s_own_operators(training, relu, order):
    gen = generator(training, relu, order)
    x, r = (activation((3, 5, 4, 4), torch.float64, "nchw", gen).requires_grad_() for _ in range(2))
    own, other = norm(5, torch.float64, gen), norm(5, torch.float64, gen)
    stats = [t.clone() for t in (*own[:2], *other[:2])]

    def bn(v: Tensor, n, mean, var) -> Tensor:
        return F.batch_norm(v, mean, var, n.weight, n.bias, training, n.momentum, n.eps)

    act = F.relu if relu else (lambda v: v)
    z, q = bn(x, own, *stats[:2]), bn(r, other, *stats[2:])
    expected = act(z + q) if order == "add_act" else act(z) + q
    y = reference.batch_norm_act(
        x, *own[:4], training=training, momentum=own.momentum, eps=own.eps, residual=r, residual_norm=other, relu=relu,
        order=order,
    )  # fmt: skip
    torch.testing.assert_close(y, expected)
    for kept, wanted in zip((*own[:2], *other[:2]), stats, strict=True):
        torch.testing.assert_close(kept, wanted)
    inputs = [x, r, own.weight, own.bias, other.weight, other.bias]
    dy = torch.randn(y.shape, generator=gen, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["add_act", "act_add"])
def test_the_oracle_of_the_convolution_s_neighbours_agrees_with_torch_s_own_operators(order):
    gen = generator("neighbours", order)
    x, r = (activation((2, 5, 4, 6), torch.float64, "nchw", gen).requires_grad_() for _ in range(2))
    weight, back = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((7, 5, 3, 3), (5, 7, 3, 3)))
    first, last = norm(5, torch.float64, gen), norm(5, torch.float64, gen)
    seed, running = torch.tensor([4]), [t.clone() for t in first[:2]]
    z = F.batch_norm(x, *running, first.weight, first.bias, True, first.momentum, first.eps)
    keep = contract.dropout_keep(x.shape, seed, 0.3).double() / 0.7
    a = F.relu(z + r) * keep if order == "add_act" else F.relu(z) * keep + r
    product = F.conv2d(F.conv2d(a, weight, padding=1), back, padding=1)
    expected = F.relu(F.batch_norm(product, *last[:4], eps=last.eps) + r)
    y = reference.norm_act_conv3x3(x, first, weight, residual=r, dropout_p=0.3, order=order, seed=seed)
    y = reference.conv3x3_norm_act(y, back, last, residual=r)
    torch.testing.assert_close(y, expected)
    for kept, wanted in zip(first[:2], running, strict=True):
        torch.testing.assert_close(kept, wanted)
    inputs = [x, r, first.weight, first.bias, last.weight, last.bias]
    dy = torch.randn(y.shape, generator=gen, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (1, 3, 1, 5), (1, 3, 4, 1), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_dropout_are_right_for_single_images_and_lines(shape, layout):
    gen, seed = generator(shape, layout), torch.tensor([3])
    x, dy = (activation(shape, torch.float64, layout, gen) for _ in range(2))
    bias = torch.zeros(shape[1], dtype=torch.float64, requires_grad=True)
    y = reference.batch_norm_act(x, None, None, None, bias, training=True, relu=False, dropout_p=0.25, seed=seed)
    kept = dy * contract.dropout_keep(shape, seed, 0.25) / 0.75
    torch.testing.assert_close(torch.autograd.grad(y, bias, dy)[0], kept.sum((0, 2, 3)))
