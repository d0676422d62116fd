"""What a run tells: one line an epoch, JSON lines for programs, and the table at the end."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastres.train.config import TrainConfig
from fastres.train.folder import write_text
from fastres.train.image_data import ImageData
from fastres.train.precision import AMP_DTYPES

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Summary:
    """The outcome of a run; summary.json holds the same."""

    model: str
    fused: bool
    backend: str
    device: str
    dataset: str
    train_images: int
    test_images: int
    instead_of: str | None
    finished: bool  # False after an interruption
    stopped_by: str | None  # the signal that stopped it: SIGINT, SIGTERM, SIGHUP
    epoch: int  # epochs completed
    step: int
    best_accuracy: float | None  # share of the test images, None before the first evaluation
    best_epoch: int | None
    last_accuracy: float | None
    images_per_second: float | None  # training, median over this sitting's steps without the first
    seconds: float  # all sittings together
    output_dir: str


def show_start(console: Console, config: TrainConfig, data: ImageData, backend: str) -> None:
    """Say what is about to run, and loudly if it is not the data set one may expect."""
    if data.instead_of:
        console.print(
            Panel(
                Text(f"Training on scikit-learn's HANDWRITTEN DIGITS instead. {data.instead_of}."),
                title="NOT CIFAR-10",
                border_style="bold yellow",
            )
        )
    console.print(
        f"{config.model} ({'fused' if config.fused else 'plain'}, {backend}) on {config.device} in "
        f"{str(AMP_DTYPES[config.amp]).removeprefix('torch.')}, {describe(data)}; "
        f"{config.epochs:g} epochs of batches of {config.batch_size}, {config.optimizer}, lr {config.lr:g}, "
        f"weight decay {config.weight_decay:g}, seed {config.seed}; results in {config.output_dir}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def describe(data: ImageData) -> str:
    """A data set in a few words."""
    counts = f"{len(data.train):,} training and {len(data.test):,} test images"
    return f"{data.name} ({counts} of {data.image_size} pixels)"


def write_summary(summary: Summary) -> None:
    """Write summary.json."""
    write_text(Path(summary.output_dir) / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")


def show_summary(console: Console, summary: Summary, data: ImageData) -> None:
    """Print the final table."""
    directory = Path(summary.output_dir)
    table = Table(title="Training finished" if summary.finished else "Training stopped early", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("data set", describe(data))
    if data.instead_of:
        table.add_row("NOT CIFAR-10", Text(data.instead_of), style="yellow")
    table.add_row("model", f"{summary.model}, {'fused' if summary.fused else 'plain PyTorch'}")
    table.add_row("backend", f"{summary.backend} on {summary.device}")
    best = "none yet" if summary.best_accuracy is None else f"{summary.best_accuracy:.2%} in epoch {summary.best_epoch}"
    table.add_row("best test accuracy", best)
    table.add_row("last test accuracy", "none yet" if summary.last_accuracy is None else f"{summary.last_accuracy:.2%}")
    rate = "too few steps" if summary.images_per_second is None else f"{summary.images_per_second:,.1f} images/s"
    table.add_row("training speed", f"{rate} (median over steps)" if summary.images_per_second else rate)
    table.add_row("time", f"{summary.seconds:,.1f} s, {summary.epoch} epochs, {summary.step:,} steps")
    files = ", ".join(sorted(p.name for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")))
    table.add_row("files", Text(f"{directory}/: {files}"))
    console.print(table)
