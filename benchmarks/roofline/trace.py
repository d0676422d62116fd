"""One step of a network as a list of kernels, without a GPU.

The real model runs under FakeTensorMode, where tensors have shapes and no data. Module hooks say which layer is at
work, autograd's node numbers say it in backward, and a rule for each operator (benchmarks/roofline/kernels.py) says
which kernels a GPU would launch for it, and which tensors each of them reads and writes.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import CLASSES
from fastres import models

Phase = Literal["forward", "backward", "optimizer"]
Part = Literal["conv", "norm", "rest"]
Traffic = tuple[tuple[Hashable, int], ...]

PARTS: tuple[Part, ...] = ("conv", "norm", "rest")


@dataclass(frozen=True)
class Step:
    """What runs: one step of a network with the CIFAR stem, on [batch, 3, image, image], channels_last.

    Attributes:
        model: a name that `fastres.models.create` knows.
        dtype: float32, or that of autocast; parameters are float32 always.
        dropout: 0 <= dropout < 1, in each block.
        training: forward, backward and a step of SGD with momentum and weight decay; or forward in evaluation mode,
            without gradients.
    Raises:
        ValueError: batch or image below 1.
    """

    model: str = "resnet18"
    batch: int = 512
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    training: bool = True
    image: int = 32

    def __post_init__(self) -> None:
        for name in ("batch", "image"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Kernel:
    """One kernel, or one that is launched several times over parts of its tensors.

    Attributes:
        name: what it does.
        row: the layer whose work it is, by the name of the module.
        phase: forward, backward or optimizer.
        part: conv (the convolutions), norm (everything between them), rest.
        reads, writes: (storage, bytes) of each tensor.
        flops: floating-point operations; a multiplication with an addition counts as two.
        unit: which peak bounds them: the dtype of tensor-core operands, "tf32", or "fp32" for vector instructions.
        launches: how often it is launched.
    """

    name: str
    row: str
    phase: Phase
    part: Part
    reads: Traffic
    writes: Traffic
    flops: int
    unit: str
    launches: int = 1

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(size for _, size in self.reads + self.writes)


@dataclass(frozen=True)
class Call:
    """One operator that was dispatched, its arguments by name."""

    op: str
    row: str
    phase: Phase
    args: dict[str, Any]
    out: Any
    recorder: Recorder

    def kernel(
        self, name: str, part: Part, reads: Iterable[Tensor | None], writes: Iterable[Tensor | None], flops: int = 0,
        unit: str = "fp32", launches: int = 1, more_reads: Traffic = (), more_writes: Traffic = (),
    ) -> Kernel:  # fmt: skip
        """A kernel of this call; tensors that are None or empty do not count."""
        found = tuple(item for t in reads if t is not None for item in self.sources(t))
        written = tuple(traffic(t) for t in writes if t is not None and t.numel())
        return Kernel(
            name, self.row, self.phase, part, tuple(item for item in found + more_reads if item[1]),
            written + more_writes, flops, unit, launches,
        )  # fmt: skip

    def sources(self, tensor: Tensor) -> Traffic:
        """What has to be read for a tensor: itself, or what it is computed from where it was never written."""
        return self.recorder.inlined.get(storage(tensor), (traffic(tensor),))


Rule = Callable[[Call], list[Kernel]]


def storage(tensor: Tensor) -> Hashable:
    """Which memory a tensor lies in."""
    return int(tensor.untyped_storage()._cdata)


def traffic(tensor: Tensor) -> tuple[Hashable, int]:
    """Storage and bytes of one pass over a tensor; an expanded one is no larger than what it is expanded from."""
    return storage(tensor), min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns operators into kernels, and knows to which layer of the network each belongs.

    Attributes:
        kernels: in the order in which they run.
        y_of_x: storage of an activation's input -> its output, for rules that need it again in backward.
        inlined: storage of a tensor that is never written -> what is read in its place.
    """

    def __init__(self, network: nn.Module, rule_of: Callable[[Any], Rule], *, by_parameters: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.kernels: list[Kernel] = []
        self.y_of_x: dict[Hashable, Tensor] = {}
        self.inlined: dict[Hashable, Traffic] = {}
        self._rule_of = rule_of
        # A storage that is freed would give its address to another. Kept are storages, not tensors: autograd copies a
        # gradient that somebody else holds.
        self._keep: list[torch.UntypedStorage] = []
        self._modules = dict(network.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._stack: list[str] = []
        self._norm_row = ""
        # Hooks on all modules would take a fused block off its faster way: there a layer is known by its parameters.
        self._by_parameters = by_parameters
        self._owners: dict[Hashable, str] = {
            storage(tensor): name
            for name, module in self._modules.items()
            for tensor in (*module.parameters(False), *module.buffers(False))
        }
        # Autograd numbers its nodes as forward makes them: number -> layer.
        self._row_of_node: dict[int, str] = {}

    def __enter__(self) -> Recorder:
        self._hooks = []
        if not self._by_parameters:
            self._hooks = [register_module_forward_pre_hook(self._begin), register_module_forward_hook(self._end)]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        name = self._names[module]
        parent, _, child = name.rpartition(".")
        if child == "downsample":
            self._norm_row = self._last_norm(parent)
        elif isinstance(module, nn.BatchNorm2d) and not parent.endswith("downsample"):
            self._norm_row = name
        if child == "downsample":
            name += ".0"
        elif not isinstance(module, (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d)):
            name = ""
        self._stack.append(name)

    def _last_norm(self, block: str) -> str:
        """What closes a block counts with the block's last normalisation, that of the shortcut as well."""
        return f"{block}.{'bn3' if hasattr(self._modules[block], 'bn3') else 'bn2'}"

    def _row_of_parameters(self, op: str, tensors: list[Tensor], out: Any) -> str:
        """The layer of an operator in forward: that of its parameters, or of those before it."""
        owners = [self._owners[storage(tensor)] for tensor in tensors if storage(tensor) in self._owners]
        if not owners:
            if self._norm_row == "fc":
                return "loss"
            return "avgpool" if op.startswith(("aten::mean", "aten::_adaptive_avg_pool2d")) else self._norm_row
        owner = min(owners, key=lambda name: "downsample" in name)
        if op.startswith("aten::_to_copy"):  # a parameter in autocast's dtype
            self._owners |= {storage(tensor): owner for tensor in tensors_in(out)}
        module = self._modules[owner]
        if isinstance(module, nn.BatchNorm2d) or owner == "fc":
            block, _, rest = owner.partition(".downsample")
            self._norm_row = owner if not rest else self._last_norm(block)
            return self._norm_row
        return owner

    def _end(self, *_: Any) -> None:
        self._stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._keep += [tensor.untyped_storage() for tensor in tensors_in((args, kwargs, out))]
        names = [argument.name for argument in func._schema.arguments]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        row = self._row(func.name(), tensors_in((args, kwargs)), out)
        self.kernels += self._rule_of(func)(Call(func.name(), row, self.phase, named, out, self))
        return out

    def _row(self, op: str, tensors: list[Tensor], out: Any) -> str:
        if self.phase == "optimizer":
            return "optimizer"
        if self.phase == "forward":
            if self._by_parameters:
                row = self._row_of_parameters(op, tensors, out)
            else:
                row = (self._stack[-1] or self._norm_row) if self._stack else "loss"
            # What runs without autograd after a node, counters for instance, sees the same number.
            number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            self._row_of_node.setdefault(number - 1, row)
            return row
        node: Any = torch._C._current_autograd_node()
        if node is None:  # The engine adds gradients between nodes.
            return "loss"
        numbers = sorted(self._row_of_node)
        found = bisect_right(numbers, node._sequence_nr()) - 1
        return self._row_of_node[numbers[found]] if found >= 0 else "loss"

    def finish(self) -> list[Kernel]:
        """The kernels; gradients that are added or copied on the way count with the layer that takes them."""
        for index, kernel in enumerate(self.kernels):
            if kernel.phase == "backward" and kernel.name in ("add.Tensor", "add_.Tensor", "clone"):
                target = kernel.writes[0][0]
                readers = (k for k in self.kernels[index + 1 :] if target in [key for key, _ in k.reads])
                row = next(readers, kernel).row
                self.kernels[index] = replace(kernel, row=row, part="norm", name=f"gradient {kernel.name}")
        return self.kernels


class _GpuDropout(TorchFunctionMode):
    """Make F.dropout the operator that it is on a GPU: one kernel that writes the result and a mask of bytes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            p, training = kwargs["p"], kwargs["training"]
            return torch.native_dropout(args[0], p, True)[0] if training and p > 0 else args[0]
        return func(*args, **kwargs)


def record(step: Step, *, fused: bool, rule_of: Callable[[Any], Rule]) -> list[Kernel]:
    """Run a step without data and give its kernels.

    Args:
        fused: fastres's network, or the same on plain PyTorch.
        rule_of: the rule for an operator.
    Raises:
        TypeError, ValueError: what `fastres.models.create` refuses.
    """
    # The CPU stands for the GPU: where there is none, the autograd engine refuses tensors that claim to be on it.
    with FakeTensorMode():
        # The CPU's own convolutions are not what a GPU runs.
        algorithm = "torch" if fused else None
        network = models.create(
            step.model, num_classes=CLASSES, dropout=step.dropout, fused=fused, conv_algorithm=algorithm
        )
        network.train(step.training)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.detach().contiguous(memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight)
        images = torch.empty(step.batch, 3, step.image, step.image).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(step.batch, dtype=torch.int64)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, foreach=True)
        recorder = Recorder(network, rule_of, by_parameters=fused)

        def run() -> None:
            recorder.phase = "forward"
            autocast = torch.autocast("cpu", step.dtype, enabled=step.dtype != torch.float32)
            with autocast, torch.set_grad_enabled(step.training):
                logits = network(images)
                if not step.training:
                    return
                loss = F.cross_entropy(logits, labels)
            recorder.phase = "backward"
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            recorder.phase = "optimizer"
            optimizer.step()

        if step.training:
            run()  # The first step makes the momentum buffers.
        with recorder, contextlib.nullcontext() if fused else _GpuDropout():
            run()
    return recorder.finish()
