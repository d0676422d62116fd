"""`python -m benchmarks.accuracy --data-dir PATH --output-dir DIR`: does Winograd's convolution cost accuracy?

Trains one network twice from each seed, in float32 on the CPU, by the trainer itself: fused with Winograd's algorithm
for the blocks' 3x3 convolutions of stride 1, and in plain PyTorch. Both begin with the same weights and see the same
images in the same order, augmented alike. Whatever the seeds, the images are the same subset, as many of each class.

PATH is a folder of images, train/<class>/ and test/<class>/, or one that holds torchvision's copy of CIFAR-10. DIR
takes accuracy-<model>.json, everything that was found, and accuracy-<model>.md, the table.

A study can be done in pieces: stop it with Ctrl-C, or `timeout -s INT 600 python -m benchmarks.accuracy ...`, and give
the same command again. Runs whose result is written are not repeated, one that was stopped goes on from its checkpoint,
and more seeds can be added. Take another folder for other settings.

A side takes about seeds * epochs * (train_images + test_images / 3) / (training images a second). The defaults are
made for 20 minutes on two cores that train a ResNet-18 at 60 (plain) and 130 (fused) images a second; resnet20 has a
fourteenth of the arithmetic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shlex
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks import records
from benchmarks.machine import describe_machine
from benchmarks.records import row
from benchmarks.sides import EAGER, FUSED
from fastres import models
from fastres._extension import cpu_capability, load_cpu, status
from fastres.info import processors
from fastres.train import ImageData, Split, TrainConfig, load_checkpoint, load_data, train
from fastres.train.config import check_config
from fastres.train.folder import write_text

PROGRAM = "python -m benchmarks.accuracy"
SIDES = (FUSED, EAGER)
ALGORITHM = "winograd"
MEASURES = {"test_accuracy": "test accuracy, %", "train_loss": "training loss", "test_loss": "test loss"}


@dataclass(frozen=True)
class Config:
    """Train fused with Winograd's convolutions and unfused, and compare the accuracies."""

    data_dir: Path
    """Folder of the images."""
    output_dir: Path
    """Folder for the results, and for the checkpoint of the run at hand."""
    seeds: int = 3
    """Runs of each side, with the seeds 0, 1, ..."""
    epochs: int = 3
    """Passes over the training images."""
    train_images: int = 5000
    """Training images, as many of each class."""
    test_images: int = 2000
    """Test images, as many of each class."""
    model: str = "resnet18"
    """A network of the trainer."""
    batch_size: int = 64
    """Images a training step. Few images need small batches, to make steps enough of them."""
    lr: float = 0.02
    """Peak learning rate of SGD with Nesterov's momentum; it rises for a fifth of the epochs, at most one, and falls on
    a cosine to zero. Of 0.01, 0.02 and 0.05 the default gave a ResNet-18 in plain PyTorch the best accuracy."""
    threads: int | None = None
    """CPU threads. None leaves PyTorch's own choice."""


@dataclass(frozen=True)
class Run:
    """One training. `epochs`: the trainer's line for each; `losses`: the training loss of every step."""

    seed: int
    side: str
    backend: str
    test_accuracy: float  # after the last epoch, a share of the test images
    test_loss: float
    train_loss: float  # mean over the last epoch
    epochs: list[dict[str, Any]]
    losses: list[float]
    machine: dict[str, Any]
    command: str


@dataclass(frozen=True)
class Study:
    """All runs that share their settings, in the order in which they were made."""

    settings: dict[str, Any]
    runs: list[Run]

    def find(self, seed: int, side: str) -> Run | None:
        """A run, where it has been made."""
        return next((run for run in self.runs if (run.seed, run.side) == (seed, side)), None)

    def values(self, side: str, measure: str) -> list[float]:
        """One figure of all the runs of a side."""
        return [getattr(run, measure) for run in self.runs if run.side == side]


# ---------------------------------------------------------------------------------------------------------- preparation


