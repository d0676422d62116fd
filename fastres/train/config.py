"""The configuration of a training run: every option, its check, and the defaults that depend on the data set."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from fastres import models
from fastres.ops.algorithms import requested_algorithm
from fastres.train.errors import InputError
from fastres.train.precision import choose_amp

Dataset = Literal["auto", "cifar10", "cifar100", "imagefolder", "digits"]
Optimizer = Literal["sgd", "momentum", "nesterov", "rmsprop", "adam", "amsgrad", "adamw"]
Schedule = Literal["cosine", "constant"]
Stem = Literal["auto", "cifar", "imagenet"]
Amp = Literal["auto", "none", "bf16"]
ConvAlgorithm = Literal["auto", "torch", "winograd", "direct"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a residual network for image classification.

    An option whose default is None takes a value that suits the data set and the optimizer; the values used are
    saved in config.json. The recipe of the article that started the project is:
    --model article --dataset cifar10 --batch-size 128 --optimizer adam --lr 1e-3 --weight-decay 1e-4 --epochs 100
    --schedule constant

    Args:
        fused: Fused blocks; --no-fused is the same network on plain PyTorch, with the same seed, batches and
            checkpoints.
        conv_algorithm: What the fused blocks compute their 3x3 convolutions of stride 1 with, on a CPU:
            winograd, torch (PyTorch's; direct is its old name), or auto, Winograd's where a cost model says that it
            pays. Everything else is PyTorch's. None: the environment variable FASTRES_CONV, or auto. Not with
            --no-fused.
        model: Network: resnet18, resnet34, resnet50, resnet101, resnet152 or article.
        dataset: Data set. auto is CIFAR-10 where it lies under --data-dir or can be downloaded, otherwise the
            handwritten digits that come with scikit-learn.
        data_dir: Folder of the data. For imagefolder it holds train/ and one of test/, val/, valid/, with a folder a
            class.
        output_dir: Folder for the results; must not hold a run that has saved a checkpoint. None is
            runs/<dataset>-<model>-<fused|plain>-<time>, or the checkpoint's own folder with --resume.
        resume: Checkpoint, or folder of a run, to go on from. Options not given are those of the checkpoint. auto: the
            last one in --output-dir, or from the beginning where there is none, so that the same command serves for
            both.
        epochs: Passes over the training images. None: 5 for digits, 30 for the others.
        max_steps: Stop after this many steps in total, evaluate and save. The schedule still spans all epochs, so a
            short run is the beginning of a long one.
        batch_size: Images a training step. None: 64 for digits, 128 for the others.
        eval_batch_size: Images a batch of the evaluation.
        optimizer: Optimizer, from torch.optim. sgd has no momentum; amsgrad is Adam with the running maximum.
        lr: Peak learning rate. None: 0.05 for sgd, momentum and nesterov, 0.001 for the others.
        weight_decay: Weight decay as torch.optim means it: added to the gradient, in adamw taken from the weight.
            None: 5e-4 for sgd, momentum and nesterov, 1e-4 for rmsprop, adam and amsgrad, 0.01 for adamw.
        momentum: Momentum of the optimizers momentum and nesterov.
        schedule: Learning rate after the warm-up: falling to zero on a cosine over all steps, or constant.
        warmup_epochs: Epochs in which the learning rate rises in a line from zero. None: 1 with cosine (at most a
            fifth of the epochs), 0 with constant.
        label_smoothing: Label smoothing of the training loss, from 0 up to but not including 1.
        dropout: Dropout probability in the residual blocks. None: the model's own (0; 0.5 for article).
        stem: First layers: cifar (3x3, no pooling), imagenet (7x7 with stride 2, pooling). auto: cifar up to 64
            pixels.
        image_size: Side of the images in pixels, imagefolder only. None: the shorter side of the first training
            image, at most 224.
        seed: Seed of the weights, the order of the images, the augmentation and the dropout.
        device: cpu, cuda or cuda:N; auto is CUDA where there is a GPU.
        threads: CPU threads of PyTorch. None leaves PyTorch's own choice.
        workers: Processes that decode images where the data set is too large for memory (2 GiB decoded).
        amp: Automatic mixed precision: bf16 runs convolutions in bfloat16, none runs everything in float32, auto takes
            the faster of the two on this device. The choice is saved: a resumed run keeps it.
        channels_last: Keep images and weights in the channels_last memory format, the faster one.
        reuse_memory: On the CPU, let the C library keep large buffers instead of returning them to the system at each
            free: faster, and the process keeps its peak memory until it ends.
        compile: Pass the network through torch.compile.
        sync_bn: In several processes (torchrun), batch statistics of all their images; else each normalises by those of
            its own share. On a CPU it needs the fused blocks.
        fsdp: In several processes, shard weights, gradients and optimizer state over them (FSDP2), where else each
            holds them whole (DistributedDataParallel).
        save_minutes: Write last.pt after so many minutes as well as after each epoch. The one before stays as
            previous.pt.
    """

    fused: bool = True
    conv_algorithm: ConvAlgorithm | None = None
    model: str = "resnet18"
    dataset: Dataset = "auto"
    data_dir: Path = Path("data")
    output_dir: Path | None = None
    resume: Path | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    eval_batch_size: int = 256
    optimizer: Optimizer = "nesterov"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    schedule: Schedule = "cosine"
    warmup_epochs: float | None = None
    label_smoothing: float = 0.0
    dropout: float | None = None
    stem: Stem = "auto"
    image_size: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    workers: int = 2
    amp: Amp = "none"
    channels_last: bool = True
    reuse_memory: bool = True
    compile: bool = False
    sync_bn: bool = False
    fsdp: bool = False
    save_minutes: float = 10.0


