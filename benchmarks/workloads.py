"""What is measured. A workload is one task; its sides (eager, compile, fused) do that task on tensors of their own.

Every side runs channels_last, which is no slower for eager than contiguous NCHW. On a GPU the same workloads run at
batch 512 under bfloat16 autocast. FASTRES_BENCH_QUICK=1 makes everything tiny: it shows that the benchmarks run, and
says nothing about speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from fastres import models
from fastres.functional import batch_norm_act
from fastres.nn import FusedBasicBlock

EAGER, COMPILE, FUSED = SIDES = ("eager", "compile", "fused")

CUDA = torch.cuda.is_available()
QUICK = os.environ.get("FASTRES_BENCH_QUICK", "0") not in ("", "0")
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH = 4 if QUICK else 512 if CUDA else 128
IMAGE = 16 if QUICK else 32
CLASSES = 10
DROPOUTS = (0.0, 0.1)

Shape = tuple[int, int, int, int]
Run = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """One task. `make(side)` sets a side up; the function it returns does the task once, to the end.

    Attributes:
        group: op, block, model-train-step or model-inference.
        key: the task in one word, unique in its group.
        name: the task in words, for tables.
        images: images, or samples of the batch, in one run.
        rounds: runs that give a steady median without taking long.
        sides: who does it, eager first.
        shape: of the tensor that the operator passes over; None where the task is more than one operator.
        bytes: what one run has to read and write at least; None likewise.
        dropout: the dropout rate of the operator.
    """

    group: str
    key: str
    name: str
    images: int
    rounds: int
    make: Callable[[str], Run]
    sides: tuple[str, ...]
    shape: Shape | None = None
    bytes: int | None = None
    dropout: float = 0.0

    @property
    def warmup_rounds(self) -> int:
        """Runs before the clock: compilation, the allocator's first pages, cuDNN's choice of algorithms."""
        return 1 if self.group == "model-train-step" and not CUDA else 3


def op_workloads() -> Iterator[Workload]:
    """y = dropout(relu(bn(x) + r)), forward + backward, at the four shapes of ResNet-18's stages."""
    for stage in range(2 if QUICK else 4):
        shape = (BATCH, 64 << stage, IMAGE >> stage, IMAGE >> stage)
        for dropout in DROPOUTS:
            # Compilation takes most of a quick run, so one case stands for all.
            compiled = not QUICK or (stage == 0 and dropout == 0)
            yield Workload(
                group="op",
                key=f"{'x'.join(map(str, shape))}-dropout{dropout:g}",
                name=f"relu(bn(x) + r), {_text(shape)}" + (f", dropout {dropout:g}" if dropout else ""),
                images=BATCH,
                rounds=2 if QUICK else 20,
                make=_op(shape, dropout),
                sides=SIDES if compiled else (EAGER, FUSED),
                shape=shape,
                bytes=least_bytes(shape),
                dropout=dropout,
            )


def block_workloads() -> Iterator[Workload]:
    """A basic block of ResNet-18, forward + backward: with the identity, and with a projection, as its shortcut."""
    for projection in (False, True):
        words = "projection shortcut, 64 to 128 channels" if projection else "identity shortcut, 64 channels"
        yield Workload(
            group="block",
            key="projection" if projection else "identity",
            name=f"basic block, {words}, {_text((BATCH, 64, IMAGE, IMAGE))}",
            images=BATCH,
            rounds=2 if QUICK else 8,
            make=_block(projection),
            sides=_model_sides(),
        )


def train_workloads() -> Iterator[Workload]:
    """ResNet-18 with the CIFAR stem: forward, backward and a step of SGD with momentum."""
    yield Workload(
        group="model-train-step",
        key=f"batch{BATCH}",
        name=f"ResNet-18 training step, batch {BATCH}",
        images=BATCH,
        rounds=1 if QUICK else 20 if CUDA else 3,
        make=_train_step(BATCH),
        sides=_model_sides(),
    )


def inference_workloads() -> Iterator[Workload]:
    """ResNet-18 with the CIFAR stem in evaluation mode, without gradients."""
    for batch in (BATCH, 1):
        yield Workload(
            group="model-inference",
            key=f"batch{batch}",
            name=f"ResNet-18 inference, batch {batch}",
            images=batch,
            rounds=2 if QUICK else 6 if batch > 1 else 40,
            make=_inference(batch),
            sides=_model_sides(),
        )


