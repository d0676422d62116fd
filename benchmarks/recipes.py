"""`python -m benchmarks.recipes RUN...`: what the trainer's recipes reached here, beside what their sources published.

RUN is the folder of a run that ended (`python -m fastres.train --recipe NAME --output-dir RUN`), made on this machine.
docs/results/recipes.json keeps the figures of all runs so far; a run of the same recipe, seed, side, images and
processor takes the place of an older one. The table goes into docs/training.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.accuracy import describe_cpu
from benchmarks.records import PUBLISHED, ROOT, insert_table, row, to_json, write_text
from benchmarks.sides import EAGER, FUSED
from fastres.train.recipes import RECIPES

PROGRAM = "python -m benchmarks.recipes"
MARKERS = "recipes"


@dataclass(frozen=True)
class Config:
    """Put the figures of runs that ended beside those that the recipes' sources published."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    images: str
    """What the images are, for the table: "CIFAR-10", say."""
    file: Path = PUBLISHED / "recipes.json"
    """The figures of all runs."""
    page: Path | None = ROOT / "docs" / "training.md"
    """Markdown file that takes the table, between `<!-- recipes -->` and `<!-- /recipes -->`."""


@dataclass(frozen=True)
class Run:
    """One training. The accuracy is a share of the test images after the last step, seconds are of all sittings."""

    recipe: str
    side: str
    seed: int
    images: str
    processor: str
    capability: str
    threads: int
    torch: str
    date: str
    test_images: int
    test_accuracy: float
    seconds: float
    images_per_second: float
    eval_epochs: int

    @property
    def row(self) -> tuple[Any, ...]:
        """The row of the table that it is part of."""
        return (self.recipe, self.images, self.side, self.processor, self.capability, self.threads)


def read(folder: Path, images: str, machine: dict[str, Any]) -> Run:
    """
    Raises:
        ValueError: the folder holds no run of a recipe that ended.
    """
    try:
        config, summary = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("config", "summary"))
    except (OSError, ValueError) as error:
        raise ValueError(f"runs: {folder}: {error}") from None
    if config["recipe"] not in RECIPES:
        raise ValueError(f"runs: {folder}: expected a run of a recipe, got the recipe {config['recipe']!r}")
    epochs = RECIPES[config["recipe"]].settings["epochs"]
    if not summary["finished"] or config["epochs"] != epochs or config["max_steps"] is not None:
        raise ValueError(f"runs: {folder}: expected a run of all {epochs:g} epochs, that ended")
    return Run(
        recipe=config["recipe"],
        side=FUSED if config["fused"] else EAGER,
        seed=config["seed"],
        images=images,
        processor=machine["processor"],
        capability=machine["capability"],
        threads=config["threads"] or machine["threads"],
        torch=machine["torch"],
        date=machine["date"],
        test_images=summary["test_images"],
        test_accuracy=summary["last_accuracy"],
        seconds=summary["seconds"],
        images_per_second=summary["images_per_second"],
        eval_epochs=config.get("eval_epochs", 1),
    )


def known(file: Path) -> list[Run]:
    """The runs so far."""
    return [Run(**run) for run in json.loads(file.read_text("utf-8"))] if file.is_file() else []


def joined(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """All runs in the recipes' order, the new ones in the place of others of the same row and seed."""
    found = {(run.row, run.seed): run for run in (*old, *new)}
    order = list(RECIPES)
    return sorted(found.values(), key=lambda run: (order.index(run.recipe), *map(str, run.row[1:]), run.seed))


def table(runs: Sequence[Run]) -> str:
    """The runs as a Markdown table, and the machines and dates."""
    lines = [
        row(
            "recipe, images", "", "test accuracy, %, by seed", "mean", "published", "minutes", "images a second",
            "processor",
        ),
        row("---", "---", "---", "---:", "---", "---:", "---:", "---"),
    ]  # fmt: skip
    for key in dict.fromkeys(run.row for run in runs):
        own = [run for run in runs if run.row == key]
        recipe, images, side, processor, capability, threads = key
        shares = [100 * run.test_accuracy for run in own]
        lines.append(
            row(
                f"{recipe}, {images}",
                side,
                ", ".join(f"{share:.2f}" for share in shares),
                f"{statistics.fmean(shares):.2f}",
                RECIPES[recipe].published,
                f"{min(run.seconds for run in own) / 60:.1f}",
                f"{max(run.images_per_second for run in own):.0f}",
                f"{processor}, {capability}, {threads} threads",
            )
        )
    dates = sorted({run.date for run in runs})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(sorted({run.torch for run in runs}))
    # A run takes so long that others may have had to share the machine.
    told = f"Float32 on the CPU; minutes and images a second are each the best seed's; torch {versions}; {span}."
    return "\n".join([*lines, "", told, ""])


def main(config: Config) -> None:
    """
    Raises:
        ValueError: a folder holds no run of a recipe that ended.
    """
    machine = describe_cpu()
    runs = joined(known(config.file), [read(folder, config.images, machine) for folder in config.runs])
    text = table(runs)
    write_text(config.file, to_json([asdict(run) for run in runs]))
    if config.page is not None and not insert_table(config.page, text, MARKERS):
        raise ValueError(f"page: {config.page} lacks the lines <!-- {MARKERS} --> and <!-- /{MARKERS} -->")
    print(text)


def entry(args: Sequence[str]) -> int:
    """The command line: 0 done, 2 wrong input."""
    try:
        main(tyro.cli(Config, args=list(args), prog=PROGRAM, description=__doc__))
    except ValueError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
