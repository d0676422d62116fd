"""The launches of a step on a GPU, without one: the real model under fake CUDA tensors, its launchers writing down what
they would launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.operators import has_kernel
from benchmarks.workloads import CLASSES
from fastres import contract, models
from fastres.kernels import batch_norm_act as launchers
from fastres.kernels.launch import TRACED, Launch, recording
from fastres.kernels.plan import Device
from fastres.ops import batch_norm_act as operators

_PREFIX = "fastres::batch_norm_act_"


@dataclass
class Trace:
    """What a step did.

    Attributes:
        launches: of the Triton kernels, in order.
        operators: operator -> calls, views and other things without a kernel left out.
        mismatches: results whose shape, strides, dtype or device the launcher and the fake kernel see differently.
    """

    launches: list[Launch] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    mismatches: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and asks the launchers of ours what they launch."""

    def __init__(self, device: Device = TRACED) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.trace = Trace()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("aten::convolution"):
            out = _as_cudnn(args[0] if name == "aten::convolution" else args[1], out)
        if has_kernel(func):
            self.trace.operators[name] += 1
        if name.startswith(_PREFIX):
            with recording(self.device) as launches:
                operator = name.removeprefix(_PREFIX)
                grouped = getattr(operators, operator).arguments.group(*args)
                launched = getattr(launchers, operator)(**grouped)
            self.trace.launches += launches
            for i, (ours, fake) in enumerate(zip(tree_leaves(launched), tree_leaves(out), strict=True)):
                if _described(ours) != _described(fake):
                    self.trace.mismatches.append(f"{name}[{i}]: {_described(ours)}, the fake one {_described(fake)}")
        return out


def _as_cudnn(x: Tensor, out: Any) -> Any:
    """A convolution's results in the memory format of x, as cuDNN gives them and a fake one without a GPU does not."""
    if not isinstance(out, Tensor):
        return tuple(t if t is None or t.dim() != 4 else _as_cudnn(x, t) for t in out)
    return out.contiguous(memory_format=contract.memory_format(x))


def _described(t: Tensor) -> tuple[Any, ...]:
    # Strides of empty tensors mean nothing.
    return tuple(t.shape), t.stride() if t.numel() else (), t.dtype, t.device


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made within it have shapes and a CUDA device, and no data."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield


def run_backward(loss: Tensor) -> None:
    """loss.backward() without autograd's engine, which looks for the streams of a GPU that is not there.

    Nodes are called in the reverse order of their making; gradients land in `.grad` of the leaves.
    """
    gradients: dict[Any, list[Any]] = {loss.grad_fn: [torch.ones_like(loss)]}
    waiting: set[Any] = {loss.grad_fn}
    while waiting:
        node: Any = max(waiting, key=lambda n: n._sequence_nr())
        waiting.remove(node)
        given = gradients.pop(node)
        if hasattr(node, "variable"):
            node.variable.grad = given[0]
            continue
        run = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        results = run(*given)
        for (target, index), gradient in zip(
            node.next_functions, results if isinstance(results, tuple) else (results,), strict=False
        ):
            if target is None or gradient is None:
                continue
            # The engine undoes broadcasting, too.
            gradient = gradient.sum_to_size(target._input_metadata[index].shape)
            slots = gradients.setdefault(target, [])
            slots += [None] * (index + 1 - len(slots))
            slots[index] = gradient if slots[index] is None else slots[index] + gradient
            waiting.add(target)


def training_step(
    model: str = "resnet18", *, batch: int = 512, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0,
    memory_format: torch.memory_format = torch.channels_last, device: Device = TRACED,
) -> tuple[Trace, nn.Module]:  # fmt: skip
    """Forward, loss, backward and a step of SGD of a network with the CIFAR stem under autocast; (trace, network)."""
    with fake_cuda():
        network, images, labels = _network(model, batch, dropout, memory_format)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        with Recorder(device) as recorder:
            with _autocast(dtype):
                loss = F.cross_entropy(network(images), labels)
            with torch.no_grad():  # as the engine does
                run_backward(loss)
            optimizer.step()
    return recorder.trace, network


def evaluation(
    model: str = "resnet18", *, batch: int = 512, dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.channels_last, device: Device = TRACED,
) -> Trace:  # fmt: skip
    """A forward pass in evaluation mode, without gradients."""
    with fake_cuda():
        network, images, _ = _network(model, batch, 0.0, memory_format)
        network.eval()
        with Recorder(device) as recorder, torch.no_grad(), _autocast(dtype):
            network(images)
    trace: Trace = recorder.trace
    return trace


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast for CUDA, which refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


def _network(
    model: str, batch: int, dropout: float, memory_format: torch.memory_format
) -> tuple[nn.Module, Tensor, Tensor]:
    network = models.create(model, num_classes=CLASSES, dropout=dropout, fused=True)
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 4:  # Module.to would do so, but swaps tensors, which fake ones do not allow
                setattr(module, name, nn.Parameter(p.detach().contiguous(memory_format=memory_format)))
    images = torch.empty(batch, 3, 32, 32, device="cuda").contiguous(memory_format=memory_format)
    return network, images, torch.zeros(batch, dtype=torch.int64, device="cuda")


def model_launches(
    dtype: torch.dtype, memory_format: torch.memory_format, device: Device, batch: int = 512
) -> list[Launch]:
    """Every launch of the ResNet-18 and of the article's network in training and evaluation."""
    launches: list[Launch] = []
    for model, dropout in (("resnet18", 0.0), ("resnet18", 0.1), ("article", 0.1)):
        launches += training_step(
            model, batch=batch, dtype=dtype, dropout=dropout, memory_format=memory_format, device=device
        )[0].launches
    for model in ("resnet18", "article"):
        launches += evaluation(model, batch=batch, dtype=dtype, memory_format=memory_format, device=device).launches
    return launches
