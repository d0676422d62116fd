"""report.html: one page that tells a run, readable in any browser, with nothing outside it: no script, no address."""

import base64
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastres.train import pictures
from fastres.train.config import TrainConfig
from fastres.train.folder import write_text
from fastres.train.history import History, read_history
from fastres.train.image_data import ImageData
from fastres.train.page_template import TEMPLATE
from fastres.train.progress import duration

PAGE = "report.html"
MISTAKES = 20
"""Images on the sheet of mistakes."""
PAIRS = 10
"""Pairs of classes in the table of confusions."""


class Evaluated(Protocol):
    """What an evaluation of the test images found, as far as a report needs it."""

    @property
    def logits(self) -> Tensor: ...  # [N, classes], in the order of the test images


class ClassRow(NamedTuple):
    """A class in the table."""

    name: str
    images: int
    recall: float | None  # share of its images that were classified correctly, None without images
    precision: float | None  # share of what was taken for it that is of it, None where nothing was
    taken_for: str  # the class that it was most often mistaken for


class Picture(NamedTuple):
    """A picture in the page."""

    name: str
    title: str
    words: str
    data: str | None  # a data: URI; None where it could not be drawn


def write_report(directory: Path, data: ImageData, evaluation: Evaluated) -> list[str]:
    """Write curves.png, confusion.png, mistakes.png and report.html into the folder of a run.

    Reads its config.json, metrics.jsonl, steps.jsonl and summary.json, of which the page tells what there is. Whatever
    fails is left out of the page: a report never ends a run.

    Args:
        directory: folder of the run.
        data: the data set; its test images are shown.
        evaluation: of the test images; `logits` is [N, classes], of any floating dtype, on any device.

    Returns:
        A line for each thing that could not be made; empty where all is well.
    """
    problems: list[str] = []
    _attempt(PAGE, lambda: _write(directory, data, evaluation, problems), problems)
    return problems


def _write(directory: Path, data: ImageData, evaluation: Evaluated, problems: list[str]) -> None:
    logits, labels = evaluation.logits.detach().float().cpu(), data.test.labels.cpu()
    expected = (len(labels), len(data.classes))
    if tuple(logits.shape) != expected:
        raise ValueError(f"evaluation.logits: expected {list(expected)}, got {list(logits.shape)}")
    history = read_history(directory)
    counts = pictures.confusion(logits, labels)
    mistakes = pictures.worst_mistakes(logits, labels, MISTAKES)
    wrong = len(labels) - int(counts.diagonal().sum())
    drawn = [
        _draw(
            directory / "curves.png",
            lambda path: pictures.draw_curves(history, path),
            ("Curves", "Training figures are means over the epoch's augmented images."),
            problems,
        ),
        _draw(
            directory / "confusion.png",
            lambda path: pictures.draw_confusion(counts, data.classes, path),
            ("Confusion matrix", "A row is a true class, a column what its images were taken for."),
            problems,
        ),
        _draw(
            directory / "mistakes.png",
            lambda path: pictures.draw_mistakes(mistakes, data, path),
            (
                "The worst mistakes",
                f"{wrong:,} of {len(labels):,} test images are classified wrongly; here are "
                + (f"the {len(mistakes)} with the largest loss, " if wrong > len(mistakes) else "all of them, ")
                + "each with its class, what it was taken for, and the network's probabilities of both."
                if wrong
                else "Every test image is classified correctly.",
            ),
            problems,
        ),
    ]
    write_text(directory / PAGE, render(history, data, counts, drawn))


def _attempt(what: str, do: Callable[[], None], problems: list[str]) -> bool:
    try:
        do()
    except Exception as error:  # matplotlib and the disk fail in many ways, and the run is worth more than its page
        reason = " ".join(str(error).split())[:200]
        problems.append(f"{what} could not be written: {type(error).__name__}: {reason}")
        return False
    return True


