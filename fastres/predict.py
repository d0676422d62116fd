"""`python -m fastres.predict CHECKPOINT IMAGE...`: the class of each image, with its probability.

CHECKPOINT is a file of a run, or its folder (best.pt, or else last.pt or previous.pt). An IMAGE is a file, a folder, of
which every image below it is taken, or a pattern in quotes such as 'photos/*.png'. Images are prepared as in the run's
evaluations: RGB, the shorter side resized to the run's image size, the middle cut out, normalised by the mean and
deviation of the training images.
"""

from __future__ import annotations

import glob
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastres.freeze import freeze
from fastres.train import checkpoint as ckpt
from fastres.train.augment import normalise
from fastres.train.config import check_device
from fastres.train.decoding import ImageFile, decode_image
from fastres.train.errors import InputError, RunError, reading
from fastres.train.image_folder import images_below
from fastres.train.loop import restored_model
from fastres.train.prepare import pick_device
from fastres.train.terminal import discard_output, escape_output

PROGRAM = "python -m fastres.predict"
PREPROCESSING = ("mean", "std", "image_size")


@dataclass(frozen=True)
class Options:
    """Classify images by a trained network."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint, or folder of a run: its best.pt, or last.pt where there is none, or previous.pt."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders of images, patterns in quotes."""
    top: int = 3
    """How many classes to name for each image, the likeliest first."""
    json: bool = False
    """Write one JSON object an image, a line each, in place of the table."""
    freeze: bool = True
    """Fold normalisations into convolutions, and pack weights, which is faster."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    batch_size: int = 64
    """Images a batch."""


class Guess(NamedTuple):
    """A class and its probability."""

    name: str
    probability: float


class Prediction(NamedTuple):
    """What was found for an image: the likeliest classes, or why it could not be read."""

    image: str
    guesses: tuple[Guess, ...]
    error: str | None


class Predictor:
    """A trained network together with the preparation of its images."""

    def __init__(self, checkpoint: Path | str, *, device: torch.device | str = "cpu", frozen: bool = True) -> None:
        """
        Args:
            checkpoint: file of a run, or its folder.
            frozen: compute with `fastres.freeze(model)`.
        Raises:
            InputError: no usable checkpoint, or one from before the preparation of images was saved.
        """
        file = checkpoint_file(Path(checkpoint))
        try:
            state = ckpt.load_checkpoint(file)
            model = restored_model(state, file)
        except InputError as error:
            raise InputError(f"checkpoint: {str(error).removeprefix('resume: ')}") from error
        missing = [name for name in PREPROCESSING if name not in state]
        if missing:
            raise InputError(
                f"checkpoint: {file} does not hold {', '.join(missing)}, by which images are prepared; it was written "
                "by an older version: resume its run for an epoch to have it written anew"
            )
        self.file = file
        self.classes: tuple[str, ...] = tuple(state["classes"])
        self.image_size: int = state["image_size"]
        self.mean, self.std = tuple(state["mean"]), tuple(state["std"])
        self.device = torch.device(device)
        self.amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(state["config"]["amp"])
        self.channels_last: bool = state["config"]["channels_last"]
        layout: dict[str, Any] = {"memory_format": torch.channels_last} if self.channels_last else {}
        self.model = (freeze(model) if frozen else model).to(self.device, **layout)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities of the classes.

        Args:
            images: uint8 [N, 3, image_size, image_size].
        Returns:
            float32 [N, classes], on the CPU.
        """
        expected = (3, self.image_size, self.image_size)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: expected uint8 [N, 3, {self.image_size}, {self.image_size}], got {images.dtype} "
                f"{list(images.shape)}"
            )
        x = normalise(images.to(self.device), self.mean, self.std, channels_last=self.channels_last)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            logits = self.model(x)
        chances: Tensor = logits.float().softmax(1).cpu()
        return chances

    def predict(self, paths: Sequence[Path], *, top: int = 3, batch_size: int = 64) -> Iterator[Prediction]:
        """The `top` likeliest classes of each file, in the order of the files.

        A file that cannot be read gives a Prediction with `error`.
        """
        top = min(top, len(self.classes))
        for start in range(0, len(paths), batch_size):
            part = paths[start : start + batch_size]
            decoded = [self._decode(path) for path in part]
            images = [image for image in decoded if isinstance(image, Tensor)]
            rows = iter(self(torch.stack(images)) if images else ())
            for path, found in zip(part, decoded, strict=True):
                if isinstance(found, str):
                    yield Prediction(str(path), (), found)
                    continue
                best = next(rows).topk(top)
                pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                yield Prediction(str(path), tuple(Guess(self.classes[i], value) for value, i in pairs), None)

    def _decode(self, path: Path) -> Tensor | str:
        try:
            return decode_image(ImageFile(str(path)), self.image_size)
        except InputError as error:
            return str(error).removeprefix("data_dir: ")


