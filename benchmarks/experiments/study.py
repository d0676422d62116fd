"""What the experiments share: settings, the runs of the trainer, results as JSON, the section of a document."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn
from rich.console import Console

from benchmarks import accuracy, records
from benchmarks.records import row, write_text
from fastres import models
from fastres.train import DivergedError, ImageData, TrainConfig, load_checkpoint, pictures, train

DOCUMENT = records.ROOT / "docs" / "experiments.md"
PUBLISHED = records.PUBLISHED / "experiments"

MakeModel = Callable[[TrainConfig, int], nn.Module]


@dataclass(frozen=True)
class Settings:
    """What decides the figures of an experiment."""

    model: str
    width: float
    epochs: int
    train_images: int
    test_images: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Place:
    """Where the images come from, and where results go."""

    data_dir: Path
    output_dir: Path
    machine: dict[str, Any]
    command: str


@dataclass(frozen=True)
class Case:
    """One training: options of the trainer, and what is done to the network before it."""

    name: str
    options: dict[str, Any]
    alter: Callable[[nn.Module], None] | None = None


@dataclass
class Study:
    """The results of an experiment: of each case by its name, as far as they are known."""

    name: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    command: str
    cases: dict[str, dict[str, Any]]

    @property
    def file(self) -> str:
        """Name of the file of raw figures."""
        return f"{self.name}.json"


class Interrupted(Exception):
    """Ctrl-C came; the same command goes on."""


def load(settings: Settings, place: Place) -> ImageData:
    """The images: the same subset for every experiment of these counts, as many of each class.

    Raises:
        ValueError: a wrong folder, or more images asked for than there are.
    """
    wanted = accuracy.Config(
        data_dir=place.data_dir,
        output_dir=place.output_dir,
        train_images=settings.train_images,
        test_images=settings.test_images,
    )
    return accuracy.load_images(wanted)


def read(name: str, settings: Settings, place: Place) -> Study:
    """The results so far, an empty study where there are none.

    Raises:
        ValueError: the file is not one of ours, or of other settings.
    """
    wanted = dataclasses.asdict(settings)
    path = place.output_dir / f"{name}.json"
    if not path.exists():
        return Study(name, wanted, place.machine, place.command, {})
    try:
        study = Study(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"output_dir: {path} does not hold results of this program ({error})") from error
    if study.settings != wanted:
        changed = [
            f"{k} was {study.settings.get(k)!r}, is {v!r}" for k, v in wanted.items() if study.settings.get(k) != v
        ]
        raise ValueError(f"output_dir: {path} holds results of other settings: {'; '.join(changed)}")
    return study


def write(study: Study, place: Place) -> None:
    """Write the raw figures."""
    place.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(place.output_dir / study.file, records.to_json(dataclasses.asdict(study)))


def trainer_config(settings: Settings, place: Place, folder: Path, options: dict[str, Any]) -> TrainConfig:
    """The trainer's configuration of a case, in float32 on the CPU."""
    fields: dict[str, Any] = {
        "model": settings.model, "epochs": settings.epochs, "batch_size": settings.batch_size, "seed": settings.seed,
        "device": "cpu", "amp": "none", "output_dir": folder,
        "resume": folder if (folder / "last.pt").is_file() else None,
    }  # fmt: skip
    return TrainConfig(**{**fields, **options})


def network(settings: Settings, alter: Callable[[nn.Module], None] | None) -> MakeModel:
    """What makes the network of a case: fused as it is, in plain PyTorch where it is altered."""

    def make(config: TrainConfig, num_classes: int) -> nn.Module:
        fused = alter is None and config.fused
        model = models.create(
            settings.model, num_classes=num_classes, stem=config.stem, dropout=config.dropout, width=settings.width,
            fused=fused,
        )  # fmt: skip
        if alter is not None:
            alter(model)
        return model

    return make


def train_case(case: Case, data: ImageData, settings: Settings, place: Place) -> dict[str, Any]:
    """Train, or go on, or read what a run that had ended left.

    Returns:
        `epochs`, the trainer's lines, and `diverged`, what it said of a loss that is not finite, else None.
    Raises:
        Interrupted: Ctrl-C came; the checkpoint is kept.
    """
    folder = place.output_dir / f"run-{case.name}"
    if folder.exists() and not (folder / "last.pt").is_file():
        shutil.rmtree(folder)  # stopped before its first checkpoint
    diverged = None
    if not (folder.exists() and load_checkpoint(folder)["epoch"] >= settings.epochs):
        config = trainer_config(settings, place, folder, case.options)
        try:
            summary = train(
                config, data=data, make_model=network(settings, case.alter), console=Console(file=io.StringIO())
            )
        except DivergedError as error:
            diverged = str(error)
        else:
            if not summary.finished:
                raise Interrupted
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    shutil.rmtree(folder)
    return {"epochs": [json.loads(line) for line in lines], "diverged": diverged}


