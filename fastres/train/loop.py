"""The training loop: prepare everything that can fail, then write, train, evaluate, save."""

import dataclasses
import json
import math
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from fastres import _extension, models
from fastres.memory import reuse_cpu_memory
from fastres.train import checkpoint as ckpt
from fastres.train.config import TrainConfig, check_config, resolve, to_dict
from fastres.train.data import ImageData, augment, batches, load_data, normalise, train_order
from fastres.train.errors import DivergedError, InputError, RunError
from fastres.train.optim import lr_factor, make_optimizer
from fastres.train.report import Summary, append_json, keep_rows, show_start, write_summary

RUN_FILES = ("config.json", "metrics.jsonl", "steps.jsonl", "summary.json", "last.pt", "best.pt")
SITTING_FIELDS = ("resume", "output_dir", "data_dir", "epochs", "max_steps", "eval_batch_size", "device", "threads",
                  "workers", "reuse_memory", "compile")  # fmt: skip
"""Fields in which a resumed run may differ from its checkpoint; the others decide what is computed."""


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
    run = _prepare(config, data, make_model or _make_model, console)
    return _Loop(run, console).run()


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> nn.Module:
    """The trained network of a checkpoint (or of a run's last.pt), in evaluation mode.

    Raises:
        InputError: no usable checkpoint at `path`.
    """
    file = ckpt.checkpoint_path(Path(path))
    state = ckpt.load_checkpoint(file)
    config = ckpt.saved_config(file)
    model = _make_model(config, len(state["classes"]))
    ckpt.load_state(model, state["model"], what=f"model {config.model}", path=file)
    return model.to(device).eval()


@dataclasses.dataclass
class _Run:
    """Everything a run needs, made before anything is written."""

    config: TrainConfig  # resolved
    data: ImageData
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # order and augmentation
    resumed: dict[str, Any] | None  # the checkpoint
    backend: str


def _prepare(
    config: TrainConfig,
    data: ImageData | None,
    make_model: Callable[[TrainConfig, int], nn.Module],
    console: Console,
) -> _Run:
    check_config(config)
    resumed = None
    if config.resume is not None:
        resumed = ckpt.load_checkpoint(config.resume)
        config = _inherit(config, resumed["config"])
    _check_output_dir(config)
    device = _pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if data is None:
        data = load_data(config, notify=lambda text: console.print(text, highlight=False, soft_wrap=True))
    if len(data.train) < 2 or len(data.test) < 1:
        raise InputError(
            f"data: expected 2 training images and 1 test image or more, got {len(data.train)}, {len(data.test)}"
        )
    config = resolve(config, dataset=data.name, image_size=data.image_size)
    if resumed is not None:
        _check_same_run(config, resumed, data)
    if device.type == "cpu" and config.reuse_memory:
        reuse_cpu_memory()
    torch.manual_seed(config.seed)
    model = make_model(config, len(data.classes)).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model.parameters(), config)
    generator = torch.Generator().manual_seed(config.seed)
    if resumed is not None and config.resume is not None:
        ckpt.load_state(model, resumed["model"], what=f"model {config.model}", path=config.resume)
        ckpt.load_state(optimizer, resumed["optimizer"], what=f"optimizer {config.optimizer}", path=config.resume)
        generator.set_state(resumed["generator"])
        torch.set_rng_state(resumed["torch_rng"])
        if device.type == "cuda" and resumed["cuda_rng"] is not None:
            torch.cuda.set_rng_state(resumed["cuda_rng"], device)
    if config.output_dir is None:
        config = dataclasses.replace(config, output_dir=_default_output_dir(config))
    if device.type == "cuda":
        data = _to_device(data, device)
    backend = _backend(config, device)
    return _Run(config, data, device, model, optimizer, generator, resumed, backend)


