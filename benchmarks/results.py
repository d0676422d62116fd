"""`python -m benchmarks.results`: every workload with all its sides interleaved in one process.

Writes the raw figures as JSON and the README's plot to docs/results/, all tables to docs/benchmarks.md, and a selection
of at most ten rows to the README: in both between the lines `<!-- results -->` and `<!-- /results -->`, where they are.
Both have a table for each instruction set: of this run, and for the others of the newest run in that folder.
Interleaved means: each round runs every side once, so that a machine whose speed drifts slows all sides alike. Figures
are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import memory, records, serving, workloads
from benchmarks.machine import describe_machine
from benchmarks.pooling import pool_workloads
from benchmarks.records import PUBLISHED, ROOT, insert_table, number, row
from benchmarks.workloads import COMPILE, EAGER, FUSED, Workload
from fastres.train.folder import atomic, write_text

COPY = "copy"
SAVED_BATCH = 4 if workloads.QUICK else 32
NAMES = {EAGER: "PyTorch eager", COMPILE: "torch.compile", FUSED: "fastres"}
COLOURS = {EAGER: "#9aa5b1", COMPILE: "#e0a458", FUSED: "#1f6f8b"}


@dataclass(frozen=True)
class Config:
    """Measure fastres against PyTorch eager and torch.compile."""

    output_dir: Path = PUBLISHED
    """Folder for the JSON file and results.png."""
    readme: Path = ROOT / "README.md"
    """File for the selection; left as it is by a quick run, or where it lacks the two marker lines."""
    page: Path = ROOT / "docs" / "benchmarks.md"
    """File for all tables; likewise."""
    rounds: float = 2.0
    """Rounds of each workload, as a multiple of those that pytest runs."""
    from_json: Path | None = None
    """Draw and print again what an earlier run wrote, without measuring."""
    serving_seconds: float = 20.0
    """Of measuring each network that is served."""


@dataclass(frozen=True)
class Measurement:
    """One workload. `seconds`: side -> every round's seconds; "copy" is the copy of one tensor of that shape."""

    group: str
    name: str
    images: int
    shape: list[int] | None
    bytes: int | None
    copied_bytes: int | None
    dropout: float
    seconds: dict[str, list[float]]

    def median(self, side: str) -> float:
        """Seconds; not a number where the side did not run."""
        return statistics.median(self.seconds[side]) if side in self.seconds else float("nan")

    def floor(self) -> float:
        """Seconds that the least traffic takes at the bandwidth of the copy."""
        if self.bytes is None or self.copied_bytes is None:
            return float("nan")
        return self.bytes / self.copied_bytes * self.median(COPY)


@dataclass(frozen=True)
class Results:
    """A whole run.

    Attributes:
        saved_bytes_per_image: setting -> side -> what a ResNet-18 training step keeps for backward.
        served: frozen networks beside what else serves a network; none on a GPU.
    """

    machine: dict[str, Any]
    measurements: list[Measurement]
    saved_bytes_per_image: dict[str, dict[str, float]]
    served: list[serving.Measured] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(config: Config) -> Results:
    """Run everything."""
    machine = describe_machine()
    tasks: list[Workload] = list(
        chain(
            workloads.op_workloads(),
            pool_workloads(),
            workloads.conv_workloads(),
            workloads.block_workloads(),
            workloads.inference_workloads(),
            workloads.all_train_workloads(large=True),
        )
    )
    measurements = []
    with tqdm(tasks, unit="workload") as bar:
        for task in bar:
            bar.set_description(task.name)
            measurements.append(interleave(task, max(1, round(task.rounds * config.rounds))))
    saved = {
        (f"dropout {dropout:g}" + ", bfloat16 autocast" * lowered): {
            side: saved_bytes(side, dropout, amp) / SAVED_BATCH for side in (EAGER, FUSED)
        }
        for amp, lowered in (((True, False),) if workloads.CUDA else ((False, False), (True, True)))
        for dropout in workloads.DROPOUTS
    }
    served = []
    if not workloads.CUDA and not workloads.QUICK:
        options = serving.Config(seconds=config.serving_seconds)
        served = [serving.measure(serving.Case.of(case), options) for case in tqdm(options.cases, desc="serving")]
    return Results(machine, measurements, saved, served)


