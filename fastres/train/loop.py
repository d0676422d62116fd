"""The training loop: epochs of steps, an evaluation after each, checkpoints, Ctrl-C, the report."""

import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from fastres.train import checkpoint as ckpt
from fastres.train.averages import evaluated_weights
from fastres.train.config import TrainConfig, to_dict
from fastres.train.data import ImageData, batches, left_out, train_order
from fastres.train.engine import Engine, Position
from fastres.train.errors import DivergedError, InputError
from fastres.train.parallel import by_rank, smallest_batch, whole_model, whole_optimizer
from fastres.train.prepare import Run, configured_model, prepare
from fastres.train.report import Summary, append_json, keep_rows, show_start, write_summary
from fastres.train.schedule import lr_factor


def train(
    config: TrainConfig,
    *,
    data: ImageData | None = None,
    make_model: Callable[[TrainConfig, int], nn.Module] | None = None,
    console: Console | None = None,
) -> Summary:
    """Train a network as configured, and leave config.json, metrics.jsonl, steps.jsonl, last.pt, best.pt and
    summary.json in the output folder.

    Seeds torch's global generators, and sets the number of threads where config.threads is given.

    Args:
        config: need not be resolved.
        data: used in place of the data set that the configuration names.
        make_model: makes the network in place of the one that the configuration names, from the resolved configuration
            and the number of classes, once the generators are seeded. `load_model` cannot read such a checkpoint.
        console: where the report goes; standard output by default.

    Returns:
        The outcome; `finished` is False where Ctrl-C stopped the run (last.pt is written then).

    Raises:
        TypeError, InputError: a wrong argument, data folder or checkpoint. Nothing has been written.
        RunError: no such device, or a data set that cannot be downloaded. Nothing has been written.
        DivergedError: the loss is no longer finite. The files hold the state before that.
    """
    console = console or Console()
    run = prepare(config, data, make_model or configured_model, console)
    if not run.group.is_main:
        console = Console(quiet=True)
    return _Loop(run, console).run()


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """The trained network of a checkpoint (or of a run's last.pt), in evaluation mode.

    Raises:
        InputError: no usable checkpoint at `path`.
    """
    file = ckpt.checkpoint_path(Path(path))
    state = ckpt.load_checkpoint(file)
    config = ckpt.saved_config(file)
    model = configured_model(config, len(state["classes"]))
    ckpt.load_state(model, evaluated_weights(state), what=f"model {config.model}", path=file)
    return model.to(device).eval()