def check_config(config: TrainConfig) -> None:
    """Check each field on its own.

    Raises:
        TypeError: a field has the wrong type.
        InputError: a field has the right type and an impossible value; the message starts with the field's name.
    """
    for name, kind in get_type_hints(TrainConfig).items():
        _check_type(name, getattr(config, name), kind)
    for name, kind in (
        ("dataset", Dataset),
        ("optimizer", Optimizer),
        ("schedule", Schedule),
        ("stem", Stem),
        ("amp", Amp),
        ("conv_algorithm", ConvAlgorithm),
    ):
        _check_choice(name, getattr(config, name), get_args(kind))
    _check_choice("model", config.model, models.NAMES)
    # A resumed run has its checkpoint to agree with, which says more.
    if not config.fused and config.conv_algorithm is not None and config.resume is None:
        raise InputError(
            "conv_algorithm: expected nothing with fused=False (--no-fused), where every convolution is PyTorch's, "
            f"got {config.conv_algorithm!r}"
        )
    for name in ("epochs", "max_steps", "eval_batch_size", "threads", "image_size"):
        _check_range(name, getattr(config, name), low=1)
    _check_range("batch_size", config.batch_size, low=2)
    _check_range("workers", config.workers, low=0)
    _check_range("seed", config.seed, low=0, high=2**63 - 1)
    for name in ("lr", "save_minutes"):
        _check_range(name, getattr(config, name), low=0.0, low_included=False)
    for name in ("weight_decay", "warmup_epochs"):
        _check_range(name, getattr(config, name), low=0.0)
    for name in ("momentum", "label_smoothing", "dropout"):
        _check_range(name, getattr(config, name), low=0.0, high=1.0, high_included=False)
    if config.epochs is not None and config.warmup_epochs is not None and config.warmup_epochs > config.epochs:
        raise InputError(f"warmup_epochs: expected at most epochs = {config.epochs}, got {config.warmup_epochs}")
    if config.device != "auto":
        try:
            device = torch.device(config.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {config.device!r}")


def resolve(config: TrainConfig, *, dataset: Dataset, image_size: int) -> TrainConfig:
    """Fill every field that depends on the data set or the machine, so that config.json says what ran.

    Args:
        config: checked configuration; fields that are neither None nor "auto" stay as they are.
        dataset: the data set in use, never "auto".
        image_size: side of its images in pixels.

    Raises:
        InputError: the environment variable FASTRES_CONV, where it counts, names no algorithm.
    """
    small = dataset == "digits"
    plain_gradient = config.optimizer in ("sgd", "momentum", "nesterov")
    epochs = _first(config.epochs, 5 if small else 30)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        conv_algorithm: Any = requested_algorithm(config.conv_algorithm) if config.fused else config.conv_algorithm
    except ValueError as error:
        raise InputError(str(error)) from error
    amp = config.amp
    if amp == "auto":
        amp = choose_amp(torch.device(device))
    return dataclasses.replace(
        config,
        dataset=dataset,
        epochs=epochs,
        batch_size=_first(config.batch_size, 64 if small else 128),
        lr=_first(config.lr, 0.05 if plain_gradient else 1e-3),
        weight_decay=_first(
            config.weight_decay, 5e-4 if plain_gradient else 0.01 if config.optimizer == "adamw" else 1e-4
        ),
        warmup_epochs=_first(config.warmup_epochs, 0.0 if config.schedule == "constant" else min(1.0, epochs / 5)),
        image_size=image_size,
        stem=("cifar" if image_size <= 64 else "imagenet") if config.stem == "auto" else config.stem,
        device=device,
        conv_algorithm=conv_algorithm,
        amp=amp,
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration in plain JSON types."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Inverse of to_dict.

    Raises:
        InputError: a field is missing or unknown, or has an impossible value.
    """
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    if set(values) != names:
        raise InputError(f"config: missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}")
    paths = {k: Path(values[k]) for k in ("data_dir", "output_dir", "resume") if values[k] is not None}
    config = TrainConfig(**{**values, **paths})
    check_config(config)
    return config


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_type(name: str, value: object, kind: Any) -> None:
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
    kinds = tuple(str if get_origin(k) is Literal else k for k in kinds)
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_range(
    name: str,
    value: float | None,
    *,
    low: float,
    high: float = math.inf,
    low_included: bool = True,
    high_included: bool = True,
) -> None:
    if value is None:
        return
    above = value >= low if low_included else value > low
    below = value <= high if high_included else value < high
    if not (above and below and math.isfinite(value)):
        text = f"{'at least' if low_included else 'above'} {low}"
        if high < math.inf:
            text += f" and {'at most' if high_included else 'below'} {high}"
        raise InputError(f"{name}: expected a number {text}, got {value}")
