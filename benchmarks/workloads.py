"""What is measured. A workload is one task; its sides (eager, compile, fused) do that task on tensors of their own.

Every side runs channels_last, which is no slower for eager than contiguous NCHW, at batch 1 either. On a GPU the same
workloads run at batch 512 under bfloat16 autocast, with more sides: torch.compile with autotuning, every side of a
network under a CUDA graph, and fastres under torch.compile in training. FASTRES_BENCH_QUICK=1 makes everything tiny: it
shows that the benchmarks run, and says nothing about speed.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from benchmarks import sides
from fastres import models
from fastres.functional import NormParams, batch_norm_act, conv3x3, projection_shortcut
from fastres.nn import FusedBasicBlock

EAGER, COMPILE, FUSED = SIDES = sides.SIDES
MAX_AUTOTUNE, FUSED_COMPILE = sides.MAX_AUTOTUNE, sides.FUSED_COMPILE
COMPILED = (*sides.COMPILERS, FUSED_COMPILE)

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
class Network:
    """A network, its images' side in pixels, at 96 and below with the stem for CIFAR-10, and its channels' factor."""

    model: str = "resnet18"
    image: int = IMAGE
    width: float = 1.0

    @property
    def name(self) -> str:
        words = self.model.replace("resnet", "ResNet-") + (f" x {self.width:g}" if self.width != 1 else "")
        return words if self.image == IMAGE else f"{words} at {self.image}"


CIFAR = Network()
# What is trained at the size of ImageNet's pictures, with its batch; a GPU's list is benchmarks.gpu.measure's.
LARGE = ((Network("resnet18", 224), 32), (Network("resnet50", 224), 16), (Network("wrn28-10"), 16))


@dataclass(frozen=True)
class Workload:
    """One task. `make(side)` sets a side up; the function it returns does the task once, to the end.

    Attributes:
        group: op, projection, conv, block, model-train-step or model-inference.
        key: the task in one word, unique in its group.
        name: the task in words, for tables.
        images: images, or samples of the batch, in one run.
        rounds: runs that give a steady median without taking long.
        set_up: as `make`, but what it returns does not wait for the GPU, and what was compiled before stays.
        sides: who does it, eager first.
        shape: of the tensor that the operator passes over; None where the task is more than one operator.
        bytes: what one run has to read and write at least; None likewise.
        dropout: the dropout rate of the operator, or of the network.
    """

    group: str
    key: str
    name: str
    images: int
    rounds: int
    set_up: Callable[[str], Run]
    sides: tuple[str, ...]
    shape: Shape | None = None
    bytes: int | None = None
    dropout: float = 0.0

    def make(self, side: str) -> Run:
        """A function that does the task once and returns when the device has finished."""
        if side in COMPILED:
            # One workload's shapes must not make the next one's symbolic.
            torch.compiler.reset()
        return _to_the_end(self.set_up(side))

    @property
    def warmup_rounds(self) -> int:
        """Runs before the clock: compilation, the allocator's first pages, cuDNN's choice of algorithms."""
        return 1 if self.group == "model-train-step" and not CUDA else 3


def op_workloads(batch: int = BATCH) -> Iterator[Workload]:
    """y = dropout(relu(bn(x) + r)), forward + backward, at the four shapes of ResNet-18's stages."""
    for stage in range(2 if QUICK else 4):
        shape = (batch, 64 << stage, IMAGE >> stage, IMAGE >> stage)
        for dropout in DROPOUTS:
            # Compilation takes most of a quick run, so one case stands for all.
            compiled = not QUICK or (stage == 0 and dropout == 0)
            yield Workload(
                group="op",
                key=f"{'x'.join(map(str, shape))}-dropout{dropout:g}",
                name=f"relu(bn(x) + r), {shape_words(shape)}" + (f", dropout {dropout:g}" if dropout else ""),
                images=batch,
                rounds=2 if QUICK else 20,
                set_up=_op(shape, dropout),
                sides=_sides() if compiled else (EAGER, FUSED),
                shape=shape,
                bytes=least_bytes(shape),
                dropout=dropout,
            )