def check(config: Config) -> None:
    """Check the arguments.

    Raises:
        TypeError, ValueError: a wrong type or an impossible value; the message names the argument.
        RuntimeError: there are no Winograd kernels here, so there is nothing to compare.
    """
    for name, low in (("seeds", 1), ("train_images", 2), ("test_images", 1), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    why = models.why_unknown(config.model)
    if why is not None:
        raise ValueError(f"model: {why}")
    check_config(trainer_config(config, 0, FUSED, config.output_dir))
    if not has_winograd_kernels():
        raise RuntimeError(f"Winograd's convolution needs compiled kernels for AVX2 or AVX-512, got: {status().cpu}")


def has_winograd_kernels() -> bool:
    """Whether the compiled CPU kernels are there, and for a processor that Winograd's algorithm is written for."""
    return load_cpu() is not None and cpu_capability() != "default"


def load_images(config: Config) -> ImageData:
    """The images of the study.

    Raises:
        ValueError: a wrong folder, more images asked for than there are, or too many to hold them in memory.
    """
    kind: Any = "imagefolder" if (config.data_dir / "train").is_dir() else "cifar10"
    data = load_data(TrainConfig(dataset=kind, data_dir=config.data_dir))
    train_split = subset(data.train, config.train_images, "train_images")
    return dataclasses.replace(data, train=train_split, test=subset(data.test, config.test_images, "test_images"))


def subset(split: Split, count: int, name: str) -> Split:
    """`count` images, drawn once and for all, as many of each class as can be."""
    if not isinstance(split.images, Tensor):
        raise ValueError("data_dir: expected images that fit into memory, 2 GiB decoded")
    if count > len(split):
        raise ValueError(f"{name}: expected at most the {len(split)} that there are, got {count}")
    if count == len(split):
        return split
    try:
        part, _ = train_test_split(np.arange(len(split)), train_size=count, stratify=split.labels, random_state=0)
    except ValueError as error:
        raise ValueError(f"{name}: {count} of {len(split)} cannot be drawn evenly: {error}") from error
    chosen = torch.from_numpy(np.sort(part))
    return Split(split.images[chosen], split.labels[chosen])


def settings(config: Config, data: ImageData) -> dict[str, Any]:
    """What has to be the same for runs to be compared."""
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        for tensor in (split.images, split.labels):
            if isinstance(tensor, Tensor):
                digest.update(tensor.numpy().tobytes())
    return {
        "data": data.name,
        "data_sha256": digest.hexdigest(),
        "classes": len(data.classes),
        "image_size": data.image_size,
        **{
            name: getattr(config, name)
            for name in ("model", "train_images", "test_images", "epochs", "batch_size", "lr")
        },
    }


def trainer_config(config: Config, seed: int, side: str, folder: Path) -> TrainConfig:
    """The trainer's configuration for one run; the sides differ in what computes the blocks, and in nothing else."""
    fused: dict[str, Any] = {"fused": True, "conv_algorithm": ALGORITHM} if side == FUSED else {"fused": False}
    return TrainConfig(
        model=config.model,
        output_dir=folder,
        resume=folder if (folder / "last.pt").is_file() else None,
        epochs=config.epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=seed,
        device="cpu",
        amp="none",
        **fused,
    )


# -------------------------------------------------------------------------------------------------------------- running


def train_side(
    config: Config, data: ImageData, seed: int, side: str, folder: Path, machine: dict[str, Any], command: str
) -> Run | None:
    """Make one run, or the rest of it; None where Ctrl-C stopped it."""
    if folder.exists() and not (folder / "last.pt").is_file():
        shutil.rmtree(folder)  # killed before its first checkpoint
    if not _complete(folder, config.epochs):
        quiet = Console(file=io.StringIO())
        if not train(trainer_config(config, seed, side, folder), data=data, console=quiet).finished:
            return None
    epochs = _rows(folder / "metrics.jsonl")
    return Run(
        seed=seed,
        side=side,
        backend=str(status().cpu) if side == FUSED else "eager PyTorch",
        test_accuracy=epochs[-1]["test_accuracy"],
        test_loss=epochs[-1]["test_loss"],
        train_loss=epochs[-1]["train_loss"],
        epochs=epochs,
        losses=[step["loss"] for step in _rows(folder / "steps.jsonl")],
        machine=machine,
        command=command,
    )


def _complete(folder: Path, epochs: int) -> bool:
    """Whether a run was killed between its end and the writing of its result."""
    return (folder / "last.pt").is_file() and load_checkpoint(folder)["epoch"] == epochs


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def describe_cpu() -> dict[str, Any]:
    """As for the other benchmarks, of the CPU also where there is a GPU."""
    return {**describe_machine(), "processor": dict(processors())["CPU"], "device": "cpu", "dtype": "float32"}


# ------------------------------------------------------------------------------------------------------------ reporting


def to_json(study: Study) -> str:
    """The raw figures."""
    return records.to_json(dataclasses.asdict(study))


def read(path: Path, wanted: dict[str, Any]) -> Study:
    """The study so far; an empty one where there is no file.

    Raises:
        ValueError: the file is not one of ours, or of other settings.
    """
    if not path.exists():
        return Study(wanted, [])
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        study = Study(found["settings"], [Run(**run) for run in found["runs"]])
        names = sorted(wanted.keys() | study.settings.keys())
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"output_dir: {path} does not hold results of this program ({error})") from error
    differences = [
        f"{name} was {study.settings.get(name)!r}, is {wanted.get(name)!r}"
        for name in names
        if study.settings.get(name) != wanted.get(name)
    ]
    if differences:
        raise ValueError(f"output_dir: {path} holds results of other settings: {'; '.join(differences)}")
    return study


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation, not a number where there are too few values."""
    mean = statistics.mean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The first mean less the second, and its standard error sqrt(s1^2 / n1 + s2^2 / n2).

    The sides' runs of one seed count as independent: after some steps rounding has driven them apart.
    """
    (mean_1, deviation_1), (mean_2, deviation_2) = mean_and_deviation(first), mean_and_deviation(second)
    if not first or not second:
        return math.nan, math.nan
    return mean_1 - mean_2, math.sqrt(deviation_1**2 / len(first) + deviation_2**2 / len(second))