class _Loop:
    """The state that changes while training, and the steps that change it."""

    def __init__(self, run: _Run, console: Console) -> None:
        self.config, self.data, self.device = run.config, run.data, run.device
        self.model, self.optimizer, self.generator = run.model, run.optimizer, run.generator
        self.backend, self.console = run.backend, console
        config = self.config
        if config.output_dir is None or config.batch_size is None or config.epochs is None or config.lr is None:
            raise ValueError("config: expected a resolved one")
        self.directory, self.batch_size = config.output_dir, config.batch_size
        self.epochs, self.peak_lr = config.epochs, config.lr
        count = len(self.data.train)
        self.steps_per_epoch = math.ceil(count / self.batch_size) - (count % self.batch_size == 1)
        self.total_steps = self.epochs * self.steps_per_epoch
        self.warmup_steps = round((config.warmup_epochs or 0.0) * self.steps_per_epoch)
        self.stop_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.compute = torch.compile(self.model) if config.compile else self.model
        self.amp = torch.autocast(self.device.type, torch.bfloat16, enabled=config.amp == "bf16")
        self.train_metrics, self.test_metrics = self._metrics(), self._metrics()
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
        self.resumed = run.resumed is not None
        if run.resumed is not None:
            for name in ("step", "epoch", "batch", "order", "best_accuracy", "best_epoch"):
                setattr(self, name, run.resumed[name])
            self.seconds_before = run.resumed["seconds"]
            self.train_metrics.load_state_dict(run.resumed["metrics"])
            self.train_metrics.to(self.device)
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
        bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, disable=None)
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
            self.order = train_order(len(self.data.train), self.batch_size, self.generator)
            self.batch = 0
            self.train_metrics.reset()
        bar.set_description(f"epoch {self.epoch + 1}/{self.epochs}")
        window = _Window(self.device)
        for images, labels in batches(
            self.data.train, self.order, self.batch_size, start=self.batch, workers=self.config.workers
        ):
            if self.step >= self.stop_step or self.interrupted:
                break
            window.add(self._train_step(images, labels), len(labels))
            bar.update(len(labels))
            if window.full or self.step == self.stop_step or self.batch == self.steps_per_epoch:
                self._log_steps(window, bar)
        if window.losses:
            self._log_steps(window, bar)

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        x = augment(images, self.data.augmentation, self.generator)
        x = self._input(x)
        labels = labels.to(self.device)
        factor = lr_factor(
            self.step, schedule=self.config.schedule, warmup_steps=self.warmup_steps, total_steps=self.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        with self.amp:
            logits = self.compute(x)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        loss = loss.detach()
        self.train_metrics["loss"].update(loss.expand(len(labels)))
        self.train_metrics["accuracy"].update(logits.detach(), labels)
        self.step += 1
        self.batch += 1
        return loss

    def _log_steps(self, window: "_Window", bar: Any) -> None:
        """Write the losses of the steps since the last call, check them, and show where the run stands."""
        losses, rate = window.close()
        first = self.step - len(losses) + 1
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {step} (epoch {self.epoch + 1}); try an lr below {self.peak_lr:g}"
                )
            append_json(self.directory / "steps.jsonl", {"step": step, "epoch": self.epoch + 1, "loss": loss})
        self.rates.append(rate)
        accuracy = self.train_metrics["accuracy"].compute().item()
        bar.set_postfix(loss=f"{losses[-1]:.4f}", accuracy=f"{accuracy:.2%}", refresh=False)

    def _evaluate_and_save(self, bar: Any) -> bool:
        """Evaluate, write the line of the epoch and the checkpoints. False where Ctrl-C came in between."""
        test = self._evaluate()
        if test is None:
            return False
        with warnings.catch_warnings():
            # After a resume at the end of an epoch the metrics are all restored, which torchmetrics takes for unused.
            warnings.filterwarnings("ignore", message=".*called before the ``update`` method")
            train = {name: value.item() for name, value in self.train_metrics.compute().items()}
        complete = self.batch == self.steps_per_epoch
        number = self.epoch + 1
        if complete:
            self.epoch, self.batch, self.order = number, 0, None
        self.last_accuracy = test["accuracy"]
        best = self.best_accuracy is None or test["accuracy"] > self.best_accuracy
        if best:
            self.best_accuracy, self.best_epoch = test["accuracy"], number
        row = {
            "epoch": number,
            "step": self.step,
            "complete": complete,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "test_loss": test["loss"],
            "test_accuracy": test["accuracy"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": self._rate(),
            "seconds": self._seconds(),
        }
        append_json(self.directory / "metrics.jsonl", row)
        self._save("last.pt")
        if best:
            self._save("best.pt")
        speed = row["images_per_second"]
        bar.clear()
        self.console.print(
            f"epoch {number}/{self.epochs}{'' if complete else ' (part)'}  train loss {train['loss']:.4f}  accuracy "
            f"{train['accuracy']:.2%}  test loss {test['loss']:.4f}  accuracy {test['accuracy']:.2%}"
            f"{'  best' if best else ''}{f'  {speed:,.1f} images/s' if speed else ''}  {self._seconds():,.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        bar.refresh()
        return True

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float] | None:
        """Mean cross-entropy and accuracy over the test images; None where Ctrl-C came in between."""
        self.model.eval()
        self.test_metrics.reset()
        test = self.data.test
        steps = batches(test, torch.arange(len(test)), self.config.eval_batch_size, workers=self.config.workers)
        with tqdm(total=len(test), desc="evaluation", unit="img", leave=False, disable=None) as bar:
            for images, labels in steps:
                if self.interrupted:
                    return None
                labels = labels.to(self.device)
                with self.amp:
                    logits = self.compute(self._input(images))
                    loss = F.cross_entropy(logits, labels)
                self.test_metrics["loss"].update(loss.expand(len(labels)))
                self.test_metrics["accuracy"].update(logits, labels)
                bar.update(len(labels))
        return {name: value.item() for name, value in self.test_metrics.compute().items()}

    def _input(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.device), self.data.mean, self.data.std, channels_last=self.config.channels_last)

    def _metrics(self) -> MetricCollection:
        accuracy = MulticlassAccuracy(num_classes=len(self.data.classes), average="micro", validate_args=False)
        # NaN is reported by the loop itself, with its step. MeanMetric without its check ignores weights, so a batch's
        # mean loss is given once for each image.
        metrics = MetricCollection(
            {"loss": MeanMetric(nan_strategy="disable"), "accuracy": accuracy}, compute_groups=False
        )
        metrics.persistent(True)
        return metrics.to(self.device)

    def _images_until(self, step: int) -> int:
        epochs, steps = divmod(step, self.steps_per_epoch)
        count = len(self.data.train) - (len(self.data.train) % self.batch_size == 1)
        return epochs * count + min(steps * self.batch_size, count)

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
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "order": self.order,
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": cuda_rng,
            "metrics": self.train_metrics.state_dict(),
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "seconds": self._seconds(),
        }
        ckpt.save_checkpoint(self.directory / name, state)

    def _open_output(self) -> None:
        """The first writes of a run."""
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


