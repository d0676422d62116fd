"""What the rewritten graph takes of memory that the caller holds too, and how much it saves for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import fastres
from tests import oracle
from tests.compiled import compare, networks
from tests.compiled.test_networks import counts
from tests.compiled.traps import Constant

INNER = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def _alone():
    with compare.fresh():
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=oracle.generator("memory", shape, seed), dtype=dtype)


def compiled(model: nn.Module, **options: object) -> Callable[..., Tensor]:
    call: Callable[..., Tensor] = fastres.compile(model, options={"smallest": 0} | options)
    return call


# ------------------------------------------------------------------------------------- inputs and running statistics


def test_blocks_compiled_one_by_one_are_fused_as_in_one_graph():
    """Between a block's last normalisation and the addition the shortcut reads the graph's own input."""
    training, evaluation = compare.check(lambda: networks.OptionA(4, 8, 2), [(2, 4, 8, 8)])
    assert counts(training) == counts(evaluation) == "2/2 0/2 3 batch_norm_act:2"


class ReadsBetween(nn.Module):
    """Reads its second input after the running statistics have moved and before the ReLU.

    It reads numbers, whatever the input's dtype: the bits of two sums that round apart are far apart as integers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        y = self.bn(x)
        scale = m.view(x.dtype) * 2
        return F.relu(y) + scale.reshape(-1, 1, 1)


def _a_view(bn: nn.BatchNorm2d) -> Tensor:
    assert bn.running_mean is not None
    return bn.running_mean[:]


def _another_dtype(bn: nn.BatchNorm2d) -> Tensor:
    assert bn.running_mean is not None
    return bn.running_mean.view(torch.int64)


def _data_of_the_input(bn: nn.BatchNorm2d) -> Tensor:
    assert bn.running_mean is not None
    m = random(6, seed=1)
    bn.running_mean.data = m[3:]
    return m[3:]


def _one_array(bn: nn.BatchNorm2d) -> Tensor:
    """Storages of their own with addresses in common."""
    assert bn.running_mean is not None
    array = numpy.arange(4.0)
    bn.running_mean.data = torch.from_numpy(array[1:])
    return torch.from_numpy(array)[1:]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("alias", [_a_view, _another_dtype, _data_of_the_input, _one_array])
def test_an_input_may_be_a_view_of_running_statistics_in_a_later_call(alias, inner):
    model = ReadsBetween().double()
    plain, call = copy.deepcopy(model), compiled(model, inner=inner)
    apart = torch.ones(3, dtype=torch.int64) if alias is _another_dtype else random(3)
    for step, make in enumerate((lambda bn: apart, alias, lambda bn: apart)):
        x = random(2, 3, 4, 4, seed=step)
        ours, expected = call(x, make(model.bn)), plain(x, make(plain.bn))
        assert torch.allclose(ours, expected, rtol=0, atol=compare.EXACT), step
        ours.square().sum().backward()
        expected.square().sum().backward()
        assert torch.allclose(model.bn.running_mean, plain.bn.running_mean, rtol=0, atol=compare.EXACT), step
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and torch.allclose(p.grad, q.grad, rtol=0, atol=compare.EXACT)
    assert fastres.compile_report()[0].pointwise == 1


class OneOfManySizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, *images: Tensor) -> list[Tensor]:
        return [F.relu(self.bn(self.conv(x))) for x in images]


@pytest.mark.parametrize("together", [True, False])
def test_a_normalisation_of_small_images_and_large_ones(together):
    """PyTorch normalises the small ones, keeps the running statistics, and refuses backward if it sees them moved."""
    model, sizes = OneOfManySizes().double(), (8, 24, 6)
    plain, given = copy.deepcopy(model), [random(2, 3, size, size) for size in sizes]
    call = compiled(model, smallest=4 * 2 * 16 * 16)
    ours = call(*given) if together else [y for x in given for y in call(x)]
    for found in (ours, plain(*given)):
        sum(y.square().sum() for y in found).backward()
    reports = fastres.compile_report()
    assert sum(graph.fused_norms for graph in reports) == 1 and sum(graph.norms for graph in reports) > 1
    for a, b in ((model.parameters(), plain.parameters()), (model.buffers(), plain.buffers())):
        assert all(torch.allclose(p, q, rtol=0, atol=compare.EXACT) for p, q in zip(a, b, strict=True))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=compare.EXACT, atol=compare.EXACT)


