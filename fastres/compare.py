"""`python -m fastres.compare RUN...`: runs side by side: what differs in their settings, what came out, their curves.

A RUN is the folder of a run of `python -m fastres.train`, finished or not. The table goes to standard output, the
curves into one picture.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastres.train import pictures
from fastres.train.errors import InputError, RunError
from fastres.train.folder import writing
from fastres.train.history import History, read_history
from fastres.train.progress import duration
from fastres.train.terminal import discard_output, escape_output

PROGRAM = "python -m fastres.compare"
PLACES = ("output_dir", "resume")
"""Options that differ from run to run and mean nothing."""

MOST_COLUMNS = 6
"""Most runs that get a column each; of more, each gets a row."""

DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Options:
    """Compare runs of the trainer."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    output: Path = Path("compare.png")
    """Where the picture of the curves goes, a PNG."""
    json: bool = False
    """Write the table as one JSON object."""


def labels(directories: Sequence[Path]) -> list[str]:
    """A short name of each folder, longer where folders have one name."""
    parts = [directory.resolve().parts for directory in directories]
    names = []
    for own in parts:
        size = 1
        while size < len(own) and sum(other[-size:] == own[-size:] for other in parts) > 1:
            size += 1
        names.append("/".join(own[-size:]).lstrip("/"))
    return names


def differences(histories: Sequence[History]) -> list[str]:
    """The options in which the runs differ, in the order of the configuration; one that a run lacks counts as None."""
    names = list(dict.fromkeys(name for history in histories for name in history.config))
    first, *others = [history.config for history in histories]
    return [n for n in names if n not in PLACES and any(other.get(n) != first.get(n) for other in others)]


def outcome(history: History) -> dict[str, Any]:
    """What came out, as far as the run has got: plain figures, None where there is none yet."""
    tested = [row for row in history.metrics if row.get("test_accuracy") is not None]
    best = max(tested, key=lambda row: row["test_accuracy"], default=None)
    last = history.metrics[-1] if history.metrics else {}
    summary = history.summary
    state = "finished" if summary.get("finished") else "stopped" if summary else "at work, or killed"
    return {
        "state": state,
        "epochs": max(last.get("epoch", 0), summary.get("epoch", 0)),
        "best_accuracy": best["test_accuracy"] if best else None,
        "best_epoch": best["epoch"] if best else None,
        "last_accuracy": tested[-1]["test_accuracy"] if tested else None,
        "last_test_loss": last.get("test_loss"),
        "seconds": last.get("seconds", summary.get("seconds")),
        "images_per_second": summary.get("images_per_second") or last.get("images_per_second"),
    }


