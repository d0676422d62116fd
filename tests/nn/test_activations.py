"""Activations other than ReLU: in modules, in blocks whose `relu` was replaced, and one that comes from outside."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn as nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastres import Activation, activations, freeze, functional, fuse
from fastres.fuse import fuse_report
from fastres.nn import FusedBasicBlock, FusedBatchNormAct2d, FusedBottleneck, PlainResidualBlock, ResidualBlock
from tests.nn.test_blocks import inputs, pair
from tests.operators import Operators
from tests.oracle import near_zero
from tests.parity import DTYPES, FORMATS, close, same_training, scramble

MODULES = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "elu": lambda: nn.ELU(0.7),
}
BLOCKS = [(FusedBasicBlock, BasicBlock), (FusedBottleneck, Bottleneck)]


def sure(expected, make_input):
    """`make_input`, drawing until no activation of `expected` is in doubt: behind it stand whole convolutions."""

    def make():
        state = copy.deepcopy(expected.state_dict())
        while True:
            x = make_input()
            with torch.no_grad(), Operators() as seen:
                expected(x)
            expected.load_state_dict(state)
            if not any(near_zero(distance, x.dtype).any() for distance in seen.distances):
                return x

    return make


class Plain(nn.Module):
    """bn, addition, activation and addition again, in the words of torch alone."""

    def __init__(self, norm, act, order):
        super().__init__()
        self.norm, self.act, self.order = norm, act, order

    def forward(self, x, residual=None):
        z = self.norm(x)
        if residual is not None and self.order == "add_act":
            z = z + residual
        z = self.act(z)
        return z if residual is None or self.order == "add_act" else z + residual


class WithResidual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(*x.chunk(2))


def test_every_kind_has_a_module_and_goes_there_and_back():
    assert set(MODULES) == set(activations.KINDS)
    for kind, make in MODULES.items():
        found = Activation.for_module(make())
        assert found.kind == kind
        again = found.module()
        assert type(again) is type(make()) and Activation.for_module(again) == found
        assert Activation.of(make()) == found == Activation.of(found)
        assert Activation.of(kind).kind == kind
    assert Activation.of("leaky_relu").alpha == 0.01
    assert Activation.of("elu").alpha == 1.0
    assert Activation.for_module(nn.Tanh()) is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("tanh", ValueError, r"activation: expected one of \('identity', .*, got 'tanh'"),
        (Activation("swish"), ValueError, "activation: expected one of .*, got 'swish'"),
        (1, TypeError, "activation: expected an Activation, a string or a module, got int"),
        (nn.Tanh(), TypeError, r"activation: expected a module of one of torch's classes .*, got Tanh\(\)"),
    ],
)
def test_an_unknown_activation_is_refused(value, error, message):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(error, match=message):
        functional.batch_norm_act(x, None, None, training=True, activation=value)


def test_relu_false_beside_another_activation_is_refused():
    with pytest.raises(
        ValueError, match="relu: expected True with an activation of another kind, got False with 'silu'"
    ):
        functional.batch_norm_act(torch.randn(2, 3, 4, 4), None, None, training=True, relu=False, activation="silu")
    with pytest.raises(ValueError, match="relu: expected True where act says what follows, got False with act='silu'"):
        FusedBatchNormAct2d(3, relu=False, act="silu")


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("residual", "order"), [(False, "add_act"), (True, "add_act"), (True, "act_add")])
def test_a_module_with_an_activation_trains_as_torchs_do(kind, dtype, memory_format, residual, order):
    act = MODULES[kind]()
    actual = scramble(FusedBatchNormAct2d(16, act=copy.deepcopy(act), order=order, dtype=dtype))
    expected = Plain(copy.deepcopy(actual.norm), act, order)
    assert "" in fuse_report(actual).swapped
    if residual:
        actual, expected = WithResidual(actual), WithResidual(expected)
    same_training(actual, expected, sure(expected, inputs(dtype, memory_format)), steps=2, times=2)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("fused", "plain"), BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shortcut", "stride"), [("none", 1), ("projection", 2)])
def test_a_block_with_another_activation_stays_on_the_fused_way(kind, fused, plain, dtype, shortcut, stride):
    actual, expected = pair(fused, plain, shortcut=shortcut, stride=stride, dtype=dtype)
    actual.relu, expected.relu = MODULES[kind](), MODULES[kind]()
    assert "" in fuse_report(actual).swapped
    same_training(actual, expected, sure(expected, inputs(dtype)), steps=2, times=16)


@pytest.mark.parametrize("kind", MODULES)
def test_a_residual_block_with_another_activation_stays_on_the_fused_way(kind):
    torch.manual_seed(0)
    actual = scramble(ResidualBlock(16, 16, dropout=0.0, conv_algorithm="winograd").double())
    expected = PlainResidualBlock(16, 16, dropout=0.0).double()
    expected.load_state_dict(actual.state_dict())
    actual.relu, expected.relu = MODULES[kind](), MODULES[kind]()
    assert "" in fuse_report(actual).swapped
    same_training(actual, expected, inputs(), steps=2, times=16)


@pytest.mark.parametrize("kind", MODULES)
def test_a_network_with_another_activation_is_frozen_with_it(kind):
    torch.manual_seed(0)
    plain = scramble(resnet18(num_classes=5))
    for module in plain.modules():
        if hasattr(module, "relu"):
            module.relu = MODULES[kind]()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(plain).double().eval()(x.double())
    unit = (plain.eval()(x).double() - exact).norm()
    for model in (fused.eval(), freeze(fused)):
        with torch.no_grad():
            assert (model(x).double() - exact).norm() <= 4 * unit


@pytest.mark.parametrize("kind", ["silu", "hardswish", "leaky_relu", "gelu"])
@pytest.mark.parametrize(("residual", "dropout"), list(itertools.product((False, True), (0.0, 0.3))))
def test_nothing_is_saved_that_relu_would_not_save_but_the_residual_itself(kind, residual, dropout):
    """x, mean, rstd, weight, bias, the residual that was passed in, and a bit an element."""
    norm = FusedBatchNormAct2d(16, act=kind, dropout=dropout)
    x, r = (torch.randn(2, 16, 6, 6, requires_grad=True) for _ in range(2))
    known = {t.data_ptr() for t in (x, r, norm.weight, norm.bias)}
    sizes = []

    def pack(t):
        if t.data_ptr() not in known:
            sizes.append((t.dtype, t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm(x, r if residual else None)
    vectors = [size for dtype, size in sizes if dtype == torch.float32]
    masks = [size for dtype, size in sizes if dtype == torch.uint8]
    assert vectors == [16, 16]
    has_bits = dropout > 0 or (residual and kind == "leaky_relu")
    assert masks == [2 * 16 * 5] * has_bits  # rows of 36 elements are 5 bytes


@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [
        ("silu", nn.functional, "silu"), ("gelu_tanh", nn.functional, "gelu"), ("relu6", nn.functional, "hardtanh"),
        ("elu", nn.ELU, "forward"), ("leaky_relu", nn.functional, "leaky_relu"),
        ("hardswish", nn.Hardswish, "__call__"),
    ],
)  # fmt: skip
def test_a_function_of_torchs_that_somebody_replaced_is_called(kind, where, name, monkeypatch):
    """As for ReLU: profilers and tools that put functions in these places see what they see in plain PyTorch."""
    norm, x = FusedBatchNormAct2d(4, act=kind), torch.randn(3, 4, 5, 5)
    assert "" in fuse_report(norm).swapped
    own, calls = getattr(where, name), []
    monkeypatch.setattr(where, name, lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs))
    assert "somebody replaced" in fuse_report(norm).left[""]
    norm(x)
    assert calls
    monkeypatch.undo()
    assert "" in fuse_report(norm).swapped


class Squash(nn.Module):
    """z / (1 + |z|): torch.nn.Softsign, under a name of the test's own."""

    def forward(self, z):
        return z / (1 + z.abs())