def table(study: Study) -> str:
    """The results in Markdown."""
    given = study.settings
    seeds = sorted({run.seed for run in study.runs})
    lines = [
        f"{given['model']}, {given['train_images']:,} training and {given['test_images']:,} test images of"
        f" {given['image_size']} pixels ({given['data']}, {given['classes']} classes), {given['epochs']} epochs, batch"
        f" {given['batch_size']}, peak learning rate {given['lr']:g}; float32 on the CPU. fused: with Winograd's"
        " convolution; plain: PyTorch. Losses are means over the last epoch's training images, and over the test"
        " images after it. Means with the sample standard deviation; the difference with its standard error.",
        "",
        row("seed", *(f"{words}: {side}" for words in MEASURES.values() for side in ("fused", "plain"))),
        row("---", *["---:"] * (2 * len(MEASURES))),
    ]
    for seed in seeds:
        runs = {side: study.find(seed, side) for side in SIDES}
        lines.append(
            row(str(seed), *(_figure(m, getattr(runs[s], m) if runs[s] else math.nan) for m in MEASURES for s in SIDES))
        )
    means = [_spread(m, *mean_and_deviation(study.values(side, m))) for m in MEASURES for side in SIDES]
    lines.append(row("mean", *means))
    apart = [_spread(m, *difference(study.values(FUSED, m), study.values(EAGER, m)), "+") for m in MEASURES]
    lines.append(row("fused - plain", *(cell for found in apart for cell in (found, ""))))
    lines.append("")
    for machine in _unique(
        f"{run.machine['processor']}, {run.machine['capability']}, {run.machine['threads']} threads; torch"
        f" {run.machine['torch']}, torchvision {run.machine['torchvision']}, fastres {run.machine['fastres']}"
        f" ({run.machine['commit']}); {run.machine['date']}."
        for run in study.runs
    ):
        lines.append(machine)
    lines += [f"`{command}`" for command in _unique(run.command for run in study.runs)]
    return "\n".join(lines) + "\n"


def _figure(measure: str, value: float, sign: str = "") -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:{sign}.2f}" if measure == "test_accuracy" else f"{value:{sign}.4f}"


def _spread(measure: str, value: float, deviation: float, sign: str = "") -> str:
    figures = (_figure(measure, value, sign), _figure(measure, deviation))
    return " ± ".join(figure for figure in figures if figure)


def _unique(texts: Any) -> list[str]:
    return list(dict.fromkeys(texts))


def main(config: Config, command: str) -> bool:
    """Make the runs that are missing, writing the results after each; False where Ctrl-C came.

    Raises:
        ValueError, RuntimeError: a wrong argument or folder, or no Winograd kernels. Nothing has been written.
    """
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    machine = describe_cpu()
    data = load_images(config)
    file = config.output_dir / f"accuracy-{config.model}.json"
    study = read(file, settings(config, data))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    # The settings are there before the first run, so that no checkpoint is gone on with under others.
    write_text(file, to_json(study))
    for seed in range(config.seeds):
        for side in SIDES:
            folder = config.output_dir / f"accuracy-{config.model}-{side}-seed{seed}"
            if study.find(seed, side) is None:
                print(f"seed {seed}, {side} ...", flush=True)
                run = train_side(config, data, seed, side, folder, machine, command)
                if run is None:
                    print("Interrupted; the same command goes on from here.")
                    return False
                study.runs.append(run)
                write_text(file, to_json(study))
                write_text(file.with_suffix(".md"), table(study))
                print(f"  test accuracy {run.test_accuracy:.2%}, training loss {run.train_loss:.4f}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(table(study))
    print(f"raw figures: {file}")
    return True


if __name__ == "__main__":
    asked = tyro.cli(Config, prog=PROGRAM, description=__doc__)
    sys.exit(0 if main(asked, shlex.join([*PROGRAM.split(), *sys.argv[1:]])) else 130)