# ------------------------------------------------------------------------------- a residual that is saved for backward


class Smooth(nn.Module):
    """The addition saves nothing, so PyTorch lets the residual change before backward."""

    activation: Callable[[Tensor], Tensor] = staticmethod(F.silu)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.activation(self.bn(self.conv(x)) + r), r


class SmoothOutput(Smooth):
    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        r = r * 1.5
        return super().forward(x, r)


class SmoothViewOfOutput(Smooth):
    activation = staticmethod(F.gelu)

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        r = r * 1.5
        y, _ = super().forward(x, r)
        return y, r[:, 2:]


class Prologue(Smooth):
    """The convolution computes its input again in backward, and so ReLU's out of the residual."""

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(F.relu(self.bn(self.conv(x)) + r)), r


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("network", [Smooth, SmoothOutput, SmoothViewOfOutput, Prologue])
def test_a_caller_may_overwrite_a_residual_before_backward(network, inner):
    gen = oracle.generator("overwritten", network.__name__, inner)
    torch.manual_seed(int(torch.randint(2**31, (), generator=gen)))
    format = {"dtype": torch.float32, "memory_format": torch.channels_last}
    model = network().to(**format)
    x, r = (torch.randn(2, 8, 8, 8, generator=gen).to(**format) for _ in range(2))
    exact, call = copy.deepcopy(model).double(), compiled(model, inner=inner, conv_algorithm="winograd")
    for run, to in ((call, torch.float32), (exact, torch.float64)):
        y, residual = run(x.to(to), r.to(to, copy=True))
        with torch.no_grad():
            residual.fill_(3.0)
        y.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if q.grad is not None and name != "conv.bias":  # its gradient is 0
            assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), name
    (graph,) = fastres.compile_report()
    assert graph.fused_norms == 1 and graph.pointwise == (2 if network is Prologue else 1)


class SmoothBlock(nn.Module):
    """PyTorch saves the block's input for its first convolution: who overwrites it is refused with and without us."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)) + x)


def test_a_residual_that_pytorch_saves_as_well_is_part_of_a_smooth_chain():
    training, evaluation = compare.check(SmoothBlock, [(2, 4, 8, 8)])
    assert training.pointwise == evaluation.pointwise == 2
    model = SmoothBlock().double()
    model.conv.requires_grad_(False)  # then it saves nothing
    compiled(model)(random(2, 4, 8, 8))
    assert fastres.compile_report()[-1].pointwise == 1


class SmoothNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(x) + x)


def test_a_normalisation_has_saved_its_own_input():
    training, evaluation = compare.check(SmoothNorm, [(2, 4, 8, 8)])
    assert training.pointwise == evaluation.pointwise == 2


class SmoothBehindConstants(SmoothNorm):
    """The product with a constant scale saves the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = Constant(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.constant(x)) + x)


def test_arithmetic_with_constants_has_not_saved_its_input():
    model, x = SmoothBehindConstants().double(), random(2, 4, 8, 8).requires_grad_()
    for call in (model, compiled(model)):
        given = x * 1
        y = call(given)
        with torch.no_grad():
            given.zero_()
        y.square().sum().backward()
    (graph,) = fastres.compile_report()
    assert graph.fused_norms == 2 and graph.pointwise == 1  # the addition


