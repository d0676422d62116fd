"""What a record looks like: from which batch on time is flat, the table of the page, and the picture."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.memory import MIB
from benchmarks.records import number, row
from benchmarks.results import COLOURS, NAMES
from benchmarks.scaling.sweeps import (
    BATCH,
    BATCHES_OF_THREADS,
    DEPTH,
    INFERENCE,
    MODES,
    SIZE,
    THREADS,
    TRAINING,
    WIDTH,
    Measured,
    Record,
    Sweep,
    date,
    newest,
)
from benchmarks.workloads import COMPILE, EAGER, FUSED, SIDES
from fastres.train.folder import atomic

FLAT = 0.1
WITHIN = f"within {100 * FLAT:g} %"
PICTURE = "scaling.png"
MARKERS = {EAGER: "s", COMPILE: "^", FUSED: "o"}
STROKES: dict[str, Literal["-", "--"]] = {TRAINING: "-", INFERENCE: "--"}


def shown(folder: Path) -> list[Record]:
    """The newest record of each instruction set in a folder, whatever the processor; narrow vectors first."""
    found: dict[str, Record] = {}
    for (capability, _), record in newest(folder).items():
        found[capability] = max(found.get(capability, record), record, key=date)
    return [found[capability] for capability in sorted(found, key=lambda name: (len(name), name))]


def flat_from(batches: Sequence[int], seconds: Sequence[float], tolerance: float = FLAT) -> int | None:
    """The least batch from which on the time an image is flat.

    Args:
        batches: in ascending order.
        seconds: time an image at each of them.
        tolerance: how much longer than the shortest the longest time may be from there on, as a share.
    Returns:
        The batch; None where not even the last two are so close.
    """
    flat = None
    for first in range(len(batches) - 2, -1, -1):
        if max(seconds[first:]) > (1 + tolerance) * min(seconds[first:]):
            break
        flat = batches[first]
    return flat


def line_is_flat_from(line: Iterable[Measured], side: str) -> int | None:
    """`flat_from` of a sweep's points at different batches."""
    times = {found.point.batch: found.an_image(side) for found in line}
    return flat_from(list(times), list(times.values()))


# --------------------------------------------------------------------------------------------------------------- table


def page(folder: Path) -> str:
    """The picture, and a table for each instruction set of which a folder has a record; nothing where it has none."""
    found = shown(folder)
    picture = f"![Time and memory of an image by batch, width, depth, image size and threads](results/{PICTURE})\n\n"
    return picture + "\n".join(f"{heading(record)}\n\n{table(record)}" for record in found) if found else ""


def heading(record: Record) -> str:
    """On what, how and when: in one line where the sweeps were measured alike, otherwise with their names."""
    measured: dict[str, list[str]] = {}
    for name, sweep in record.items():
        machine = sweep.machine
        held = f" (held to it by `{machine['isa_settings']}`)" if machine["isa_settings"] else ""
        how = f"{machine['processor']}, {machine['capability']}{held}, {machine['threads']} threads; torch"
        how += f" {machine['torch']}; {machine['dtype']}, {machine['memory_format']}; {machine['date']}. Allocator, for"
        measured.setdefault(f"{how} all sides: {machine['allocator']}.", []).append(name)
    if len(measured) == 1:
        return next(iter(measured))
    return "\n\n".join(f"By {', '.join(names)}: {how}" for how, names in measured.items())


def table(record: Record) -> str:
    """A row of Markdown for each mode and side of ResNet-20."""
    nothing = Sweep({}, [])
    by_batch, by_threads = record.get(BATCH, nothing), record.get(THREADS, nothing)
    batches = sorted({found.point.batch for found in by_threads.points})
    heads = (
        "ResNet-20", f"time an image is flat, {WITHIN}, from batch", "ms an image there", "at batch 1",
        "first run, compilation and all, s", "MiB resident an image, largest batch",
        *(f"two threads over one, batch {batch}" for batch in batches),
    )  # fmt: skip
    lines = [row(*heads), row("---", *["---:"] * (len(heads) - 1))]
    for mode, side in itertools.product(MODES, SIDES):
        line, gains = by_batch.line(mode, side), _gains(by_threads, mode, side)
        if line or gains:
            words = f", batches {', '.join(str(found.point.batch) for found in line)}" if side == COMPILE else ""
            gained = [number(gains.get(batch, float("nan")), "x") for batch in batches]
            lines.append(row(f"{mode}, {NAMES[side]}{words}", *_cells(line, side), *gained))
    return "\n".join(lines) + "\n"


