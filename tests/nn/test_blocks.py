from __future__ import annotations

import copy
import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

from fastres import contract
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.nn import (
    DropoutBasicBlock,
    DropoutBottleneck,
    FusedBasicBlock,
    FusedBottleneck,
    FusedPreactivationBlock,
    PlainResidualBlock,
    PlainSkipConnection,
    PreactivationBlock,
    ResidualBlock,
    SkipConnection,
)
from tests.operators import Operators
from tests.oracle import (
    LAYOUTS,
    activation,
    assert_close,
    generator,
    near_zero,
    output_length,
    saved_bytes,
    weight_length,
)
from tests.parity import DTYPES, FORMATS, close, same_training, scramble, twin

KINDS = [(FusedBasicBlock, BasicBlock), (FusedBottleneck, Bottleneck)]
ALL = [FusedBasicBlock, FusedBottleneck, ResidualBlock, FusedPreactivationBlock]
PLAIN_WITH_DROPOUT = {FusedBasicBlock: DropoutBasicBlock, FusedBottleneck: DropoutBottleneck}
IN = 16


def downsample(kind, stride, planes):
    if kind == "none":
        return None
    if kind == "projection":
        return nn.Sequential(conv1x1(IN, planes, stride), nn.BatchNorm2d(planes))
    return nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), conv1x1(IN, planes), nn.BatchNorm2d(planes))


