"""`python -m benchmarks.experiments NAME --data-dir PATH --output-dir DIR`: the questions of docs/experiments.md.

NAME is depth, optimizers, rates, dropout or parts. PATH is a folder of images, train/<class>/ and test/<class>/, or one
that holds torchvision's copy of CIFAR-10. DIR takes NAME.json, all figures, NAME.png and NAME.md; --publish puts them
into docs/. An experiment may be stopped by Ctrl-C at any time; the same command goes on. Take another folder for other
settings.

Estimated for resnet20 at 1,000 training images a second, as two quiet cores make: depth 4 minutes, optimizers 4, rates
5, dropout 6, parts 5.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import tyro

from benchmarks import accuracy
from benchmarks.experiments import depth, trained
from benchmarks.experiments.study import Interrupted, Place, Settings, Study, load, publish, read, section, write
from benchmarks.records import write_text
from fastres.train import ImageData

PROGRAM = "python -m benchmarks.experiments"
Name = Literal["depth", "optimizers", "rates", "dropout", "parts"]


class Experiment(Protocol):
    """What an experiment can do."""

    def run(self, study: Study, data: ImageData, settings: Settings, place: Place) -> None: ...
    def body(self, study: Study) -> list[str]: ...
    def draw(self, study: Study, path: Path) -> None: ...


# Epochs and training images that make each a matter of minutes.
EXPERIMENTS: dict[str, tuple[Any, int, int]] = {
    "depth": (depth, 0, 5000),  # steps, not epochs
    "optimizers": (trained.optimizers, 5, 10000),
    "rates": (trained.rates, 3, 8000),
    "dropout": (trained.dropout, 5, 10000),
    "parts": (trained.parts, 5, 10000),
}


@dataclass(frozen=True)
class Config:
    """Answer one question by experiment."""

    name: tyro.conf.Positional[Name]
    """Which one."""
    data_dir: Path
    """Folder of the images."""
    output_dir: Path
    """Folder for the results, and for the checkpoint of the run at hand."""
    epochs: int | None = None
    """Passes over the training images. None: as the experiment is made for."""
    train_images: int | None = None
    """Training images, as many of each class. None: as the experiment is made for."""
    test_images: int = 2000
    """Test images, as many of each class."""
    batch_size: int = 64
    """Images a training step."""
    model: str = "resnet20"
    """The network that is trained; depth has its own."""
    width: float = 1.0
    """Multiplier of the network's channels."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    threads: int | None = None
    """CPU threads. None leaves PyTorch's own choice."""
    publish: bool = False
    """Put figures, picture and section into docs/."""


def main(config: Config, command: str) -> bool:
    """Run what is missing, and write the results; False where Ctrl-C came.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong argument or folder.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    experiment, epochs, images = EXPERIMENTS[config.name]
    settings = Settings(
        model=config.model,
        width=config.width,
        epochs=epochs if config.epochs is None else config.epochs,
        train_images=images if config.train_images is None else config.train_images,
        test_images=config.test_images,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    if config.name == "depth":
        settings = dataclasses.replace(settings, model=f"resnet{depth.DEPTHS[0]} to {depth.DEPTHS[-1]}", epochs=0)
    place = Place(config.data_dir, config.output_dir, accuracy.describe_cpu(), command)
    study = read(config.name, settings, place)
    data = load(settings, place)
    write(study, place)
    try:
        experiment.run(study, data, settings, place)
    except Interrupted:
        print("Interrupted; the same command goes on from here.")
        return False
    # A study that was gone on with names the command that finished it.
    study = dataclasses.replace(study, machine=place.machine, command=command)
    write(study, place)
    experiment.draw(study, place.output_dir / f"{config.name}.png")
    text = section(study, experiment.body(study))
    write_text(place.output_dir / f"{config.name}.md", text)
    if config.publish:
        publish(study, place, text)
    print(text)
    return True


def entry(args: Sequence[str]) -> int:
    """The command line: 0 done, 2 wrong input, 130 stopped by Ctrl-C."""
    config = tyro.cli(Config, args=list(args), prog=PROGRAM, description=__doc__)
    try:
        return 0 if main(config, shlex.join([*PROGRAM.split(), *args])) else 130
    except (ValueError, RuntimeError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