def _cells(line: Sequence[Measured], side: str) -> list[str]:
    """What the sweep of the batch says of a side; empty cells where it says nothing."""
    if not line:
        return [""] * 5
    times = {found.point.batch: found.an_image(side) for found in line}
    flat = line_is_flat_from(line, side)
    first = number(statistics.median(found.first_seconds[side] for found in line)) if side == COMPILE else ""
    sizes = [found.resident[side] / found.point.batch for found in line if side in found.resident]
    there, at_1 = (number(1e3 * times.get(batch, float("nan"))) for batch in (flat or 0, 1))
    return [str(flat or "none"), there, at_1, first, number(sizes[-1] / MIB) if sizes else ""]


def _gains(by_threads: Sweep, mode: str, side: str) -> dict[int, float]:
    """Batch -> one thread's time over that of two."""
    times = {(found.point.batch, found.point.threads): found.an_image(side) for found in by_threads.line(mode, side)}
    return {batch: times[batch, 1] / two for (batch, threads), two in times.items() if threads == 2}


# ------------------------------------------------------------------------------------------------------------- picture


def digest(found: Iterable[Record]) -> str:
    """What tells figures apart."""
    plain = [{name: dataclasses.asdict(sweep) for name, sweep in record.items()} for record in found]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def plot(found: Sequence[Record], path: Path) -> None:
    """Draw six panels for each record. The file says under "Figures" what it was drawn from: `digest`."""
    style: dict[Any, Any] = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(style), atomic(path) as temporary:
        figure = Figure(figsize=(12, 7.6 * len(found)), layout="constrained", facecolor="white")
        for part, record in zip(figure.subfigures(len(found), 1, squeeze=False)[:, 0], found, strict=True):
            _draw(part, record)
        figure.savefig(temporary, format="png", dpi=150, metadata={"Figures": digest(found)})


def _draw(figure: SubFigure, record: Record) -> None:
    (time, memory, threads), (width, depth, size) = figure.subplots(2, 3)
    largest = max(BATCHES_OF_THREADS)
    for name, axes, words in (
        (BATCH, time, "batch"),
        (THREADS, threads, f"threads, batch {largest}"),
        (WIDTH, width, "width: factor of ResNet-20's channels"),
        (DEPTH, depth, "depth: layers"),
        (SIZE, size, "image size in pixels, ResNet-18"),
    ):
        axes.set(xscale="log", yscale="log", xlabel=words, ylabel="ms an image" if name == BATCH else "images a second")
        if name in record:
            _draw_times(axes, name, record[name], largest if name == THREADS else None)
    memory.set(xscale="log", yscale="log", xlabel="batch", ylabel="peak resident memory of a run, MiB")
    if BATCH in record:
        _draw_memory(memory, record[BATCH])
    handles = [Line2D([], [], color=COLOURS[side], marker=MARKERS[side], label=NAMES[side]) for side in SIDES]
    handles += [Line2D([], [], color="#333333", linestyle=stroke, label=mode) for mode, stroke in STROKES.items()]
    handles += time.plot([], [], **_ring(), label=f"flat {WITHIN} from here on")
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=10)
    figure.supxlabel(heading(record).replace("\n\n", "\n"), fontsize=8, color="#666666")


def _ring() -> dict[str, Any]:
    return {"marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": "none", "color": "#333333"}


def _draw_times(axes: Axes, name: str, sweep: Sweep, batch: int | None) -> None:
    for mode, side in itertools.product(MODES, SIDES):
        line = sweep.line(mode, side, batch)
        heights = {p.point.at(name): 1e3 * p.an_image(side) if name == BATCH else 1 / p.an_image(side) for p in line}
        axes.plot(list(heights), list(heights.values()), STROKES[mode], color=COLOURS[side], marker=MARKERS[side])
        flat = line_is_flat_from(line, side) if name == BATCH else None
        if flat is not None:
            axes.plot(flat, heights[flat], **_ring())
    _label(axes, [found.point.at(name) for found in sweep.points])


def _draw_memory(axes: Axes, sweep: Sweep) -> None:
    for mode, side in itertools.product(MODES, SIDES):
        sizes = {p.point.batch: p.resident[side] / MIB for p in sweep.line(mode, side) if side in p.resident}
        axes.plot(list(sizes), list(sizes.values()), STROKES[mode], color=COLOURS[side], marker=MARKERS[side])
    _label(axes, [found.point.batch for found in sweep.points if found.resident])


def _label(axes: Axes, places: Iterable[float]) -> None:
    """Ticks where a sweep was measured, at every second place where they are many, and plain numbers."""
    ticks = sorted(set(places))
    ticks = ticks[:: 2 if len(ticks) > 6 else 1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