class _Loop:
    """The state that changes while training, and the steps that change it."""

    def __init__(self, run: Run, console: Console) -> None:
        self.config, self.data, self.device = run.config, run.data, run.device
        self.model, self.optimizer, self.generator = run.model, run.optimizer, run.generator
        self.backend, self.console, self.group = run.backend, console, run.group
        self.hide_bar = None if run.group.is_main else True
        config = self.config
        if config.output_dir is None or config.batch_size is None or config.epochs is None or config.lr is None:
            raise ValueError("config: expected a resolved one")
        self.directory, self.batch_size = config.output_dir, config.batch_size
        self.epochs, self.peak_lr = config.epochs, config.lr
        count = len(self.data.train)
        self.smallest_batch = smallest_batch(run.group, sync_bn=config.sync_bn)
        if config.drop_last:
            self.smallest_batch = self.batch_size
        self.epoch_images = count - left_out(count, self.batch_size, self.smallest_batch)
        if not self.epoch_images:
            raise InputError(f"data: expected {self.smallest_batch} training images or more for a batch, got {count}")
        self.steps_per_epoch = math.ceil(self.epoch_images / self.batch_size)
        self.total_steps = math.ceil(self.epochs * self.steps_per_epoch)
        self.stop_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.engine = Engine(run)
        self.rates: list[float] = []
        self.interrupted = False
        self.started = time.perf_counter()
        self.last_accuracy: float | None = None
        # What follows is in the checkpoint.
        self.step = self.epoch = self.batch = 0
        self.order: Tensor | None = None
        self.best_accuracy: float | None = None
        self.best_epoch: int | None = None
        self.seconds_before = 0.0
        if run.resumed is not None:
            for name in ("step", "epoch", "batch", "order", "best_accuracy", "best_epoch"):
                setattr(self, name, run.resumed[name])
            self.seconds_before = run.resumed["seconds"]
            self.engine.train_metrics.load_state_dict(run.resumed["metrics"])
            self.engine.train_metrics.to(self.device)
            self.engine.load_state_dict(run.resumed.get("engine", {}))
        if self.step >= self.stop_step and self.batch < self.steps_per_epoch:
            raise InputError(
                f"resume: the checkpoint has already done {self.epoch} epochs, {self.step} steps; "
                "ask for more with epochs or max_steps"
            )

    def run(self) -> Summary:
        """Train to the end, to max_steps, or to Ctrl-C."""
        self._open_output()
        show_start(self.console, self.config, self.data, self.backend)
        total, done = self._images_until(self.stop_step), self._images_until(self.step)
        bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, disable=self.hide_bar)
        with bar, self._catch_interrupt():
            while not self.interrupted:
                self._train_epoch(bar)
                if self.interrupted or not self._evaluate_and_save(bar):
                    break
                if self.step >= self.stop_step:
                    break
            if self.interrupted:
                self._save("last.pt")
        return self._finish()

    def _train_epoch(self, bar: Any) -> None:
        """Train to the end of the epoch, to max_steps, or to Ctrl-C; starts where the checkpoint stopped."""
        self.model.train()
        if self.order is None:
            self.order = train_order(len(self.data.train), self.batch_size, self.generator, self.smallest_batch)
            self.batch = 0
            self.engine.train_metrics.reset()
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs:g}")
        window = _Window(self.device)
        for images, labels in batches(
            self.data.train, self.order, self.batch_size, start=self.batch, workers=self.config.workers,
            group=self.group,
        ):  # fmt: skip
            # A signal reaches the processes between different steps; all stop after the same one.
            self.interrupted = self.group.any(self.interrupted)
            if self.step >= self.stop_step or self.interrupted:
                break
            window.add(self.engine.train_step(images, labels, self._lr(), self._at(len(labels))), len(labels))
            self.step += 1
            self.batch += 1
            bar.update(len(labels))
            if window.full or self.step == self.stop_step or self.batch == self.steps_per_epoch:
                self._log_steps(window, bar)
        if window.losses:
            self._log_steps(window, bar)

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

    def _log_steps(self, window: "_Window", bar: Any) -> None:
        """Write the losses of the steps since the last call, check them, and show where the run stands."""
        losses, rate = window.close()
        first = self.step - len(losses) + 1
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {step} (epoch {self.epoch + 1}); try an lr below {self.peak_lr:g}"
                )
            if self.group.is_main:
                append_json(self.directory / "steps.jsonl", {"step": step, "epoch": self.epoch + 1, "loss": loss})
        self.rates.append(rate)
        accuracy = self.engine.train_metrics["accuracy"].compute().item()
        bar.set_postfix(loss=f"{losses[-1]:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)

    def _evaluate_and_save(self, bar: Any) -> bool:
        """Evaluate, write the line of the epoch and the checkpoints. False where Ctrl-C came in between."""
        test = self.engine.evaluate(lambda: self.interrupted)
        if test is None:
            self.interrupted = True
            return False
        train = self.engine.trained()
        complete = self.batch == self.steps_per_epoch
        number = self.epoch + 1
        if complete:
            self.epoch, self.batch, self.order = number, 0, None
        self.last_accuracy = test.accuracy
        best = self.best_accuracy is None or test.accuracy > self.best_accuracy
        if best:
            self.best_accuracy, self.best_epoch = test.accuracy, number
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
        if self.group.is_main:
            append_json(self.directory / "metrics.jsonl", row)
        self._save("last.pt")
        if best:
            self._save("best.pt")
        speed = row["images_per_second"]
        bar.clear()
        self.console.print(
            f"epoch {number}/{self.epochs:g}{'' if complete else ' (part)'}  train loss {train['loss']:.4f}  accuracy "
            f"{train['accuracy']:.2%}  test loss {test.loss:.4f}  accuracy {test.accuracy:.2%}"
            f"{'  best' if best else ''}{f'  {speed:,.1f} images/s' if speed else ''}  {self._seconds():,.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        bar.refresh()
        return True

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
            "seconds": self._seconds(),
        }
        if self.group.is_main:
            ckpt.save_checkpoint(self.directory / name, state)

    def _open_output(self) -> None:
        """The first writes of a run."""
        if not self.group.is_main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "steps.jsonl"):
            keep_rows(self.directory / name, self.step)
        ckpt.write_text(self.directory / "config.json", json.dumps(to_dict(self.config), indent=2) + "\n")

    @contextmanager
    def _catch_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C end the run after the current step; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def stop(signum: int, frame: Any) -> None:
            self.interrupted = True
            # torchrun passes a Ctrl-C on to processes that the terminal has told already.
            if self.group.size == 1:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

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
            finished=not self.interrupted,
            epoch=self.epoch,
            step=self.step,
            best_accuracy=self.best_accuracy,
            best_epoch=self.best_epoch,
            last_accuracy=self.last_accuracy,
            images_per_second=self._rate(),
            seconds=self._seconds(),
            output_dir=str(self.directory),
        )
        if self.group.is_main:
            write_summary(self.console, summary, self.data)
        if self.interrupted:
            self.console.print(
                f"Interrupted; go on with: python -m fastres.train --resume {self.directory}",
                highlight=False,
                soft_wrap=True,
            )
        return summary


class _Window:
    """The steps since losses were last fetched. On a GPU several, since fetching waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.length = 1 if device.type == "cpu" else 20
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