def interleave(workload: Workload, rounds: int, clock: Callable[[], float] = time.perf_counter) -> Measurement:
    """Time every side of a workload once a round."""
    runs = {side: workload.make(side) for side in workload.sides}
    if workload.shape is not None:
        runs[COPY] = workloads.copy(workload.shape)
    for run in runs.values():
        for _ in range(workload.warmup_rounds):
            run()
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(rounds):
        for side, run in runs.items():
            start = clock()
            run()
            seconds[side].append(clock() - start)
    return Measurement(
        group=workload.group,
        name=workload.name,
        images=workload.images,
        shape=None if workload.shape is None else list(workload.shape),
        bytes=workload.bytes,
        copied_bytes=None if workload.shape is None else workloads.copied_bytes(workload.shape),
        dropout=workload.dropout,
        seconds=seconds,
    )


def saved_bytes(side: str, dropout: float, amp: bool) -> int:
    """Bytes that autograd keeps between forward and backward of a ResNet-18 training step of SAVED_BATCH images."""
    model = workloads.make_network(side, dropout=dropout)
    images, labels = workloads.image_batch(SAVED_BATCH)
    return memory.saved_for_backward(
        model, lambda: torch.autograd.backward(workloads.training_loss(model, images, labels, amp))
    )


# ------------------------------------------------------------------------------------------------------------ reporting


def json_name(machine: dict[str, Any]) -> str:
    """<processor>-<capability>-<date>.json, in lower case."""
    name = records.slug(f"{machine['processor']} {machine['capability']}")
    return f"{name}-{machine['date']}{'-quick' if machine['quick'] else ''}.json"


def to_json(results: Results) -> str:
    """The raw figures."""
    return records.to_json(dataclasses.asdict(results))


def from_json(path: Path) -> Results:
    """What `to_json` wrote.

    Raises:
        ValueError: the file is not one of ours.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        measurements = [Measurement(**entry) for entry in data["measurements"]]
        served = [
            serving.Measured(serving.Case(**entry["case"]), entry["seconds"], entry["missing"])
            for entry in data.get("served", ())
        ]
        return Results(data["machine"], measurements, data["saved_bytes_per_image"], served)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"from_json: {path} does not hold results of this script ({error})") from error


def _conditions(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['capability']}, {machine['threads']} threads; torch {machine['torch']};"
        f" {machine['dtype']}, {machine['memory_format']}; {machine['date']}. Allocator, for all sides:"
        f" {machine['allocator']}. Medians of interleaved rounds."
    )


def newest(results: Results, folder: Path) -> list[Results]:
    """This run, and of every other instruction set the newest in a folder; narrow vectors first."""
    found = {results.machine["capability"]: results}
    dates: dict[str, str] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            other = from_json(file)
        except ValueError:  # another script's
            continue
        capability, date = other.machine["capability"], other.machine["date"]
        comparable = not other.machine["quick"] and other.machine["device"] == results.machine["device"]
        if comparable and capability != results.machine["capability"] and date >= dates.get(capability, ""):
            found[capability], dates[capability] = other, date
    return [found[capability] for capability in sorted(found, key=lambda c: (len(c), c))]


class Chosen(NamedTuple):
    """A row of the README for an instruction set: the best peer, and fastres. Less is better where `is_size`."""

    name: str
    unit: str
    peer: str
    theirs: float
    ours: float
    is_size: bool = False

    def cells(self) -> list[str]:
        ratio = self.theirs / self.ours if self.is_size else self.ours / self.theirs
        return [f"{number(self.theirs)} ({self.peer})", number(self.ours), number(ratio, "x")]


# Networks that the README shows: how many in training, the first ones, and which as served. All are on the page.
TRAINED = 4
SERVED = ("ResNet-18 inference, batch 128", "ResNet-18 inference, batch 1", "ResNet-50 at 224 inference, batch 1")


def chosen(results: Results) -> Iterator[Chosen]:
    """What a reader asks about first, at most ten rows: networks in training and served, what a training step with
    dropout keeps, and the operator at its largest shape.
    """
    by_group: dict[str, list[Measurement]] = {}
    for entry in results.measurements:
        by_group.setdefault(entry.group, []).append(entry)

    def best(entry: Measurement, unit: str, amount: float) -> Chosen:
        peer = min((EAGER, COMPILE), key=entry.median)
        theirs, ours = (entry.median(side) for side in (peer, FUSED))
        if unit == "ms":
            return Chosen(entry.name, unit, peer, amount * theirs, amount * ours, is_size=True)
        return Chosen(entry.name, unit, peer, amount / theirs, amount / ours)

    trained = [entry for entry in by_group["model-train-step"] if "bfloat16" not in entry.name]
    yield from (best(entry, "images/s", entry.images) for entry in trained[:TRAINED])
    if results.served:
        for measured in results.served:
            case = measured.case
            name = f"{workloads.Network(case.network, case.image).name} inference, batch {case.batch}"
            if name in SERVED:
                peer = measured.fastest(ours=False)
                theirs, ours = (measured.seconds[side] for side in (peer, measured.fastest(ours=True)))
                yield Chosen(name, "images/s", serving.NAMES[peer], case.batch / theirs, case.batch / ours)
    else:
        yield from (best(entry, "images/s", entry.images) for entry in by_group["model-inference"])
    setting = list(results.saved_bytes_per_image)[len(workloads.DROPOUTS) - 1]
    saved = results.saved_bytes_per_image[setting]
    name = f"ResNet-18 training step, saved for backward, {setting}"
    yield Chosen(name, "MiB/image", EAGER, saved[EAGER] / 2**20, saved[FUSED] / 2**20, is_size=True)
    for entry in by_group["op"]:
        if entry.shape == by_group["op"][0].shape:
            yield best(entry, "ms", 1e3)


def selection(runs: Sequence[Results]) -> str:
    """The README's table: `chosen`, with three columns an instruction set."""
    sets = [r.machine["capability"].replace("AVX5", "AVX-5") for r in runs]
    rows: dict[tuple[str, str], dict[int, list[str]]] = {}
    for index, results in enumerate(runs):
        for entry in chosen(results):
            rows.setdefault((entry.name, entry.unit), {})[index] = entry.cells()
    lines = [
        *(_conditions(results.machine) for results in runs),
        "",
        row("", "unit", *chain.from_iterable((f"{name}: the best peer", "fastres", "over it") for name in sets)),
        row("---", "---", *["---:"] * (3 * len(runs))),
    ]
    for (name, unit), cells in rows.items():
        lines.append(row(name, unit, *chain.from_iterable(cells.get(i, [""] * 3) for i in range(len(runs)))))
    return "\n".join(lines) + "\n"


