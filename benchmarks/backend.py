"""`python -m benchmarks.backend`: training steps of networks that are not ours, by eager, inductor and our backend.

Each round runs every side once; figures are medians over the rounds. A step is forward, a loss, backward and SGD with
momentum, in float32 and channels_last, on the same images. Every side has the network with the same first weights, and
the time that its first step took, compilation and all, stands beside the others. Two more sides are eager and ours on
the network as it is made, in NCHW. A last step of each is watched by the profiler for the most bytes that its tensors
hold at a time. Each network has a process of its own: after others had filled and left its memory, one took
1.25 times as long.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import describe_machine, in_own_process
from benchmarks.memory import MIB, tensors_peak
from benchmarks.networks import Unet, plain, preactivation_resnet18, timm_network, training_step, with_ordinary_weights
from benchmarks.records import PUBLISHED, ROOT, insert_table, number, row, slug, to_json, write_text
from benchmarks.workloads import Run, Workload

EAGER, INDUCTOR, OURS, EAGER_NCHW, NCHW = ("eager", "inductor", "fastres", "eager, NCHW", "fastres, NCHW")
PEERS = (EAGER, EAGER_NCHW, INDUCTOR)
IN_NCHW = (EAGER_NCHW, NCHW)
INNER = "fastres, inner "

# name -> how it is made, images of a step, their side
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "WRN-16-4": (plain("wrn16-4"), 64, 32),
    "preactivation ResNet-18": (preactivation_resnet18, 64, 32),
    "CIFAR ResNet-18": (plain("resnet18"), 64, 32),
    "U-Net (32, 64, 128)": (Unet, 8, 128),
    **{
        f"timm {name}": (timm_network(name), batch, 160)
        for name, batch in (
            ("vgg11_bn", 16), ("seresnet18", 16), ("resnet18", 32), ("resnet50d", 8), ("densenet121", 8),
            ("resnetv2_50", 8), ("regnety_002", 16), ("mobilenetv3_small_100", 16), ("efficientnet_b0", 8),
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Measure our backend against eager and inductor."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """Names of NETWORKS."""
    inner: tuple[str, ...] = ()
    """Further inner backends for ours, each a side of its own, such as aot_eager."""
    rounds: int = 7
    """Rounds of every network."""
    output_dir: Path = PUBLISHED
    """Folder for the raw figures, backend-<processor>-<capability>-<date>.json."""
    page: Path | None = ROOT / "docs" / "compile.md"
    """Markdown file that takes the tables of the folder, between `<!-- speed -->` and `<!-- /speed -->`."""


@dataclass
class Measured:
    """One network: seconds a step of each side, and of its first step, and the most bytes that its tensors hold."""

    name: str
    batch: int
    image: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first_seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """NaN where the side is missing."""
        return statistics.median(self.seconds[side]) if self.seconds.get(side) else float("nan")

    @property
    def gain(self) -> float:
        """The best peer's time over ours."""
        return min(self.median(side) for side in PEERS if self.seconds.get(side)) / self.median(OURS)

    def peak(self, side: str) -> float:
        """MiB; NaN where it was not measured."""
        return self.peak_bytes.get(side, float("nan")) / MIB


