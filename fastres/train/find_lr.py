"""Learning-rate range test: a short run of a rising learning rate, its curve, and what it suggests."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rich.console import Console
from torch import nn
from tqdm import tqdm

from fastres.train import pictures
from fastres.train.config import TrainConfig, to_dict
from fastres.train.data import batches, train_order
from fastres.train.engine import Engine, Position
from fastres.train.errors import DivergedError
from fastres.train.folder import claimed, write_text
from fastres.train.image_data import ImageData
from fastres.train.prepare import Plan, Run, configured_model, plan_of, prepare
from fastres.train.report import show_start
from fastres.train.stop import Stop
from fastres.train.terminal import Terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE, PICTURE = "lr_test.json", "lr_test.png"
LOW, HIGH = 1e-5, 10.0
"""The learning rates between which a test runs: the usual ones of all optimizers but LARS, ten times more and less."""
LARS_SCALE = 100.0
"""LARS shortens each update to a share of its layer's weights, and its learning rates are that much larger."""
FEWEST_STEPS, MOST_STEPS = 50, 200
"""An epoch, within these limits: 10 to 33 steps for each factor of ten."""
SMOOTHING = 0.9
WINDOW = 10
"""Losses that the exponential mean holds, 1 / (1 - SMOOTHING); the smallest one of fewer is chance."""
DIVERGED = 4.0
"""Multiple of the smallest smoothed loss at which a test ends."""
SHARE = 0.1
"""Of the learning rate at which the smoothed loss is smallest, the one that is suggested."""


Ended = Literal["range", "diverged", "not finite", "stopped"]


