"""The training loop: epochs of steps, evaluations, checkpoints, signals, the report."""

import io
import json
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastres.train import checkpoint as ckpt
from fastres.train.averages import evaluated_weights
from fastres.train.boards import Board
from fastres.train.config import TrainConfig, to_dict
from fastres.train.data import batches, train_order
from fastres.train.engine import Engine, Evaluation, Position
from fastres.train.errors import DivergedError, InputError
from fastres.train.folder import append_json, atomic, claimed, keep_rows, write_text, writing
from fastres.train.image_data import ImageData
from fastres.train.page import write_report
from fastres.train.parallel import by_rank, whole_model, whole_optimizer
from fastres.train.prepare import Run, configured_model, plan_of, prepare
from fastres.train.progress import Progress
from fastres.train.report import SUMMARY, Summary, show_start, show_summary, write_summary
from fastres.train.rewind import Rewind
from fastres.train.schedule import lr_factor
from fastres.train.stop import Stop
from fastres.train.terminal import Terminal

LATE_STEPS = 20
"""Steps on a GPU whose losses are looked at together."""


def train(
    config: TrainConfig,
    *,
    data: ImageData | None = None,
    make_model: Callable[[TrainConfig, int], nn.Module] | None = None,
    console: Console | None = None,
) -> Summary:
    """Train a network as configured, and leave config.json, metrics.jsonl, steps.jsonl, last.pt, previous.pt, best.pt
    and summary.json in the output folder; with config.report also report.html and its pictures.

    Seeds torch's global generators, and sets the number of threads where config.threads is given.

    Args:
        config: need not be resolved.
        data: used in place of the data set that the configuration names.
        make_model: makes the network in place of the one that the configuration names, from the resolved configuration
            and the number of classes, once the generators are seeded. `load_model` cannot read such a checkpoint.
        console: where the report goes; standard output by default, without which a run goes on where it is lost.

    Returns:
        The outcome; `finished` is False where SIGINT (Ctrl-C), SIGTERM or SIGHUP stopped the run (last.pt is written
        then).

    Raises:
        TypeError, InputError: a wrong argument, data folder or checkpoint. Nothing has been written.
        RunError: no such device, or a data set that cannot be downloaded; nothing has been written. Or something could
            not be written: the last good checkpoint is there.
        DivergedError: the loss is no longer finite. The files hold the state before that.
    """
    if config.test_only:
        raise InputError("test_only: train() trains; fastres.train.evaluate() tests, as the command does")
    if config.find_lr:
        raise InputError(
            "find_lr: train() trains; fastres.train.find_learning_rate() makes the test, as the command does"
        )
    console = console or Terminal()
    run = prepare(config, data, make_model or configured_model, console)
    if not run.group.is_main:
        console = Console(quiet=True)
    return _Loop(run, console).run()


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """The trained network of a checkpoint (or of a run's last.pt), in evaluation mode.

    Raises:
        InputError: no usable checkpoint at `path`.
    """
    path = Path(path)
    return restored_model(ckpt.load_checkpoint(path), path).to(device)


def restored_model(state: dict[str, Any], path: Path) -> nn.Module:
    """`load_model` of a checkpoint that was read from `path`."""
    config = ckpt.config_of(state, path)
    model = configured_model(config, len(state["classes"]))
    ckpt.load_state(model, evaluated_weights(state), what=f"model {config.model}", path=path)
    return model.eval()