def page(runs: Sequence[Results]) -> str:
    """All results of every instruction set in Markdown."""
    return "\n".join(f"### {results.machine['capability']}\n\n{table(results)}" for results in runs)


def table(results: Results) -> str:
    """All results in Markdown."""
    lines = [
        _conditions(results.machine),
        "",
        "| forward + backward, ms (less is better) | eager | torch.compile | fastres | over eager | over compile |"
        " fastres / byte floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in results.measurements:
        if entry.group in ("op", "block"):
            cells = [number(1e3 * entry.median(side)) for side in workloads.SIDES]
            floor = entry.median(FUSED) / entry.floor()
            lines.append(row(entry.name, *cells, *_ratios(entry), number(floor)))
    convolutions = [entry for entry in results.measurements if entry.group == "conv"]
    if convolutions:
        lines += [
            "",
            "| one pass of a convolution, ms | eager | fastres | over eager |",
            "| --- | ---: | ---: | ---: |",
        ]
    for entry in convolutions:
        cells = [number(1e3 * entry.median(side)) for side in (EAGER, FUSED)]
        lines.append(row(entry.name, *cells, number(entry.median(EAGER) / entry.median(FUSED), "x")))
    lines += [
        "",
        "| whole network, images a second (more is better) | eager | torch.compile | fastres | over eager |"
        " over compile |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in results.measurements:
        if entry.group.startswith("model"):
            cells = [number(entry.images / entry.median(side)) for side in workloads.SIDES]
            lines.append(row(entry.name, *cells, *_ratios(entry)))
    lines += [
        "",
        "| saved for backward by a ResNet-18 training step, MiB an image | eager | fastres | eager / fastres |",
        "| --- | ---: | ---: | ---: |",
    ]
    for setting, saved in results.saved_bytes_per_image.items():
        sizes = [number(saved[side] / 2**20) for side in (EAGER, FUSED)]
        lines.append(row(setting, *sizes, number(saved[EAGER] / saved[FUSED], "x")))
    text = "\n".join(lines) + "\n"
    return text + (f"\n{serving.table(results.served)}" if results.served else "")


def _ratios(entry: Measurement) -> list[str]:
    ratios = [entry.median(side) / entry.median(FUSED) for side in (EAGER, COMPILE)]
    return [number(ratio, "x") for ratio in ratios]


def plot(results: Results, path: Path) -> None:
    """Draw what the whole network gains, what a convolution gains, and the operator's times over its byte floor."""
    style: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid.axis": "y",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(style), atomic(path) as temporary:
        figure = Figure(figsize=(12, 8.4), layout="constrained", facecolor="white")
        (network, convolution), panels = figure.subplots(2, 2)
        _plot_networks(network, results)
        _plot_convolutions(convolution, results)
        for axes, dropout in zip(panels, workloads.DROPOUTS, strict=True):
            _plot_operator(axes, results, dropout)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        machine = results.machine
        figure.supxlabel(
            f"batch {_batch(results)}, {machine['dtype']}, {machine['memory_format']}; {machine['processor']},"
            f" {machine['capability']}, {machine['threads']} threads; torch {machine['torch']}; {machine['date']}",
            fontsize=8, color="#666666",
        )  # fmt: skip
        figure.savefig(temporary, format="png", dpi=150)


def _bars(axes: Axes, heights: dict[str, list[float]], labels: dict[str, list[str]], ticks: list[str]) -> None:
    """A group of bars a tick, one of them a side."""
    for offset, side in enumerate(heights):
        bars = axes.bar(
            [index + 0.28 * (offset - (len(heights) - 1) / 2) for index in range(len(ticks))],
            heights[side], 0.26, color=COLOURS[side], label=NAMES[side],
        )  # fmt: skip
        axes.bar_label(bars, labels[side], padding=2, fontsize=8, color="#333333")
    axes.set_xticks(range(len(ticks)), ticks, fontsize=9)


def _plot_networks(axes: Axes, results: Results) -> None:
    entries = [e for e in results.measurements if e.group.startswith("model") and " at " not in e.name]
    speeds = {side: [e.median(EAGER) / e.median(side) for e in entries] for side in workloads.SIDES}
    labels = {side: [number(e.images / e.median(side)) for e in entries] for side in workloads.SIDES}
    ticks = [e.name.removeprefix("ResNet-18 ").replace(" autocast", "").replace(", ", "\n") for e in entries]
    _bars(axes, speeds, labels, ticks)
    axes.set_ylabel("speed / PyTorch eager")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("ResNet-18. On the bars: images a second", fontsize=11)


def _plot_convolutions(axes: Axes, results: Results) -> None:
    entries = [e for e in results.measurements if e.group == "conv" and e.images == _batch(results)]
    if not entries:  # on a GPU both sides are PyTorch's
        axes.set_axis_off()
        return
    sides = (EAGER, FUSED)
    speeds = {side: [e.median(EAGER) / e.median(side) for e in entries] for side in sides}
    labels = {side: [number(1e3 * e.median(side)) for e in entries] for side in sides}
    names = [e.name.split(", ") for e in entries]
    ticks = [f"{name[1].removesuffix(' gradient')}\n{name[2].split()[0]}" for name in names]
    _bars(axes, speeds, labels, ticks)
    axes.set_ylabel("speed / PyTorch eager")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("3x3 convolution by pass and channels. On the bars: milliseconds", fontsize=11)


def _plot_operator(axes: Axes, results: Results, dropout: float) -> None:
    entries = [e for e in results.measurements if e.group == "op" and e.dropout == dropout]
    heights = {side: [e.median(side) / e.floor() for e in entries] for side in workloads.SIDES}
    labels = {side: [number(1e3 * e.median(side)) for e in entries] for side in workloads.SIDES}
    axes.axhline(1, color="#b03a2e", linewidth=1.2, linestyle="--", label="byte floor", zorder=3)
    _bars(axes, heights, labels, ["{} channels\n{} x {}".format(*e.shape[1:]) for e in entries if e.shape])
    axes.set_ylabel("time / byte floor  (1 = copy bandwidth)")
    words = f"dropout({dropout:g}, relu(bn(x) + r))" if dropout else "relu(bn(x) + r)"
    axes.set_title(f"{words}, both ways. On the bars: milliseconds", fontsize=11)


def _batch(results: Results) -> int:
    return next(entry.images for entry in results.measurements if entry.group == "op")


def main(config: Config) -> None:
    """Measure, or read; then write, draw and print."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if config.from_json is not None:
        results = from_json(config.from_json)
    else:
        results = measure(config)
        file = config.output_dir / json_name(results.machine)
        write_text(file, to_json(results))
        print(f"raw figures: {file}")
    text = table(results)
    print(text)
    picture = config.output_dir / ("results-quick.png" if results.machine["quick"] else "results.png")
    plot(results, picture)
    print(f"plot: {picture}")
    if not results.machine["quick"]:
        runs = newest(results, config.output_dir)
        for file, part in ((config.readme, selection(runs)), (config.page, page(runs))):
            inserted = insert_table(file, part)
            print(f"table {'written to' if inserted else 'not written, the marker lines are missing in'} {file}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