def _make_model(config: TrainConfig, num_classes: int) -> nn.Module:
    return models.create(
        config.model, num_classes=num_classes, stem=config.stem, dropout=config.dropout, fused=config.fused,
        conv_algorithm=config.conv_algorithm,
    )  # fmt: skip


def _inherit(config: TrainConfig, saved: dict[str, Any]) -> TrainConfig:
    """Fields left to a default take the checkpoint's values, so that they resolve as they did then."""
    open_fields = [
        f.name for f in dataclasses.fields(config)
        if f.name not in ("resume", "output_dir", "max_steps")
        # "auto" is one of the algorithms, not a default.
        and getattr(config, f.name) in ((None,) if f.name == "conv_algorithm" else (None, "auto"))
    ]  # fmt: skip
    changes = {name: saved[name] for name in open_fields if name in saved and name != "device"}
    return dataclasses.replace(config, **changes)


def _check_same_run(config: TrainConfig, resumed: dict[str, Any], data: ImageData) -> None:
    now = to_dict(config)
    differences = [
        f"{name} was {resumed['config'].get(name)!r}, is {now[name]!r}"
        for name in now
        if name not in SITTING_FIELDS and now[name] != resumed["config"].get(name)
    ]
    if list(data.classes) != resumed["classes"]:
        differences.append(f"classes were {resumed['classes'][:5]}..., are {list(data.classes)[:5]}...")
    order = resumed["order"]
    if order is not None and len(order) and int(order.max()) >= len(data.train):
        differences.append(f"the training images are fewer than then ({len(data.train)})")
    if differences:
        raise InputError(f"resume: the checkpoint {config.resume} is of another run: {'; '.join(differences)}")


def _check_output_dir(config: TrainConfig) -> None:
    directory = config.output_dir
    if directory is None:
        return
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output_dir: expected a folder, got the file {directory}")
    if config.resume is not None and directory.resolve() == ckpt.checkpoint_path(config.resume).parent.resolve():
        return
    held = [name for name in RUN_FILES if (directory / name).exists()]
    if held:
        raise InputError(
            f"output_dir: {directory} already holds a run ({', '.join(held)}); choose another, or --resume it"
        )


def _default_output_dir(config: TrainConfig) -> Path:
    if config.resume is not None:
        return ckpt.checkpoint_path(config.resume).parent
    kind = "fused" if config.fused else "plain"
    name = f"{config.dataset}-{config.model}-{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory, number = Path("runs") / name, 1
    while directory.exists():
        number += 1
        directory = Path("runs") / f"{name}-{number}"
    return directory


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"device: {name} is not there, {torch.cuda.device_count()} CUDA devices are available")
    return device


def _to_device(data: ImageData, device: torch.device) -> ImageData:
    def moved(split: Any) -> Any:
        if not isinstance(split.images, Tensor):
            return split
        return dataclasses.replace(split, images=split.images.to(device), labels=split.labels.to(device))

    return dataclasses.replace(data, train=moved(data.train), test=moved(data.test))


def _backend(config: TrainConfig, device: torch.device) -> str:
    """What computes the blocks, in a few words."""
    if not config.fused:
        return "eager PyTorch"
    if device.type == "cuda":
        _extension.load_cuda()
        return str(_extension.status().cuda)
    _extension.load_cpu()
    return str(_extension.status().cpu)