def pair(fused, plain, *, shortcut="none", stride=1, dtype=torch.float64, planes=None, **options):
    """A fused block and torchvision's, with the same state."""
    torch.manual_seed(0)
    planes = planes or (IN // plain.expansion)
    blocks = [
        cls(IN, planes, stride, downsample(shortcut, stride, planes * plain.expansion), **options)
        for cls in (fused, plain)
    ]
    scramble(blocks[0])
    blocks[1].load_state_dict(blocks[0].state_dict())
    return [b.to(dtype) for b in blocks]


def inputs(dtype=torch.float64, memory_format=torch.channels_last, size=5, channels=IN):
    generator = torch.Generator().manual_seed(2)

    def make():
        x = torch.randn(4, channels, size, size, generator=generator, dtype=torch.float64)
        return x.to(dtype).contiguous(memory_format=memory_format)

    return make


def identical(actual, expected, x):
    """A pass of two blocks that run the same operators: output, gradients and buffers agree bit for bit."""
    results = []
    for module in (actual, expected):
        v = x.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(6)
        y = module(v)
        y.square().sum().backward()
        results.append([y, v.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert results[0][0].stride() == results[1][0].stride()
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("shortcut", "stride"), [("none", 1), ("projection", 1), ("projection", 2), ("pooled", 2)])
def test_a_fused_block_trains_as_that_of_torchvision(fused, plain, dtype, memory_format, shortcut, stride):
    actual, expected = pair(fused, plain, shortcut=shortcut, stride=stride, dtype=dtype)
    for (name, ours), (other, theirs) in zip(actual.named_modules(), expected.named_modules(), strict=True):
        assert (name, type(ours)) == (other, type(theirs) if name else fused)
    assert "" in fuse_report(actual).swapped
    same_training(actual, expected, inputs(dtype, memory_format), steps=2, times=8)


def test_groups_width_and_dilation_reach_the_convolutions():
    actual, expected = pair(FusedBottleneck, Bottleneck, groups=2, base_width=128, dilation=2)
    assert actual.conv2.groups == 2
    assert actual.conv2.dilation == (2, 2)
    same_training(actual, expected, inputs(), steps=1, times=8)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_a_norm_layer_with_other_constants_is_kept(fused, plain):
    actual, expected = pair(fused, plain, norm_layer=partial(nn.BatchNorm2d, eps=0.2, momentum=0.5))
    assert actual.bn1.eps == 0.2
    same_training(actual, expected, inputs(), steps=2, times=8)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
@pytest.mark.parametrize("norm_layer", [partial(nn.GroupNorm, 2), nn.InstanceNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("shortcut", ["none", "projection"])
def test_with_a_norm_layer_of_another_kind_it_computes_as_torchvisions_block(fused, plain, norm_layer, shortcut):
    actual, expected = pair(fused, plain, norm_layer=norm_layer, shortcut=shortcut, dtype=torch.float32)
    assert re.match(r"its bn1 is .*(GroupNorm|InstanceNorm2d|FrozenBatchNorm2d), ", fuse_report(actual).left[""])
    for _ in range(2):
        identical(actual, expected, inputs(torch.float32)())


@pytest.mark.parametrize("cls", [*ALL, *PLAIN_WITH_DROPOUT.values(), PreactivationBlock])
@pytest.mark.parametrize("dropout", [1.0, -0.5])
def test_a_dropout_rate_outside_its_range_is_refused(cls, dropout):
    with pytest.raises(ValueError, match="dropout: expected 0 <= dropout < 1"):
        cls(IN, IN, dropout=dropout)


@pytest.mark.parametrize("some", [("bn1",), ("bn2",), ("downsample",), ("bn1", "bn2", "downsample")])
@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_frozen_normalisations_stay_frozen(fused, plain, some):
    blocks = pair(fused, plain, shortcut="projection", stride=2)
    for block in blocks:
        for name in some:
            getattr(block, name).eval()
    same_training(*blocks, inputs(), steps=2, times=8)


def branch(block, x, drop):
    """The block's last convolution and what leads to it, in torch's words; `drop` stands before that convolution."""
    names = ["1", "2"] if isinstance(block, (BasicBlock, ResidualBlock)) else ["1", "2", "3"]
    for n in names:
        x = drop(x) if n == names[-1] else x
        x = getattr(block, f"conv{n}")(x)
        norm = getattr(block, f"bn{n}")
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        x = x if n == names[-1] else F.relu(x)
    return x


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_dropout_stands_before_the_last_convolution(fused, plain):
    block, _ = pair(fused, plain)
    actual = PLAIN_WITH_DROPOUT[fused](IN, IN // plain.expansion, dropout=0.4).double()
    actual.load_state_dict(block.state_dict())
    block.dropout = 0.4
    x = inputs()()

    def drop(z):
        return torch.where(contract.dropout_keep(z.shape, contract.draw_seed(z.device), 0.4), z / 0.6, 0)

    for module, rule in ((block, drop), (actual, partial(F.dropout, p=0.4))):
        torch.manual_seed(3)
        expected = F.relu(branch(module, x, rule) + x)
        torch.manual_seed(3)
        close(module(x), expected, x.numel(), times=8)


@pytest.mark.parametrize("cls", [*ALL, *PLAIN_WITH_DROPOUT.values(), PreactivationBlock])
def test_freezing_the_normalisations_does_not_stop_the_dropout(cls):
    planes = IN // cls.expansion
    block, x = cls(IN, planes, dropout=0.5), inputs(torch.float32)()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(block(x), block(x))
    block.eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    # The other way round: statistics may be adapted at test time without dropping anything.
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize(("fused", "plain"), KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_unfuse_and_fuse_of_a_block_are_each_others_inverse(fused, plain, dropout):
    block = fused(IN, IN // plain.expansion, dropout=dropout)
    back = unfuse(block)
    assert type(back) is (PLAIN_WITH_DROPOUT[fused] if dropout else plain)
    assert repr(back) == repr(type(back)(IN, IN // plain.expansion, **({"dropout": dropout} if dropout else {})))
    assert repr(fuse(back)) == repr(block)
    assert type(fuse(back)) is fused
    assert fuse(back).__dict__.keys() == back.__dict__.keys()


def article_block(block, x, drop):
    """The article's block in torch's words."""
    out = F.conv2d(x, block.conv1.weight, stride=block.conv1.stride, padding=1)
    out = drop(F.relu(F.batch_norm(out, None, None, block.bn1.weight, block.bn1.bias, training=True)))
    if isinstance(block.shortcut, nn.Sequential):
        conv, norm, _ = block.shortcut
        x = F.conv2d(x, conv.weight, stride=conv.stride)
        x = F.relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True))
    out = F.conv2d(out + x, block.conv2.weight, padding=1)
    return F.batch_norm(out, None, None, block.bn2.weight, block.bn2.bias, training=True)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("out", "stride"), [(IN, 1), (12, 1), (IN, 2), (12, 2)])
def test_a_residual_block_adds_before_its_second_convolution(memory_format, fused, out, stride):
    torch.manual_seed(0)
    block = scramble(ResidualBlock(IN, out, stride, dropout=0.0)).double()
    assert isinstance(block.shortcut, nn.Identity) == (out == IN and stride == 1)
    if not fused:
        block = unfuse(block)
        assert type(block) is PlainResidualBlock
        assert type(block.shortcut) is (PlainSkipConnection if out != IN or stride > 1 else nn.Identity)
    other = twin(block)
    x = inputs(memory_format=memory_format)().requires_grad_()
    x2 = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, expected = block(x), article_block(other, x2, lambda z: z)
    close(y, expected, x.numel(), times=8)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    close(x.grad, x2.grad, x.numel(), "input gradient", times=8)
    for (name, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
        close(p.grad, q.grad, x.numel(), name, times=8)


def test_the_dropout_of_a_residual_block_stands_before_the_addition():
    block = scramble(ResidualBlock(IN, IN, dropout=0.4)).double()
    x = inputs()()

    def drop(z):
        return torch.where(contract.dropout_keep(z.shape, contract.draw_seed(z.device), 0.4), z / 0.6, 0)

    torch.manual_seed(3)
    expected = article_block(block, x, drop)
    torch.manual_seed(3)
    close(block(x), expected, x.numel(), times=8)


def test_a_residual_block_has_a_normalisation_for_each_convolution():
    block = ResidualBlock(IN, 12, 2)
    assert block.expansion == 1
    assert block.dropout == 0.5
    assert type(block.shortcut) is SkipConnection
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [type(m) for m in norms] == [nn.BatchNorm2d] * 3
    assert len({id(p) for m in norms for p in m.parameters()}) == 6


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [
    lambda: pair(FusedBasicBlock, BasicBlock, shortcut="projection", stride=2, dtype=torch.float32)[0],
    lambda: pair(FusedBottleneck, Bottleneck, dtype=torch.float32)[0],
    lambda: ResidualBlock(IN, 12, 2),
    lambda: FusedBasicBlock(IN, IN, conv_algorithm="winograd"),
    lambda: FusedBottleneck(IN, IN // 4, conv_algorithm="winograd"),
    lambda: ResidualBlock(IN, IN, conv_algorithm="winograd"),
    lambda: FusedPreactivationBlock(IN, IN, conv_algorithm="winograd"),
    lambda: FusedPreactivationBlock(IN, 12, 1, conv_algorithm="winograd"),
])  # fmt: skip
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, make):
    block = make()
    block.dropout = 0.3
    other = twin(block)
    results = []
    for module, wrapped in ((block, False), (other, True)):
        x = inputs(torch.float32)().requires_grad_()
        torch.manual_seed(4)
        y = checkpoint(module, x, use_reentrant=use_reentrant) if wrapped else module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------- convolutions that take in the normalisations beside them


def off_kinks(exact, layout, gen, *, size=(5, 7), n=4):
    """A random input for which no ReLU of the float64 block is in doubt: behind it stand whole convolutions."""
    state = copy.deepcopy(exact.state_dict())
    while True:
        x = activation((n, IN, *size), torch.float32, layout, gen)
        with torch.no_grad(), Operators() as seen:
            exact(x.double())
        exact.load_state_dict(state)
        if not any(near_zero(z, x.dtype).any() for z in seen.relu_inputs):
            return x


def follow(actual, exact, layout, gen, *, size=(5, 7), evaluate=True):
    """A pass of a float32 block against the same in float64: output, gradients, buffers. Then both in evaluation."""
    x = off_kinks(exact, layout, gen, size=size)
    # The longest sum behind anything: of a convolution's output and then of its weight's gradient.
    check = partial(assert_close, length=output_length(IN) + weight_length(x))
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_(), x.double().requires_grad_()]
    y, expected = (module(v) for module, v in zip((actual, exact), inputs, strict=True))
    check(y, expected, "output")
    dy = torch.randn(y.shape, generator=gen)
    y.backward(dy)
    expected.backward(dy.double())
    check(inputs[0].grad, inputs[1].grad, "input gradient")
    wanted = dict(exact.named_parameters())
    for name, p in actual.named_parameters():
        assert (p.grad is None) == (wanted[name].grad is None), name
        if p.grad is not None:
            check(p.grad, wanted[name].grad, f"gradient of {name}")
            p.grad = wanted[name].grad = None
    buffers = dict(exact.named_buffers())
    for name, b in actual.named_buffers():
        if b.is_floating_point():
            check(b, buffers[name], name)
        else:
            assert torch.equal(b, buffers[name]), name
    if evaluate:
        modes = [(m, m.training) for block in (actual, exact) for m in block.modules()]
        follow(actual.eval(), exact.eval(), layout, gen, size=size, evaluate=False)
        with torch.no_grad():
            check(actual(x), exact(x.double()), "output without gradients")
        for module, mode in modes:
            module.training = mode


def winograd_pair(fused, plain, algorithm="winograd", **options):
    """A float32 block by a convolution of ours, and torchvision's in float64."""
    actual, exact = pair(fused, plain, dtype=torch.float32, **options)
    actual.conv_algorithm = algorithm
    return actual, exact.double()


@pytest.mark.parametrize(
    ("fused", "plain", "algorithm"),
    [*((*kind, "winograd") for kind in KINDS), (FusedBottleneck, Bottleneck, "gemm")],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
@pytest.mark.parametrize(("shortcut", "stride"), [("none", 1), ("projection", 1), ("projection", 2), ("pooled", 2)])
def test_by_our_convolutions_a_block_trains_as_that_of_torchvision(
    fused, plain, algorithm, layout, size, shortcut, stride
):
    actual, exact = winograd_pair(fused, plain, algorithm, shortcut=shortcut, stride=stride)
    gen = generator(fused.__name__, layout, size, shortcut, stride)
    for _ in range(2):
        follow(actual, exact, layout, gen, size=size)
        with torch.no_grad():
            for p in actual.parameters():
                p += 0.1 * torch.randn(p.shape, generator=gen)
        exact.load_state_dict(actual.state_dict())
    assert actual.bn1.num_batches_tracked == 2


class ExactResidualBlock(nn.Module):
    """`article_block` as a module that holds another's parameters and buffers in float64."""

    def __init__(self, block):
        super().__init__()
        block = twin(block).double()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.shortcut = block.shortcut

    def _norm(self, norm, x):
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
        )

    def forward(self, x):
        out = F.relu(self._norm(self.bn1, F.conv2d(x, self.conv1.weight, stride=self.conv1.stride, padding=1)))
        if isinstance(self.shortcut, nn.Sequential):
            conv, norm, _ = self.shortcut
            x = F.relu(self._norm(norm, F.conv2d(x, conv.weight, stride=conv.stride)))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                module.num_batches_tracked += 1
        return self._norm(self.bn2, F.conv2d(out + x, self.conv2.weight, padding=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("out", "stride"), [(IN, 1), (12, 1), (12, 2)])
def test_by_winograds_convolution_a_residual_block_trains_as_in_float64(layout, out, stride):
    torch.manual_seed(0)
    actual = scramble(ResidualBlock(IN, out, stride, dropout=0.0, conv_algorithm="winograd"))
    exact, gen = ExactResidualBlock(actual), generator("residual", layout, out, stride)
    follow(actual, exact, layout, gen)


# Groups of four, of eight and of single channels.
IN_GROUPS = {4: {"groups": 4}, 8: {"groups": 2, "base_width": 128}, 1: {"groups": 16, "base_width": 16}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", IN_GROUPS)
@pytest.mark.parametrize("stride", [1, 2])
def test_in_groups_a_bottleneck_trains_as_that_of_torchvision(width, layout, stride):
    options = {"shortcut": "none" if stride == 1 else "projection", "stride": stride, **IN_GROUPS[width]}
    actual, exact = winograd_pair(FusedBottleneck, Bottleneck, "grouped", **options)
    assert actual.conv2.in_channels // actual.conv2.groups == width
    follow(actual, exact, layout, generator("groups", width, layout, stride))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dilation", "size"), [(2, (6, 8)), (2, (5, 7)), (4, (9, 6))])
@pytest.mark.parametrize("shortcut", ["none", "projection"])
def test_dilated_a_bottleneck_trains_as_that_of_torchvision(dilation, size, layout, shortcut):
    actual, exact = winograd_pair(FusedBottleneck, Bottleneck, dilation=dilation, base_width=256, shortcut=shortcut)
    x = torch.randn(2, IN, *size)
    with Operators() as seen:
        copy.deepcopy(actual)(x)
    whole = all(side % dilation == 0 for side in size)
    assert ("norm_act_conv3x3_forward" if whole else "conv3x3_forward") in seen.names
    follow(actual, exact, layout, generator("dilated", dilation, layout, size, shortcut), size=size)


def test_a_convolution_in_groups_measures_its_output():
    block, x = FusedBottleneck(IN, IN // 4, groups=4, conv_algorithm="grouped"), torch.randn(2, IN, 6, 6)
    with Operators() as seen:
        block(x)
    assert seen.names == ["batch_norm_act_training", "grouped_conv_forward", *["batch_norm_act_training"] * 2]
    first, conv, second, last = seen.arguments
    assert conv["statistics"] and second["statistics_mean"] is not None
    assert first["statistics_mean"] is last["statistics_mean"] is None
    with torch.no_grad(), Operators() as seen:
        block.eval()(x)
    assert seen.names == ["batch_norm_act_inference", "grouped_conv_forward", *["batch_norm_act_inference"] * 2]


def test_a_bottleneck_keeps_raw_outputs_and_bits_only():
    """Its input, the three convolutions' raw outputs, the weights, and a bit an element of the last ReLU's."""
    block = FusedBottleneck(128, 32, conv_algorithm="auto")
    pixels = 4 * 32 * 32
    x = torch.randn(4, 128, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = sum(conv.weight.numel() for conv in (block.conv1, block.conv2, block.conv3))
    kept = 4 * (pixels * (128 + 32 + 32 + 128) + weights) + pixels * 128 // 8
    with Operators() as seen:
        assert saved_bytes(lambda: block(x)) == kept
    by = ["conv3x3_forward", "norm_act_conv3x3_forward", "norm_act_conv3x3_forward", "batch_norm_act_training"]
    assert seen.names == by
    for later in seen.arguments[1:]:
        assert later["statistics_mean"] is not None
    with Operators() as seen:
        block(x).sum().backward()
    assert seen.names[4:] == [name.replace("forward", "backward").replace("training", "backward") for name in by[::-1]]
    assert seen.arguments[-1]["added"] is not None


IN_TRAINING = ["conv3x3_forward", "norm_act_conv3x3_forward", "batch_norm_act_training"]
FUSION = [
    (FusedBasicBlock, "none", IN_TRAINING, ["conv3x3_inference"] * 2),
    (
        FusedBasicBlock, "projection", [*IN_TRAINING[:2], "projection_shortcut_forward", IN_TRAINING[2]],
        ["conv3x3_inference", "conv3x3_inference", "projection_shortcut_inference"],
    ),
    (
        FusedBottleneck, "none", ["norm_act_conv3x3_forward", "batch_norm_act_training", "batch_norm_act_training"],
        ["batch_norm_act_inference", "conv3x3_inference", "batch_norm_act_inference"],
    ),
    (
        FusedBottleneck, "products",
        ["conv3x3_forward", "batch_norm_act_training", "norm_act_conv3x3_forward", "batch_norm_act_training"],
        ["batch_norm_act_inference", "conv3x3_inference", "batch_norm_act_inference"],
    ),
    (
        ResidualBlock, "none", IN_TRAINING,
        ["conv3x3_inference", "batch_norm_act_inference", "conv3x3_inference"],
    ),
    (
        FusedPreactivationBlock, "none", ["norm_act_conv3x3_forward"] * 2,
        ["batch_norm_act_inference", "conv3x3_inference", "conv3x3_inference"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "shortcut", "training", "evaluation"), FUSION)
def test_what_stands_beside_a_convolution_is_part_of_it(cls, shortcut, training, evaluation):
    planes = IN // cls.expansion
    torchvisions = issubclass(cls, (BasicBlock, Bottleneck))
    algorithm, shortcut = ("gemm", "none") if shortcut == "products" else ("winograd", shortcut)
    options = {} if not torchvisions else {"downsample": downsample(shortcut, 1, planes * cls.expansion)}
    block = cls(IN, planes, **options, dropout=0.3, conv_algorithm=algorithm)
    x = torch.randn(2, IN, 6, 6)
    with Operators() as seen:
        block(x)
    assert seen.names == training
    with torch.no_grad(), Operators() as seen:
        block.eval()(x)
    assert seen.names == evaluation


@pytest.mark.parametrize("cls", [FusedBasicBlock, ResidualBlock])
def test_no_pass_over_memory_is_left_to_measure_or_to_add(cls):
    block, x = cls(IN, IN, conv_algorithm="winograd"), torch.randn(2, IN, 6, 6, requires_grad=True)
    with Operators() as seen:
        y = block(x)
    first, second, last = seen.arguments
    assert first["statistics"]
    for later in (second, last):
        assert later["statistics_mean"] is not None
        assert later["statistics_m2"] is not None
    with Operators() as seen:
        y.sum().backward()
    assert seen.names == ["batch_norm_act_backward", "norm_act_conv3x3_backward", "conv3x3_backward"]
    assert seen.arguments[-1]["added"] is not None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fused", "plain"), KINDS)
@pytest.mark.parametrize(("shortcut", "stride"), [("none", 1), ("projection", 1), ("projection", 2), ("pooled", 2)])
def test_a_small_image_evaluates_as_in_torchvisions_block(fused, plain, layout, shortcut, stride):
    actual, exact = pair(fused, plain, shortcut=shortcut, stride=stride, dtype=torch.float32)
    actual.eval(), exact.double().eval()
    x = activation((1, IN, 7, 6), torch.float32, layout, generator(fused.__name__, layout, shortcut, stride))
    with torch.no_grad(), Operators() as seen:
        y = actual(x)
        assert_close(y, exact(x.double()), "output", length=9 * IN)
    if layout == "channels_last":
        assert seen.names.count("conv3x3_inference") == (2 if fused is FusedBasicBlock else 1)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_the_dropout_before_a_convolution_is_that_of_the_contract(fused, plain):
    block, exact = winograd_pair(fused, plain)
    block.dropout = 0.4
    gen = generator(fused.__name__)
    x = off_kinks(exact, "channels_last", gen)

    def drop(z):
        return torch.where(contract.dropout_keep(z.shape, contract.draw_seed(z.device), 0.4), z / 0.6, 0)

    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    torch.manual_seed(3)
    y = block(inputs[0])
    torch.manual_seed(3)
    z = branch(exact, inputs[1], drop) + inputs[1]
    assert_close(y, F.relu(z), "output", length=output_length(IN))
    dy = torch.where(near_zero(z, x.dtype), 0, torch.randn(y.shape, generator=gen))
    for result, gradient in ((y, dy.float()), (F.relu(z), dy.double())):
        result.backward(gradient)
    assert_close(inputs[0].grad, inputs[1].grad, "input gradient", length=output_length(IN) + weight_length(x))
    assert_close(block.conv2.weight.grad, exact.conv2.weight.grad, "weight gradient", length=weight_length(x))


def test_the_dropout_of_a_residual_block_is_that_of_the_contract_by_winograds_convolution():
    block = scramble(ResidualBlock(IN, IN, dropout=0.4, conv_algorithm="winograd"))
    exact, gen = ExactResidualBlock(block), generator("residual dropout")
    x = off_kinks(exact, "channels_last", gen)

    def drop(z):
        return torch.where(contract.dropout_keep(z.shape, contract.draw_seed(z.device), 0.4), z / 0.6, 0)

    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    torch.manual_seed(3)
    y = block(inputs[0])
    torch.manual_seed(3)
    expected = article_block(exact, inputs[1], drop)
    assert_close(y, expected, "output", length=output_length(IN))
    dy = torch.randn(y.shape, generator=gen)
    y.backward(dy)
    expected.backward(dy.double())
    assert_close(inputs[0].grad, inputs[1].grad, "input gradient", length=output_length(IN) + weight_length(x))
    assert_close(block.conv2.weight.grad, exact.conv2.weight.grad, "weight gradient", length=weight_length(x))


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def replace(name, **options):
    def change(block):
        torch.manual_seed(1)
        old = getattr(block, name)
        keywords = {"padding": 1, "bias": False} | options
        setattr(block, name, nn.Conv2d(IN, IN, **({"kernel_size": 3} | keywords)).to(old.weight.dtype))

    return change


def on(name, change):
    return lambda block: change(getattr(block, name))


def double_input(module):
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))


def triple_output(module):
    module.register_forward_hook(lambda m, args, y: y * 3)


CHANGES = {
    **{f"input of {name} doubled": on(name, double_input) for name in ("conv1", "bn1", "conv2", "bn2")},
    **{f"output of {name} tripled": on(name, triple_output) for name in ("conv1", "conv2")},
    "conv1 pruned": on("conv1", lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5)),
    "conv2 pruned": on("conv2", lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5)),
    "conv1 parametrised": on("conv1", torch.nn.utils.parametrizations.weight_norm),
    "conv2 parametrised": on("conv2", torch.nn.utils.parametrizations.weight_norm),
    "conv1 a subclass": on("conv1", lambda m: setattr(m, "__class__", DoubledConv)),
    "conv2 a subclass": on("conv2", lambda m: setattr(m, "__class__", DoubledConv)),
    "forward set on conv2": on("conv2", lambda m: setattr(m, "forward", lambda x: x * 2)),
    "conv1 with bias": replace("conv1", bias=True),
    "conv2 with bias": replace("conv2", bias=True),
    "conv1 with groups": replace("conv1", groups=2),
    "conv2 dilated": replace("conv2", dilation=2, padding=2),
    "conv2 of 5x5": replace("conv2", kernel_size=5, padding=2),
    "conv1 of 1x1": replace("conv1", kernel_size=1, padding=0),
    "conv1 of 1x1 padded, conv2 of 5x5 padded less": lambda block: [
        replace("conv1", kernel_size=1)(block), replace("conv2", kernel_size=5)(block),
    ],
    "conv2 reflects": replace("conv2", padding_mode="reflect"),
    "conv1 pads by name": replace("conv1", padding="same"),
    "conv1 with a stride of one number": on("conv1", lambda m: setattr(m, "stride", 1)),
    "conv1 frozen": on("conv1", lambda m: m.weight.requires_grad_(False)),
    "conv2 frozen": on("conv2", lambda m: m.weight.requires_grad_(False)),
    **{f"{name} in evaluation": on(name, nn.Module.eval) for name in ("bn1", "bn2")},
    "bn1 averages": on("bn1", lambda m: setattr(m, "momentum", None)),
    "bn2 averages": on("bn2", lambda m: setattr(m, "momentum", None)),
    "bn1 no longer tracks": on("bn1", lambda m: setattr(m, "track_running_stats", False)),
    "both without statistics": lambda block: [
        setattr(m, name, None) for m in (block.bn1, block.bn2) for name in ("running_mean", "running_var")
    ],
}  # fmt: skip


@pytest.mark.parametrize("shortcut", ["none", "projection"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_was_changed_does_what_torchvisions_would(change, shortcut):
    actual, exact = winograd_pair(FusedBasicBlock, BasicBlock, shortcut=shortcut)
    for block in (actual, exact):
        CHANGES[change](block)
    exact.load_state_dict(actual.state_dict())
    gen = generator(change, shortcut)
    follow(actual, exact, "channels_last", gen)


BOTTLENECK_CHANGES = {
    **{f"input of {name} doubled": on(name, double_input) for name in ("conv1", "bn1", "conv2", "bn2", "conv3")},
    "output of conv2 tripled": on("conv2", triple_output),
    "conv2 pruned": on("conv2", lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5)),
    "conv2 in groups with bias": replace("conv2", groups=4, bias=True),
    "conv2 in groups dilated": replace("conv2", groups=4, dilation=2, padding=2),
    "conv2 in groups reflects": replace("conv2", groups=4, padding_mode="reflect"),
    "conv2 in groups of 5x5": replace("conv2", groups=4, kernel_size=5, padding=2),
    "conv2 in groups pads by name": replace("conv2", groups=4, padding="same"),
    "conv2 in groups with a stride of one number": lambda block: [
        replace("conv2", groups=4)(block),
        on("conv2", lambda m: setattr(m, "stride", 1))(block),
    ],
    **{f"{name} in evaluation": on(name, nn.Module.eval) for name in ("bn1", "bn2", "bn3")},
    "bn1 averages": on("bn1", lambda m: setattr(m, "momentum", None)),
}


@pytest.mark.parametrize("change", BOTTLENECK_CHANGES)
def test_a_bottleneck_that_was_changed_does_what_torchvisions_would(change):
    grouped = "in groups" in change
    options = {"base_width": 256} if grouped else {}  # conv2 has IN channels then
    actual, exact = winograd_pair(FusedBottleneck, Bottleneck, "grouped" if grouped else "winograd", **options)
    for block in (actual, exact):
        BOTTLENECK_CHANGES[change](block)
    exact.load_state_dict(actual.state_dict())
    gen = generator(change)
    follow(actual, exact, "channels_last", gen)


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu", "conv2", "bn2"])
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_inside_a_block_see_what_they_see_in_the_plain_block(cls, name, training):
    block = scramble(cls(IN, IN // cls.expansion, dropout=0.2, conv_algorithm="winograd")).train(training)
    # Autograd forbids to change in place what a full backward hook has wrapped.
    block.relu.inplace = False
    plain = unfuse(twin(block))
    x, seen = torch.randn(2, IN, 6, 6, requires_grad=True), ([], [])
    for each, calls in zip((block, plain), seen, strict=True):
        module = getattr(each, name)
        module.register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[0].detach().clone()))
        module.register_forward_hook(lambda m, args, y, calls=calls: calls.append(y.detach().clone()))
        if not isinstance(block, BasicBlock) or name != "bn2":  # whose output torchvision's block adds to in place
            module.register_full_backward_hook(lambda m, gi, go, calls=calls: calls.append(go[0].detach().clone()))
    identical(block, plain, x.detach())
    assert len(seen[0]) >= 2
    assert [t.stride() for t in seen[0]] == [t.stride() for t in seen[1]]
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)
    if name == "bn1" and cls in (FusedBasicBlock, FusedBottleneck):
        assert (seen[0][1] < 0).any(), "the ReLU is no part of what bn1 gives"


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_a_hook_on_all_modules_sees_those_of_a_block(cls, training):
    block = cls(IN, IN // cls.expansion, dropout=0.0, conv_algorithm="winograd").train(training)
    plain, x, seen = unfuse(twin(block)), torch.randn(2, IN, 6, 6), []
    names = {m: name for each in (block, plain) for name, m in each.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(names[m]))
    try:
        identical(block, plain, x)
    finally:
        handle.remove()
    count = len(seen) // 2
    assert seen[:count] == seen[count:]
    assert set(seen) == {name for name in names.values() if name != "downsample"}


ALTERED = {
    "other activation": lambda block: setattr(block, "relu", nn.Tanh()),
    "activation with a forward of its own": lambda block: setattr(block.relu, "forward", F.gelu),
    "normalisation folded away": lambda block: setattr(block, "bn1", nn.Identity()),
    "one normalisation frozen": lambda block: block.bn1.eval(),
    "convolution wrapped": lambda block: setattr(block, "conv1", nn.Sequential(block.conv1, nn.Dropout(0.0))),
    "_conv_forward set": lambda block: setattr(
        block.conv2, "_conv_forward", lambda x, w, b: F.conv2d(2 * x, w, b, padding=1)
    ),
    "spectral norm": lambda block: torch.nn.utils.parametrizations.spectral_norm(block.conv2),
}


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_block_is_the_plain_one_bit_for_bit_and_the_log_says_so_once(case, cls, caplog):
    block = scramble(cls(IN, IN // cls.expansion, dropout=0.2, conv_algorithm="winograd"))
    with caplog.at_level("WARNING", logger="fastres.nn.trust"):
        block(torch.randn(2, IN, 6, 6))
        assert list(fuse_report(block).swapped) == [""]
        assert not caplog.records
        ALTERED[case](block)
        for _ in range(2):
            block(torch.randn(2, IN, 6, 6))
    reason = fuse_report(block).left[""]
    assert [record.getMessage() for record in caplog.records] == [
        f"a {cls.__name__} goes on child by child, as in plain PyTorch: {reason}"
    ]
    plain = unfuse(twin(block))
    with Operators() as seen:
        identical(block, plain, torch.randn(2, IN, 6, 6))
    assert not seen.names


@pytest.mark.parametrize("cls", ALL)
def test_a_block_takes_the_faster_way_again_once_its_hook_is_gone(cls):
    block, x = cls(IN, IN // cls.expansion, conv_algorithm="winograd"), torch.randn(2, IN, 6, 6)
    handle = block.bn1.register_forward_hook(lambda *_: None)
    for hooked in (True, False):
        with Operators() as seen:
            block(x)
        assert bool(seen.names) == (not hooked)
        report = fuse_report(block)
        assert list(report.left if hooked else report.swapped) == [""]
        handle.remove()


# ------------------------------------------------------------------------------------------------------- memory format


MAKERS = {
    "basic": lambda **options: FusedBasicBlock(IN, IN, **options),
    "basic projection": lambda **options: FusedBasicBlock(IN, IN, 2, downsample("projection", 2, IN), **options),
    "bottleneck": lambda **options: FusedBottleneck(IN, IN // 4, **options),
    "bottleneck projection": lambda **options: FusedBottleneck(
        IN, IN // 4, 2, downsample("projection", 2, IN), **options
    ),
    "residual": lambda **options: ResidualBlock(IN, IN, dropout=0.0, **options),
    "residual skip": lambda **options: ResidualBlock(IN, 12, 2, dropout=0.0, **options),
    "preactivation": lambda **options: FusedPreactivationBlock(IN, IN, **options),
    "preactivation projection": lambda **options: FusedPreactivationBlock(IN, 12, 1, **options),
    "preactivation strided": lambda **options: FusedPreactivationBlock(IN, 12, 2, **options),
}


@pytest.mark.parametrize("algorithm", ["winograd", "auto", "torch"])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_block_alone_returns_the_memory_format_of_the_plain_block(kind, memory_format, weights, algorithm):
    torch.manual_seed(0)
    block = scramble(MAKERS[kind](conv_algorithm=algorithm)).to(memory_format=weights)
    plain = unfuse(twin(block))
    for training in (True, False):
        for size in ((4, IN, 6, 5), (1, IN, 8, 8)):
            x = torch.randn(size).contiguous(memory_format=memory_format)
            block.train(training), plain.train(training)
            with torch.no_grad():
                ours, theirs = block(x), plain(x)
            assert ours.stride() == theirs.stride()
            v = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = block(v)
            assert y.stride() == theirs.stride()
            y.backward(torch.randn_like(y))
            assert v.grad.stride() == x.stride()


def kept_for_backward(block, x):
    """Bytes of each storage that a block keeps, largest first, without its parameters and what is [C]."""
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.numel() > 4 * x.shape[1]:
            found[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x)
    assert y.requires_grad
    return sorted((nbytes for nbytes, _ in found.values()), reverse=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("make", "raw", "bits"),
    [
        (lambda **options: FusedBasicBlock(16, 16, **options), 3, 1),
        # A projection adds its own raw output.
        (
            lambda **options: FusedBasicBlock(
                16, 16, 1, nn.Sequential(conv1x1(16, 16), nn.BatchNorm2d(16)), **options
            ), 4, 1,
        ),
        # Nothing follows the last normalisation: no bits.
        (lambda **options: ResidualBlock(16, 16, **options), 3, 0),
        # Its last convolution's output is added, and by nothing followed.
        (lambda **options: FusedPreactivationBlock(16, 16, **options), 2, 0),
    ],
    ids=["basic", "projection", "residual", "preactivation"],
)  # fmt: skip
def test_a_block_keeps_its_input_raw_outputs_and_bits(make, raw, bits, dropout):
    block = make(dropout=dropout, conv_algorithm="winograd")
    x = torch.randn(2, 16, 8, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    whole, mask = x.numel() * x.element_size(), contract.bits_size(x)
    assert kept_for_backward(block, x) == [whole] * raw + [mask] * (bits + (dropout > 0))


@pytest.mark.parametrize("cls", ALL)
def test_without_gradients_training_updates_the_same_statistics(cls):
    block = scramble(cls(IN, IN // cls.expansion, dropout=0.3, conv_algorithm="winograd"))
    other, x = twin(block), torch.randn(4, IN, 5, 7)
    torch.manual_seed(0)
    expected = block(x)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
    for a, b in zip(block.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_an_input_and_a_convolution_without_gradients_change_nothing_else():
    block = scramble(FusedBasicBlock(IN, IN, conv_algorithm="winograd"))
    other, x = twin(block), torch.randn(4, IN, 5, 7)
    block.conv1.weight.requires_grad_(False)
    block(x).square().sum().backward()
    other(x.clone().requires_grad_()).square().sum().backward()
    assert block.conv1.weight.grad is None
    for (name, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
        assert name == "conv1.weight" or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_it_is_as_near_to_float64_as_plain_pytorch(cls, training, autocast):
    gen = generator(cls.__name__, training, autocast)
    block = scramble(cls(IN, IN // cls.expansion, dropout=0.0, conv_algorithm="winograd")).train(training)
    if training:
        # Far from the kinks: bfloat16 flips so many elements that gradients would say nothing.
        for name in [name for name, _ in block.named_parameters() if "bn" in name and "bias" in name]:
            block.get_parameter(name).data += 16
    plain, exact = unfuse(twin(block)), unfuse(twin(block)).double()
    dtype = torch.float32 if autocast else torch.bfloat16
    block, plain = block.to(dtype), plain.to(dtype)
    exact.load_state_dict(plain.state_dict())
    x = activation((4, IN, 12, 12), dtype, "channels_last", gen)
    dy, results = torch.randn(x.shape, generator=gen), []
    for module in (block, plain, exact):
        wide = module is exact
        v = (x.double() if wide else x.clone(memory_format=torch.preserve_format)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and not wide):
            y = module(v)
            with torch.no_grad():
                again = module(v)
        # Autocast adds the shortcut as it is, and this one is the block's input.
        stays = autocast and cls is FusedPreactivationBlock
        assert y.dtype == again.dtype == (torch.float64 if wide else torch.float32 if stays else torch.bfloat16)
        y.backward(dy.to(y.dtype))
        assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in module.parameters())
        results.append([y.detach(), again, v.grad] if training else [y.detach(), again])
    for ours, theirs, true in zip(*results, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_conv_algorithm_is_copied_and_printed(cls, way):
    block = cls(IN, IN // cls.expansion, conv_algorithm="torch")
    again = copy.deepcopy(block) if way == "deepcopy" else pickle.loads(pickle.dumps(block))
    assert again.conv_algorithm == "torch"
    assert "conv_algorithm=torch" in repr(again)
    assert "conv_algorithm" not in repr(cls(IN, IN))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("fft", ValueError, "conv_algorithm: expected one of .*'auto', 'torch', 'winograd', 'gemm'.*, got 'fft'"),
        (4, TypeError, "conv_algorithm: expected a string or None, got int"),
    ],
)
def test_a_conv_algorithm_that_does_not_exist_is_refused(cls, value, error, message):
    with pytest.raises(error, match=message):
        cls(IN, IN, conv_algorithm=value)


@pytest.mark.parametrize(("algorithm", "operators"), [("winograd", True), ("torch", False), ("auto", False)])
def test_without_an_algorithm_of_its_own_a_block_asks_the_environment(monkeypatch, algorithm, operators):
    # So few channels that "auto" leaves them to PyTorch.
    block, x = FusedBasicBlock(3, 3), torch.randn(8, 3, 64, 64)
    monkeypatch.setenv("FASTRES_CONV", algorithm)
    with Operators() as seen:
        block(x)
    assert any("conv3x3" in name for name in seen.names) == operators


def test_an_unfused_residual_block_is_plain_pytorch():
    block = unfuse(ResidualBlock(IN, IN, conv_algorithm="winograd"))
    for training in (True, False):
        with torch.no_grad(), Operators() as seen:
            block.train(training)(torch.randn(2, IN, 6, 6))
        assert not seen.names