class _Loop:
    """The state that changes while training, and the steps that change it."""

    def __init__(self, run: Run, console: Console) -> None:
        self.config, self.data, self.device = run.config, run.data, run.device
        self.model, self.optimizer, self.generator = run.model, run.optimizer, run.generator
        self.fingerprint = run.fingerprint
        self.backend, self.console, self.group = run.backend, console, run.group
        config = self.config
        if config.output_dir is None or config.batch_size is None or config.epochs is None or config.lr is None:
            raise ValueError("config: expected a resolved one")
        self.directory, self.batch_size = config.output_dir, config.batch_size
        self.epochs, self.peak_lr = config.epochs, config.lr
        plan = plan_of(run)
        self.smallest_batch, self.epoch_images = plan.smallest_batch, plan.epoch_images
        self.steps_per_epoch, self.total_steps = plan.steps_per_epoch, plan.total_steps
        self.stop_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.engine = Engine(run)
        self.rewind = None if self.engine.watchful else Rewind(self.engine)
        self.rates: list[float] = []
        self.stop = Stop(run.group)
        self.started = self.saved = time.perf_counter()
        self.evaluation: Evaluation | None = None
        self.board: Board | None = None
        # What follows is in the checkpoint.
        self.step = self.epoch = self.batch = 0
        self.order: Tensor | None = None
        self.best_accuracy: float | None = None
        self.best_epoch: int | None = None
        self.best_step: int | None = None
        self.evaluated_step: int | None = None
        self.seconds_before = 0.0
        if run.resumed is not None:
            for name in ("step", "epoch", "batch", "order", "best_accuracy", "best_epoch"):
                setattr(self, name, run.resumed[name])
            self.best_step = run.resumed.get("best_step")
            # Checkpoints older than the entry were saved after an evaluation, but for those at the end of an epoch.
            evaluated = self.step if self.batch < self.steps_per_epoch else None
            self.evaluated_step = run.resumed.get("evaluated_step", evaluated)
            self.seconds_before = run.resumed["seconds"]
            self.engine.train_metrics.load_state_dict(run.resumed["metrics"])
            self.engine.train_metrics.to(self.device)
            self.engine.load_state_dict(run.resumed.get("engine", {}))
        # Without a summary the end was cut off after its evaluation, and is evaluated again for the report.
        if self.at_end and self.evaluated_step == self.step and self._was_told():
            raise InputError(
                f"resume: the checkpoint has already done {self.epoch} epochs, {self.step} steps; "
                "ask for more with epochs or max_steps"
            )
        if self.at_end:
            self.evaluated_step = None  # until it has been, also where a signal comes in between

    def _was_told(self) -> bool:
        """Whether the run that wrote the checkpoint to go on from has come to its summary, as the main process sees."""
        resume = self.config.resume
        return self.group.broadcast(resume is None or (ckpt.folder_of(resume) / SUMMARY).exists())

    @property
    def at_end(self) -> bool:
        """Whether no step is left to train."""
        return self.step >= self.stop_step

    def run(self) -> Summary:
        """Train, and report."""
        with claimed(self.directory, self.group):
            return self._run()

    def _run(self) -> Summary:
        self._open_output()
        show_start(self.console, self.config, self.data, self.backend)
        if self.group.is_main:
            self.board = Board(self.directory, self.step, notify=self._tell)
        try:
            self._train()
        finally:
            if self.board is not None:
                self.board.close()
        return self._finish()

    def _train(self) -> None:
        """Epochs and evaluations to the end, to max_steps, or to a signal."""
        total, done = self._images_until(self.stop_step), self._images_until(self.step)
        # Lines of several processes would overwrite each other.
        with Progress(total, done, file=None if self.group.is_main else io.StringIO()) as line, self.stop.on_signals():
            while not self.stop.anywhere():
                self._train_epoch(line)
                if self.stop.anywhere() or not self._end_epoch(line):
                    break
                if self.at_end:
                    break
            if self.stop.by is not None:
                self._save(ckpt.LAST)

    def _train_epoch(self, line: Progress) -> None:
        """Train to the end of the epoch, to max_steps, or to a signal; starts where the checkpoint stopped."""
        if self.at_end:  # as a checkpoint may be whose end was not evaluated
            return
        self.model.train()
        if self.order is None:
            self.order = train_order(len(self.data.train), self.batch_size, self.generator, self.smallest_batch)
            self.batch = 0
            self.engine.train_metrics.reset()
        line.epoch(self.epoch + 1, math.ceil(self.epochs))
        window = _Window(1 if self.engine.watchful else LATE_STEPS)
        for images, labels in batches(
            self.data.train, self.order, self.batch_size, start=self.batch, workers=self.config.workers,
            group=self.group,
        ):  # fmt: skip
            if self.stop.anywhere() or self.at_end:
                break
            if self.rewind is not None:
                self.rewind.keep(self.step, self.batch)
            window.add(self.engine.train_step(images, labels, self._lr(), self._at(len(labels))), len(labels))
            self.step += 1
            self.batch += 1
            if window.full or self.step == self.stop_step or self.batch == self.steps_per_epoch:
                self._log_steps(window, line)
                # By the first one's clock: all have a part in saving.
                due = time.perf_counter() - self.saved > 60 * self.config.save_minutes
                if self.batch < self.steps_per_epoch and self.group.any(due and self.group.is_main):
                    self._save(ckpt.LAST)
        if window.losses:
            self._log_steps(window, line)

    def _lr(self) -> float:
        """The learning rate of the coming step."""
        return self.peak_lr * lr_factor(
            self.step, self.config, steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps
        )

    def _at(self, count: int) -> Position:
        """Where in the run the coming step is, of `count` images."""
        assert self.order is not None
        first = self.batch * self.batch_size
        return Position(self.step, self.total_steps, self.epoch, self.order[first : first + count])

    def _log_steps(self, window: "_Window", line: Progress) -> None:
        """Write the losses of the steps since the last call, check them, and show where the run stands."""
        images = window.images
        losses, rate = window.close()
        first = self.step - len(losses) + 1
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                raise self._diverged(step, loss)
            self._record("steps.jsonl", {"step": step, "epoch": self.epoch + 1, "loss": loss})
        self.rates.append(rate)
        accuracy = self.engine.train_metrics["accuracy"].compute().item()
        line.update(images, loss=losses[-1], accuracy=accuracy, rate=rate)

    def _diverged(self, step: int, loss: float) -> DivergedError:
        """What a loss that was looked at late is due to: the steps since the copy, looked at one by one.

        All processes have the same losses, and do the same here.
        """
        assert self.rewind is not None and self.order is not None
        self.rewind.restore()
        self.step, self.batch, self.engine.watchful = self.rewind.step, self.rewind.batch, True
        first = self.step + 1
        for images, labels in batches(
            self.data.train, self.order, self.batch_size, start=self.batch, workers=self.config.workers,
            group=self.group,
        ):  # fmt: skip
            try:
                self.engine.train_step(images, labels, self._lr(), self._at(len(labels)))
            except DivergedError as error:
                return error
            self.step += 1
            self.batch += 1
            if self.step == step:
                break
        return DivergedError(
            f"the loss is {loss} at step {step} (epoch {self.epoch + 1}), but finite when the steps from {first} on are"
            f" computed again; the last checkpoint is of before; try an lr below {self.peak_lr:g}"
        )

    def _record(self, file: str, row: dict[str, Any]) -> None:
        if self.group.is_main:
            append_json(self.directory / file, row)
        if self.board is not None:
            self.board.add(row)

    def _end_epoch(self, line: Progress) -> bool:
        """Evaluate where that is due, and write checkpoints. False where a signal came in between."""
        # Where a checkpoint from between two epochs is to be the end, it is the epoch before.
        number, complete = self.epoch + (self.batch > 0), self.batch in (0, self.steps_per_epoch)
        is_due = self._is_evaluated(number) or self.at_end
        test = self.engine.evaluate(lambda: self.stop.asked is not None) if is_due else None
        if is_due and test is None:
            return not self.stop.anywhere()
        train, speed = self.engine.trained(), self._rate()
        if self.batch == self.steps_per_epoch:
            self.epoch, self.batch, self.order = number, 0, None
        text = (
            f"epoch {number}/{self.epochs:g}{'' if complete else ' (part)'}  train loss {train['loss']:.4f}  accuracy "
            f"{train['accuracy']:.2%}"
        )
        if test is not None:
            best = self._note_evaluation(test, train, number, complete)
            text += f"  test loss {test.loss:.4f}  accuracy {test.accuracy:.2%}{'  best' if best else ''}"
        self._save(ckpt.LAST)
        line.clear()
        self.console.print(
            f"{text}{f'  {speed:,.1f} images/s' if speed else ''}  {self._seconds():,.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        return True

    def _is_evaluated(self, number: int) -> bool:
        """Whether the epoch of that number ends with an evaluation."""
        return number % self.config.eval_epochs == 0 or number >= self.epochs

    def _note_evaluation(self, test: Evaluation, train: dict[str, float], number: int, complete: bool) -> bool:
        """Write the line of epoch `number`, and the best checkpoint; whether it is that."""
        self.evaluation, self.evaluated_step = test, self.step
        best = self.best_accuracy is None or test.accuracy > self.best_accuracy
        if best:
            self.best_accuracy, self.best_epoch, self.best_step = test.accuracy, number, self.step
        row = {
            "epoch": number,
            "step": self.step,
            "complete": complete,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": self._rate(),
            "seconds": self._seconds(),
        }
        self._record("metrics.jsonl", row)
        if best:
            # Before last.pt: after a kill in between the run goes on from the one before, and writes both again.
            self._save(ckpt.BEST)
        return best

    def _images_until(self, step: int) -> int:
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.epoch_images + min(steps * self.batch_size, self.epoch_images)

    def _rate(self) -> float | None:
        """Training images a second: the median, without the first measurement, which builds and warms up."""
        return statistics.median(self.rates[1:]) if len(self.rates) > 1 else None

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _save(self, name: str) -> None:
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {
            "format": ckpt.FORMAT,
            "config": to_dict(self.config),
            "classes": list(self.data.classes),
            "model": whole_model(self.model),
            "optimizer": whole_optimizer(self.model, self.optimizer),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "order": self.order,
            "generator": self.generator.get_state(),
            "torch_rng": by_rank(torch.get_rng_state(), self.group),
            "cuda_rng": by_rank(cuda_rng, self.group),
            "metrics": self.engine.train_metrics.state_dict(),
            "engine": self.engine.state_dict(),
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "best_step": self.best_step,
            "evaluated_step": self.evaluated_step,
            "seconds": self._seconds(),
            "data": self.fingerprint,
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "image_size": self.data.image_size,
        }
        if self.group.is_main:
            ckpt.save_checkpoint(self.directory / name, state)
        self.saved = time.perf_counter()

    def _open_output(self) -> None:
        """The first writes of a run."""
        if self.group.is_main:
            write_text(self.directory / "config.json", json.dumps(to_dict(self.config), indent=2) + "\n")
            with writing(self.directory):
                (self.directory / SUMMARY).unlink(missing_ok=True)  # of the sitting before
            # What was found where an epoch was cut short stands, unless its end will be evaluated as well.
            again = self._is_evaluated(self.epoch + 1) and (not self.at_end or self.batch == self.steps_per_epoch)
            # What the end was found to be is found again.
            for name, last in (("metrics.jsonl", self.step - self.at_end), ("steps.jsonl", self.step)):
                broken = keep_rows(self.directory / name, last, cut_short=again)
                if broken:
                    self._tell(f"{name}: {broken} lines were no records, and are dropped")
        if self.best_step is not None:
            self._mend_best()

    def _mend_best(self) -> None:
        """See that best.pt holds what the checkpoint says is the best so far, or that the next evaluation writes it."""
        state = "good"
        if self.group.is_main:
            problem = self._why_not_best(self.directory / ckpt.BEST)
            source = self.config.resume and ckpt.folder_of(self.config.resume) / ckpt.BEST
            if problem is not None and source and self._why_not_best(source) is None:
                with atomic(self.directory / ckpt.BEST) as temporary:
                    shutil.copyfile(source, temporary)
            elif problem is not None:
                state = "here" if self.best_step == self.step else "lost"
                rest = "is written again" if state == "here" else "is lost; the next evaluation counts as the best"
                self._tell(f"{ckpt.BEST}: {problem}; the one of epoch {self.best_epoch} {rest}")
        state = self.group.broadcast(state)
        if state == "here":
            self._save(ckpt.BEST)
        elif state == "lost":
            self.best_accuracy = self.best_epoch = self.best_step = None

    def _why_not_best(self, file: Path) -> str | None:
        try:
            found = ckpt.read_checkpoint(file)
        except InputError as error:
            return str(error).removeprefix("resume: ")
        step, best = found["step"], self.best_step or 0
        # One of a later step is from an epoch that a kill cut off, and that is trained again.
        return None if step >= best else f"it is of step {step}, not of step {best}"

    def _tell(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _finish(self) -> Summary:
        summary = Summary(
            model=self.config.model,
            fused=self.config.fused,
            backend=self.backend,
            device=str(self.device),
            dataset=self.data.name,
            train_images=len(self.data.train),
            test_images=len(self.data.test),
            instead_of=self.data.instead_of,
            finished=self.stop.by is None,
            stopped_by=self.stop.by,
            epoch=self.epoch,
            step=self.step,
            best_accuracy=self.best_accuracy,
            best_epoch=self.best_epoch,
            last_accuracy=None if self.evaluation is None else self.evaluation.accuracy,
            images_per_second=self._rate(),
            seconds=self._seconds(),
            output_dir=str(self.directory),
        )
        if self.group.is_main:
            write_summary(summary)
            if self.config.report and self.evaluation is not None:
                for problem in write_report(self.directory, self.data, self.evaluation):
                    self._tell(problem)
            show_summary(self.console, summary, self.data)
        if self.stop.by is not None:
            folder = shlex.quote(str(self.directory))
            command = "python" if self.group.size == 1 else f"torchrun (of {self.group.size} processes)"
            self._tell(f"Stopped by {self.stop.by}; go on with: {command} -m fastres.train --resume {folder}")
        return summary


class _Window:
    """The steps since losses were last fetched. On a GPU several, since fetching waits for the device."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.losses: list[Tensor] = []
        self.images = 0
        self.since = time.perf_counter()

    def add(self, loss: Tensor, images: int) -> None:
        self.losses.append(loss)
        self.images += images

    @property
    def full(self) -> bool:
        return len(self.losses) >= self.length

    def close(self) -> tuple[list[float], float]:
        """The losses, and the images a second; starts a new window."""
        losses = torch.stack(self.losses).tolist()
        now = time.perf_counter()
        rate = self.images / (now - self.since)
        self.losses, self.images, self.since = [], 0, now
        return losses, rate
