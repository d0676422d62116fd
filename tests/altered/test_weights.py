"""Weights written in every way, carried, copied, frozen and averaged, with evaluation between."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torch.nn as nn
from torch import Tensor
from torch.optim import swa_utils
from torch.utils import data

from tests.altered.compare import Draw, Results, backward, descend, infer, observe, record, state, step
from tests.altered.subjects import BASIC, BLOCKS, BOTTLENECK, DIRECT_BASIC, NETWORK, PROJECTED, STEM, SUBJECTS, each
from tests.altered.table import Table, check

TABLE = Table()
change, use = TABLE.change, TABLE.use
ALL = (*SUBJECTS, DIRECT_BASIC, NETWORK)
FEW = (STEM, PROJECTED, BOTTLENECK)


# --------------------------------------------------------------------------------------- weights written, then evaluated

WRITES: dict[str, Callable[[Tensor], object]] = {
    ".data.copy_": lambda t: t.data.copy_(t.data * 1.5),
    ".data.mul_().add_()": lambda t: t.data.mul_(0.9).add_(0.1),
    ".data =": lambda t: setattr(t, "data", t.data * 1.5),
    ".detach().mul_": lambda t: t.detach().mul_(1.5),
    "numpy": lambda t: t.detach().numpy().__imul__(1.5),
    "numpy, kept": lambda t: t.detach().numpy().__setitem__(..., 0.25),
    "untyped_storage().copy_": lambda t: t.untyped_storage().copy_((t.detach() * 1.5).contiguous().untyped_storage()),
    "set_": lambda t: t.data.set_((t.data * 1.5).contiguous()),
    "memmove": lambda t: ctypes.memmove(
        t.data_ptr(), (source := t.detach() * 1.5).data_ptr(), source.numel() * source.element_size()
    ),
    "dlpack": lambda t: torch.from_dlpack(t.detach()).mul_(1.5),
    "a view": lambda t: t.detach().view(-1)[: t.numel() // 2].mul_(1.5),
    "_foreach_mul_": lambda t: torch._foreach_mul_([t.detach()], 1.5),
    "inference mode": lambda t: torch.inference_mode()(lambda: t.mul_(1.5))(),
    "no_grad": lambda t: torch.no_grad()(lambda: t.mul_(1.5))(),
    "unsafe version counter": lambda t: write_unseen(t),
    "nn.init": lambda t: nn.init.constant_(t, 0.2),
}


def write_unseen(t: Tensor) -> None:
    with torch.autograd._unsafe_preserve_version_counter(t), torch.no_grad():
        t.mul_(1.5)


def weights_of(m: nn.Module) -> list[Tensor]:
    """Parameters and running statistics, which may not become negative."""
    return [*m.parameters(), *[b for b in m.buffers() if b.is_floating_point()]]


for name, write in WRITES.items():

    @use(f"weights written by {name}", ALL)
    def _(m: nn.Module, draw: Draw, write: Callable[[Tensor], object] = write) -> Results:
        results: Results = {}
        infer(m, draw, results, "before")
        for t in weights_of(m):
            write(t)
        infer(m, draw, results, "after")
        step(m, draw, results, "evaluation", 2)
        m.train()
        step(m, draw, results, "training", 3)
        for t in weights_of(m):
            write(t)
        infer(m, draw, results, "again")
        return results


@use("weights of one module alone written", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(m, draw, results, "before")
    for i, (_, _, child) in enumerate(each(m, nn.Conv2d, nn.BatchNorm2d)):
        child.weight.detach().numpy()[:] *= 1.5
        infer(m, draw, results, f"after {i}")
    return results


@use("weights aliased by a flat vector", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    flat = torch.cat([p.detach().reshape(-1) for p in m.parameters()])
    start = 0
    for p in m.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    infer(m, draw, results, "before")
    flat.mul_(1.5)
    infer(m, draw, results, "after")
    m.train()
    step(m, draw, results, "training")
    return results


@use("vector_to_parameters", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    vector = torch.nn.utils.parameters_to_vector(m.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector * 1.5, m.parameters())
    infer(m, draw, results, "after")
    vector.mul_(0.5)
    torch.nn.utils.vector_to_parameters(vector, m.parameters())
    infer(m, draw, results, "again")
    return results


def write_shared(tensors: list[Tensor]) -> None:
    for t in tensors:
        t.mul_(1.5)


@use("weights shared with another process", (BASIC,))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    m.share_memory()
    infer(m, draw, results, "before")
    context = torch.multiprocessing.get_context("fork")
    process = context.Process(target=write_shared, args=([t.detach() for t in weights_of(m)],))
    process.start()
    process.join()
    assert process.exitcode == 0
    infer(m, draw, results, "after")
    return results


@use("weights between forward and backward", FEW, exact=False)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    y = m(x := draw.x())
    for _, _, conv in each(m, nn.Conv2d):
        conv.weight.data.mul_(1.5)
    backward(y, draw)
    record(results, "step", x=x.grad)
    return results


@use("weights written in place between forward and backward", BLOCKS, refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    y = m(draw.x())
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1.5)
    backward(y, draw)
    return {}


@use("the input written in place between forward and backward", BLOCKS, refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    x = draw.x() * 1
    y = m(x)
    x.mul_(2)
    backward(y, draw)
    return {}


# ------------------------------------------------------------------------------------------------------------ optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "fused SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, 0.05, foreach=True),
    "fused Adam": lambda p: torch.optim.Adam(p, 0.01, eps=1e-3, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3, foreach=True),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, eps=1e-3, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, eps=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, eps=1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 0.1, eps=1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.01, max_iter=2),
}

for name, make in OPTIMIZERS.items():

    @use(f"{name} with evaluation between steps", ALL if "fused" in name else FEW)
    def _(m: nn.Module, draw: Draw, make: Any = make) -> Results:
        results: Results = {}
        optimizer = make([p for p in m.parameters() if p.requires_grad])

        def closure(index: int = 0) -> Tensor:
            optimizer.zero_grad()
            loss = m(draw.x(index).detach()).square().mean()
            loss.backward()
            return loss

        for index in range(2):
            m.train()
            if isinstance(optimizer, torch.optim.LBFGS):
                m.eval()
                optimizer.step(closure)
            else:
                closure(index)
                torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                optimizer.step()
            infer(m, draw, results, f"after {index}")
        state(results, "end", m, gradients=False)
        return results


@use("training in evaluation mode, by fused SGD", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    optimizer = torch.optim.SGD(m.parameters(), 0.05, fused=True)
    for index in range(2):
        infer(m, draw, results, f"before {index}")
        step(m, draw, results, f"step {index}", index)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    infer(m, draw, results, "end")
    return results


@use("gradients accumulated over batches", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for index in range(2):
        step(m, draw, results, f"batch {index}", index)
    descend(m)
    infer(m, draw, results, "end")
    return results


@use("gradients of zero, kept", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    kept = {n: p.grad for n, p in m.named_parameters()}
    step(m, draw, results, "step")
    results["in place"] = [kept[n] is p.grad for n, p in m.named_parameters()]
    return results


# --------------------------------------------------------------------------------------------------- averages of weights


@use("EMA by .data.mul_().add_()", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    average = copy.deepcopy(m).eval()
    for index in range(2):
        infer(average, draw, results, f"average {index}")
        m.train()
        step(m, draw, results, f"step {index}", index)
        descend(m)
        for ours, theirs in zip(average.parameters(), m.parameters(), strict=True):
            ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)
        for ours, theirs in zip(average.buffers(), m.buffers(), strict=True):
            ours.data.copy_(theirs.data)
    infer(average, draw, results, "average")
    return results


@use("weights swapped with the average's by .data, and back", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    average = [p.detach() * 0.5 for p in m.parameters()]
    infer(m, draw, results, "before")
    for _ in range(2):
        for p, other in zip(m.parameters(), average, strict=True):
            kept = p.data.clone()
            p.data.copy_(other)
            other.copy_(kept)
        infer(m, draw, results, "swapped")
    return results


@use("AveragedModel and update_bn", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    average = swa_utils.AveragedModel(m)
    for index in range(2):
        m.train()
        step(m, draw, results, f"step {index}", index)
        descend(m)
        average.update_parameters(m)
        infer(average, draw, results, f"average {index}")
    swa_utils.update_bn([draw.x(6).detach(), draw.x(7).detach()], average)
    infer(average, draw, results, "average")
    state(results, "average", average, gradients=False)
    return results


@use("AveragedModel with an EMA and buffers", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    average = swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    for index in range(2):
        step(m.train(), draw, results, f"step {index}", index)
        descend(m)
        average.update_parameters(m)
        infer(average, draw, results, f"average {index}")
    return results


@use("statistics recalibrated over a loader", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for n in m.modules():
        if isinstance(n, nn.BatchNorm2d):
            n.reset_running_stats()
            n.momentum = None
    with torch.no_grad():
        for batch in data.DataLoader(draw.x(0, shape=(6, *draw.subject.shape()[1:])).detach(), batch_size=2):
            m.train()(batch)
    infer(m, draw, results, "end")
    state(results, "end", m, gradients=False)
    return results


# ------------------------------------------------------------------------------------------------------ state_dict and copies

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save of the whole": lambda m: save_and_load(m),
    "deepcopy of a deepcopy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    ".double().float()": lambda m: m.double().float(),
    ".to(memory_format=channels_last)": lambda m: m.to(memory_format=torch.channels_last),
    ".to(memory_format=contiguous_format)": lambda m: m.to(memory_format=torch.contiguous_format),
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_(False), (True)": lambda m: m.requires_grad_(False).requires_grad_(True),
    "apply": lambda m: m.apply(lambda c: nn.init.constant_(c.weight, 0.1) if type(c) is nn.Conv2d else None),
    "_apply": lambda m: m._apply(lambda t: t * 2 if t.is_floating_point() else t),
    "nn.DataParallel": lambda m: nn.DataParallel(m),
    "cpu": lambda m: m.cpu(),
    "type": lambda m: m.type(torch.float32),
}


def save_and_load(m: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


for name, carry in COPIES.items():
    change(name, ALL)(lambda m, draw, carry=carry: carry(m))


@use("state_dict saved and loaded", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(m, draw, results, "before")
    file = io.BytesIO()
    torch.save({k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()}, file)
    file.seek(0)
    results["loaded"] = str(m.load_state_dict(torch.load(file)))
    infer(m, draw, results, "after")
    m.train()
    results |= observe(m, draw)
    return results


@use("load_state_dict(assign=True)", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(m, draw, results, "before")
    saved = {k: v * 1.5 if v.is_floating_point() else v.clone() for k, v in m.state_dict().items()}
    m.load_state_dict(saved, assign=True)
    infer(m, draw, results, "after")
    for value in saved.values():
        if value.is_floating_point():
            value.mul_(0.5)
    infer(m, draw, results, "written")
    m.train()
    return results | observe(m, draw)


@use("load_state_dict by swap_tensors", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(m, draw, results, "before")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()})
        m.to(torch.float64).to(draw.dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    infer(m, draw, results, "after")
    return results | observe(m.train(), draw)


@use("swap_tensors", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(m, draw, results, "before")
    for p in m.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))
    infer(m, draw, results, "after")
    return results | observe(m.train(), draw)


@use("loading what does not fit", ALL, refused=(RuntimeError,))
def _(m: nn.Module, draw: Draw) -> Results:
    saved = m.state_dict()
    saved.popitem()
    m.load_state_dict(saved)
    return {}


@use("loading without strictness", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    saved = m.state_dict() | {"extra": torch.zeros(1)}
    saved = {k: v for k, v in saved.items() if "bias" not in k}
    # FusedBatchNormAct2d speaks of its child's parameters by the names that it saves them under, or by the child's.
    keys = m.load_state_dict(saved, strict=False)
    results: Results = {"unexpected": keys.unexpected_keys, "missing": len(keys.missing_keys)}
    return results | observe(m, draw)


@use("state_dict(keep_vars=True) and with a prefix", SUBJECTS)
def _(m: nn.Module, draw: Draw) -> Results:
    kept = m.state_dict(keep_vars=True, prefix="model.")
    own = {id(p) for p in m.parameters()}
    return {k: (id(v) in own, v.requires_grad) for k, v in kept.items()}


@use("meta device, to_empty, load", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    saved = {k: v.clone() for k, v in m.state_dict().items()}
    m.to("meta")
    y = m(draw.x().to("meta"))
    results["meta"] = (tuple(y.shape), y.device.type)
    m.to_empty(device="cpu")
    m.load_state_dict(saved)
    return results | observe(m, draw)


@use("meta device, load by assignment", ALL)
def _(m: nn.Module, draw: Draw) -> Results:
    saved = {k: v.clone() for k, v in m.state_dict().items()}
    m.to("meta").load_state_dict(saved, assign=True)
    for p in m.parameters():
        p.requires_grad_()
    return observe(m, draw)


@use("fake tensors", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    from torch._subclasses.fake_tensor import FakeTensorMode

    results: Results = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for mode in (m.train(), m.eval()):
            y = mode(torch.empty(draw.subject.shape(), dtype=draw.dtype, requires_grad=True))
            results[f"training {m.training}"] = (tuple(y.shape), str(y.dtype), tuple(y.stride()))
    return results


@use("parameters replaced by larger ones, then trained", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    infer(m, draw, results, "before")
    for _, _, conv in each(m, nn.Conv2d):
        conv.weight = nn.Parameter(conv.weight.detach() * 2)
    infer(m, draw, results, "after")
    return results | observe(m.train(), draw)


@use("a module freed and another at its place", (BASIC,))
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    for index in range(4):
        other = copy.deepcopy(m)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1 + 0.1 * index)
        infer(other, draw, results, f"copy {index}")
        del other
    return results


@use("trained by state_dict of another epoch, back and forth", FEW)
def _(m: nn.Module, draw: Draw) -> Results:
    results: Results = {}
    first = copy.deepcopy(m.state_dict())
    step(m, draw, results, "step")
    descend(m)
    infer(m, draw, results, "trained")
    second = copy.deepcopy(m.state_dict())
    for i, saved in enumerate((first, second, first)):
        m.load_state_dict(saved)
        infer(m, draw, results, f"loaded {i}")
    return results


@use("evaluated by several threads at once", (STEM, PROJECTED, BOTTLENECK, NETWORK))
def _(m: nn.Module, draw: Draw) -> Results:
    m.eval()
    xs = [draw.x(i, shape=(1 + i % 3, *draw.subject.shape()[1:])).detach() for i in range(8)]

    def evaluate(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [m(x) for _ in range(5)]

    results: Results = {}
    with ThreadPoolExecutor(4) as pool:
        for i, outputs in enumerate(pool.map(evaluate, xs)):
            record(results, f"input {i}", y=outputs)
    return results


@use("trained by two threads at once, a copy each", (PROJECTED, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> Results:
    def train(index: int) -> Results:
        results: Results = {}
        copied = copies[index]
        for i in range(3):
            step(copied, draw, results, f"copy {index}, step {i}", 10 * index + i)
            descend(copied)
        return results

    copies = [m, copy.deepcopy(m)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, range(2))
    return first | second


@use("two modules in turn, of one shape", (BASIC, BOTTLENECK))
def _(m: nn.Module, draw: Draw) -> Results:
    other = copy.deepcopy(m)
    for p in other.parameters():
        p.data.mul_(1.5)
    results: Results = {}
    for i in range(3):
        for j, module in enumerate((m, other)):
            infer(module, draw, results, f"turn {i}, module {j}", i)
    return results


@TABLE.every()
def test_a_module_whose_weights_were_written_does_what_the_plain_one_does(row, subject):
    if "another process" in row.name and not sys.platform.startswith("linux"):
        pytest.skip("needs fork")
    check(row, subject)
