"""What the Triton path does without a GPU: the launches of a step and their bytes, and the kernels as compiled."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import triton
from torch import Tensor

from benchmarks.compiled.launches import evaluation, model_launches, training_step
from benchmarks.compiled.triton_table import label
from benchmarks.gate.figures import Counted, Unavailable
from fastres.kernels.compiled import ARCHITECTURES, Architecture, compile_launch, distinct
from fastres.kernels.launch import Launch

BATCH = 64
NETWORKS = ("resnet18", "resnet50")


def check_compiler() -> None:
    """Check that kernels are functions for the compiler.

    Raises:
        Unavailable: Triton's interpreter has taken its place.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise Unavailable("TRITON_INTERPRET is set, and the interpreter compiles nothing")


def bytes_of(launch: Launch) -> int:
    """Of the tensors that a launch is given, each counted once."""
    tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def of_launches(step: str, launches: Iterable[Launch]) -> dict[str, int]:
    """ "step, kernel: launches" and "...: bytes"."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for launch in launches:
        counts[launch.name] += 1
        sizes[launch.name] += bytes_of(launch)
    figures: dict[str, int] = {}
    for name in sorted(counts):
        figures |= {f"{step}, {name}: launches": counts[name], f"{step}, {name}: bytes": sizes[name]}
    return figures


def count_launches(networks: Sequence[str] = NETWORKS) -> Counted:
    """The group of the baseline: steps with the CIFAR stem in bfloat16 and channels_last."""
    check_compiler()
    figures: dict[str, int] = {}
    for name in networks:
        for dropout in (0.0, 0.1):
            trace, _ = training_step(name, batch=BATCH, dropout=dropout)
            figures |= of_launches(f"{name}, training, dropout {dropout:g}", trace.launches)
        figures |= of_launches(f"{name}, evaluation", evaluation(name, batch=BATCH).launches)
    return Counted({}, figures)


def of_kernels(launches: Iterable[Launch], architecture: Architecture) -> dict[str, int]:
    """ "kernel: registers" and "kernel: spilled bytes", a thread; of kernels that do the same work the most."""
    figures: dict[str, int] = {}
    for launch in distinct(launches):
        compiled = compile_launch(launch, architecture)
        for kind, value in (("registers", compiled.registers), ("spilled bytes", compiled.local_bytes)):
            name = f"{label(launch)}: {kind}"
            figures[name] = max(value, figures.get(name, 0))
    return figures


def count_kernels(name: str) -> Counted:
    """The group of the baseline: every kernel of a ResNet-18 and of the article's network in bfloat16.

    Args:
        name: of the architecture.
    """
    check_compiler()
    (architecture,) = (architecture for architecture in ARCHITECTURES if architecture.name == name)
    launches = model_launches(torch.bfloat16, torch.channels_last, architecture.device)
    return Counted({"triton": triton.__version__}, of_kernels(launches, architecture))