def _draw(path: Path, draw: Callable[[Path], None], words: tuple[str, str], problems: list[str]) -> Picture:
    done = _attempt(path.name, lambda: draw(path), problems)
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii") if done else None
    return Picture(path.stem, *words, uri)


def render(history: History, data: ImageData, counts: Tensor, drawn: Sequence[Picture]) -> str:
    """The page as HTML.

    Args:
        counts: the confusion matrix, int64 [classes, classes], a row a true class.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda share: "-" if share is None else f"{share:.2%}"
    return environment.from_string(TEMPLATE).render(
        title=f"{history.config.get('model', 'network')} on {data.name}",
        run=str(history.directory),
        written=time.strftime("%Y-%m-%d %H:%M"),
        instead_of=data.instead_of,
        facts=facts(history, counts),
        pictures={picture.name: picture for picture in drawn},
        classes=class_rows(counts, data.classes),
        pairs=confused_pairs(counts, data.classes),
        configuration=configuration(history.config),
        machine=machine(history),
        epochs=history.metrics,
        broken=history.broken,
    )


def facts(history: History, counts: Tensor) -> list[tuple[str, str]]:
    """The few figures at the head of the page: name and value."""
    summary, last = history.summary, history.metrics[-1] if history.metrics else {}
    rows = [row for row in history.metrics if row.get("test_accuracy") is not None]
    found = [("test accuracy", f"{counts.diagonal().sum().item() / max(counts.sum().item(), 1):.2%}")]
    if rows:
        best = max(rows, key=lambda row: row["test_accuracy"])
        found.append((f"best, epoch {best['epoch']}", f"{best['test_accuracy']:.2%}"))
    if last.get("test_loss") is not None:
        found.append(("test loss", f"{last['test_loss']:.4f}"))
    epochs = history.config.get("epochs")
    done = summary.get("epoch", last.get("epoch", 0))
    found.append(("epochs", f"{done} of {epochs}" if epochs else str(done)))
    seconds = summary.get("seconds", last.get("seconds"))
    if seconds is not None:
        found.append(("time", duration(seconds)))
    rate = summary.get("images_per_second", last.get("images_per_second"))
    if rate is not None:
        found.append(("images a second", f"{rate:,.0f}"))
    return found


def class_rows(counts: Tensor, classes: Sequence[str]) -> list[ClassRow]:
    """Recall, precision and the likeliest mistake of each class."""
    rows = []
    for index, name in enumerate(classes):
        images, taken, right = int(counts[index].sum()), int(counts[:, index].sum()), int(counts[index, index])
        others = counts[index].clone()
        others[index] = 0
        most = int(others.max())
        rows.append(
            ClassRow(
                name,
                images,
                right / images if images else None,
                right / taken if taken else None,
                f"{classes[int(others.argmax())]} ({most})" if most else "-",
            )
        )
    return rows


def confused_pairs(counts: Tensor, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """The PAIRS commonest mistakes: true class, predicted class, images."""
    wrong = counts - torch.diag(counts.diagonal())
    order = wrong.flatten().sort(descending=True, stable=True).indices[:PAIRS].tolist()
    places = [divmod(place, len(classes)) for place in order]
    return [(classes[i], classes[j], int(wrong[i, j])) for i, j in places if wrong[i, j]]


def configuration(config: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Options as they ran: name, value, and whether the value differs from the option's default."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return [(name, str(value), value != _plain(defaults.get(name))) for name, value in config.items()]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def machine(history: History) -> list[tuple[str, str]]:
    """Where the run was made, as far as this process knows: processor, threads, versions."""
    from fastres import __version__
    from fastres.info import processors

    found = processors()
    for key, words in (("device", "trained on"), ("backend", "backend")):
        if key in history.summary:
            found.append((words, str(history.summary[key])))
    found += [
        ("system", platform.platform(terse=True)),
        ("fastres", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    return found + [(name, importlib.metadata.version(name)) for name in ("torchvision", "numpy")]