def projection_workloads(batch: int = BATCH) -> Iterator[Workload]:
    """y = relu(bn(x) + bn(conv1x1(s))), forward + backward: what ends the first block of ResNet-18's later stages."""
    for stage in range(1 if QUICK else 3):
        channels, size = 64 << stage, IMAGE >> stage
        yield Workload(
            group="projection",
            key=f"{batch}x{channels}to{2 * channels}x{size}",
            name=f"relu(bn(x) + bn(conv1x1(s))), {channels} to {2 * channels} channels, s"
            f" {shape_words((batch, channels, size, size))}",
            images=batch,
            rounds=2 if QUICK else 20,
            set_up=_projection((batch, channels, size, size)),
            sides=_model_sides(),
        )


CONV_PASSES = {"forward": "forward", "input": "input gradient", "weight": "weight gradient"}


def conv_workloads(batches: tuple[int, ...] = (64, 128)) -> Iterator[Workload]:
    """conv3x3(x, weight) at the four shapes of ResNet-18's stages, float32 on the CPU: forward, or one gradient of it.

    The weights' transform counts in every run. On a GPU there is nothing to compare: both sides are PyTorch's.
    """
    if CUDA:
        return
    for batch in (2,) if QUICK else batches:
        for stage in range(1 if QUICK else 4):
            shape = (batch, 64 << stage, IMAGE >> stage, IMAGE >> stage)
            for key, words in CONV_PASSES.items():
                yield Workload(
                    group="conv",
                    key=f"{'x'.join(map(str, shape))}-{key}",
                    name=f"3x3 convolution, {words}, {shape[1]} channels, {shape_words(shape)}",
                    images=batch,
                    rounds=2 if QUICK else 20,
                    set_up=_conv(shape, key),
                    sides=(EAGER, FUSED),
                )


def block_workloads() -> Iterator[Workload]:
    """A basic block of ResNet-18, forward + backward: with the identity, and with a projection, as its shortcut."""
    for projection in (False, True):
        words = "projection shortcut, 64 to 128 channels" if projection else "identity shortcut, 64 channels"
        yield Workload(
            group="block",
            key="projection" if projection else "identity",
            name=f"basic block, {words}, {shape_words((BATCH, 64, IMAGE, IMAGE))}",
            images=BATCH,
            rounds=2 if QUICK else 8,
            set_up=_block(projection),
            sides=_model_sides(),
        )


def train_workloads(
    batch: int = BATCH, dropout: float = 0.0, amp: bool = CUDA, network: Network = CIFAR
) -> Iterator[Workload]:
    """A network, ResNet-18 with the CIFAR stem, say: forward, backward and a step of SGD with momentum."""
    lowered = ", bfloat16 autocast" if amp and not CUDA else ""  # on a GPU autocast is what every workload runs under
    dropped = f", dropout {dropout:g}" if dropout else ""
    key = f"batch{batch}" + (f"-dropout{dropout:g}" if dropout else "") + ("-bfloat16" if lowered else "")
    yield Workload(
        group="model-train-step",
        key=key if network == CIFAR else f"{network.model}-{network.image}-{key}",
        name=f"{network.name} training step, batch {batch}{dropped}{lowered}",
        images=batch,
        rounds=1 if QUICK else 20 if CUDA else 3,
        set_up=_train_step(network, batch, dropout, amp),
        sides=(*_model_sides(), *((FUSED_COMPILE, *sides.GRAPHS) if CUDA else ())),
        dropout=dropout,
    )


def all_train_workloads(large: bool) -> Iterator[Workload]:
    """ResNet-18's training step plain, with dropout, on a CPU that gains by it under autocast; `LARGE` if asked for."""
    yield from train_workloads()
    if not QUICK:
        yield from train_workloads(dropout=max(DROPOUTS))
    # Elsewhere PyTorch emulates bfloat16, at a twentieth of float32's speed.
    if not CUDA and torch.cpu.get_capabilities().get("avx512_bf16", False):
        yield from train_workloads(amp=True)
    for network, batch in LARGE if large and not (CUDA or QUICK) else ():
        yield from train_workloads(batch, network=network)


def inference_workloads(batches: tuple[int, ...] = (BATCH, 1), network: Network = CIFAR) -> Iterator[Workload]:
    """A network, ResNet-18 with the CIFAR stem, say, in evaluation mode, without gradients."""
    for batch in batches:
        yield Workload(
            group="model-inference",
            key=f"batch{batch}" if network == CIFAR else f"{network.model}-{network.image}-batch{batch}",
            name=f"{network.name} inference, batch {batch}",
            images=batch,
            rounds=2 if QUICK else 6 if batch > 1 else 40,
            set_up=_inference(network, batch),
            sides=(*_model_sides(), *(sides.GRAPHS if CUDA else ())),
        )


