"""`python -m benchmarks.compiled.inductor_bytes`: what the pointwise part of a residual block moves through memory.

The table is written into docs/compile.md. Inductor's side is its own count, of what each of its scheduled kernels reads
and writes; there being no GPU, of the schedule that it makes for the CPU. Ours is the graph that the backend makes,
run on tensors without data, and what docs/kernels.md says that each operator reads and writes on a GPU. Convolutions
are none of it, and nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from tqdm import tqdm

from benchmarks.records import ROOT, insert_table, row
from benchmarks.roofline.kernels import rules_of
from benchmarks.roofline.trace import Recorder
from benchmarks.workloads import FUSED
from fastres.backend.compiler import rewrite

SHAPE = (64, 64, 32, 32)


class Block(nn.Module):
    """What stands behind the last convolution of a block.

    Args:
        normed: the residual has a normalisation of its own.
        residual: there is one.
    """

    def __init__(self, *, residual: bool = False, normed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.residual, self.dropout = nn.BatchNorm2d(SHAPE[1]), residual or normed, dropout
        self.residual_norm = nn.BatchNorm2d(SHAPE[1]) if normed else None

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        z = self.norm(x)
        if self.residual:
            z = z + (r if self.residual_norm is None else self.residual_norm(r))
        return F.dropout(torch.relu(z), self.dropout, self.training)


PATTERNS: dict[str, dict[str, Any]] = {
    "relu(bn(x))": {},
    "relu(bn(x) + r)": {"residual": True},
    "relu(bn(x) + bn(r))": {"normed": True},
    "dropout(relu(bn(x) + r))": {"residual": True, "dropout": 0.1},
}


@dataclass(frozen=True)
class Config:
    """Count the bytes of inductor's plan and of ours, and write the table."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of x and r."""
    page: Path = ROOT / "docs" / "compile.md"
    """The part between `<!-- bytes -->` and `<!-- /bytes -->` is replaced."""


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, r = (torch.randn(SHAPE, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    return x.requires_grad_(), r.requires_grad_()


def of_inductor(pattern: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes forward and backward, as inductor counts them while it compiles."""
    torch._dynamo.reset()
    # Without its log nothing is counted.
    torch._logging.set_logs(inductor_metrics=True)  # type: ignore[attr-defined]
    metrics.reset()
    block, inputs = Block(**PATTERNS[pattern]), _inputs(dtype)
    with inductor_config.patch(force_disable_caches=True):
        y = torch.compile(block, backend="inductor")(*inputs)
        forward = metrics.num_bytes_accessed
        y.backward(torch.randn_like(y))
    total = metrics.num_bytes_accessed
    # Both graphs may be compiled at once.
    return (forward, total - forward) if total > forward else (0, total)


def of_ours(pattern: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes forward and backward of the graph that the backend makes."""
    torch._dynamo.reset()
    made: list[tuple[GraphModule, tuple[Tensor, ...]]] = []

    def backend(graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            made.append((graph, tensors))
            return graph.forward(*tensors)

        rewrite(graph, "torch", smallest=0)
        return run

    block = Block(**PATTERNS[pattern])
    torch.compile(block, backend=backend)(*_inputs(dtype))
    graph, tensors = made[0]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        recorder = Recorder(block, rules_of(FUSED), by_parameters=True)
        with recorder:
            (y,) = graph.forward(*fakes)
            recorder.phase = "backward"
            torch.autograd.backward(y, torch.empty_like(y))
    bytes_of = dict.fromkeys(("forward", "backward"), 0)
    for kernel in recorder.kernels:
        bytes_of[kernel.phase] += kernel.bytes
    return bytes_of["forward"], bytes_of["backward"]


def main(config: Config) -> None:
    """Count and write."""
    lines = [
        row("pattern", "dtype", "inductor, forward", "backward", "fastres, forward", "backward", "of inductor's"),
        row("---", "---", *["---:"] * 5),
    ]
    for name in config.dtypes:
        dtype = getattr(torch, name)
        size = torch.Size(SHAPE).numel() * dtype.itemsize
        for pattern in tqdm(PATTERNS):
            theirs, ours = of_inductor(pattern, dtype), of_ours(pattern, dtype)
            passes = [f"{count / size:.2f}" for count in (*theirs, *ours)]
            lines.append(row(f"`{pattern}`", name, *passes, f"{sum(ours) / sum(theirs):.2f}"))
    insert_table(config.page, "\n".join(lines) + "\n", "bytes")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Config))