def rows(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """The table: a row's name, and its words for each run; options that differ first, then what came out."""
    found = [outcome(history) for history in histories]
    table = [(name, [_option(history, name) for history in histories]) for name in differences(histories)]
    table.append(("state", [one["state"] for one in found]))
    planned = [history.config.get("epochs", "?") for history in histories]
    table.append(("epochs done", [f"{o['epochs']} of {p}" for o, p in zip(found, planned, strict=True)]))
    table.append(("best test accuracy", [_best(one) for one in found]))
    table.append(("last test accuracy", [_words(one["last_accuracy"], "{:.2%}") for one in found]))
    table.append(("last test loss", [_words(one["last_test_loss"], "{:.4f}") for one in found]))
    table.append(("time", ["-" if one["seconds"] is None else duration(one["seconds"]) for one in found]))
    table.append(("images a second", [_words(one["images_per_second"], "{:,.0f}") for one in found]))
    if any(history.broken for history in histories):
        table.append(("lines that are broken", [str(history.broken) for history in histories]))
    return table


def _option(history: History, name: str) -> str:
    if not history.config:
        return "?"
    return str(history.config.get(name))


def _best(found: dict[str, Any]) -> str:
    return "-" if found["best_epoch"] is None else f"{found['best_accuracy']:.2%} in epoch {found['best_epoch']}"


def _words(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def show(table: Sequence[tuple[str, list[str]]], names: Sequence[str], console: Console) -> None:
    """Print the table: a column a run, or a row a run where there are many."""
    printed = Table()
    if len(names) <= MOST_COLUMNS:
        head, body = ["", *names], [[name, *cells] for name, cells in table]
    else:
        head = ["run", *(name for name, _ in table)]
        body = [[name, *(cells[index] for _, cells in table)] for index, name in enumerate(names)]
    for number, text in enumerate(head):
        printed.add_column(Text(text), overflow="fold", style="bold" if number == 0 else None)
    for cells in body:
        printed.add_row(*map(Text, cells))
    console.print(printed)


def draw(histories: Sequence[History], names: Sequence[str], path: Path) -> None:
    """Test accuracy, test loss and training loss of all runs, over epochs; and accuracy over time."""
    from matplotlib.lines import Line2D

    height = 6.6 + 0.24 * math.ceil(len(names) / 3)
    figure = pictures.new_figure(10, height)
    panels = figure.subplots(2, 2)
    titles = ("Test accuracy", "Test accuracy over time", "Training loss", "Test loss")
    handles = []
    longest = 1.0
    losses: tuple[list[float], list[float]] = ([], [])
    for number, history in enumerate(histories):
        style: dict[str, Any] = {
            "color": pictures.COLOURS[number % len(pictures.COLOURS)],
            "linestyle": DASHES[number // len(pictures.COLOURS) % len(DASHES)],
        }
        epochs = history.epochs()
        longest = max([longest, *epochs])
        minutes = [value / 60 for value in history.series("seconds")]
        accuracy = history.series("test_accuracy")
        timed = [(m, a) for m, a in zip(minutes, accuracy, strict=True) if math.isfinite(m)]
        pictures.plot(panels[0, 0], epochs, accuracy, **style)
        pictures.plot(panels[0, 1], [m for m, _ in timed], [a for _, a in timed], **style)
        for column, name in enumerate(("train_loss", "test_loss")):
            values = history.series(name)
            losses[column].extend(values)
            pictures.plot(panels[1, column], epochs, values, **style)
        handles.append(Line2D([], [], linewidth=2, **style))
    for axes, title in zip(panels.flat, titles, strict=True):
        pictures.tidy(axes, title)
        if axes is not panels[0, 1]:
            pictures.epoch_axis(axes, longest)
    panels[0, 1].set_xlim(left=0)
    panels[0, 1].set_xlabel("minutes", fontsize=9)
    reached = [value for history in histories for value in history.series("test_accuracy")]
    for axes in panels[0]:
        pictures.accuracy_scale(axes, reached)
    for axes, values in zip(panels[1], losses, strict=True):
        pictures.loss_scale(axes, values)
    words = [pictures.shortened(name, 40) for name in names]
    figure.legend(handles, words, loc="outside lower left", ncols=min(3, len(names)), fontsize=9, frameon=False)
    pictures.save(figure, path)


def run(options: Options, console: Console) -> None:
    """Compare as asked.

    Raises:
        InputError: no such run, or another kind of picture.
        RunError: the picture cannot be written. The table has been printed.
    """
    if not options.runs:
        raise InputError("run: expected at least one folder of a run")
    if options.output.suffix.lower() not in (".png", ""):
        raise InputError(f"output: expected a name that ends in .png, which it will be, got {options.output}")
    histories = [read_history(directory) for directory in options.runs]
    names = labels(options.runs)
    if options.json:
        found = {
            name: {"config": {key: history.config.get(key) for key in differences(histories)}, **outcome(history)}
            for name, history in zip(names, histories, strict=True)
        }
        print(json.dumps(found, indent=2))
    else:
        show(rows(histories), names, console)
    if not any(history.metrics for history in histories):
        console.print("No run has finished an epoch yet, so there are no curves.", highlight=False)
        return
    with writing(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        draw(histories, names, options.output)
    if not options.json:
        console.print(f"curves: {options.output}", highlight=False, soft_wrap=True, markup=False)


def main(args: Sequence[str] | None = None) -> int:
    """Compare as the command line says.

    Returns:
        Exit status: 0 done, 1 nobody reads what is printed, 2 a wrong folder or argument, or no place for the picture.
    """
    escape_output()
    try:
        run(tyro.cli(Options, args=args, prog=PROGRAM), Console())
    except (InputError, RunError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as of `| head`
        discard_output()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
