"""What a prediction looks like: tables, the plot, JSON. Everywhere it is called a prediction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.records import number, row
from benchmarks.results import COLOURS, NAMES
from benchmarks.roofline.model import GPUS, Config, Gpu, find_gpu, predict
from benchmarks.roofline.trace import PARTS, Kernel
from benchmarks.workloads import COMPILE, EAGER, FUSED, SIDES
from fastres.train.folder import atomic

PREDICTION = "PREDICTION of a roofline model, not measured"
PART_NAMES = {"conv": "convolutions", "norm": "normalisation, activation, addition", "rest": "rest"}
PART_COLOURS = {"conv": "#9aa5b1", "norm": "#1f6f8b", "rest": "#e0a458"}


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
