"""Networks compiled by the backend in two processes do what they do in eager: DistributedDataParallel around the
compiled module and inside it, whose graph Dynamo cuts at the buckets, fully_shard, synchronised normalisations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.backend import GraphReport
from tests import oracle
from tests.compiled import compare, networks
from tests.distributed.processes import run_processes
from tests.parity import scramble

RANKS, IMAGES, STEPS = 2, 3, 2
# The parameters of a network this wide fill more than one bucket of the smallest size that DistributedDataParallel has.
WIDTH, BUCKET_MIB = 64, 1
OPTIONS = {"smallest": 0}


class Trained(NamedTuple):
    """What a network gave: name -> value, those that all ranks have in common, and its graphs."""

    own: dict[str, Tensor]
    common: dict[str, Tensor]
    graphs: list[GraphReport]


def plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.replace("module.", "").replace("_orig_mod.", "")


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def images(rank: int, step: int) -> Tensor:
    gen = oracle.generator("compiled in processes", rank, step)
    return torch.randn((IMAGES, 3, 8, 8), generator=gen, dtype=torch.float64)


def network(*, norms: bool = True, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(oracle.SEED % 1000)
    model = scramble(networks.ResNet(networks.Basic, width)).double()
    if not norms:  # every image by itself, so that two processes together give what one gives
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.Identity())
    return model


def train(model: Any, rank: int | None) -> Trained:
    """SGD for two steps and an evaluation, on the images of a rank, or of all."""
    own, common = {}, {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for step in range(STEPS + 1):
        x = images(rank, step) if rank is not None else torch.cat([images(r, step) for r in range(RANKS)])
        if step == STEPS:
            model.eval()
            with torch.no_grad():
                own["evaluation"] = model(x)
            break
        y = model(x)
        own[f"step {step}: output"] = y.detach().clone()
        y.square().mean().backward()
        for name, p in model.named_parameters():
            common[f"step {step}: gradient of {plain(name)}"] = whole(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        # Running statistics are each rank's own, until DistributedDataParallel sends those of rank 0.
        own |= {f"step {step}: {plain(name)}": whole(t) for name, t in model.named_buffers()}
    common |= {plain(name): whole(p) for name, p in model.named_parameters()}
    return Trained(own, common, list(fastres.compile_report(clear=True)))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend=fastres.backend.fastres, options=OPTIONS | options)


def sharded(*, by_blocks: bool = False) -> nn.Module:
    model, mesh = network(), init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        if by_blocks:
            block.compile(backend=fastres.backend.fastres, options=OPTIONS)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def synchronised() -> nn.Module:
    torch.manual_seed(oracle.SEED % 1000)
    block = scramble(fastres.nn.ResidualBlock(3, 8, 2, dropout=0.0)).double()
    return nn.SyncBatchNorm.convert_sync_batchnorm(block)


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=BUCKET_MIB, **options)


# Name -> the network, and what it is compared with.
WAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "eager": (lambda: ddp(network()), ""),
    "inside": (lambda: ddp(compiled(network())), "eager"),
    "around": (lambda: compiled(ddp(network())), "eager"),
    "around by aot_eager": (lambda: compiled(ddp(network()), inner="aot_eager"), "eager"),
    "around a static graph": (
        lambda: compiled(ddp(network(), static_graph=True, gradient_as_bucket_view=True)),
        "eager",
    ),
    "without norms": (lambda: compiled(ddp(network(norms=False))), "one process"),
    "sharded": (sharded, ""),
    "sharded by blocks": (lambda: sharded(by_blocks=True), "sharded"),
    "sharded as a whole": (lambda: compiled(sharded()), "sharded"),
    "synchronised": (synchronised, ""),
    "synchronised compiled": (lambda: compiled(synchronised()), "synchronised"),
}


def on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (make, _) in WAYS.items():
        with compare.fresh():
            found[name] = train(make(), rank)
    found["SyncBatchNorm"] = synchronised_by_torch(rank)
    return found


def synchronised_by_torch(rank: int) -> list[str]:
    """PyTorch's own SyncBatchNorm does not train on the CPU; in evaluation it is a normalisation like any other."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(width=8))
    x, said = images(rank, 0), []
    for call in (model, compiled(model)):
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU") as raised:
            call(x)
        said.append(str(raised.value).splitlines()[0])
    with compare.fresh():
        model.eval()
        assert (compiled(model)(x) - model(x)).abs().max() < compare.EXACT
        (graph,) = fastres.compile_report()
        assert graph.fused_norms == graph.norms == 6
    return said


@pytest.fixture(scope="module")
def ranks():
    return run_processes(on_rank, RANKS, timeout=240)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (found[name].double() - wanted.double()).abs().max()
        assert error < compare.EXACT, f"{name}: error {error:.3e}"


@pytest.mark.parametrize("name", [name for name, (_, other) in WAYS.items() if other not in ("", "one process")])
def test_every_rank_has_what_it_has_in_eager(ranks, name):
    for rank in ranks:
        assert_same(rank[name].own, rank[WAYS[name][1]].own)
        assert_same(rank[name].common, rank[WAYS[name][1]].common)


def test_gradients_of_a_network_without_norms_are_those_of_one_process_on_the_joined_batch(ranks):
    one = train(network(norms=False), None)
    for rank in ranks:
        assert_same(rank["without norms"].common, one.common)
    together = torch.cat([rank["without norms"].own["evaluation"] for rank in ranks])
    assert_same({"evaluation": together}, {"evaluation": one.own["evaluation"]})


# Normalisations of the graphs in training, which are all fused.
GRAPHS = {
    "inside": [1, 3, 2], "around": [1, 3, 2], "around by aot_eager": [1, 3, 2], "around a static graph": [1, 3, 2],
    "sharded by blocks": [2, 3], "sharded as a whole": [1, 2, 3, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_normalisations_are_fused_in_every_graph(ranks, name):
    for rank in ranks:
        graphs = rank[name].graphs
        assert [graph.norms for graph in graphs[: len(graphs) // 2]] == GRAPHS[name]
        assert all(graph.fused_norms == graph.norms for graph in graphs)


def test_torch_s_own_synchronised_normalisation_says_what_it_says_in_eager(ranks):
    for rank in ranks:
        eager, ours = rank["SyncBatchNorm"]
        assert eager == ours
