"""`python -m benchmarks.scaling`: what an image costs, by the batch, width, depth, image size and number of threads.

A sweep varies one of them, in inference and in training (forward, cross-entropy, backward and SGD with momentum), in
float32 and channels_last on the CPU. Each round runs every side once, and figures are medians over the rounds. A sweep
has a process of its own for each mode and number of threads, and the peak of resident memory, which memory once used
would hide, one for each batch, mode and side. torch.compile runs at a few batches only, with nothing compiled before:
its first run says what compilation takes.

Batch, width, depth and threads are swept on ResNet-20, the image size on ResNet-18, both with the stem for CIFAR-10.
Sweeps that are not asked for are kept from the newest record of the same processor and instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.records import PUBLISHED, ROOT, insert_table
from benchmarks.scaling.report import PICTURE, heading, page, plot, shown, table
from benchmarks.scaling.sweeps import SWEEPS, Sweep, file_name, measure_sweep, newest, write


@dataclass(frozen=True)
class Config:
    """Measure how the time and the memory of an image scale."""

    sweeps: tuple[str, ...] = tuple(SWEEPS)
    """What is varied: some of batch, width, depth, image and threads."""
    rounds: float = 1.0
    """Rounds of each point, as a multiple of its own number."""
    measure: bool = True
    """Measure first; otherwise the picture and the page are written anew from the records."""
    output_dir: Path = PUBLISHED
    """Folder for the record, scaling-<processor>-<capability>-<date>.json, and scaling.png."""
    page: Path | None = ROOT / "docs" / "benchmarks.md"
    """Markdown file that takes the tables, between `<!-- scaling -->` and `<!-- /scaling -->`; not of a quick run."""


def publish(config: Config) -> None:
    """Write the picture and the page from the records of the folder."""
    found = shown(config.output_dir)
    if found:
        plot(found, config.output_dir / (PICTURE.replace(".", "-quick.") if workloads.QUICK else PICTURE))
    if config.page is not None and not workloads.QUICK:
        insert_table(config.page, page(config.output_dir), "scaling")


def main(config: Config) -> None:
    """Measure, write, print; what there is after each sweep, so that a run that is cut off leaves it.

    Raises:
        ValueError: no sweep, an unknown one, or no rounds.
        RuntimeError: there is a GPU, on which the workloads would run.
    """
    unknown = [name for name in config.sweeps if name not in SWEEPS]
    if unknown or not config.sweeps:
        raise ValueError(f"sweeps: expected some of {', '.join(SWEEPS)}, got {', '.join(unknown) or 'none'}")
    if not config.rounds > 0:
        raise ValueError(f"rounds: expected a positive number, got {config.rounds}")
    if workloads.CUDA:
        raise RuntimeError("device: expected a machine without a GPU, or CUDA_VISIBLE_DEVICES='', got a GPU")
    if config.measure:
        machine = describe_machine()
        record = newest(config.output_dir).get((machine["capability"], machine["processor"]), {})
        for sweep in config.sweeps:
            record[sweep] = Sweep(machine, measure_sweep(sweep, config.rounds))
            write(record, config.output_dir / file_name(machine))
            publish(config)
    else:
        publish(config)
    for record in shown(config.output_dir):
        print(f"{heading(record)}\n\n{table(record)}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
