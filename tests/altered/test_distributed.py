"""DistributedDataParallel and fully_shard, with evaluation between steps, in one process and in two."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.altered.compare import Draw, Results, backward, infer, problems, record
from tests.altered.subjects import BOTTLENECK, NETWORK, PROJECTED, RESIDUAL, STEM, Subject
from tests.altered.table import Table, check
from tests.oracle import SEED

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo and its file store")

TABLE = Table()
use = TABLE.use
COLUMNS = (STEM, PROJECTED, BOTTLENECK, RESIDUAL, NETWORK)


@pytest.fixture
def group():
    """A process group of this process alone, gone before another test forks."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(m: nn.Module, draw: Draw, optimizer: Any = None, *, rank: int = 0, steps: int = 2) -> Results:
    """Evaluate, train and evaluate, as a trainer does between epochs; warnings are results as well."""
    results: Results = {}
    sharded = any(isinstance(p, DTensor) for p in m.parameters())
    optimizer = optimizer or torch.optim.SGD(m.parameters(), 0.05, fused=not sharded)
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in range(steps):
            infer(m, draw, results, f"before {index}")
            m.train()
            y = m(draw.x(index + 10 * rank))
            record(results, f"step {index}", y=y)
            backward(y, draw, index)
            for i, p in enumerate(m.parameters()):
                record(results, f"step {index}", **{f"gradient {i}": None if p.grad is None else whole(p.grad)})
            optimizer.step()
            optimizer.zero_grad()
        infer(m, draw, results, "end")
    torch.set_warn_always(False)
    if not any(p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and p.shape[1] > 1 for p in m.parameters()):
        # Of a 1x1 convolution in channels_last PyTorch's own gradient has other strides.
        results["warned of strides"] = any("strides" in str(w.message) for w in caught)
    for i, b in enumerate(m.buffers()):
        record(results, "end", **{f"buffer {i}": whole(b)})
    return results


DDP: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, gradients as views": {"gradient_as_bucket_view": True},
    "DDP, static graph": {"static_graph": True},
    "DDP, looking for unused parameters": {"find_unused_parameters": True},
    "DDP without broadcast of buffers": {"broadcast_buffers": False},
}
for name, options in DDP.items():
    use(name, COLUMNS)(lambda m, draw, options=options: train(DistributedDataParallel(m, **options), draw))

use("DDP of a channels_last module", COLUMNS)(
    lambda m, draw: train(DistributedDataParallel(m.to(memory_format=torch.channels_last)), draw)
)


@use("DDP, gradients accumulated by no_sync", (PROJECTED, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    ddp = DistributedDataParallel(m)
    with ddp.no_sync():
        backward(ddp(draw.x(7)), draw)
    return train(ddp, draw)


@use("DDP of frozen norms", (PROJECTED, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    for n in m.modules():
        if isinstance(n, nn.BatchNorm2d):
            n.requires_grad_(False)
    return train(DistributedDataParallel(m), draw)


@use("SyncBatchNorm in DDP", (PROJECTED, STEM), refused=(ValueError, RuntimeError))
def _(m: nn.Module, draw: Draw) -> Results:
    return train(DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(m)), draw)


@use("ZeroRedundancyOptimizer", (PROJECTED, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    return train(m, draw, ZeroRedundancyOptimizer(m.parameters(), torch.optim.SGD, lr=0.05))


use("fully_shard", COLUMNS)(lambda m, draw: train(fully_shard(m), draw))
use("fully_shard, kept whole after forward", COLUMNS)(
    lambda m, draw: train(fully_shard(m, reshard_after_forward=False), draw)
)


@use("fully_shard of each block", (NETWORK,))
def _(m: nn.Module, draw: Draw) -> Results:
    for stage in (m.layer1, m.layer2, m.layer3):
        fully_shard(stage[0])
    return train(fully_shard(m), draw)


@use("fully_shard of each convolution and norm", COLUMNS)
def _(m: nn.Module, draw: Draw) -> Results:
    for child in list(m.modules()):
        if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
            fully_shard(child)
    return train(m, draw)


@use("a DTensor as every weight", (PROJECTED, STEM), refused=(RuntimeError, NotImplementedError))
def _(m: nn.Module, draw: Draw) -> Results:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    distributed = distribute_module(m, init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        return {"y": whole(distributed.eval()(draw.x().detach()))}


@TABLE.every()
def test_a_distributed_module_does_what_the_plain_one_does(group, row, subject):
    check(row, subject)


# -------------------------------------------------------------------------------------------------------- two processes

WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": DistributedDataParallel, "fully_shard": fully_shard}


PAIRED: dict[str, Subject] = {s.name: s for s in (PROJECTED, NETWORK)}
CASES = [(wrap, name) for wrap in WRAPS for name in PAIRED]


def work(rank: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "pair"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found: list[list[Results]] = []
    for wrap, name in CASES:
        subject, key = PAIRED[name], (seed, wrap, name)
        found.append([])
        for make, dtype in (
            (subject.make_fused, torch.float32), (subject.make_plain, torch.float32), (subject.make_plain, torch.float64)
        ):  # fmt: skip
            found[-1].append(train(WRAPS[wrap](make().to(dtype)), Draw(subject, key, dtype), rank=rank))
    torch.save(found, Path(folder) / f"found{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes found, for all cases at once: their start takes longer than the rest."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(work, (str(folder), SEED), nprocs=2)
    return {
        (*case, rank): results
        for rank in range(2)
        for case, results in zip(CASES, torch.load(folder / f"found{rank}"), strict=True)
    }


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize(("wrap", "name"), CASES)
def test_two_processes_do_what_they_do_with_the_plain_module(two_processes, wrap, name, rank):
    assert not problems(PAIRED[name], *two_processes[wrap, name, rank])
