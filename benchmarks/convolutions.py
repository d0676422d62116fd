"""`python -m benchmarks.convolutions`: the algorithm that is chosen for every convolution of ResNet-18 and ResNet-50,
beside the measured times of all that serve it.

A convolution that no kernel of ours serves has PyTorch's algorithm alone. The others are measured interleaved: each
round runs every algorithm once, and figures are medians over the rounds. In training forward and backward count, with
the gradients that the network asks for, and around a 1x1 convolution the passes of the normalisations beside it that
ours spares: the statistics of its output, and where it has more outputs than inputs, as the last one of a bottleneck,
the normalisation and ReLU before it. In evaluation a normalisation by running statistics and ReLU follow, as in blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torchvision
import tyro
from torch import Tensor
from tqdm import tqdm

import fastres
from benchmarks.machine import describe_machine
from benchmarks.records import insert_table, number, row, to_json, write_text
from fastres.activations import RELU
from fastres.functional import NormParams, Statistics, conv1x1_with_statistics, conv3x3_norm_act, norm_act_conv1x1
from fastres.ops import conv3x3 as ops
from fastres.ops.algorithms import Choice, choose_algorithm, is_served, problem_of

ALGORITHMS = ("torch", "winograd", "gemm")
# The choice may be this much slower than the best.
ALLOWED = 1.05


@dataclass(frozen=True)
class Config:
    """Print the choice of algorithm beside the measured times."""

    networks: tuple[str, ...] = ("resnet18", "resnet50")
    """Networks of torchvision whose convolutions are measured."""
    images: tuple[int, ...] = (32, 224)
    """Sides of the images; at 32 and below the stem is the one for CIFAR-10."""
    batches: tuple[int, ...] = (1, 16, 128)
    """Batches; those of more than 16 images are left out above 32 pixels."""
    rounds: int = 15
    """Rounds of every convolution."""
    json: Path | None = None
    """File for the raw figures."""
    page: Path | None = None
    """Markdown file that takes the table, between `<!-- choices-avx2 -->` and `<!-- /choices-avx2 -->`, or whatever the
    instruction set is."""


@dataclass(frozen=True)
class Convolution:
    """One convolution of a network on an input of a given size."""

    shape: tuple[int, int, int, int]
    outputs: int
    kernel: int
    stride: int
    training: bool

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{size} to {self.outputs}, {self.kernel}x{self.kernel}{stride}"


@dataclass(frozen=True)
class Measured:
    """A convolution with its choice, and the median seconds of each algorithm that serves it."""

    convolution: Convolution
    choice: Choice
    seconds: dict[str, float]

    @property
    def behind(self) -> float:
        """The chosen algorithm's time over the best one's."""
        return self.seconds[self.choice.algorithm] / min(self.seconds.values())


def convolutions(network: str, image: int, batch: int, training: bool) -> Counter[Convolution]:
    """The network's convolutions, and how often it has each."""
    model = getattr(torchvision.models, network)()
    if image <= 32:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    found: Counter[Convolution] = Counter()

    def note(module: nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        _, c, h, w = args[0].shape
        kernel, stride = module.kernel_size[0], module.stride[0]
        found[Convolution((batch, c, h, w), module.out_channels, kernel, stride, training)] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.device("meta"):
        model.to("meta").eval()(torch.empty(1, 3, image, image))
    return found


def sides(conv: Convolution) -> Iterator[tuple[str, Callable[[], object]]]:
    """(algorithm, a run) of everything that serves the convolution."""
    x = torch.randn(conv.shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(conv.outputs, conv.shape[1], conv.kernel, conv.kernel) * 0.05
    weight = weight.contiguous(memory_format=torch.channels_last)
    padding = conv.kernel // 2

    def torchs() -> Tensor:
        return nn.functional.conv2d(x, weight, stride=conv.stride, padding=padding)

    if conv.training:
        x.requires_grad_(conv.shape[1] > 3)
        weight.requires_grad_()
        dy = torch.randn_like(torchs())
        inputs = [t for t in (x, weight) if t.requires_grad]
        if conv.kernel == 1 and conv.stride == 1:
            for name, run in pointwise_sides(conv, x, weight):
                yield name, lambda run=run: torch.autograd.grad(run(), inputs, dy)  # type: ignore[misc]
            return
        yield "torch", lambda: torch.autograd.grad(torchs(), inputs, dy)
        if conv.kernel == 3 and conv.stride <= 2:
            yield (
                "winograd",
                lambda: torch.autograd.grad(ops.Conv3x3.apply(x, weight, False, conv.stride)[0], inputs, dy),
            )
        return
    if conv.kernel != 3:
        yield "torch", torchs
        return
    norm = NormParams(
        torch.zeros(conv.outputs), torch.ones(conv.outputs), torch.ones(conv.outputs), torch.zeros(conv.outputs)
    )
    yield "torch", lambda: conv3x3_norm_act(x, weight, norm, stride=conv.stride, algorithm="torch")
    if conv.stride <= 2:
        yield "winograd", lambda: ops.inference(x, weight, norm, None, RELU, conv.stride, "winograd")
    yield "gemm", lambda: ops.inference(x, weight, norm, None, RELU, conv.stride, "gemm")


def pointwise_sides(conv: Convolution, x: Tensor, weight: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(algorithm, y of a 1x1 convolution in training, after the normalisation before it where there is one)."""
    channels = conv.shape[1]
    norm = NormParams(None, None, torch.ones(channels), torch.zeros(channels))
    known = Statistics(*torch.ops.fastres.batch_norm_act_stats(x.detach())[1:])  # the convolution before took them

    def convolve(algorithm: str) -> Tensor:
        if conv.outputs <= channels:
            y, found, _ = conv1x1_with_statistics(x, weight, algorithm=algorithm)
        else:
            y, found = norm_act_conv1x1(x, norm, weight, statistics=known, algorithm=algorithm)
        if found is None:
            torch.ops.fastres.batch_norm_act_stats(y.detach())
        return y

    for name in ("torch", "gemm"):
        yield name, functools.partial(convolve, name)


def measure(conv: Convolution, rounds: int) -> Measured:
    """Time every algorithm of a convolution, interleaved."""
    x = torch.empty(conv.shape).contiguous(memory_format=torch.channels_last)
    problem = problem_of(
        x, conv.outputs, conv.kernel, conv.stride, needs_grad=conv.training, followed=not conv.training
    )
    choice, runs = choose_algorithm(problem), dict(sides(conv))
    if not is_served(problem):
        runs = {"torch": runs["torch"]}
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    with torch.set_grad_enabled(conv.training):
        for side, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            # Long enough for the clock, and not longer.
            repeats = max(1, int(0.004 / max(time.perf_counter() - start, 1e-6)))
            runs[side] = _repeated(run, repeats)
        for _ in range(rounds):
            for side, run in runs.items():
                start = time.perf_counter()
                count = run()
                seconds[side].append((time.perf_counter() - start) / int(count))  # type: ignore[call-overload]
    return Measured(conv, choice, {side: statistics.median(times) for side, times in seconds.items()})


def _repeated(run: Callable[[], object], repeats: int) -> Callable[[], int]:
    def together() -> int:
        for _ in range(repeats):
            run()
        return repeats

    return together


def table(found: list[Measured]) -> str:
    """A Markdown table, training first; the convolutions with one algorithm are a line at its end."""
    lines = [
        row("convolution", "pass", *(f"{name}, ms" for name in ALGORITHMS), "chosen", "over the best", "why"),
        row("---", "---", *["---:"] * 3, "---", "---:", "---"),
    ]
    alone = [m for m in found if len(m.seconds) == 1]
    for m in found:
        if m in alone:
            continue
        times = [number(1e3 * m.seconds[name]) if name in m.seconds else "" for name in ALGORITHMS]
        kind = "training" if m.convolution.training else "evaluation"
        lines.append(row(m.convolution.name, kind, *times, m.choice.algorithm, f"{m.behind:.2f}", m.choice.reason))
    reasons = sorted({m.choice.reason for m in alone})
    lines += ["", f"{len(alone)} others have PyTorch's algorithm alone: {'; '.join(reasons)}."] if alone else []
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Measure, print, and fail where a choice is behind the best by more than `ALLOWED`."""
    fastres.reuse_cpu_memory()
    wanted: Counter[Convolution] = Counter()
    for training in (True, False):
        for network in config.networks:
            for image in config.images:
                for batch in config.batches:
                    if (batch > 16 and image > 32) or (training and batch == 1):
                        continue
                    wanted |= convolutions(network, image, batch, training)
    found = [measure(conv, config.rounds) for conv in tqdm(wanted)]
    text = table(found)
    print(text)
    if config.json is not None:
        entries = [dataclasses.asdict(m) for m in found]
        write_text(config.json, to_json({"machine": describe_machine(), "convolutions": entries}))
    if config.page is not None:
        machine = describe_machine()
        name = f"choices-{machine['capability'].lower()}"
        insert_table(config.page, f"{machine['processor']}, {machine['threads']} threads\n\n{text}", name)
    behind = [m for m in found if m.behind > ALLOWED]
    for m in behind:
        print(f"{m.convolution.name}: {m.choice.algorithm} takes {m.behind:.2f} of the best")
    print(f"{len(found) - len(behind)} of {len(found)} choices are within {ALLOWED:.2f} of the best")


if __name__ == "__main__":
    main(tyro.cli(Config))
