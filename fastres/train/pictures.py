"""The pictures of a run: curves, confusion matrix, and the test images that it got most wrong.

Drawn on matplotlib's Figure objects, without pyplot: no global state, no window, the user's backend stays as it is.
matplotlib is imported when the first picture is drawn. Colours are those of Okabe and Ito, which people who confuse red
and green tell apart, and `cividis`, which has the same lightness for everybody.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.train.folder import atomic
from fastres.train.history import History
from fastres.train.image_data import ImageData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito, "Color Universal Design", 2008; the yellow, too pale for a line on white, is a brown."""

POINTS = 1000
"""Most points of a line; more steps than that are averaged in groups."""

NAMED_CLASSES = 100
"""Most classes whose names fit beside a confusion matrix."""


class Mistake(NamedTuple):
    """A test image that was classified wrongly."""

    position: int  # in the test images
    loss: float
    label: int
    predicted: int
    label_probability: float
    predicted_probability: float


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def tidy(axes: "Axes", title: str) -> None:
    """The look that all our diagrams share: a title at the left, a pale grid behind the lines, no box."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


def epoch_axis(axes: "Axes", last: float) -> None:
    """Epochs from 0 to `last`, in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(last, 1.0) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", fontsize=9)


def plot(axes: "Axes", x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line through the finite points; few points are marked, since one alone makes no line."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    if points:
        marker = {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
        axes.plot(*zip(*points, strict=True), **{"linewidth": 1.6, **marker, **style})


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS points: means over groups of neighbours of one size."""
    group = math.ceil(len(x) / POINTS)
    if group <= 1:
        return list(x), list(y)
    starts = range(0, len(x), group)
    return tuple([sum(v[i : i + group]) / len(v[i : i + group]) for i in starts] for v in (x, y))  # type: ignore[return-value]


def loss_scale(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis where losses span more than a factor of 20, with numbers as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finite = [v for v in values if math.isfinite(v) and v > 0]
    if finite and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
        many = max(finite) > 1e4 * min(finite)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def accuracy_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Percent; at least five points of it, so that noise does not fill the picture."""
    from matplotlib.ticker import PercentFormatter

    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    spare = max(0.0, 0.05 - (max(finite) - min(finite))) / 2 + 0.05 * (max(finite) - min(finite)) + 0.005
    axes.set_ylim(max(0.0, min(finite) - spare), min(1.02, max(finite) + spare))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def from_zero(axes: "Axes", values: Sequence[float]) -> None:
    """An axis from zero to a little above the largest value."""
    axes.set_ylim(0, 1.1 * max([v for v in values if math.isfinite(v) and v > 0], default=1.0))


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_curves(history: History, path: Path) -> None:
    """Loss, accuracy, learning rate and speed over the epochs."""
    figure = new_figure(10, 6.4)
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2, height_ratios=(3, 2), sharex=True)
    epochs = history.epochs()
    per_epoch = history.steps_per_epoch
    finite = [(row["step"] / per_epoch, row["loss"]) for row in history.steps if math.isfinite(row["loss"])]
    x, y = thinned([a for a, _ in finite], [b for _, b in finite])
    if x:
        loss.plot(x, y, color=COLOURS[0], alpha=0.3, linewidth=0.8, label="training, by step")
    for name, axes, key in (("loss", loss, "loss"), ("accuracy", accuracy, "accuracy")):
        for which, words, colour, dash in (("train", "training", 0, "-"), ("test", "test", 1, "--")):
            values = history.series(f"{which}_{key}")
            plot(axes, epochs, values, color=COLOURS[colour], linestyle=dash, label=f"{words} {name}")
    loss_scale(loss, [*y, *history.series("train_loss"), *history.series("test_loss")])
    accuracy_scale(accuracy, [*history.series("train_accuracy"), *history.series("test_accuracy")])
    _mark_best(accuracy, epochs, history.series("test_accuracy"))
    plot(rate, epochs, history.series("lr"), color=COLOURS[2])
    plot(speed, epochs, history.series("images_per_second"), color=COLOURS[3])
    from_zero(rate, history.series("lr"))
    from_zero(speed, history.series("images_per_second"))
    titles = ("Loss", "Accuracy", "Learning rate at the end of the epoch", "Training images a second")
    for axes, title in zip((loss, accuracy, rate, speed), titles, strict=True):
        tidy(axes, title)
        epoch_axis(axes, max([*epochs, *x], default=1.0))
    for axes in (loss, accuracy):
        axes.xaxis.label.set_visible(False)
        if axes.lines:
            axes.legend(fontsize=8, frameon=False, loc="best")
    save(figure, path)


def _mark_best(axes: "Axes", epochs: Sequence[float], values: Sequence[float]) -> None:
    finite = [(value, -epoch) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
    if finite:
        value, epoch = max(finite)
        axes.plot(
            [-epoch], [value], "o", markersize=8, markerfacecolor="none", markeredgecolor=COLOURS[1],
            label=f"best {value:.2%}", linestyle="none",
        )  # fmt: skip


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 [classes, classes]: how many images of class i (row) were taken for class j (column).

    Args:
        logits: [N, classes].
        labels: int64 [N].
    """
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def draw_confusion(counts: Tensor, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix in percent of each class's test images; numbers up to 20 classes, names up to 100.

    Colours follow the square root, so that the few wrong ones are seen beside the many right ones.
    """
    from matplotlib.colors import PowerNorm

    number = len(classes)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = min(3.5 + 0.5 * number, 7.5) if number <= 20 else 9.5 if number <= 40 else 13.0
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    picture = axes.imshow(share.numpy(), cmap="cividis", norm=PowerNorm(0.5, vmin=0, vmax=100))
    bar = figure.colorbar(picture, ax=axes, shrink=0.75, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("% of the class's test images", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if number <= NAMED_CLASSES:
        size = 9.0 if number <= 20 else 7.5 if number <= 40 else max(4.5, 520 / number / 1.2)
        names = [shortened(name, 18) for name in classes]
        axes.set_xticks(range(number), names, rotation=90 if number > 4 else 0, fontsize=min(size, 9))
        axes.set_yticks(range(number), names, fontsize=min(size, 9))
    if number <= 20:
        size = 9 if number <= 12 else 7
        for i in range(number):
            for j in range(number):
                value = share[i, j].item()
                if counts[i, j]:
                    dark = value < 30
                    words = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                    axes.text(j, i, words, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    axes.set_xlabel("predicted class", fontsize=10)
    axes.set_ylabel("true class", fontsize=10)
    axes.set_title("Confusion matrix", loc="left", fontsize=11)
    save(figure, path)


def worst_mistakes(logits: Tensor, labels: Tensor, most: int) -> list[Mistake]:
    """The wrongly classified images with the largest cross-entropy, the largest first."""
    logits = logits.double()
    losses = F.cross_entropy(logits, labels, reduction="none")
    predicted = logits.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    # A stable sort, so that images of one loss come in the order of the data set.
    chosen = wrong[losses[wrong].sort(descending=True, stable=True).indices[:most]]
    found = []
    for index in chosen.tolist():
        chances = logits[index].softmax(0)
        label, guess = int(labels[index]), int(predicted[index])
        found.append(
            Mistake(index, losses[index].item(), label, guess, chances[label].item(), chances[guess].item())
        )  # fmt: skip
    return found


def draw_mistakes(mistakes: Sequence[Mistake], data: ImageData, path: Path) -> None:
    """The images of `mistakes` as a sheet, each with what it is and what it was taken for."""
    if not mistakes:
        figure = new_figure(7, 1.2)
        figure.text(0.5, 0.5, "Every test image is classified correctly.", ha="center", va="center", fontsize=12)
        save(figure, path)
        return
    columns = min(5, len(mistakes))
    rows = math.ceil(len(mistakes) / columns)
    figure = new_figure(max(2.1 * columns, 4.5), 2.5 * rows + 0.4)
    figure.suptitle("Test images with the largest loss", x=0.01, ha="left", fontsize=11)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, mistake in zip(figure.axes, mistakes, strict=False):
        pixels = data.test.images[mistake.position].cpu().permute(1, 2, 0).numpy()
        axes.imshow(pixels, interpolation="nearest")
        lines = (
            f"is {shortened(data.classes[mistake.label], 16)}, {percent(mistake.label_probability)}",
            f"not {shortened(data.classes[mistake.predicted], 16)}, {percent(mistake.predicted_probability)}",
        )
        axes.set_title("\n".join(lines), fontsize=8, loc="left")
    save(figure, path)


def shortened(text: str, most: int) -> str:
    """Text cut to `most` characters, without the signs that matplotlib takes for mathematics."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")


def percent(share: float) -> str:
    """A probability in percent, with digits enough to tell a small one from none."""
    return f"{100 * share:.1f} %" if share >= 0.001 else "<0.1 %"