class RangeTest(NamedTuple):
    """The learning rate of each step, and the mean loss of its batch before the step."""

    rates: list[float]
    losses: list[float]
    ended: Ended = "range"  # range: the largest rate was reached
    stopped_by: str | None = None  # SIGINT, SIGTERM or SIGHUP

    @property
    def smoothed(self) -> list[float]:
        """Exponential mean of the losses so far, free of the bias of its beginning.

        Source: Kingma and Ba 2015, "Adam", section 3.
        """
        mean, found = 0.0, []
        for count, loss in enumerate(self.losses, start=1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            found.append(mean / (1 - SMOOTHING**count))
        return found

    @property
    def best(self) -> int:
        """Number of the step with the smallest smoothed loss, from WINDOW on where there are more."""
        values = self.smoothed
        return min(range(min(WINDOW, len(values)) - 1, len(values)), key=values.__getitem__)

    @property
    def best_rate(self) -> float:
        """The learning rate of that step."""
        return self.rates[self.best]

    @property
    def suggestion(self) -> float:
        """A tenth of `best_rate`: there the loss is about to rise, and its mean is late.

        Source: Howard and Gugger 2020, "fastai: A layered API for deep learning", section 4.2 (the learning rate
            finder).
        """
        return SHARE * self.best_rate


def find_learning_rate(
    config: TrainConfig,
    *,
    data: ImageData | None = None,
    make_model: Callable[[TrainConfig, int], nn.Module] | None = None,
    console: Console | None = None,
) -> RangeTest:
    """Make the range test of a configuration, and leave its curve as lr_test.json and lr_test.png in the output folder.

    There is no checkpoint, and the folder is still free for a run. A test that a signal ends writes nothing.

    Args:
        config: need not be resolved; its learning rate and schedule are not used.
        data, make_model, console: as `fastres.train.train`.

    Returns:
        The curve, with `stopped_by` where SIGINT (Ctrl-C), SIGTERM or SIGHUP ended it; its rates may be too few.

    Raises:
        TypeError, InputError, RunError: as `fastres.train.train`.
        DivergedError: the loss is not finite at the smallest learning rate.
    """
    console = console or Terminal()
    run = prepare(dataclasses.replace(config, find_lr=True), data, make_model or configured_model, console)
    if not run.group.is_main:
        console = Console(quiet=True)
    directory = run.config.output_dir
    if directory is None:
        raise ValueError("config: expected a resolved one")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    stop = Stop(run.group)
    plan = plan_of(run)
    steps = run.config.max_steps or min(max(plan.steps_per_epoch, FEWEST_STEPS), MOST_STEPS)
    scale = LARS_SCALE if run.config.optimizer == "lars" else 1.0
    low, high = scale * LOW, scale * HIGH
    with claimed(directory, run.group), stop.on_signals():
        show_start(console, run.config, run.data, run.backend)
        say(f"Learning-rate range test: at most {steps} steps, lr rises from {low:g} to {high:g}; nothing is trained.")
        found = range_test(run, steps=steps, low=low, high=high, stop=stop)
        if found.stopped_by is None and run.group.is_main:
            _write(found, run.config, directory)
    if found.stopped_by is not None:
        say(f"Stopped by {found.stopped_by}; nothing is written")
    else:
        say(_sentence(found))
        say(f"The curve is in {directory}: {CURVE}, {PICTURE}. Train with --lr {found.suggestion:.2g}")
    return found


def range_test(run: Run, *, steps: int, low: float = LOW, high: float = HIGH, stop: Stop | None = None) -> RangeTest:
    """The loss of each step while the learning rate rises by one factor from `low` to `high`.

    Network, optimizer, batches and augmentation are those of the run, which is used up. Ends early where the smoothed
    loss is DIVERGED times its smallest value, or the loss is not finite; all processes of a job get the same.

    Args:
        run: fresh from `prepare`.
        steps: of the whole range; images repeat where an epoch has fewer.
        stop: what is asked between steps.

    Raises:
        DivergedError: the first loss is not finite.

    Source: Smith 2017, "Cyclical learning rates for training neural networks", section 3.3. The rise by a factor and
        the end at a multiple of the smallest loss: as `RangeTest.suggestion`'s source.
    """
    stop = stop or Stop(run.group)
    plan = plan_of(run)
    engine = Engine(run)
    run.model.train()
    test = RangeTest([], [])
    ended: Ended | None = None
    while ended is None:
        ended = _epoch(run, plan, engine, test, steps, (low, high), stop)
    return test._replace(ended=ended, stopped_by=stop.by)


def _epoch(
    run: Run, plan: Plan, engine: Engine, test: RangeTest, steps: int, span: tuple[float, float], stop: Stop
) -> Ended | None:
    """Add an epoch's steps to `test`; why the test is at its end, if it is."""
    size = run.config.batch_size or 0
    low, high = span
    order = train_order(len(run.data.train), size, run.generator, plan.smallest_batch)
    epoch = len(test.rates) // plan.steps_per_epoch
    hidden = None if run.group.is_main else True
    with tqdm(total=steps, initial=len(test.rates), desc="range test", unit="step", leave=False, disable=hidden) as bar:
        parts = batches(run.data.train, order, size, workers=run.config.workers, group=run.group)
        for first, (images, labels) in zip(range(0, len(order), size), parts, strict=True):
            number = len(test.rates)
            if stop.anywhere():
                return "stopped"
            rate = low * (high / low) ** (number / max(steps - 1, 1))
            at = Position(number, plan.total_steps, epoch, order[first : first + len(labels)])
            try:
                loss = engine.train_step(images, labels, rate, at).item()
            except DivergedError:
                if not test.rates:
                    raise
                return "not finite"
            if not math.isfinite(loss):
                if not test.rates:
                    raise DivergedError(f"the loss is {loss} at the first step, with an lr of {rate:g}")
                return "not finite"
            test.rates.append(rate)
            test.losses.append(loss)
            bar.update()
            smoothed = test.smoothed
            if smoothed[-1] > DIVERGED * smoothed[test.best]:
                return "diverged"
            if len(test.rates) == steps:
                return "range"
    return None


def _sentence(test: RangeTest) -> str:
    last = test.rates[-1]
    if test.ended == "range":
        end = f"the loss did not diverge up to {last:.2g}"
    else:
        end = f"the loss {'diverged' if test.ended == 'diverged' else 'was not finite'} after {last:.2g}"
    start, smallest = test.smoothed[min(WINDOW, len(test.rates)) - 1], test.smoothed[test.best]
    return (
        f"Suggested lr: {test.suggestion:.2g}, a tenth of {test.best_rate:.2g}, at which the smoothed loss was smallest"
        f" ({smallest:.3g}, {start:.3g} at the start); {end}."
    )


def _write(test: RangeTest, config: TrainConfig, directory: Path) -> None:
    """The curve as JSON and as a picture."""
    values = {
        "suggestion": test.suggestion,
        "rule": f"{SHARE:g} of the rate at which the smoothed loss is smallest",
        "best_rate": test.best_rate,
        "ended": test.ended,
        "rates": test.rates,
        "losses": test.losses,
        "smoothed": test.smoothed,
        "config": to_dict(config),
    }
    write_text(directory / CURVE, json.dumps(values, indent=2) + "\n")
    figure = pictures.new_figure(7, 4.2)
    draw(figure.subplots(), test)
    pictures.save(figure, directory / PICTURE)


def draw(axes: "Axes", test: RangeTest) -> None:
    """Loss over learning rate, by step and smoothed, with the suggestion."""
    blue, red = pictures.COLOURS[:2]
    axes.plot(test.rates, test.losses, color=blue, alpha=0.3, linewidth=0.8, label="step")
    pictures.plot(axes, test.rates, test.smoothed, color=blue, label="smoothed")
    axes.axvline(test.suggestion, color=red, linestyle="--", label=f"suggested {test.suggestion:.2g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=9)
    # Up to where the test ends: single losses that are far above would press the curve flat.
    axes.set_ylim(0.9 * min(test.losses), 1.05 * min(max(test.losses), DIVERGED * test.smoothed[test.best]))
    pictures.tidy(axes, "Training loss in the range test")
    axes.legend(fontsize=8, frameon=False)