def train_cases(cases: Sequence[Case], study: Study, data: ImageData, settings: Settings, place: Place) -> None:
    """Train what is missing, and write the results after each."""
    for case in cases:
        if case.name in study.cases:
            continue
        print(f"{case.name} ...", flush=True)
        study.cases[case.name] = train_case(case, data, settings, place)
        write(study, place)
        print(f"  {outcome(study.cases[case.name])}", flush=True)


def last(result: dict[str, Any], name: str) -> float:
    """A figure after the last epoch, NaN where training diverged."""
    if result["diverged"] or not result["epochs"]:
        return math.nan
    return float(result["epochs"][-1][name])


def outcome(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if result["diverged"]:
        return f"diverged: {result['diverged']}"
    return f"test accuracy {last(result, 'test_accuracy'):.2%}, training loss {last(result, 'train_loss'):.4f}"


def table(study: Study, names: Sequence[str]) -> list[str]:
    """The cases as a Markdown table."""
    lines = [
        row("", "test accuracy, %", "training accuracy, %", "test loss", "training loss", "seconds"),
        row("---", *["---:"] * 5),
    ]
    for name in names:
        result = study.cases[name]
        if result["diverged"]:
            lines.append(row(name, "diverged", "", "", "", ""))
            continue
        shares = [f"{100 * last(result, key):.2f}" for key in ("test_accuracy", "train_accuracy")]
        losses = [f"{last(result, key):.4f}" for key in ("test_loss", "train_loss")]
        lines.append(row(name, *shares, *losses, f"{last(result, 'seconds'):.0f}"))
    return lines


def draw_lines(study: Study, names: Sequence[str], path: Path) -> None:
    """Training loss and test accuracy of the cases by epoch."""
    figure = pictures.new_figure(10, 3.9)
    loss, reached = figure.subplots(1, 2)
    losses: list[float] = []
    shares: list[float] = []
    epochs = 1
    for number, name in enumerate(names):
        rows = study.cases[name]["epochs"]
        style = {"color": pictures.COLOURS[number % len(pictures.COLOURS)], "label": name}
        x = [line["epoch"] for line in rows]
        epochs = max([epochs, *x])
        for axes, key, values in ((loss, "train_loss", losses), (reached, "test_accuracy", shares)):
            y = [line[key] for line in rows]
            values.extend(y)
            pictures.plot(axes, x, y, **style)
    pictures.loss_scale(loss, losses)
    pictures.accuracy_scale(reached, shares)
    for axes, title in ((loss, "Training loss"), (reached, "Test accuracy")):
        pictures.tidy(axes, title)
        pictures.epoch_axis(axes, epochs)
        axes.legend(fontsize=8, frameon=False)
    pictures.save(figure, path)


def section(study: Study, body: Sequence[str]) -> str:
    """What goes between the markers of the document: settings, picture, figures, machine, date and command."""
    given, machine = study.settings, study.machine
    train_words = f"{given['epochs']} epochs, " if given["epochs"] else ""
    return "\n".join(
        [
            f"{given['model']} with its channels times {given['width']:g}, {given['train_images']:,} training and"
            f" {given['test_images']:,} test images, {train_words}batch {given['batch_size']}, seed {given['seed']},"
            " float32 on the CPU.",
            "",
            f"![{study.name}](results/experiments/{study.name}.png)",
            "",
            *body,
            "",
            f"{machine['processor']}, {machine['capability']}, {machine['threads']} threads; torch {machine['torch']},"
            f" fastres {machine['fastres']} ({machine['commit']}); {machine['date']}.",
            f"`{study.command}`",
            "",
        ]
    )


def publish(study: Study, place: Place, text: str) -> None:
    """Put raw figures, picture and section into docs/."""
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    for name in (study.file, f"{study.name}.png"):
        shutil.copyfile(place.output_dir / name, PUBLISHED / name)
    if not records.insert_table(DOCUMENT, text, study.name):
        raise RuntimeError(f"{DOCUMENT} lacks the lines <!-- {study.name} --> and <!-- /{study.name} -->")