@pytest.fixture
def squash():
    kind = activations.Kind(lambda z, _: z / (1 + z.abs()), lambda z, _: (1 + z.abs()).pow(-2))
    activations.register("squash", kind, Squash)
    yield
    activations.unregister("squash", Squash)


@pytest.mark.parametrize(("fused", "plain"), BLOCKS)
def test_an_activation_registered_from_outside_works_everywhere(squash, fused, plain):
    """As docs/architecture.md tells it: one entry in the table, and PyTorch's operators compute it."""
    actual, expected = pair(fused, plain)
    actual.relu, expected.relu = Squash(), Squash()
    assert "" in fuse_report(actual).swapped
    same_training(actual, expected, inputs(), steps=2, times=16)
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    norm = FusedBatchNormAct2d(16, act="squash", dtype=torch.float64)
    y = Squash()(nn.BatchNorm2d(16, dtype=torch.float64)(x))
    close(norm(x), y, x.numel())
    assert torch.autograd.gradcheck(norm, x)
    with pytest.raises(ValueError, match="kind: expected a new name, got 'squash', which is taken"):
        activations.register("squash", activations.KINDS["squash"])


def test_registering_is_undone(squash):
    activations.unregister("squash", Squash)
    assert "squash" not in activations.KINDS
    assert Activation.for_module(Squash()) is None
    activations.register("squash", activations.Kind(lambda z, _: z, lambda z, _: z), Squash)
