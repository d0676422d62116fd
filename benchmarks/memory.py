"""`python -m benchmarks.memory`: the peak memory of a training step, of eager PyTorch and of fastres.

A step is forward, cross-entropy, backward and SGD with momentum, in float32 and channels_last, on the CPU. Each side of
each network has a process of its own, since memory once used would count for the next one, and takes its figures there:

- the peak of resident memory over three steps, above what was resident once the network and its images were made.
  Parameters' gradients and momentum are in it, and so are workspaces, fragments and pages that the C library keeps;
- the tensors' peak: the most bytes that PyTorch's allocator had given out at a time in a fourth step, above what it had
  given out before (parameters, momentum and images), by the profiler's record of every allocation.

Both sides run under the C library's default settings, and once more with large buffers kept
(`fastres.reuse_cpu_memory`), which trades resident memory for time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fastres
from benchmarks import records
from benchmarks.machine import describe_machine, in_own_process
from benchmarks.records import PUBLISHED, ROOT, insert_table, number, row
from fastres import models

EAGER, FUSED = ("eager", "fastres")
SIDES = (EAGER, FUSED)
GOAL = 0.8
"""The most that fastres is to need of eager's peak."""
STEPS = 3
MIB = float(1 << 20)


@dataclass(frozen=True)
class Network:
    """A network as it is trained here: its name for `fastres.models.create`, the images of a step, and their side."""

    name: str
    stem: str
    batch: int
    image: int
    dropout: float = 0.0

    @property
    def words(self) -> str:
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.name} at {self.image}, batch {self.batch}{dropout}"


NETWORKS = (
    Network("resnet18", "cifar", 128, 32),
    Network("resnet18", "cifar", 128, 32, 0.1),
    Network("resnet50", "imagenet", 16, 224),
    Network("wrn28-10", "cifar", 16, 32),
)


@dataclass(frozen=True)
class Config:
    """Measure the peak memory of training steps."""

    networks: tuple[str, ...] = tuple(network.words for network in NETWORKS)
    """Some of them, by the words of the table's first column."""
    output_dir: Path = PUBLISHED
    """Folder for the raw figures, memory-<processor>-<capability>-<date>.json."""
    page: Path | None = ROOT / "docs" / "benchmarks.md"
    """Markdown file that takes the table, between `<!-- memory -->` and `<!-- /memory -->`."""


@dataclass(frozen=True)
class Measured:
    """Bytes of one network's step, by side; `resident` and `resident_kept` by the allocator's settings."""

    network: Network
    tensors: dict[str, int]
    resident: dict[str, int]
    resident_kept: dict[str, int]


# ---------------------------------------------------------------------------------------------------------- measuring


def tensors_peak(step: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at a time during a step, above those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_for_backward(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that autograd keeps between forward and backward of a training step.

    Every storage counts once; parameters, which exist anyway, do not count, nor does what autocast makes of them, which
    does not grow with the batch.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {parameter.shape for parameter in model.parameters() if parameter.dim() > 1}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.shape not in shapes:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Until backward begins the graph keeps what it saves, and so every address, alive; backward itself saves nothing.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def _status(field: str) -> int:
    """A size of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def resident_peak(step: Callable[[], object], steps: int = STEPS) -> int:
    """The peak of the process's resident memory over some steps, above what was resident before.

    Raises:
        RuntimeError: the system does not tell (Linux does).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
        before = _status("VmRSS")
        for _ in range(steps):
            step()
        return _status("VmHWM") - before
    except OSError as error:
        raise RuntimeError(f"resident memory: expected Linux's /proc/self, got {error}") from error


def training_step(network: Network, side: str) -> tuple[Callable[[], None], nn.Module]:
    """A step of a network that is made here, with its images; and the network."""
    torch.manual_seed(0)
    model: nn.Module = models.create(
        network.name, num_classes=10, stem=network.stem, dropout=network.dropout, fused=side == FUSED
    )
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(network.batch, 3, network.image, network.image).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (network.batch,))

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(model(images), labels))
        optimizer.step()

    return run, model


def measure(network: Network, side: str, kept: bool) -> tuple[int, int]:
    """(the tensors' peak, the resident peak) of a step, in this process. `kept`: large buffers are."""
    if kept and not fastres.reuse_cpu_memory():
        raise RuntimeError("reuse_cpu_memory: expected glibc's allocator and the CPU module, got neither or one")
    step, model = training_step(network, side)
    resident = resident_peak(step)
    model.zero_grad(set_to_none=True)
    return tensors_peak(step), resident


def measure_alone(network: Network, side: str, kept: bool) -> tuple[int, int]:
    """`measure` in a process of its own."""
    return in_own_process(measure, network, side, kept)


def measure_sides(network: Network) -> Measured:
    """Every side, under both settings of the allocator."""
    default = {side: measure_alone(network, side, False) for side in SIDES}
    kept = {side: measure_alone(network, side, True) for side in SIDES}
    return Measured(
        network,
        tensors={side: tensors for side, (tensors, _) in default.items()},
        resident={side: resident for side, (_, resident) in default.items()},
        resident_kept={side: resident for side, (_, resident) in kept.items()},
    )


# ---------------------------------------------------------------------------------------------------------- reporting


def table(found: Iterable[Measured]) -> str:
    """A row of Markdown a network: MiB, and what fastres needs as a share of eager's."""
    lines = [
        row(
            "training step, MiB", "tensors: eager", "fastres", "share", "resident: eager", "fastres", "share",
            "resident, buffers kept: eager", "fastres", "share",
        ),
        row("---", *["---:"] * 9),
    ]  # fmt: skip
    for entry in found:
        cells = []
        for sizes in (entry.tensors, entry.resident, entry.resident_kept):
            cells += [number(sizes[side] / MIB) for side in SIDES] + [number(sizes[FUSED] / sizes[EAGER], "x")]
        lines.append(row(entry.network.words, *cells))
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Measure, print, write; what there is after each network, so that a run that is cut off leaves it.

    Raises:
        ValueError: an unknown network.
    """
    by_words = {network.words: network for network in NETWORKS}
    unknown = [words for words in config.networks if words not in by_words]
    if unknown:
        raise ValueError(f"networks: expected some of {', '.join(by_words)}, got {', '.join(unknown)}")
    machine = describe_machine_of_defaults()
    slug = records.slug(f"{machine['processor']} {machine['capability']}")
    file = config.output_dir / f"memory-{slug}-{machine['date']}.json"
    how = f"{machine['processor']}, {machine['capability']}, {machine['threads']} threads; torch {machine['torch']};"
    how += f" float32, channels_last; {machine['date']}."
    config.output_dir.mkdir(parents=True, exist_ok=True)
    found: list[Measured] = []
    for words in tqdm(config.networks):
        found.append(measure_sides(by_words[words]))
        data = {"machine": machine, "networks": [dataclasses.asdict(entry) for entry in found]}
        records.write_text(file, records.to_json(data))
        if config.page is not None:
            insert_table(config.page, f"{how}\n\n{table(found)}", "memory")
    print(table(found))


def describe_machine_of_defaults() -> dict[str, Any]:
    """`describe_machine` without its setting of the allocator, which each measuring process makes for itself."""
    machine = describe_machine()
    del machine["allocator"]
    return machine


if __name__ == "__main__":
    main(tyro.cli(Config))
