"""Gradients of gradients and batches of gradients, through every function and block, against float64 PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastres import functional, reference
from fastres.functional import NormParams
from fastres.fuse import unfuse
from fastres.nn import FusedBasicBlock, FusedBatchNormAct2d, FusedBottleneck, ResidualBlock
from tests.oracle import LAYOUTS, Case, activation, assert_close, generator, keep_off_zero, norm, output_length
from tests.parity import one_thread, scramble  # noqa: F401

SHAPE = (3, 8, 6, 5)


def batch_norm_act(case: Case, f: Callable[..., Tensor], **options: Any) -> Tensor:
    n, own = case.norms["norm"], case.norms.get("residual_norm")
    return f(
        case.tensors["x"], *n[:4], momentum=n.momentum, eps=n.eps, residual=case.tensors.get("residual"),
        residual_norm=own, **options,
    )  # fmt: skip


def projection(case: Case, f: Callable[..., Tensor], **options: Any) -> Tensor:
    t = case.tensors
    return f(t["x"], t["weight"], case.norms["norm"], stride=(2, 1), **options)


def conv3x3(case: Case, f: Callable[..., Any], **options: Any) -> Tensor:
    found = f(case.tensors["x"], case.tensors["weight"], **options)
    return found[0] if isinstance(found, tuple) else found


def norm_act_conv3x3(case: Case, f: Callable[..., Any], **options: Any) -> Tensor:
    t = case.tensors
    found = f(t["x"], case.norms["norm"], t["weight"], residual=t.get("residual"), **options)
    return found[0] if isinstance(found, tuple) else found


def norm_pool(case: Case, f: Callable[..., Any], **options: Any) -> Tensor:
    return f(case.tensors["x"], case.norms["norm"], 3, 2, 1, **options)


def pool(case: Case, f: Callable[..., Any]) -> Tensor:
    return f(case.tensors["x"], 3, 2, 1)


WINOGRAD = partial(functional.conv3x3, algorithm="winograd")
GROUPED = partial(functional.grouped_conv2d, algorithm="grouped")
NORM_WINOGRAD = partial(functional.norm_act_conv3x3, algorithm="winograd")
PRODUCT = partial(functional.conv1x1_with_statistics, algorithm="gemm")
NORM_PRODUCT = partial(functional.norm_act_conv1x1, algorithm="gemm")
# name: (call, ours, reference, options, the other tensors and normalisations of the case)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], Callable[..., Any], dict[str, Any], str]] = {
    "norm": (batch_norm_act, functional.batch_norm_act, reference.batch_norm_act, {"training": True}, ""),
    "frozen norm": (batch_norm_act, functional.batch_norm_act, reference.batch_norm_act, {}, "residual"),
    "norm, added": (
        batch_norm_act, functional.batch_norm_act, reference.batch_norm_act, {"training": True}, "residual",
    ),
    "norm, dropped and added": (
        batch_norm_act, functional.batch_norm_act, reference.batch_norm_act,
        {"training": True, "dropout_p": 0.3, "order": "act_add"}, "residual",
    ),
    "norm, a normalised residual": (
        batch_norm_act, functional.batch_norm_act, reference.batch_norm_act, {"training": True},
        "residual residual_norm",
    ),
    "projection": (
        projection, functional.projection_shortcut, reference.projection_shortcut, {"training": True}, "1x1",
    ),
    "conv3x3": (conv3x3, WINOGRAD, reference.conv3x3, {}, "3x3"),
    "conv3x3, stride 2": (conv3x3, WINOGRAD, reference.conv3x3, {"stride": 2}, "3x3"),
    "depthwise": (conv3x3, GROUPED, reference.grouped_conv2d, {}, "depthwise"),
    "depthwise, stride 2": (conv3x3, GROUPED, reference.grouped_conv2d, {"stride": 2}, "depthwise"),
    "norm, max pool": (
        norm_pool, functional.batch_norm_act_max_pool2d, reference.batch_norm_act_max_pool2d, {"training": True}, "",
    ),
    "max pool": (pool, functional.max_pool2d, F.max_pool2d, {}, ""),
    "norm, conv3x3": (norm_act_conv3x3, NORM_WINOGRAD, reference.norm_act_conv3x3, {}, "3x3"),
    "norm, conv3x3, stride 2": (norm_act_conv3x3, NORM_WINOGRAD, reference.norm_act_conv3x3, {"stride": 2}, "3x3"),
    "norm, dropped and added, conv3x3": (
        norm_act_conv3x3, NORM_WINOGRAD, reference.norm_act_conv3x3, {"dropout_p": 0.3, "order": "act_add"},
        "3x3 residual",
    ),
    "conv1x1": (conv3x3, PRODUCT, reference.conv1x1, {}, "pixels"),
    "norm, dropped and added, conv1x1": (
        norm_act_conv3x3, NORM_PRODUCT, reference.norm_act_conv1x1, {"dropout_p": 0.3, "order": "act_add"},
        "pixels residual",
    ),
}  # fmt: skip


def make_case(name: str, layout: str, dtype: torch.dtype) -> Case:
    gen = generator(name, layout, dtype)
    extra = FUNCTIONS[name][4].split()
    outputs = SHAPE[1] if {"1x1", "3x3", "pixels"}.isdisjoint(extra) else 12
    tensors = {"x": activation(SHAPE, dtype, layout, gen)}
    if outputs == 12:
        taps = 3 if "3x3" in extra else 1
        tensors["weight"] = activation((outputs, SHAPE[1], taps, taps), dtype, layout, gen, mean=0.02, std=0.3)
    if "depthwise" in extra:
        tensors["weight"] = activation((SHAPE[1], 1, 3, 3), dtype, layout, gen, mean=0.02, std=0.3)
    if "residual" in extra:
        tensors["residual"] = activation(SHAPE, dtype, layout, gen)
    norms = {"norm": norm(outputs if "1x1" in extra else SHAPE[1], dtype, gen)}
    if "residual_norm" in extra:
        norms["residual_norm"] = norm(SHAPE[1], dtype, gen)
    return Case({key: t.requires_grad_() for key, t in tensors.items()}, norms)


def penalty(y: Tensor, inputs: list[Tensor], dy: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """First gradients, and those of a function of all of them."""
    dy = dy.to(y.dtype).requires_grad_()
    used = [t for t in inputs if t.requires_grad]
    first = torch.autograd.grad(y, used, dy, create_graph=True, allow_unused=True)
    total = sum((g.sin() * torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).view(g.shape)).sum()
                for g in first if g is not None)  # fmt: skip
    second = torch.autograd.grad(total, [*used, dy], allow_unused=True)
    return [g for g in first if g is not None], list(second)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_of_a_gradient_is_that_of_float64_pytorch(name, dtype, layout):
    call, ours, plain, options, extra = FUNCTIONS[name]
    case = make_case(name, layout, dtype)
    if "norm" in name and "1x1" not in extra:
        calls = {k: v for k, v in options.items() if k in ("training", "order")}
        relu_input = partial(batch_norm_act, f=reference.batch_norm_act, relu=False, **{"training": True} | calls)
        if "act_add" not in options.values():
            keep_off_zero(case.tensors["x"], lambda: relu_input(case.double()).detach())
    exact = case.double()
    if "dropout_p" in options:
        options = options | {"seed": torch.tensor([77])}
    results = []
    for c, f in ((case, ours), (exact, plain)):
        y = call(c, f, **options)
        dy = activation(tuple(y.shape), torch.float64, layout, generator("dy"), mean=0.1, std=1.0)
        results.append(penalty(y, list(c.inputs().values()), dy))
    for found, wanted in zip(results[0][0], results[1][0], strict=True):
        assert_close(found, wanted, "gradient", length=4 * output_length(12))
    for found, wanted in zip(results[0][1], results[1][1], strict=True):
        zero = torch.zeros(())
        found, wanted = (zero if t is None else t for t in (found, wanted))
        assert_close(found.expand_as(wanted), wanted, "gradient of a gradient", length=16 * output_length(12))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_in_a_batch_are_those_one_by_one(name, layout):
    call, ours, _, options, _ = FUNCTIONS[name]
    case = make_case(name, layout, torch.float32)
    if "dropout_p" in options:
        options = options | {"seed": torch.tensor([5])}
    y = call(case, ours, **options)
    inputs = [t for t in case.inputs().values() if t.requires_grad]
    dys = torch.randn(3, *y.shape, generator=generator("batched"))
    options = {"retain_graph": True, "allow_unused": True}
    batched = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, **options)
    assert batched[0] is not None
    for i, dy in enumerate(dys):
        for found, wanted in zip(batched, torch.autograd.grad(y, inputs, dy, **options), strict=True):
            assert (found is None) == (wanted is None)
            if wanted is None:
                continue
            assert_close(found[i], wanted.double(), "a gradient of a batch", length=4 * output_length(12))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: FusedBasicBlock(8, 8, conv_algorithm="winograd"),
    "projected": lambda: FusedBasicBlock(
        8, 12, 2, nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    ),
    "bottleneck": lambda: FusedBottleneck(8, 2, conv_algorithm="winograd"),
    "residual": lambda: ResidualBlock(8, 12, 2, dropout=0.0),
    "norm": lambda: FusedBatchNormAct2d(8),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_gradient_penalty_through_a_block_is_that_through_its_plain_twin(kind, training):
    torch.manual_seed(3)
    block = scramble(BLOCKS[kind]()).double().train(training)
    plain = unfuse(copy.deepcopy(block))
    x = activation((3, 8, 6, 6), torch.float64, "channels_last", generator(kind))
    results = []
    for module in (block, plain):
        v = x.clone(memory_format=torch.preserve_format).requires_grad_()
        (gradient,) = torch.autograd.grad(module(v).square().sum(), v, create_graph=True)
        gradient.square().sum().backward()
        results.append([gradient.detach(), v.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    scale = max(float(wanted.abs().max()) for wanted in results[1])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * scale)


def test_running_statistics_do_not_move_in_a_differentiable_backward():
    n = NormParams(torch.zeros(8), torch.ones(8))
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    y = functional.batch_norm_act(x, *n[:4], training=True)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    mean = n.running_mean.clone()
    first.square().sum().backward()
    assert torch.equal(n.running_mean, mean)
