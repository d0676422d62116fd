"""`python -m benchmarks.roofline`: what a training step should take on a GPU, PREDICTED from bytes and FLOPs.

    time of a kernel = max(bytes / (share * bandwidth), FLOPs / (share * peak)) + launches * gap

Bytes, FLOPs and launches come from the real model, run without data (benchmarks/roofline_trace.py), and from rules that
say which kernels a GPU launches for an operator (benchmarks/roofline_kernels.py). Nothing here is measured.
docs/roofline.md explains the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.records import insert_table, number, row
from benchmarks.results import COLOURS, NAMES
from benchmarks.roofline_kernels import kernels_of
from benchmarks.roofline_trace import PARTS, Kernel, Step
from benchmarks.workloads import COMPILE, EAGER, FUSED, SIDES
from fastres.train.checkpoint import atomic, write_text

PREDICTION = "PREDICTION of a roofline model; no GPU has run this"
PART_NAMES = {"conv": "convolutions", "norm": "normalisation, activation, addition", "rest": "rest"}
PART_COLOURS = {"conv": "#9aa5b1", "norm": "#1f6f8b", "rest": "#e0a458"}


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


# --------------------------------------------------------------------------------------------------------- the model


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


# --------------------------------------------------------------------------------------------------------- reporting


def describe(config: Config) -> str:
    """What was asked for, and the assumptions, in one line."""
    dropout = f", dropout {config.dropout:g}" if config.dropout else ""
    work = "training step" if config.mode == "train" else "inference"
    return (
        f"{config.model} {work}, batch {config.batch}, 3x32x32, {config.dtype}{dropout}; {config.bandwidth_share:g} of"
        f" bandwidth, {config.flops_share:g} of peak, {config.gap_us:g} µs a launch"
    )


def layer_table(table: dict[str, dict[str, Any]], config: Config) -> Table:
    """FLOPs of fastres, bytes and predicted time of every layer, on the GPU that was asked for."""
    rich = Table(title=f"{PREDICTION}\n{find_gpu(config.gpu).name}; {describe(config)}", title_justify="left")
    rich.add_column("layer")
    # The optimizer's step stands with backward.
    for name in ("GFLOP\nforward", "GFLOP\nbackward", "MB forward\neager / compile / fastres",
                 "MB backward\neager / compile / fastres", "predicted µs\neager / compile / fastres"):  # fmt: skip
        rich.add_column(name, justify="right")
    for name, entry in table.items():
        flops = next(entry[side]["flops"] for side in (FUSED, EAGER) if entry[side]["launches"])
        moved = [entry[side]["bytes"] for side in SIDES]
        rich.add_row(
            name,
            number(flops["forward"] / 1e9),
            number((flops["backward"] + flops["optimizer"]) / 1e9),
            " / ".join(number(b["forward"] / 1e6) for b in moved),
            " / ".join(number((b["backward"] + b["optimizer"]) / 1e6) for b in moved),
            " / ".join(number(entry[side]["predicted_us"]) for side in SIDES),
        )
    return rich


HEADER = ("GPU", "side", "launches", "GB moved", "conv ms", "norm ms", "rest ms", "predicted ms",
          "with L2, ms", "images/s", "over eager", "over compile")  # fmt: skip


def summary_rows(sides: dict[str, list[Kernel]], summary: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """The cells of the summary, a row a GPU and side. Ratios above 1: faster than eager, than torch.compile."""
    rows = []
    for key, of_side in summary.items():
        for side, entry in of_side.items():
            ratios = [of_side[other]["predicted_ms"] / entry["predicted_ms"] for other in (EAGER, COMPILE)]
            rows.append([
                GPUS[key].name, NAMES[side], str(sum(k.launches for k in sides[side])),
                number(sum(k.bytes for k in sides[side]) / 1e9),
                *(number(entry["predicted_ms_by_part"][part]) for part in PARTS),
                number(entry["predicted_ms"]), number(entry["predicted_ms_with_l2"]),
                f"{entry['predicted_images_per_second']:,.0f}", *(number(ratio, "x") for ratio in ratios),
            ])  # fmt: skip
    return rows


def summary_table(rows: list[list[str]], config: Config) -> Table:
    """The summary for the console."""
    rich = Table(title=f"{PREDICTION}\n{describe(config)}", title_justify="left")
    for index, name in enumerate(HEADER):
        rich.add_column(name, justify="left" if index < 2 else "right")
    for index, cells in enumerate(rows):
        rich.add_row(*cells, end_section=(index + 1) % len(SIDES) == 0)
    return rich


def markdown(rows: list[list[str]], config: Config) -> str:
    """The summary for the page."""
    lines = [
        f"**{PREDICTION}.** {describe(config)}.",
        "",
        row(*HEADER),
        row("---", "---", *["---:"] * (len(HEADER) - 2)),
    ]
    return "\n".join([*lines, *(row(*cells) for cells in rows)]) + "\n"


def plot(
    sides: dict[str, list[Kernel]], summary: dict[str, dict[str, dict[str, Any]]], config: Config, path: Path
) -> None:
    """Above, predicted milliseconds by part; below, the roofline of each GPU with every kernel as a point."""
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style), atomic(path) as temporary:
        figure = Figure(figsize=(12, 7.6), layout="constrained", facecolor="white")
        figure.suptitle(f"{PREDICTION}\n{describe(config)}", fontsize=11)
        panels = figure.subplots(2, len(GPUS))
        for (key, gpu), bars, roof in zip(GPUS.items(), *panels, strict=True):
            _draw_bars(bars, gpu, summary[key])
            _draw_roof(roof, gpu, sides, config)
        panels[0][0].set_ylabel("predicted ms a step")
        panels[1][0].set_ylabel("predicted FLOP/s")
        for row_of_panels, place in zip(panels, ("upper right", "upper left"), strict=True):
            row_of_panels[0].legend(fontsize=8, loc=place, framealpha=1, edgecolor="white")
        figure.savefig(temporary, format="png", dpi=140)


def _draw_bars(axes: Any, gpu: Gpu, of_side: dict[str, dict[str, Any]]) -> None:
    below = [0.0] * len(SIDES)
    for part in PARTS:
        heights = [of_side[side]["predicted_ms_by_part"][part] for side in SIDES]
        axes.bar(
            [NAMES[s] for s in SIDES], heights, 0.6, bottom=below, color=PART_COLOURS[part], label=PART_NAMES[part]
        )
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for index, total in enumerate(below):
        axes.annotate(
            number(total), (index, total), ha="center", va="bottom", xytext=(0, 2), textcoords="offset points"
        )
    axes.set_ylim(0, 1.3 * max(below))
    axes.set_title(gpu.name)


def _draw_roof(axes: Any, gpu: Gpu, sides: dict[str, list[Kernel]], config: Config) -> None:
    unit = "tf32" if config.dtype == "float32" else config.dtype
    ends = [0.1, gpu.ridge(unit), 1e4]
    axes.plot(ends, [min(x * gpu.bandwidth, gpu.peaks[unit]) for x in ends], color="#333333", label="datasheet")
    # The sides share most of their kernels: larger open marks below, small filled ones on top.
    for side, marker, size in zip(SIDES, ("o", "s", "^"), (60, 34, 10), strict=True):
        kernels = sides[side]
        points = [
            (k.flops / k.bytes, k.flops / s)
            for k, s in zip(kernels, predict(kernels, gpu, config), strict=True)
            # Kernels over a few vectors are launches and nothing else.
            if k.flops and k.bytes > 1 << 20
        ]
        face = COLOURS[side] if side == FUSED else "none"
        axes.scatter(
            *zip(*points, strict=True),
            s=size,
            marker=marker,
            edgecolor=COLOURS[side],
            facecolor=face,
            label=NAMES[side],
        )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte")


def to_json(sides: dict[str, list[Kernel]], summary: Any, table: Any, config: Config) -> str:
    """Everything, as JSON."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("output_dir", "page")}
    totals = {
        side: {
            "launches": sum(k.launches for k in kernels),
            "bytes_by_part": {part: sum(k.bytes for k in kernels if k.part == part) for part in PARTS},
            "matrix_flops": sum(k.flops for k in kernels if k.part == "conv" or "mm" in k.name),
        }
        for side, kernels in sides.items()
    }
    data = {
        "note": PREDICTION, "torch": torch.__version__, "config": settings,
        "gpus": {key: dataclasses.asdict(gpu) for key, gpu in GPUS.items()},
        "sides": totals, "summary": summary, "layers": table,
    }  # fmt: skip
    return json.dumps(data, indent=1) + "\n"


def main(config: Config, console: Console | None = None) -> None:
    """Trace the three sides, predict, print; write what was asked for."""
    console = console or Console()
    sides = {side: kernels_of(side, config.step()) for side in SIDES}
    summary, table = summarise(sides, config), layers(sides, config)
    rows = summary_rows(sides, summary)
    console.print(layer_table(table, config))
    console.print(summary_table(rows, config))
    if config.output_dir is not None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_text(config.output_dir / "roofline.json", to_json(sides, summary, table, config))
        plot(sides, summary, config, config.output_dir / "roofline.png")
        console.print(f"written: {config.output_dir / 'roofline.json'}, {config.output_dir / 'roofline.png'}")
    if config.page is not None:
        inserted = insert_table(config.page, markdown(rows, config))
        state = "written to" if inserted else "not written, the marker lines are missing in"
        console.print(f"summary {state} {config.page}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