def _sides() -> tuple[str, ...]:
    return (*SIDES, MAX_AUTOTUNE) if CUDA else SIDES


def _model_sides() -> tuple[str, ...]:
    return (EAGER, FUSED) if QUICK else _sides()


def least_bytes(shape: Shape) -> int:
    """Bytes that forward + backward of the operator with a residual read and write at least.

    Ten passes over a tensor of x's size: forward reads x twice and r and writes y; backward reads dy and x twice each
    and writes dx and dr. One bit an element is written once and read twice.
    """
    return 10 * math.prod(shape) * DTYPE.itemsize + 3 * math.prod(shape) // 8


def input_sets(input_bytes: int) -> int:
    """How many sets of inputs the runs take in turn, so that none finds its inputs in the GPU's L2 cache.

    1 on the CPU, where a set is as large as the last-level cache or larger at most shapes.
    """
    if not CUDA:
        return 1
    return math.ceil(4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size / input_bytes)


def copied_bytes(shape: Shape) -> int:
    """Bytes that `copy(shape)` reads and writes."""
    return 2 * math.prod(shape) * DTYPE.itemsize


def copy(shape: Shape) -> Run:
    """A copy of one tensor into another, the yardstick for memory bandwidth at this size."""
    source = _activation(shape)
    target = torch.empty_like(source)
    return _to_the_end(lambda: target.copy_(source))


