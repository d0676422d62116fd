"""The experiments that train networks: optimizers, learning rate and weight decay, dropout, parts taken away."""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.experiments import alter
from benchmarks.experiments.study import (
    Case,
    Place,
    Settings,
    Study,
    draw_lines,
    last,
    network,
    table,
    train_cases,
    trainer_config,
    write,
)
from benchmarks.records import row
from fastres.train import ImageData, RangeTest, pictures
from fastres.train.find_lr import draw as draw_range
from fastres.train.find_lr import range_test
from fastres.train.prepare import prepare

# ---------------------------------------------------------------------------------------------- one list of cases each

OPTIMIZERS = {
    "SGD": Case("SGD", {"optimizer": "sgd", "lr": 0.1}),
    "Momentum": Case("Momentum", {"optimizer": "momentum", "lr": 0.05}),
    "RMSprop": Case("RMSprop", {"optimizer": "rmsprop", "lr": 1e-3}),
    "Adam": Case("Adam", {"optimizer": "adam", "lr": 1e-3}),
}
"""One network, one schedule; each optimizer at a usual learning rate for it."""

DROPOUTS = {f"p = {p:g}": Case(f"p = {p:g}", {"dropout": p}) for p in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)}

DROPOUT = 0.2
PARTS = {
    "all": Case("all", {"dropout": DROPOUT, "fused": False}),
    "without BN": Case("without BN", {"dropout": DROPOUT, "fused": False}, alter.remove_normalisations),
    "without ReLU": Case("without ReLU", {"dropout": DROPOUT, "fused": False}, alter.remove_activations),
    "without dropout": Case("without dropout", {"dropout": 0.0, "fused": False}),
}
"""All in plain PyTorch, so that nothing else differs."""


class Trained:
    """An experiment that is a list of trainings."""

    def __init__(self, cases: dict[str, Case], words: str) -> None:
        self.cases, self.words = cases, words

    def run(self, study: Study, data: ImageData, settings: Settings, place: Place) -> None:
        """Train what is missing."""
        train_cases(list(self.cases.values()), study, data, settings, place)

    def body(self, study: Study) -> list[str]:
        """The table."""
        return [self.words, "", *table(study, list(self.cases))]

    def draw(self, study: Study, path: Path) -> None:
        """Curves of all cases."""
        draw_lines(study, list(self.cases), path)


optimizers = Trained(
    OPTIMIZERS,
    "Cosine schedule with a warm-up; peak learning rates "
    + ", ".join(f"{case.options['lr']:g} for {name}" for name, case in OPTIMIZERS.items())
    + "; weight decay 5e-4 for the first two, 1e-4 for the others.",
)
dropout = Trained(DROPOUTS, "Dropout between the convolutions of each block, SGD with Nesterov's momentum.")
parts = Trained(
    PARTS,
    f"`all` is the network with batch normalisation, ReLU, and dropout of {DROPOUT:g} between the convolutions of each "
    "block; from the others one of them is taken away everywhere. SGD with Nesterov's momentum, one learning rate.",
)

# ------------------------------------------------------------------------------------------------ rate and weight decay

LOW, HIGH, RANGE_STEPS = 1e-4, 3.0, 120
RATES = (0.01, 0.05, 0.2)
DECAYS = (0.0, 5e-4, 5e-3)
GRID = {
    f"lr {lr:g}, decay {decay:g}": Case(f"lr {lr:g}, decay {decay:g}", {"lr": lr, "weight_decay": decay})
    for lr in RATES
    for decay in DECAYS
}
RANGE = "range test"


def rates_and_losses(data: ImageData, settings: Settings, place: Place, steps: int) -> RangeTest:
    """The trainer's range test of an experiment's network."""
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_config(settings, place, Path(folder) / "run", {"epochs": max(1, settings.epochs)})
        run = prepare(config, data, network(settings, None), Console(file=io.StringIO()))
    return range_test(run, steps=steps, low=LOW, high=HIGH)


class Rates:
    """How to choose learning rate and weight decay: a range test, then a small grid."""

    def run(self, study: Study, data: ImageData, settings: Settings, place: Place) -> None:
        """Do what is missing."""
        if RANGE not in study.cases:
            print(f"{RANGE} ...", flush=True)
            study.cases[RANGE] = rates_and_losses(data, settings, place, RANGE_STEPS)._asdict()
            write(study, place)
        train_cases(list(GRID.values()), study, data, settings, place)

    def body(self, study: Study) -> list[str]:
        """What the range test suggests, and the grid."""
        lines = [
            f"The range test suggests a peak learning rate of {RangeTest(**study.cases[RANGE]).suggestion:.2g}, a"
            " tenth of the rate at which the smoothed loss is smallest. Test accuracy, %, of the grid:",
            "",
            row("weight decay", *(f"lr {lr:g}" for lr in RATES)),
            row("---", *["---:"] * len(RATES)),
        ]
        for decay in DECAYS:
            values = [last(study.cases[f"lr {lr:g}, decay {decay:g}"], "test_accuracy") for lr in RATES]
            lines.append(row(f"{decay:g}", *("diverged" if math.isnan(v) else f"{100 * v:.2f}" for v in values)))
        return lines

    def draw(self, study: Study, path: Path) -> None:
        """The range test, and the grid as a table of colours."""
        figure = pictures.new_figure(10, 3.9)
        left, right = figure.subplots(1, 2)
        draw_range(left, RangeTest(**study.cases[RANGE]))
        grid = [[100 * last(study.cases[f"lr {lr:g}, decay {d:g}"], "test_accuracy") for lr in RATES] for d in DECAYS]
        finite = [v for line in grid for v in line if math.isfinite(v)] or [0.0]
        right.imshow(grid, cmap="cividis", aspect="auto")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                dark = math.isfinite(value) and value < (min(finite) + max(finite)) / 2
                words = f"{value:.1f} %" if math.isfinite(value) else "diverged"
                right.text(j, i, words, ha="center", va="center", fontsize=10, color="white" if dark else "black")
        right.set_xticks(range(len(RATES)), [f"{lr:g}" for lr in RATES], fontsize=9)
        right.set_yticks(range(len(DECAYS)), [f"{d:g}" for d in DECAYS], fontsize=9)
        right.set_xlabel("peak learning rate", fontsize=9)
        right.set_ylabel("weight decay", fontsize=9)
        right.set_title("Test accuracy after training", loc="left", fontsize=11)
        pictures.save(figure, path)


rates = Rates()