def _model_sides() -> tuple[str, ...]:
    return (EAGER, FUSED) if QUICK else SIDES


def least_bytes(shape: Shape) -> int:
    """Bytes that forward + backward of the operator with a residual read and write at least.

    Ten passes over a tensor of x's size: forward reads x twice and r and writes y; backward reads dy and x twice each
    and writes dx and dr. One bit an element is written once and read twice.
    """
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    return 10 * elements * DTYPE.itemsize + 3 * elements // 8


def copied_bytes(shape: Shape) -> int:
    """Bytes that `copy(shape)` reads and writes."""
    return 2 * shape[0] * shape[1] * shape[2] * shape[3] * DTYPE.itemsize


def copy(shape: Shape) -> Run:
    """A copy of one tensor into another, the yardstick for memory bandwidth at this size."""
    source = _activation(shape)
    target = torch.empty_like(source)
    return _to_the_end(lambda: target.copy_(source))


def resnet18(side: str, dropout: float = 0.0) -> nn.Module:
    """ResNet-18 on the benchmark's device, channels_last; for every side but the fused one in plain PyTorch."""
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=CLASSES, dropout=dropout, fused=side == FUSED)
    model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def training_loss(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The forward half of a training step."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        return F.cross_entropy(model(images), labels)


def image_batch(batch: int) -> tuple[Tensor, Tensor]:
    """Images [batch, 3, H, W], channels_last, float32, and their labels [batch]."""
    images = torch.randn(batch, 3, IMAGE, IMAGE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (batch,), device=DEVICE)


# -------------------------------------------------------------------------------------------------------------- sides


def _op(shape: Shape, dropout: float) -> Callable[[str], Run]:
    def make(side: str) -> Run:
        torch.manual_seed(0)
        channels = shape[1]
        x, r = (_activation(shape).requires_grad_() for _ in range(2))
        dy = _activation(shape)
        weight = torch.rand(channels, device=DEVICE).add_(0.5).requires_grad_()
        bias = torch.randn(channels, device=DEVICE).requires_grad_()
        mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)

        def plain(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + r)
            return F.dropout(y, dropout) if dropout else y

        def fused(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return batch_norm_act(x, mean, var, weight, bias, training=True, residual=r, dropout_p=dropout)

        forward = fused if side == FUSED else _compiled(plain, side)

        def run() -> None:
            for leaf in (x, r, weight, bias):
                leaf.grad = None
            torch.autograd.backward(forward(x, r, weight, bias), dy)

        return _to_the_end(run)

    return make


def _block(projection: bool) -> Callable[[str], Run]:
    def make(side: str) -> Run:
        torch.manual_seed(0)
        channels, stride = (128, 2) if projection else (64, 1)
        shortcut = None
        if projection:
            shortcut = nn.Sequential(
                nn.Conv2d(64, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        block = (FusedBasicBlock if side == FUSED else BasicBlock)(64, channels, stride, shortcut)
        block.to(DEVICE, DTYPE, memory_format=torch.channels_last)
        x = _activation((BATCH, 64, IMAGE, IMAGE)).requires_grad_()
        dy = _activation((BATCH, channels, IMAGE // stride, IMAGE // stride))
        forward = _compiled(block, side)

        def run() -> None:
            block.zero_grad(set_to_none=True)
            x.grad = None
            torch.autograd.backward(forward(x), dy)

        return _to_the_end(run)

    return make


def _train_step(batch: int) -> Callable[[str], Run]:
    def make(side: str) -> Run:
        model = resnet18(side)
        images, labels = image_batch(batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        forward = _compiled(model, side)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(training_loss(forward, images, labels))
            optimizer.step()

        return _to_the_end(run)

    return make


def _inference(batch: int) -> Callable[[str], Run]:
    def make(side: str) -> Run:
        model = resnet18(side).eval()
        images, _ = image_batch(batch)
        forward = _compiled(model, side)

        def run() -> None:
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                forward(images)

        return _to_the_end(run)

    return make


def _compiled(forward: Callable[..., Tensor], side: str) -> Callable[..., Tensor]:
    if side != COMPILE:
        return forward
    # One workload's shapes must not make the next one's symbolic.
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(forward, dynamic=False)
    return compiled


def _to_the_end(run: Run) -> Run:
    """`run` that returns only when the device has finished."""
    if not CUDA:
        return run

    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    return synchronised


def _activation(shape: Shape) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE, memory_format=torch.channels_last)


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
