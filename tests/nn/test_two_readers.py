"""What one block hands to the next has two readers there, whose gradients meet in the backward of its normalisation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50

from fastres import ArticleResNet18, fuse, unfuse
from fastres.nn import FusedBottleneck
from tests.operators import Operators
from tests.parity import close, scramble


class Additions(TorchDispatchMode):
    """Counts additions of two activations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        two = len(args) > 1 and all(isinstance(a, torch.Tensor) and a.dim() == 4 for a in args[:2])
        self.count += func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and two
        return func(*args, **(kwargs or {}))


def network(make, algorithm, dtype=torch.float32):
    torch.manual_seed(0)
    plain = scramble(make(num_classes=4)).to(dtype)
    plain.conv1, plain.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False).to(dtype), nn.Identity()
    return plain, fuse(plain, conv_algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["torch", "winograd"])
@pytest.mark.parametrize(("make", "blocks"), [(resnet18, 8), (resnet50, 16)])
def test_backward_adds_no_two_gradients_of_an_activation_between_blocks(make, blocks, algorithm):
    _, fused = network(make, algorithm)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    loss = fused(x).square().sum()
    with Additions() as seen, torch.autograd.set_multithreading_enabled(False):
        loss.backward()
    # What the stem's max pool, here an identity, hands to the first block comes once.
    assert seen.count <= 1


@pytest.mark.parametrize("algorithm", ["torch", "winograd"])
@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_gradients_are_those_of_torchvisions_network(make, algorithm):
    plain, fused = network(make, algorithm, torch.float64)
    plain = unfuse(plain)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found = []
    for model in (fused, plain):
        v = x.clone().requires_grad_()
        y = model(v)
        found.append([y, *torch.autograd.grad(y.square().sum(), [v, *model.parameters()])])
    for a, b in zip(*found, strict=True):
        close(a, b, x.numel() * 16, times=4096)


@pytest.mark.parametrize("watch", ["forward hook", "hook on the tensor", "retained gradient"])
def test_whoever_watches_a_block_sees_the_whole_gradient(watch):
    """A hook on a block leaves the row: what it sees is the one tensor that both readers read."""
    plain, fused = network(resnet50, "torch", torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    gradients = []
    for model in (fused, plain):
        seen = {}

        def look(module, args, output, seen=seen):
            if watch == "hook on the tensor":
                output.register_hook(lambda g: seen.setdefault("g", g))
            elif watch == "retained gradient":
                output.retain_grad()
            seen["y"] = output

        handle = model.layer2[1].register_forward_hook(look)
        loss = model(x).square().sum()
        if watch == "forward hook":
            seen["g"] = torch.autograd.grad(loss, seen["y"])[0]
        else:
            loss.backward()
        gradients.append(seen["g"] if "g" in seen else seen["y"].grad)
        handle.remove()
        for p in model.parameters():
            p.grad = None
    close(*gradients, x.numel() * 64, times=4096)


def test_the_article_s_network_hands_over_as_well():
    torch.manual_seed(0)
    fused = scramble(ArticleResNet18(4, dropout=0.0, conv_algorithm="torch").double())
    plain = unfuse(copy.deepcopy(fused))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = fused(x)
    with Operators() as seen, torch.autograd.set_multithreading_enabled(False):
        y.sum().backward()
    given = [a for n, a in zip(seen.names, seen.arguments, strict=True) if n == "batch_norm_act_backward"]
    assert sum(a["dy2"] is not None for a in given) >= 7
    plain(x).sum().backward()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        close(a.grad, b.grad, 4096, times=4096)


def test_without_gradients_and_in_evaluation_it_is_the_same_network():
    plain, fused = network(resnet18, "torch", torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for mode in (True, False):
        plain.train(mode), fused.train(mode)
        with torch.no_grad():
            close(fused(x), unfuse(plain)(x), 4096, times=64)


class Doubling(FusedBottleneck):
    def forward(self, x):
        return 2 * super().forward(x)


class Counting(FusedBottleneck):
    calls = 0

    def __call__(self, *args, **kwargs):
        Counting.calls += 1
        return super().__call__(*args, **kwargs)


def test_a_subclass_with_a_forward_or_a_call_of_its_own_leaves_the_row():
    plain, fused = network(resnet50, "torch", torch.float64)
    plain = unfuse(plain)
    fused.layer2[1].__class__, fused.layer3[2].__class__ = Doubling, Counting
    plain.layer2[1].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    before = Counting.calls
    close(fused(x), plain(x), x.numel() * 16, times=64)
    assert Counting.calls == before + 1


@pytest.mark.parametrize("where", ["block", "stage"])
def test_a_block_or_stage_that_was_compiled_is_called(where):
    _, fused = network(resnet18, "torch")
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    (fused.layer2[1] if where == "block" else fused.layer2).compile(backend=backend)
    fused(torch.randn(2, 3, 16, 16))
    assert calls