def checkpoint_file(path: Path) -> Path:
    """`path` itself, or the best checkpoint in the folder `path`.

    Raises:
        InputError: there is none.
    """
    with reading("checkpoint", path):
        files = [path / name for name in (ckpt.BEST, ckpt.LAST, ckpt.PREVIOUS)] if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                return file
    raise InputError(f"checkpoint: no checkpoint at {' or '.join(map(str, files))}")


def image_files(names: Sequence[str]) -> list[Path]:
    """The files that are meant: folders and patterns are replaced by what they hold, in the order of their names.

    Raises:
        InputError: no such file, or a folder or pattern without images.
    """
    found: list[Path] = []
    for name in names:
        with reading("image", name):
            found += _files_of(name)
    return found


def _files_of(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(map(Path, images_below(str(path))))
    else:
        # A file that was named itself is taken whatever its ending is.
        matches = sorted(map(Path, glob.glob(name, recursive=True)))
        inside = [file for file in matches if _is_image(file)]
        if not matches:
            raise InputError(f"image: no such file, folder or pattern: {name}")
    if not inside:
        raise InputError(f"image: {name} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return inside


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMG_EXTENSIONS and file.is_file()


def show(predictions: Sequence[Prediction], console: Console) -> None:
    """Print the table."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("or else", overflow="fold")
    for image, guesses, error in predictions:
        if error is not None:
            table.add_row(Text(image), "unreadable", "", Text(error), style="yellow")
            continue
        others = ", ".join(f"{guess.name} {guess.probability:.2%}" for guess in guesses[1:])
        table.add_row(Text(image), Text(guesses[0].name), f"{guesses[0].probability:.2%}", Text(others))
    console.print(table)


def to_dict(prediction: Prediction) -> dict[str, Any]:
    """A prediction in plain JSON types."""
    if prediction.error is not None:
        return {"image": prediction.image, "error": prediction.error}
    best = prediction.guesses[0]
    top = [{"class": guess.name, "probability": guess.probability} for guess in prediction.guesses]
    return {"image": prediction.image, "class": best.name, "probability": best.probability, "top": top}


def run(options: Options, console: Console) -> int:
    """Predict as asked.

    Returns:
        0, or 1 where an image could not be read.
    Raises:
        InputError, RunError: an impossible option, no such image, no usable checkpoint or device.
    """
    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"{name}: expected at least 1, got {getattr(options, name)}")
    paths = image_files(options.images)
    if not paths:
        raise InputError("image: expected at least one")
    check_device(options.device, "cpu, cuda or cuda:N")
    predictor = Predictor(options.checkpoint, device=pick_device(options.device), frozen=options.freeze)
    found = predictor.predict(paths, top=options.top, batch_size=options.batch_size)
    failed = False
    predictions = []
    for prediction in found:
        failed |= prediction.error is not None
        if options.json:
            print(json.dumps(to_dict(prediction), ensure_ascii=False), flush=True)
        else:
            predictions.append(prediction)
    if not options.json:
        show(predictions, console)
    return int(failed)


def main(args: Sequence[str] | None = None) -> int:
    """Predict as the command line says.

    Returns:
        Exit status: 0 done, 1 an image could not be read, or nobody reads what is printed, 2 wrong input or
        environment, 130 stopped by Ctrl-C (SIGINT).
    """
    escape_output()
    try:
        options = tyro.cli(Options, args=args, prog=PROGRAM)
        return run(options, Console())
    except (InputError, RunError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as of `| head`
        discard_output()
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
