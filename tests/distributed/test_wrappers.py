"""Fused networks in DistributedDataParallel and fully_shard train as one process does on the joined batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

from fastres.fuse import fuse
from tests import oracle
from tests.distributed.processes import run_processes
from tests.operators import Operators
from tests.parity import close, scramble

RANKS, IMAGES, CLASSES, STEPS = 2, 6, 5, 2


def plain() -> nn.Module:
    torch.manual_seed(oracle.SEED % 1000)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.Identity()
    for module in list(model.modules()):
        if isinstance(getattr(module, "relu", None), nn.ReLU):
            module.relu = nn.SiLU()
    return scramble(model)


def batch(index: int) -> tuple[Tensor, Tensor]:
    gen = oracle.generator("wrappers", index)
    x = torch.randn(RANKS * IMAGES, 3, 16, 16, generator=gen)
    return x, torch.randint(CLASSES, (RANKS * IMAGES,), generator=gen)


def loss_of(model: Any, index: int, part: slice, scale: float = 1.0) -> Tensor:
    x, labels = batch(index)
    return nn.functional.cross_entropy(model(x[part]), labels[part]) * scale


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def synchronised(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def train(model: nn.Module, part: slice, accumulate: bool = False) -> dict[str, Any]:
    """SGD for a few steps: losses, the gradients of each step, and the parameters and buffers at the end."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    gradients = []
    for index in range(STEPS):
        if accumulate:
            with model.no_sync():
                loss_of(model, 2 * index, part, 0.5).backward()
            loss_of(model, 2 * index + 1, part, 0.5).backward()
        else:
            loss_of(model, index, part).backward()
        gradients.append([whole(p.grad).clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return {
        "gradients": gradients,
        "state": get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)),
    }


def ddp(**options: Any) -> nn.Module:
    # DistributedDataParallel's constructor refuses SyncBatchNorm on the CPU: convert what it has wrapped.
    wrapped = DistributedDataParallel(fuse(plain()), gradient_as_bucket_view=True, **options)
    wrapped.module = synchronised(wrapped.module)
    return wrapped


def sharded(mesh: Any) -> nn.Module:
    model = synchronised(fuse(plain()))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def on_rank(rank: int) -> dict[str, Any]:
    part, mesh = slice(rank * IMAGES, (rank + 1) * IMAGES), init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {}
    for name, make, accumulate in (
        ("ddp", lambda: ddp(static_graph=True), False), ("accumulated", ddp, True),
        ("fully_shard", lambda: sharded(mesh), False),
    ):  # fmt: skip
        torch.set_warn_always(True)
        with warnings.catch_warnings(record=True) as caught, Operators() as seen:
            warnings.simplefilter("always")
            found[name] = train(make(), part, accumulate)
        torch.set_warn_always(False)
        found[name]["warned"] = [str(w.message) for w in caught]
        # Four blocks and the stem: none goes child by child.
        found[name]["operators"] = {n: seen.names.count(n) for n in set(seen.names)}
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_processes(on_rank, RANKS, timeout=240)


@pytest.mark.parametrize("name", ["ddp", "accumulated", "fully_shard"])
def test_wrapped_networks_train_as_one_process_does_on_the_joined_batch(ranks, name):
    # A smooth activation, for with ReLU the sign of a rounded zero would say something.
    exact = plain().double()
    optimizer = torch.optim.SGD(exact.parameters(), 0.05, momentum=0.9)
    length, names = RANKS * IMAGES * 64, [n for n, _ in exact.named_parameters()]
    for index in range(STEPS):
        batches = [(2 * index, 0.5), (2 * index + 1, 0.5)] if name == "accumulated" else [(index, 1.0)]
        for which, scale in batches:
            x, labels = batch(which)
            (nn.functional.cross_entropy(exact(x.double()), labels) * scale).backward()
        for rank in ranks:
            for key, found, p in zip(names, rank[name]["gradients"][index], exact.parameters(), strict=True):
                close(found, p.grad.float(), length, f"gradient of {key}, step {index}", 50.0)
        optimizer.step()
        optimizer.zero_grad()
    # On rank 0 alone, as get_model_state_dict gives it; torchvision's own network takes it.
    state = ranks[0][name]["state"]
    loaded = plain()
    loaded.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    for key, value in loaded.state_dict().items():
        if value.is_floating_point():
            close(value, exact.state_dict()[key].float(), length, key, 50.0)
        else:
            assert torch.equal(value, exact.state_dict()[key]), key


@pytest.mark.parametrize("name", ["ddp", "accumulated", "fully_shard"])
def test_wrapped_networks_warn_of_nothing_and_stay_fused(ranks, name):
    for rank in ranks:
        assert rank[name]["warned"] == []
        operators, steps = rank[name]["operators"], STEPS * (2 if name == "accumulated" else 1)
        assert operators["batch_norm_act_training"] + operators.get("norm_act_conv3x3_forward", 0) == 9 * steps
        assert operators["projection_shortcut_forward"] == 3 * steps