class SmoothBlockUnderAutocast(SmoothBlock):
    """The convolution saves a copy of its input in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            c = self.conv(x)
        return F.silu(self.bn(c.float()) + x)


def test_a_copy_that_autocast_makes_may_be_saved_where_the_residual_is_not():
    model, x = SmoothBlockUnderAutocast(), random(2, 4, 8, 8, dtype=torch.float32)
    for call in (model, compiled(model)):
        given = x.clone()
        y = call(given)
        given.zero_()
        y.square().sum().backward()
    (graph,) = fastres.compile_report()
    assert graph.fused_norms == graph.pointwise == 1


class OneChannel(nn.Module):
    """A residual with one channel, of which `contiguous` makes no copy: both formats are one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.conv, self.bn = nn.Conv2d(8, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(self.wide(x))) + r)


def test_a_residual_of_one_channel_is_copied_on_its_way_to_channels_last(monkeypatch):
    compare.make_copies_free(monkeypatch)
    model = OneChannel()
    plain, call = copy.deepcopy(model), compiled(model, conv_algorithm="winograd")
    x, r = random(2, 3, 8, 8, dtype=torch.float32), random(2, 1, 8, 8, dtype=torch.float32)
    expected = torch.autograd.grad(plain(x, r).square().sum(), plain.bn.weight)
    y = call(x, r)
    r.zero_()
    found = torch.autograd.grad(y.square().sum(), model.bn.weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    (graph,) = fastres.compile_report()
    assert graph.channels_last > 0 and graph.fused_norms == 1 and graph.pointwise == 2


class OverwrittenBehindDropout(nn.Module):
    """Leaky ReLU has one bit for its two slopes, but none more for dropout: backward reads the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = x * 2
        y = F.dropout(F.leaky_relu(self.bn(self.conv(x)) + r, 0.1), 0.5, self.training)
        r.mul_(0.5)
        return y, r * 1


def test_dropout_behind_leaky_relu_is_not_fused_with_a_residual_that_changes():
    call = compiled(OverwrittenBehindDropout().double())
    y, _ = call(random(2, 3, 4, 4))
    y.square().sum().backward()
    (graph,) = fastres.compile_report()
    assert graph.fused_norms == 1 and graph.pointwise == 2


# --------------------------------------------------------------------------------------------------- saved for backward


def saved_bytes(model: nn.Module, call: Callable[..., Tensor], x: Tensor) -> int:
    """Bytes of what a training step saves for backward, each storage once, without parameters and buffers."""
    state = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in state:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(x)
    y.square().mean().backward()
    return sum(saved.values())


OF_THE_SIZE_OF_CIFAR = {
    "basic": lambda: networks.ResNet(networks.Basic, 32),
    "preactivation": lambda: networks.ResNet(networks.Preactivation, 32, stem_norm=False),
    "unet": lambda: networks.UNet(bias=False, width=32),
    "unet_bias": lambda: networks.UNet(bias=True, width=32),
}


@pytest.mark.parametrize("memory_format", oracle.LAYOUTS.values(), ids=oracle.LAYOUTS)
@pytest.mark.parametrize("name", OF_THE_SIZE_OF_CIFAR)
def test_a_step_saves_no_more_than_in_pytorch(name, memory_format):
    format = {"memory_format": memory_format}
    model = OF_THE_SIZE_OF_CIFAR[name]().to(**format)
    x = random(8, 3, 32, 32, dtype=torch.float32).to(**format)
    plain = copy.deepcopy(model)
    eager = saved_bytes(plain, plain, x)
    ours = saved_bytes(model, compiled(model), x)
    assert ours <= eager, f"{ours} bytes, {eager} in PyTorch"
    assert fastres.compile_report()[0].fused_norms > 0


def test_a_relu_behind_a_residual_saves_one_bit_an_element_more_where_its_output_is_saved_anyway():
    """PyTorch's ReLU saves the output that the next convolution saves too, and what our operator saves are bits."""
    model = networks.ResNet(networks.OptionA, 32)
    plain, x = copy.deepcopy(model), random(8, 3, 32, 32, dtype=torch.float32)
    bits = 8 * 32 * 32 * 32 + 8 * 64 * 16 * 16
    assert saved_bytes(model, compiled(model, conv_algorithm="torch"), x) == saved_bytes(plain, plain, x) + bits // 8
    assert fastres.compile_report()[0].pointwise == 7
