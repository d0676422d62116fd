"""The pre-activation block against its formula in float64, written here in torch's functions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fastres import contract, freeze
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.nn import FusedPreactivationBlock, PreactivationBlock
from tests.nn.test_blocks import IN, follow, kept_for_backward, off_kinks
from tests.operators import Operators
from tests.oracle import LAYOUTS, assert_close, generator, output_length, weight_length
from tests.parity import FORMATS, close, scramble, twin

SHAPES = [(IN, 1), (12, 1), (IN, 2), (24, 2)]


class Exact(nn.Module):
    """The formula, with the parameters and buffers of a block in float64; `drop` stands between the convolutions."""

    def __init__(self, block, drop=None):
        super().__init__()
        self.drop, self.shortcut = drop, None
        for name, child in twin(block).double().named_children():
            setattr(self, name, child)

    def norm(self, norm, x):
        if norm.training:
            norm.num_batches_tracked += 1
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
        )

    def forward(self, x):
        a = F.relu(self.norm(self.bn1, x))
        z = F.relu(self.norm(self.bn2, F.conv2d(a, self.conv1.weight, stride=self.conv1.stride, padding=1)))
        z = F.conv2d(z if self.drop is None else self.drop(z), self.conv2.weight, padding=1)
        if self.shortcut is None:
            return z + x
        return z + F.conv2d(a, self.shortcut.weight, stride=self.shortcut.stride)


def make(out, stride, **options):
    torch.manual_seed(0)
    return scramble(FusedPreactivationBlock(IN, out, stride, **options))


@pytest.mark.parametrize("algorithm", ["winograd", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
@pytest.mark.parametrize(("out", "stride"), SHAPES)
def test_it_trains_and_evaluates_as_its_formula_in_float64(out, stride, size, layout, algorithm):
    block = make(out, stride, conv_algorithm=algorithm)
    assert (block.shortcut is None) == (out == IN and stride == 1)
    follow(block, Exact(block), layout, generator(out, stride, size, layout, algorithm), size=size)
    assert block.bn1.num_batches_tracked == block.bn2.num_batches_tracked == 1


@pytest.mark.parametrize("frozen", [("bn1",), ("bn2",), ("bn1", "bn2")])
@pytest.mark.parametrize(("out", "stride"), SHAPES)
def test_frozen_normalisations_stay_frozen(out, stride, frozen):
    block = make(out, stride, conv_algorithm="winograd")
    for name in frozen:
        getattr(block, name).eval()
    follow(block, Exact(block), "channels_last", generator(out, stride, frozen), evaluate=False)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("out", "stride"), SHAPES)
def test_the_plain_block_is_the_formula(out, stride, training, memory_format):
    block = unfuse(make(out, stride)).double().train(training)
    assert type(block) is PreactivationBlock
    module = Exact(block)
    x = torch.randn(4, IN, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    with Operators() as seen:
        y = block(x)
    assert not seen.names
    expected = module(x)
    close(y, expected, x.numel(), times=8)
    dy = torch.randn_like(y)
    y.backward(dy), expected.backward(dy)
    wanted = dict(module.named_parameters())
    for name, p in block.named_parameters():
        close(p.grad, wanted[name].grad, x.numel(), name, times=8)


@pytest.mark.parametrize("algorithm", ["winograd", "torch"])
@pytest.mark.parametrize(("out", "stride"), SHAPES)
def test_dropout_stands_between_the_convolutions_and_is_that_of_the_contract(out, stride, algorithm):
    block = make(out, stride, dropout=0.4, conv_algorithm=algorithm)

    def drop(z):
        return torch.where(contract.dropout_keep(z.shape, contract.draw_seed(z.device), 0.4), z / 0.6, 0)

    gen = generator(out, stride, algorithm)
    module = Exact(block, drop)
    x = off_kinks(Exact(block), "channels_last", gen)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()]
    torch.manual_seed(3)
    y = block(inputs[0])
    torch.manual_seed(3)
    expected = module(inputs[1])
    assert_close(y, expected, "output", length=output_length(IN))
    dy = torch.randn(y.shape, generator=gen)
    y.backward(dy), expected.backward(dy.double())
    check = partial(assert_close, length=output_length(IN) + weight_length(x))
    check(inputs[0].grad, inputs[1].grad, "input gradient")
    wanted = dict(module.named_parameters())
    for name, p in block.named_parameters():
        check(p.grad, wanted[name].grad, f"gradient of {name}")


def test_the_plain_block_drops_between_its_convolutions():
    block = unfuse(make(12, 2, dropout=0.4)).double()
    x = torch.randn(2, IN, 6, 6, dtype=torch.float64)
    torch.manual_seed(3)
    expected = Exact(block, partial(F.dropout, p=0.4))(x)
    torch.manual_seed(3)
    close(block(x), expected, x.numel(), times=8)
    block.eval()
    assert torch.equal(block(x), block(x))


def test_a_projection_reads_an_activation_that_is_written_once():
    block = make(24, 1, conv_algorithm="winograd")
    x = torch.randn(2, IN, 8, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Operators() as seen:
        y = block(x)
    assert seen.names == ["batch_norm_act_training", "conv3x3_forward", "norm_act_conv3x3_forward"]
    whole = x.numel() * x.element_size()
    # Its input, the activation, and the first convolution's output of 24 channels.
    assert kept_for_backward(block, x) == [whole * 3 // 2, whole, whole]
    with Operators() as seen:
        y.sum().backward()
    assert seen.names == ["norm_act_conv3x3_backward", "conv3x3_backward", "batch_norm_act_backward"]
    assert seen.arguments[1]["added"] is not None


def test_by_pytorchs_convolutions_the_two_gradients_of_the_activation_meet_in_its_backward():
    block = make(24, 2, conv_algorithm="torch")
    y = block(torch.randn(2, IN, 8, 12, requires_grad=True))
    with Operators() as seen:
        y.sum().backward()
    assert [name for name in seen.names if name == "batch_norm_act_backward"] == ["batch_norm_act_backward"] * 2
    assert [a["dy2"] is not None for a in seen.arguments] == [False, True]


def test_in_evaluation_the_addition_is_part_of_the_last_convolution():
    block = make(IN, 1, conv_algorithm="winograd").eval()
    with torch.no_grad(), Operators() as seen:
        block(torch.randn(2, IN, 8, 8))
    assert seen.names == ["batch_norm_act_inference", "conv3x3_inference", "conv3x3_inference"]
    assert seen.arguments[-1]["residual"] is not None


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_a_wide_input_is_normalised_as_it_is(training):
    """Rounded to bfloat16 first, an input with a large mean would lose what distinguishes its values."""
    block = make(IN, 1, conv_algorithm="winograd").train(training)
    x = torch.randn(2, IN, 8, 8) + 4000
    block.bn1.running_mean.add_(4000)
    plain, true = unfuse(twin(block)), Exact(block).train(training)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = block(x), plain(x)
    assert ours.dtype == theirs.dtype == torch.float32
    wanted = true(x.double()).detach() - x.double()
    assert (ours - x - wanted).norm() <= 2 * (theirs - x - wanted).norm()


def test_fuse_and_unfuse_are_each_others_inverse():
    for dropout in (0.0, 0.3):
        block = make(12, 2, dropout=dropout)
        plain = unfuse(block)
        assert type(plain) is PreactivationBlock
        assert repr(plain) == repr(PreactivationBlock(IN, 12, 2, dropout))
        assert fuse_report(plain).left == {"": "not fused yet: fuse(model) does it"}
        assert repr(fuse(plain)) == repr(block)
        assert type(fuse(plain)) is FusedPreactivationBlock


def test_the_shortcut_may_be_any_module():
    block = make(IN, 1, conv_algorithm="winograd")
    block.shortcut = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(IN, IN, 1))
    other, x = unfuse(twin(block)).double(), torch.randn(2, IN, 8, 8)
    with Operators() as seen:
        y = block(x)
    assert seen.names
    expected = other(x.double())
    assert_close(y, expected, "output", length=output_length(IN))
    frozen = freeze(block)
    with torch.no_grad():
        assert_close(frozen(x), other.eval()(x.double()), "frozen", length=output_length(IN))


def test_a_shortcut_that_adds_by_broadcasting_does_so():
    block = make(IN, 1, conv_algorithm="winograd")
    block.shortcut = nn.AdaptiveAvgPool2d(1)
    other, x = unfuse(twin(block)).double(), torch.randn(2, IN, 8, 8)
    for training in (True, False):
        with torch.no_grad():
            y, expected = block.train(training)(x), other.train(training)(x.double())
        assert_close(y, expected, "output", length=output_length(IN))
