"""The faster way is taken where it should be, is left where it must be, and comes back."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fastres
from tests.altered.subjects import (
    BASIC,
    BLOCKS,
    NETWORK,
    PREACTIVATION,
    RESIDUAL,
    SKIP,
    STEM,
    SUBJECTS,
    Subject,
    replace,
)
from tests.operators import Operators

# Called alone, the projection's two modules are PyTorch's own.
FUSED = tuple(s for s in SUBJECTS if s.name != "shortcut")


def ran(call: Callable[[], Any]) -> list[str]:
    with Operators() as seen:
        call()
    return seen.names


def image(subject: Subject) -> torch.Tensor:
    return torch.randn(subject.shape()).contiguous(memory_format=torch.channels_last)


def operators(module: Callable[..., Any], subject: Subject) -> list[str]:
    return ran(lambda: module(image(subject)))


@pytest.mark.parametrize("subject", [*FUSED, NETWORK], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_unaltered_module_takes_its_faster_way(subject, training, gradients):
    module = subject.make_fused().train(training)
    with torch.set_grad_enabled(gradients), Operators() as seen:
        module(image(subject))
    assert seen.names
    # Nothing of PyTorch's own is left of the activations.
    assert not seen.relu_inputs


HARMLESS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "double": lambda m: m.double().float(),
    "weights written": lambda m: [p.data.mul_(2) for p in m.parameters()] and m,
    "state loaded by assignment": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and m,
    "swapped": lambda m: [torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2)) for p in m.parameters()] and m,
    "frozen": lambda m: m.requires_grad_(False),
    "norms frozen": lambda m: [n.eval() for n in m.modules() if isinstance(n, nn.BatchNorm2d)] and m,
    "a new norm": lambda m: replace(m, nn.BatchNorm2d, lambda old: nn.BatchNorm2d(old.num_features)) or m,
    "a new relu": lambda m: replace(m, nn.ReLU, lambda old: nn.ReLU()) or m,
    "AveragedModel": AveragedModel,
    "hook on the module": lambda m: m.register_forward_hook(lambda m, args, y: y * 2) and m,
    "a hook, removed": lambda m: [
        c.register_forward_hook(lambda m, args, y: y * 2).remove() for c in m.modules()
    ] and m,
    "another memory format": lambda m: m.to(memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("subject", [STEM, *BLOCKS, SKIP, RESIDUAL, PREACTIVATION, NETWORK], ids=str)
@pytest.mark.parametrize("what", HARMLESS)
def test_what_changes_nothing_in_the_children_keeps_the_faster_way(what, subject):
    assert operators(HARMLESS[what](subject.make_fused()), subject)


@pytest.mark.parametrize("subject", BLOCKS, ids=str)
def test_a_step_under_checkpoint_or_autocast_takes_the_faster_way(subject):
    module = subject.make_fused()
    assert ran(lambda: checkpoint(module, image(subject).requires_grad_(), use_reentrant=False).sum().backward())
    with torch.autocast("cpu", torch.bfloat16):
        assert operators(module, subject)


LEAVING: dict[str, Callable[[nn.Module], object]] = {
    "relu replaced": lambda m: setattr(m, "relu", nn.Tanh()),
    "norm replaced": lambda m: setattr(m, "bn1", nn.Identity()),
    "norm hooked": lambda m: m.bn1.register_forward_hook(lambda m, args, y: None),
    "relu hooked": lambda m: m.relu.register_forward_pre_hook(lambda m, args: None),
    "forward of the relu set": lambda m: setattr(m.relu, "forward", torch.tanh),
    "convolution parametrised": lambda m: nn.utils.parametrizations.weight_norm(m.conv1),
}


@pytest.mark.parametrize("subject", BLOCKS, ids=str)
@pytest.mark.parametrize("what", LEAVING)
def test_a_block_that_leaves_the_faster_way_says_so_once_and_in_the_report(what, subject, caplog):
    module = subject.make_fused()
    assert operators(module, subject)
    LEAVING[what](module)
    with caplog.at_level(logging.INFO, "fastres"):
        for _ in range(3):
            module.eval()(image(subject))
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    report = fastres.fuse_report(module)
    (why,) = [reason for name, reason in report.left.items() if name == ""]
    assert why in said[0].getMessage()


def test_a_block_goes_back_to_the_faster_way_when_its_child_is_what_it_was():
    module = BASIC.make_fused()
    before = operators(module, BASIC)
    relu = module.relu
    module.relu = nn.Tanh()
    assert operators(module, BASIC) == []
    module.relu = relu
    handle = module.conv2.register_forward_hook(lambda m, args, y: y * 2)
    assert operators(module, BASIC) == []
    handle.remove()
    assert operators(module, BASIC) == before


@pytest.mark.parametrize("subject", [*BLOCKS, STEM, NETWORK], ids=str)
def test_fuse_and_unfuse_change_classes_and_nothing_else(subject):
    plain = subject.make_plain()
    before = {name: (module, type(module), dict(module.__dict__)) for name, module in plain.named_modules()}
    fused = fastres.fuse(plain, inplace=True)
    assert fused is plain
    for name, module in fused.named_modules():
        same, was, _ = before[name]
        assert module is same
        assert type(module) is was or issubclass(type(module), was)
        assert not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) or type(module) is was
    unfused = fastres.unfuse(fused, inplace=True)
    for name, module in unfused.named_modules():
        _, was, attributes = before[name]
        assert type(module) is was
        assert module.__dict__.keys() == attributes.keys()
