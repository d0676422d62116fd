"""The roofline model: GPUs by their datasheets, the seconds of a kernel, the sums over a step.

time of a kernel = max(bytes / (share * bandwidth), FLOPs / (share * peak)) + launches * gap
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.roofline.trace import PARTS, Kernel, Step
from benchmarks.workloads import EAGER


@dataclass(frozen=True)
class Gpu:
    """What the maker's documents say.

    Attributes:
        bandwidth: of the memory, bytes/s.
        peaks: FLOP/s by unit: dense tensor-core rates with float32 accumulation, and "fp32" without tensor cores.
        multiprocessors: number of SMs; shown, not used.
        l2: bytes of the second-level cache.
    """

    name: str
    bandwidth: float
    peaks: dict[str, float]
    multiprocessors: int
    l2: int

    def ridge(self, unit: str) -> float:
        """FLOPs a byte above which the peak bounds a kernel."""
        return self.peaks[unit] / self.bandwidth


def _peaks(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bfloat16": half * 1e12, "float16": half * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12}


GPUS = {
    # NVIDIA H100 Tensor Core GPU datasheet and Hopper architecture whitepaper (H100 SXM5; half of the sparse rates).
    "h100": Gpu("H100 SXM5 80 GB", 3350e9, _peaks(989.4, 494.7, 66.9), 132, 50 << 20),
    # NVIDIA A100 Tensor Core GPU datasheet and Ampere (GA100) architecture whitepaper (A100 80 GB SXM4).
    "a100": Gpu("A100 SXM4 80 GB", 2039e9, _peaks(312.0, 156.0, 19.5), 108, 40 << 20),
    # NVIDIA Ada GPU architecture whitepaper 2.02, appendix A, table 2 (FP16 and BF16 with FP32 accumulation).
    "rtx4090": Gpu("GeForce RTX 4090", 1008e9, _peaks(165.2, 82.6, 82.6), 128, 72 << 20),
}


@dataclass(frozen=True)
class Config:
    """Predict a step of eager PyTorch, torch.compile and fastres from a roofline model. Nothing is measured."""

    gpu: Literal["h100", "a100", "rtx4090"] = "h100"
    """GPU of the table of layers; the summary, the plot and the JSON file have all three."""
    model: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """Network, with the CIFAR stem and images of 3x32x32."""
    batch: int = 512
    """Images in a step."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of activations and convolutions: autocast, or float32 with TF32 convolutions. Parameters are float32."""
    dropout: float = 0.0
    """Dropout rate in each block."""
    mode: Literal["train", "inference"] = "train"
    """Forward, backward and a step of SGD with momentum; or forward in evaluation mode without gradients."""
    bandwidth_share: float = 0.85
    """Share of the datasheet's bandwidth that every kernel reaches. An assumption."""
    flops_share: float = 0.6
    """Share of the datasheet's peak that every kernel reaches. An assumption."""
    gap_us: float = 1.5
    """Microseconds that each launch adds. An assumption."""
    output_dir: Path | None = None
    """Folder for roofline.json and roofline.png."""
    page: Path | None = None
    """Markdown file that takes the summary, between the lines <!-- results --> and <!-- /results -->."""

    def __post_init__(self) -> None:
        find_gpu(self.gpu)
        for name in ("bandwidth_share", "flops_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 < {name} <= 1, got {getattr(self, name)}")
        if not 0 <= self.gap_us < float("inf"):
            raise ValueError(f"gap_us: expected at least 0, got {self.gap_us}")

    def step(self) -> Step:
        """What runs."""
        dtype = getattr(torch, self.dtype)
        return Step(self.model, self.batch, dtype, self.dropout, self.mode == "train")


def find_gpu(name: str) -> Gpu:
    """A GPU by its short name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in GPUS:
        raise ValueError(f"gpu: expected one of {tuple(GPUS)}, got {name!r}")
    return GPUS[name]


def dram_bytes(kernels: Iterable[Kernel], l2: int) -> list[int]:
    """Bytes that each kernel moves to and from memory behind a cache of `l2` bytes.

    Every write counts. A read of a tensor that lies in the cache as a whole does not: the cache holds the tensors that
    were touched last. With l2 = 0 every read counts.
    """
    cached: OrderedDict[Hashable, int] = OrderedDict()
    result = []
    for kernel in kernels:
        result.append(kernel.bytes - sum(size for key, size in kernel.reads if cached.get(key, -1) >= size))
        for key, size in kernel.reads + kernel.writes:
            cached.pop(key, None)
            if size <= l2:
                cached[key] = size
            else:
                cached.clear()
            while sum(cached.values()) > l2:
                cached.popitem(last=False)
    return result


def predict(kernels: Sequence[Kernel], gpu: Gpu, config: Config, *, l2: bool = False) -> list[float]:
    """Predicted seconds of each kernel, its launches included.

    Args:
        l2: let the second-level cache serve what it could still hold, at no time at all: a lower bound. Otherwise
            every byte comes from memory.
    """
    bandwidth = gpu.bandwidth * config.bandwidth_share
    moved = dram_bytes(kernels, gpu.l2 if l2 else 0)
    return [
        max(size / bandwidth, kernel.flops / (gpu.peaks[kernel.unit] * config.flops_share))
        + kernel.launches * config.gap_us * 1e-6
        for kernel, size in zip(kernels, moved, strict=True)
    ]


def summarise(sides: dict[str, list[Kernel]], config: Config) -> dict[str, dict[str, dict[str, Any]]]:
    """gpu -> side -> milliseconds by part, in all and with the cache, images a second."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for key, gpu in GPUS.items():
        summary[key] = {}
        for side, kernels in sides.items():
            seconds = predict(kernels, gpu, config)
            parts = {p: 1e3 * sum(s for k, s in zip(kernels, seconds, strict=True) if k.part == p) for p in PARTS}
            summary[key][side] = {
                "predicted_ms_by_part": parts,
                "predicted_ms": 1e3 * sum(seconds),
                "predicted_ms_with_l2": 1e3 * sum(predict(kernels, gpu, config, l2=True)),
                "predicted_images_per_second": config.batch / sum(seconds),
            }
    return summary


def layers(sides: dict[str, list[Kernel]], config: Config) -> dict[str, dict[str, Any]]:
    """layer -> side -> FLOPs and bytes in each phase, launches, and predicted µs on the GPU that was asked for."""
    gpu, result = find_gpu(config.gpu), {}
    order = dict.fromkeys(kernel.row for kernel in sides[EAGER])
    for name in [*order, *dict.fromkeys(k.row for kernels in sides.values() for k in kernels if k.row not in order)]:
        entry: dict[str, Any] = {}
        for side, kernels in sides.items():
            mine = [(k, s) for k, s in zip(kernels, predict(kernels, gpu, config), strict=True) if k.row == name]
            entry[side] = {
                "flops": _by_phase((k.phase, k.flops) for k, _ in mine),
                "bytes": _by_phase((k.phase, k.bytes) for k, _ in mine),
                "launches": sum(k.launches for k, _ in mine),
                "predicted_us": 1e6 * sum(s for _, s in mine),
            }
        result[name] = entry
    return result


def _by_phase(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    totals = {"forward": 0, "backward": 0, "optimizer": 0}
    for phase, value in items:
        totals[phase] += value
    return totals