def _sides(inner: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {
        EAGER: {"disable": True},
        INDUCTOR: {"backend": "inductor"},
        OURS: {"backend": "fastres"},
        EAGER_NCHW: {"disable": True},
        NCHW: {"backend": "fastres"},
        **{INNER + name: {"backend": "fastres", "options": {"inner": name}} for name in inner},
    }


def measure(name: str, rounds: int, inner: tuple[str, ...] = ()) -> Measured:
    """Time all sides of a network, interleaved.

    Raises:
        ValueError: an unknown network, or no rounds.
    """
    if name not in NETWORKS:
        raise ValueError(f"networks: expected names among {', '.join(NETWORKS)}, got {name!r}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    _, batch, image = NETWORKS[name]
    found = Measured(name, batch, image)
    images = torch.randn(batch, 3, image, image)
    runs: dict[str, Run] = {}
    for side in _sides(inner):
        run = _set_up(name, side, images)
        start = time.perf_counter()
        try:
            run()
        except Exception as error:  # a peer that cannot compile it is named, and the others go on
            found.missing[side] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            continue
        found.first_seconds[side] = time.perf_counter() - start
        run()
        runs[side], found.seconds[side] = run, []
    for _ in range(rounds):
        for side, run in runs.items():
            start = time.perf_counter()
            run()
            found.seconds[side].append(time.perf_counter() - start)
    found.peak_bytes = {side: tensors_peak(run) for side, run in runs.items()}
    return found


def _set_up(name: str, side: str, images: Tensor) -> Run:
    torch.manual_seed(0)
    layout = torch.contiguous_format if side in IN_NCHW else torch.channels_last
    model = with_ordinary_weights(NETWORKS[name][0]()).to(memory_format=layout)
    inner = (side.removeprefix(INNER),) if side.startswith(INNER) else ()
    forward = torch.compile(model, **_sides(inner)[side])
    return training_step(forward, model, images.contiguous(memory_format=layout))


def workload(name: str) -> Workload:
    """A network's training step by every side, for pytest."""
    _, batch, image = NETWORKS[name]
    return Workload(
        group="model-backend",
        key=slug(name),
        name=f"{name} at {image} training step, batch {batch}",
        images=batch,
        rounds=3,
        set_up=lambda side: _set_up(name, side, torch.randn(batch, 3, image, image)),
        sides=tuple(_sides(())),
    )


def measure_alone(name: str, rounds: int, inner: tuple[str, ...] = ()) -> Measured:
    """`measure` in a process of its own."""
    return in_own_process(measure, name, rounds, inner)


def table(found: list[Measured]) -> str:
    """A Markdown table; ratios above 1 say that ours takes less time."""
    inner = [side for side in _all_sides(found) if side.startswith(INNER)]
    times = (EAGER, EAGER_NCHW, INDUCTOR, OURS, NCHW, *inner)
    lines = [
        row(
            "network", "images", *(f"{side}, ms" for side in times), "over the best peer", "first step, s: inductor",
            "fastres", "peak of tensors, MiB: eager", "fastres", "eager, NCHW", "fastres, NCHW",
        ),
        row("---", *["---:"] * (len(times) + 8)),
    ]  # fmt: skip
    for m in found:
        milliseconds = [number(1e3 * m.median(side)) for side in times]
        first = [number(m.first_seconds.get(side, float("nan"))) for side in (INDUCTOR, OURS)]
        peaks = [number(m.peak(side)) for side in (EAGER, OURS, EAGER_NCHW, NCHW)]
        lines.append(row(m.name, f"{m.batch} at {m.image}", *milliseconds, number(m.gain, "x"), *first, *peaks))
    return "\n".join(lines) + "\n"


def _all_sides(found: list[Measured]) -> list[str]:
    return list(dict.fromkeys(side for m in found for side in m.seconds))


def tables(folder: Path) -> str:
    """A table for each processor and instruction set of which the folder has figures: the newest ones."""
    newest: dict[tuple[str, str], tuple[dict[str, Any], list[Measured]]] = {}
    for machine, found in sorted(map(_read, folder.glob("backend-*.json")), key=lambda run: str(run[0]["date"])):
        newest[machine["processor"], machine["capability"]] = machine, found
    return "\n".join(f"{_heading(*newest[key])}\n\n{table(newest[key][1])}" for key in sorted(newest))


def _read(path: Path) -> tuple[dict[str, Any], list[Measured]]:
    """(machine, networks) of a file of raw figures."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return data["machine"], [Measured(**m) for m in data["networks"]]


def _heading(machine: dict[str, Any], found: list[Measured]) -> str:
    held = f" (held to it by `{machine['isa_settings']}`)" if machine.get("isa_settings") else ""
    where = f"{machine['processor']}, {machine['capability']}{held}, {machine['threads']} threads"
    rounds = min(len(times) for m in found for times in m.seconds.values())
    return (
        f"{where}; torch {machine['torch']}; float32, channels_last; {machine['date']}. "
        f"Medians of {rounds} interleaved rounds."
    )


def main(config: Config) -> None:
    """Measure, print, write; what there is after each network, so that a run that is cut off leaves it.

    Networks that the same machine measured on the same day, and that are not asked for again, stay in its file.
    """
    machine = describe_machine()
    config.output_dir.mkdir(parents=True, exist_ok=True)
    name = f"backend-{slug(machine['processor'])}-{slug(machine['capability'])}-{machine['date']}.json"
    file = config.output_dir / name
    kept = {m.name: m for m in _read(file)[1]} if file.is_file() else {}
    found: list[Measured] = []
    for network in tqdm(config.networks):
        found.append(measure_alone(network, config.rounds, config.inner))
        kept[network] = found[-1]
        ordered = sorted(kept.values(), key=lambda m: list(NETWORKS).index(m.name))
        write_text(file, to_json({"machine": machine, "networks": [vars(m) for m in ordered]}))
        if config.page is not None:
            insert_table(config.page, tables(config.output_dir), "speed")
    print(table(found))
    for m in found:
        for side, why in m.missing.items():
            print(f"{m.name}, {side}: {why}")


if __name__ == "__main__":
    main(tyro.cli(Config))
