"""Fused modules after nn.SyncBatchNorm.convert_sync_batchnorm: in several processes they compute what the plain module
computes in one process, in float64, on the joined batch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from fastres import functional
from fastres.functional import Statistics
from fastres.fuse import fuse, fuse_report, unfuse
from fastres.nn import FusedBasicBlock, FusedBatchNormAct2d, FusedBottleneck, ResidualBlock, SkipConnection
from tests import oracle
from tests.distributed.processes import run_processes
from tests.distributed.test_sync_batch_norm import Messages
from tests.operators import Operators
from tests.parity import close, scramble

IN, SIZES, IMAGE = 16, (3, 5), 12


def downsample(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


def network() -> nn.Module:
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.conv1 = nn.Conv2d(IN, 64, 3, padding=1, bias=False)
    return fuse(model)


def untracked() -> nn.Module:
    return FusedBatchNormAct2d(IN, momentum=None, affine=False)


def without_running() -> nn.Module:
    return FusedBatchNormAct2d(IN, track_running_stats=False, act="gelu")


MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # (makes it, its normalisations that send a message of their own)
    "basic": (lambda: FusedBasicBlock(IN, IN), 2),
    "projected": (lambda: FusedBasicBlock(IN, 24, 2, downsample(IN, 24)), 2),
    "bottleneck": (lambda: FusedBottleneck(IN, 8, 2, downsample(IN, 32)), 3),
    "bottleneck by products": (lambda: FusedBottleneck(IN, 8, 2, downsample(IN, 32), conv_algorithm="gemm"), 3),
    "residual": (lambda: ResidualBlock(IN, 24, 2, dropout=0.0), 3),
    "skip": (lambda: SkipConnection(IN, 24, 2), 1),
    "cumulative": (untracked, 1),
    "without running statistics": (without_running, 1),
    "network": (network, 9),
}


DTYPES = (torch.float64, torch.float32)
DTYPES_OF = {"network": (torch.float32,)}


class Step(NamedTuple):
    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def made(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(oracle.SEED % 1000)
    module = scramble(MODULES[name][0]()).to(dtype)
    if dtype == torch.float32:
        # A smooth activation: with ReLU the sign of a rounded zero would say something.
        for m in module.modules():
            for child, old in m.named_children():
                if isinstance(old, nn.ReLU):
                    setattr(m, child, nn.SiLU())
            if isinstance(m, (FusedBasicBlock, FusedBottleneck, ResidualBlock)):
                m.conv_algorithm = m.conv_algorithm or "winograd"
    return module.to(memory_format=torch.channels_last)


def data(name: str, dtype: torch.dtype, y_shape: tuple[int, ...] | None = None) -> Tensor:
    gen = oracle.generator("blocks", name, y_shape)
    return oracle.activation(y_shape or (sum(SIZES), IN, IMAGE, IMAGE), dtype, "nchw", gen, mean=0.0, std=1.0)


def step(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, name: str, part: slice) -> Step:
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = call(x)
    dy = data(name, torch.float64, (sum(SIZES), *y.shape[1:]) if y.dim() == 4 else (sum(SIZES), y.shape[1], 1, 1))
    module.zero_grad()
    y.backward(dy[part].reshape(y.shape).to(y.dtype))
    gradients = {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
    buffers = {key: b.clone() for key, b in module.named_buffers()}
    assert x.grad is not None
    return Step(y.detach(), x.grad, gradients, buffers)


def equal(a: Step, b: Step) -> bool:
    pairs = [*zip(a[:2], b[:2], strict=True), *((a[i][k], b[i][k]) for i in (2, 3) for k in a[i])]
    return all(torch.equal(x, y) for x, y in pairs)


def on_rank(rank: int) -> dict[Any, Step]:
    found: dict[Any, Step] = {}
    begin = sum(SIZES[:rank])
    part = slice(begin, begin + SIZES[rank])
    for name, (_, norms) in MODULES.items():
        for dtype in DTYPES_OF.get(name, DTYPES):
            x = data(name, dtype)[part]
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(made(name, dtype)).train()
            again = copy.deepcopy(converted)
            with Messages() as sent, Operators() as seen:
                found[name, dtype] = step(converted, converted, x, name, part)
            assert not fuse_report(converted).left
            assert len(sent.sizes) == 2 * norms, f"{name}: {len(sent.sizes)} messages"
            if dtype == torch.float32 and name in ("basic", "bottleneck by products"):
                assert "norm_act_conv3x3_backward_reduce" in seen.names
            assert equal(step(again, again, x, name, part), found[name, dtype]), f"{name}: another second run"
    for name in ("projected", "residual"):
        x = data(name, torch.float32)[part]
        start = nn.SyncBatchNorm.convert_sync_batchnorm(made(name, torch.float32)).train()
        once = found[name, torch.float32]
        recomputed = copy.deepcopy(start)
        again = step(recomputed, lambda x, m=recomputed: checkpoint(m, x, use_reentrant=False), x, name, part)
        assert equal(again._replace(buffers=once.buffers), once), f"{name}: checkpointing changes the result"
        for backend in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            compiled = copy.deepcopy(start)
            again = step(compiled, torch.compile(compiled, backend=backend, fullgraph=True), x, name, part)
            found[name, backend] = again
            if backend == "aot_eager":
                assert equal(again, once), f"{name}: compiling changes the result"
        with torch.autocast("cpu", torch.bfloat16):
            autocast = copy.deepcopy(start)
            found[name, torch.bfloat16] = step(autocast, autocast, x, name, part)
        converted = copy.deepcopy(start)
        found[name, "empty"] = step(
            converted, converted, x if rank == 0 else x[:0], name, part if rank == 0 else slice(0)
        )
    odd_groups(rank)
    refused(rank)
    return found


def odd_groups(rank: int) -> None:
    """In evaluation, within a group of one, and where one norm of a block is synchronised and another is not."""
    x = data("basic", torch.float32)[: rank + 2]
    alone = [dist.new_group([r]) for r in range(len(SIZES))][rank]
    plain = made("projected", torch.float32)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), alone)
    assert torch.equal(converted(x), plain(x))
    assert torch.equal(converted.eval()(x), plain.eval()(x))
    mixed = made("projected", torch.float32)
    mixed.bn2 = nn.SyncBatchNorm.convert_sync_batchnorm(mixed.bn2)
    one_by_one = made("projected", torch.float32)
    one_by_one.downsample = nn.SyncBatchNorm.convert_sync_batchnorm(one_by_one.downsample)
    for module, count in ((mixed, 1), (one_by_one, 1)):
        with Messages() as sent:
            module(x)
        assert len(sent.sizes) == count


def refused(rank: int) -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    world = dist.group.WORLD
    y = functional.batch_norm_act(x, None, None, training=True, group=world)
    with pytest.raises(RuntimeError, match="backward: expected an ordinary one"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"several processes: expected an ordinary call, but torch\.func"):
        torch.func.grad(lambda x: functional.batch_norm_act(x, None, None, training=True, group=world).sum())(x)
    known = Statistics(torch.zeros(3), torch.ones(3), torch.tensor([32]))
    with pytest.raises(ValueError, match=r"statistics\.count: expected None with a group"):
        functional.batch_norm_act(x, None, None, training=True, statistics=known, group=world)
    with pytest.raises(TypeError, match=r"group: expected a torch\.distributed\.ProcessGroup or None, got str"):
        functional.batch_norm_act(x, None, None, training=True, group="world")
    one = x[:1, :, :1, :1] if rank == 0 else x[:0]
    with pytest.raises(ValueError, match="expected more than 1 value a channel in training, got 1 in 2 processes"):
        functional.batch_norm_act(one, None, None, training=True, group=world)


@pytest.fixture(scope="module")
def ranks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_processes(on_rank, len(SIZES), timeout=240)


def compare(ranks: list[dict[Any, Step]], key: tuple[str, Any], expected: Step, times: float) -> None:
    found, length = [rank[key] for rank in ranks], sum(SIZES) * IMAGE * IMAGE

    def check(actual: Tensor, wanted: Tensor, what: str) -> None:
        close(actual, wanted.to(actual.dtype), length, f"{key}: {what}", times)

    check(torch.cat([f.y for f in found]), expected.y, "y")
    check(torch.cat([f.dx for f in found]), expected.dx, "input gradient")
    for name, wanted in expected.gradients.items():
        check(torch.stack([f.gradients[name] for f in found]).sum(0), wanted, f"gradient of {name}")
    for name, wanted in expected.buffers.items():
        assert all(torch.equal(f.buffers[name], found[0].buffers[name]) for f in found), name
        if wanted.is_floating_point():
            check(found[0].buffers[name], wanted, name)
        else:
            assert torch.equal(found[0].buffers[name], wanted), name


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in MODULES for dtype in DTYPES_OF.get(name, DTYPES)]
)
def test_processes_together_compute_what_plain_pytorch_does_with_the_joined_batch(ranks, name, dtype):
    plain = unfuse(made(name, dtype)).double()
    expected = step(plain, plain, data(name, torch.float64), name, slice(None))
    # Layers pass errors on; nine of them in the network.
    compare(ranks, (name, dtype), expected, 100.0 if name == "network" else 8.0)


@pytest.mark.parametrize("name", ["projected", "residual"])
def test_a_process_with_an_empty_batch_takes_part_and_counts_for_nothing(ranks, name):
    plain, part = unfuse(made(name, torch.float32)).double(), slice(SIZES[0])
    expected = step(plain, plain, data(name, torch.float64)[part], name, part)
    compare(ranks, (name, "empty"), expected, 8.0)


@pytest.mark.parametrize("name", ["projected", "residual"])
def test_compiled_by_inductor_they_do_as_well(ranks, name):
    plain = unfuse(made(name, torch.float32)).double()
    expected = step(plain, plain, data(name, torch.float64), name, slice(None))
    compare(ranks, (name, "inductor"), expected, 8.0)


@pytest.mark.parametrize("name", ["projected", "residual"])
def test_under_autocast_they_do_what_one_process_does(ranks, name):
    one = made(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(one, one, data(name, torch.float32), name, slice(None))
    for rank, part in zip(ranks, torch.split(expected.y, SIZES), strict=True):
        found = rank[name, torch.bfloat16]
        assert found.y.dtype == torch.bfloat16
        # Whether a product is rounded up or down shows in everything after it.
        assert (found.y - part).abs().max() <= 2**-5 * part.abs().max()
    total = {k: sum(r[name, torch.bfloat16].gradients[k] for r in ranks) for k in expected.gradients}
    for key, wanted in expected.gradients.items():
        assert (total[key] - wanted).norm() <= 2**-5 * wanted.norm(), key
    for key, wanted in expected.buffers.items():
        assert torch.allclose(ranks[0][name, torch.bfloat16].buffers[key].double(), wanted.double(), 2**-6, 2**-6), key