def make_network(side: str, network: Network = CIFAR, dropout: float = 0.0) -> nn.Module:
    """A network on the benchmark's device, channels_last; for every side but ours in plain PyTorch."""
    torch.manual_seed(0)
    stem = "cifar" if network.image <= 96 else "imagenet"
    model = models.create(
        network.model, num_classes=CLASSES, stem=stem, dropout=dropout, fused=side in sides.OURS, width=network.width
    )
    model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def training_loss(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, amp: bool = CUDA) -> Tensor:
    """The forward half of a training step, under bfloat16 autocast where `amp` is on."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
        return F.cross_entropy(model(images), labels)


def image_batch(batch: int, side: int = IMAGE) -> tuple[Tensor, Tensor]:
    """Images [batch, 3, side, side], channels_last, float32, and their labels [batch]."""
    images = torch.randn(batch, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (batch,), device=DEVICE)


# -------------------------------------------------------------------------------------------------------------- sides


def _op(shape: Shape, dropout: float) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        torch.manual_seed(0)
        channels = shape[1]
        bytes_a_set = 3 * math.prod(shape) * DTYPE.itemsize
        sets = [
            (leaf(shape), leaf(shape), _activation(shape))  # x, r, dy
            for _ in range(input_sets(bytes_a_set))
        ]
        weight, bias, mean, var = norm_vectors(channels)

        def plain(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + r)
            return F.dropout(y, dropout) if dropout else y

        def fused(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return batch_norm_act(x, mean, var, weight, bias, training=True, residual=r, dropout_p=dropout)

        forward = fused if side == FUSED else compiled_for(plain, side, graphs=False)
        turns = itertools.cycle(sets)

        def run() -> None:
            x, r, dy = next(turns)
            for leaf in (x, r, weight, bias):
                leaf.grad = None
            torch.autograd.backward(forward(x, r, weight, bias), dy)

        return run

    return set_up


def _projection(shape: Shape) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        torch.manual_seed(0)
        batch, channels, height, width = shape
        out_channels = 2 * channels
        out_shape = (batch, out_channels, height // 2, width // 2)
        bytes_a_set = (math.prod(shape) + 2 * math.prod(out_shape)) * DTYPE.itemsize
        sets = [
            (leaf(shape), leaf(out_shape), _activation(out_shape))  # s, x, dy
            for _ in range(input_sets(bytes_a_set))
        ]
        kernel = _activation((out_channels, channels, 1, 1)).mul_(channels**-0.5).requires_grad_()
        x_weight, x_bias, x_mean, x_var = norm_vectors(out_channels)
        weight, bias, mean, var = norm_vectors(out_channels)

        def plain(s: Tensor, x: Tensor) -> Tensor:
            z = F.batch_norm(x, x_mean, x_var, x_weight, x_bias, training=True)
            return F.relu(z + F.batch_norm(F.conv2d(s, kernel, stride=2), mean, var, weight, bias, training=True))

        def fused(s: Tensor, x: Tensor) -> Tensor:
            norm, x_norm = NormParams(mean, var, weight, bias), NormParams(x_mean, x_var, x_weight, x_bias)
            return projection_shortcut(s, kernel, norm, x, x_norm, stride=2, training=True)

        forward = fused if side == FUSED else compiled_for(plain, side, graphs=False)
        turns = itertools.cycle(sets)

        def run() -> None:
            s, x, dy = next(turns)
            for leaf in (s, x, kernel, x_weight, x_bias, weight, bias):
                leaf.grad = None
            torch.autograd.backward(forward(s, x), dy)

        return run

    return set_up


def _conv(shape: Shape, key: str) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        torch.manual_seed(0)
        channels = shape[1]
        x, dy = _activation(shape), _activation(shape)
        weight = _activation((channels, channels, 3, 3)).mul_((9 * channels) ** -0.5)
        if side == FUSED:
            # Gradients are asked for so that no transformed weights are kept from the run before.
            x.requires_grad_(key != "weight")
            weight.requires_grad_(key != "input")
            if key == "forward":
                return lambda: conv3x3(x, weight)
            y = conv3x3(x, weight)
            wanted = x if key == "input" else weight
            return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
        if key == "forward":
            return lambda: F.conv2d(x, weight, padding=1)
        wanted = (x if key == "input" else weight).requires_grad_()
        y = F.conv2d(x, weight, padding=1)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    return set_up


def _block(projection: bool) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        torch.manual_seed(0)
        channels, stride = (128, 2) if projection else (64, 1)
        conv = nn.Conv2d(64, channels, kernel_size=1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels)) if projection else None
        block = (FusedBasicBlock if side == FUSED else BasicBlock)(64, channels, stride, shortcut)
        block.to(DEVICE, DTYPE).to(memory_format=torch.channels_last)
        x = leaf((BATCH, 64, IMAGE, IMAGE))
        dy = _activation((BATCH, channels, IMAGE // stride, IMAGE // stride))
        forward = compiled_for(block, side)

        def run() -> None:
            block.zero_grad(set_to_none=True)
            x.grad = None
            torch.autograd.backward(forward(x), dy)

        return run

    return set_up


def _train_step(network: Network, batch: int, dropout: float, amp: bool) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        model = make_network(side, network, dropout)
        images, labels = image_batch(batch, network.image)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        forward = compiled_for(model, side)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(training_loss(forward, images, labels, amp))
            optimizer.step()

        return graphed(run) if side in sides.GRAPHS else run

    return set_up


def _inference(network: Network, batch: int) -> Callable[[str], Run]:
    def set_up(side: str) -> Run:
        model = make_network(side, network).eval()
        images, _ = image_batch(batch, network.image)
        forward = compiled_for(model, side)

        def run() -> None:
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                forward(images)

        return graphed(run) if side in sides.GRAPHS else run

    return set_up


def compiled_for(forward: Callable[..., Tensor], side: str, *, graphs: bool = True) -> Callable[..., Tensor]:
    if side not in COMPILED:
        return forward
    # Autotuning also puts CUDA graphs in. They copy what changes from run to run into buffers of their own: traffic
    # that would count against a bare operator whose inputs take turns, and whose launches are hidden anyway.
    autotune = "max-autotune" if graphs else "max-autotune-no-cudagraphs"
    compiled: Callable[..., Tensor] = torch.compile(
        forward, dynamic=False, mode=autotune if side == MAX_AUTOTUNE else None
    )
    return compiled


def graphed(step: Run) -> Run:
    """A replay of `step`, in training or in inference, as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The optimizer's state, cuDNN's choices and compiled kernels have to exist before the capture.
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    kept = graph, step  # the graph knows where the step's tensors lie, and does not hold them

    def replay() -> None:
        kept[0].replay()

    return replay


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


def leaf(shape: Shape) -> Tensor:
    return _activation(shape).requires_grad_()


def norm_vectors(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias, which take gradients, and running mean and variance of a batch normalisation."""
    weight = torch.rand(channels, device=DEVICE).add_(0.5).requires_grad_()
    bias = torch.randn(channels, device=DEVICE).requires_grad_()
    return weight, bias, torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)


def shape_words(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
