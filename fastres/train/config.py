"""The configuration of a training run: every option, its check, and the defaults that depend on the data set."""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from fastres import models
from fastres.ops.algorithms import requested_algorithm
from fastres.train.errors import InputError
from fastres.train.precision import choose_amp

Dataset = Literal["auto", "cifar10", "cifar100", "imagefolder", "webdataset", "digits"]
Optimizer = Literal["sgd", "momentum", "nesterov", "rmsprop", "adam", "amsgrad", "adamw", "lars", "muon"]
Schedule = Literal["cosine", "constant", "step", "triangle", "onecycle"]
Stem = Literal["auto", "cifar", "imagenet"]
Amp = Literal["auto", "none", "bf16", "fp16"]
Flip = Literal["auto", "none", "random", "alternating"]
CropBorder = Literal["zero", "reflect"]
Tta = Literal["none", "flip", "flip+shift"]
ConvAlgorithm = Literal["auto", "torch", "winograd", "gemm", "grouped", "direct"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


MOST = 2**31 - 1
"""The largest count that an option may be: beyond it, libraries overflow."""

LEAST_ALPHA = 0.05
"""The least parameter of a Beta distribution: below it, float32 holds too few of the draws of torch."""

OLD_DEFAULTS: dict[str, Any] = {
    "recipe": None, "width": 1.0, "pretrained": None, "drop_last": False, "accumulate": 1, "decay_norm_bias": True,
    "bias_lr_factor": 1.0, "clip_grad": None, "milestones": [], "step_factor": 0.1, "triangle_start": 0.2,
    "triangle_peak": 0.23, "triangle_end": 0.07, "warmup_factor": None, "ema_decay": None, "lookahead_period": None,
    "lookahead_decay": 0.95, "flip": "auto", "crop_padding": None, "crop_border": "zero", "tta": "none",
    "zero_init_gamma": False, "whitening_bias_epochs": None, "sync_bn": False, "fsdp": False,
    "save_minutes": 10.0, "report": True,
    "mixup": 0.0, "cutmix": 0.0, "randaugment": [], "random_erasing": 0.0,
    "find_lr": False, "test_only": False, "compile_mode": "default",
}  # fmt: skip
"""Of fields that checkpoints may be older than: the values with which those runs go on as they began."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a residual network for image classification.

    An option whose default is None takes a value that suits the data set and the optimizer; the values used are
    saved in config.json.

    Args:
        fused: Fused blocks; --no-fused is the same network on plain PyTorch, with the same seed, batches and
            checkpoints.
        conv_algorithm: What the fused blocks compute their 3x3 and 1x1 convolutions with, on a CPU:
            winograd (3x3), gemm (1x1, and 3x3 in evaluation), grouped (neither: for convolutions in groups), torch
            (PyTorch's; direct is its old name), or auto, what a cost model says that pays. What the algorithm does not
            serve is PyTorch's. None: the environment variable FASTRES_CONV, or auto. Not with --no-fused.
        recipe: Published or proven settings to start from; every option given besides overrides them. list shows all.
            A name only: from Python, `fastres.train.recipe_config` makes the configuration.
        model: Network: resnet18, resnet34, resnet50, resnet101 or resnet152; for small images resnet20, resnet32,
            resnet44, resnet56, resnet110, wrn<depth>-<k>, fast; article.
        width: Multiplier of the network's channels.
        pretrained: Weights to start from: a file by torch.save with a state_dict of torchvision's or timm's network of
            this name, or a checkpoint of this trainer. A last layer for another number of classes is left out.
        dataset: Data set. auto is CIFAR-10 where it lies under --data-dir or can be downloaded, otherwise the
            handwritten digits that come with scikit-learn.
        data_dir: Folder of the data. For imagefolder it holds train/ and one of test/, val/, valid/, with a folder a
            class; for webdataset shards train-*.tar and test-*.tar (val-, valid-) of NAME.jpg with its class in
            NAME.cls.
        output_dir: Folder for the results; must not hold a run that has saved a checkpoint. None is
            runs/<dataset>-<model>-<fused|plain>-<time>, or the checkpoint's own folder with --resume.
        resume: Checkpoint, or folder of a run, to go on from. Options not given are those of the checkpoint. auto: the
            last one in --output-dir, or from the beginning where there is none, so that the same command serves for
            both.
        epochs: Passes over the training images; a fraction ends within the last one. None: 5 for digits, 30 for the
            others.
        max_steps: Stop after this many steps in total, evaluate and save. The schedule still spans all epochs, so a
            short run is the beginning of a long one.
        test_only: Evaluate the checkpoint of --resume (a folder's last one, or a file), or the weights of --pretrained,
            on the test images, print loss and accuracy, and write nothing.
        batch_size: Images a training step. None: 16 for digits, 128 for the others.
        drop_last: Leave out the last batch of an epoch where it is smaller than the others.
        accumulate: Parts in which a batch is computed, one after the other, with one step of the optimizer: less
            memory, and batch statistics of each part.
        eval_batch_size: Images a batch of the evaluation.
        eval_epochs: Epochs from one evaluation to the next. The end of the run is always evaluated.
        optimizer: Optimizer, from torch.optim; lars and muon from timm, which they need. sgd has no momentum; amsgrad
            is Adam with the running maximum.
        lr: Peak learning rate. None: 0.05 (digits 0.01) for sgd, momentum and nesterov, 4 for lars, 0.004 for muon,
            0.001 for the others.
        find_lr: Train nothing; raise the learning rate from 1e-5 to 10 (lars: 1e-3 to 1000) over an epoch (50 to 200
            steps, or max_steps) of the run configured otherwise, write the curve of the loss (lr_test.json,
            lr_test.png), and suggest an lr.
        weight_decay: Weight decay as torch.optim means it: added to the gradient, in adamw and muon taken from the
            weight. None: 5e-4 for sgd, momentum, nesterov and lars, 1e-4 for rmsprop, adam and amsgrad, 0.01 for adamw
            and muon.
        decay_norm_bias: Weight decay also on biases and on the scales of normalisations.
        bias_lr_factor: Learning rate of the normalisations' biases, in multiples of lr; their weight decay is divided
            by it.
        momentum: Momentum of the optimizers momentum, nesterov, lars and muon.
        clip_grad: Largest norm of the gradient; a longer one is shortened to it.
        schedule: Learning rate after the warm-up: cosine falls to zero over all steps; constant; step is multiplied by
            step_factor at each milestone; triangle is two lines, onecycle two half cosines (torch's OneCycleLR).
        milestones: Epochs at which the schedule step lowers the learning rate.
        step_factor: What the schedule step multiplies the learning rate with.
        triangle_start: Share of lr at the first step of the schedule triangle.
        triangle_peak: Share of the steps after which the schedule triangle reaches lr.
        triangle_end: Share of lr at the end of the schedule triangle.
        warmup_epochs: Epochs in which the learning rate rises in a line from zero. None: 1 with cosine (0.25 for
            digits; at most a fifth of the epochs), 0 with the others.
        warmup_factor: Keep the learning rate of the warm-up at this share of lr, in place of the line.
        ema_decay: Average the weights as decay * average + (1 - decay) * weights after each step; the average is
            evaluated and is what a checkpoint's network is read as.
        lookahead_period: Steps after which the weights are averaged with slow ones, and replaced by them.
        lookahead_decay: Decay of the slow weights a step at the end of training, to which it rises as the cube of time.
        label_smoothing: Label smoothing of the training loss, from 0 up to but not including 1.
        flip: Mirror images: random with probability one half each time; alternating every second epoch, half of the
            images in the even ones; auto as the data set says (random, not for digits).
        crop_padding: Pixels by which an image is padded before a random crop. None: 4 for CIFAR, 3 for digits, an
            eighth of the side for image folders.
        crop_border: What the padding holds: zero, or the reflected image.
        mixup: Mix each image of a batch with another one by lambda and 1 - lambda, from Beta(mixup, mixup), and the
            labels too. 0: none, else 0.05 or more. With cutmix, one of the two for each batch.
        cutmix: Replace a box of each image of a batch by another one's; its area is a share of 1 - lambda, from
            Beta(cutmix, cutmix), and labels are mixed by it. 0: none, else 0.05 or more.
        randaugment: Two numbers, such as 2 9: random operations on each image (shear, rotation, contrast and others),
            one after the other, and their magnitude from 0 to 30. None by default.
        random_erasing: Probability with which a rectangle of a training image is erased.
        tta: Average the logits of an image at the evaluation: flip with its mirror image's; flip+shift also with those
            of the image moved by a pixel, both ways.
        dropout: Dropout probability in the residual blocks. None: the model's own (0; 0.5 for article).
        zero_init_gamma: Start every residual block as its shortcut: the last normalisation's scale is zero.
        whitening_bias_epochs: Epochs in which the bias of a whitening layer is trained (network fast). None: all.
        stem: First layers: cifar (3x3, no pooling), imagenet (7x7 with stride 2, pooling). auto: cifar up to 64
            pixels.
        image_size: Side of the images in pixels, imagefolder and webdataset only. None: the shorter side of the first
            training image, at most 224.
        seed: Seed of the weights, the order of the images, the augmentation and the dropout.
        device: cpu, cuda or cuda:N; auto is CUDA where there is a GPU.
        threads: CPU threads of PyTorch. None leaves PyTorch's own choice.
        workers: Processes that decode images where the data set is too large for memory (2 GiB decoded); 0 decodes
            between the steps. None: 1 on a CPU, where they and the training share the cores; on a GPU one for each core
            but one, at most 8, of this process's share of the machine.
        amp: Automatic mixed precision: bf16 runs convolutions in bfloat16, none runs everything in float32, auto takes
            the faster of the two on this device, fp16 is float16 with a scaled loss, for GPUs. The choice is saved: a
            resumed run keeps it.
        channels_last: Keep images and weights in the channels_last memory format, the faster one.
        reuse_memory: On the CPU, let the C library keep large buffers instead of returning them to the system at each
            free: faster, and the process keeps its peak memory until it ends.
        compile: Pass the network through torch.compile.
        compile_mode: torch.compile's mode. On a GPU reduce-overhead and max-autotune run the network as
            CUDA graphs, in one process and batches of one part: small batches no longer wait for the processor.
        sync_bn: In several processes (torchrun), batch statistics of all their images; else each normalises by those of
            its own share. On a CPU it needs the fused blocks.
        fsdp: In several processes, shard weights, gradients and optimizer state over them (FSDP2), where else each
            holds them whole (DistributedDataParallel).
        save_minutes: Write last.pt after so many minutes as well as after each epoch. The one before stays as
            previous.pt.
        report: At the end, draw curves.png, confusion.png and mistakes.png, and write report.html.
    """

    fused: bool = True
    conv_algorithm: ConvAlgorithm | None = None
    recipe: str | None = None
    model: str = "resnet18"
    width: float = 1.0
    pretrained: Path | None = None
    dataset: Dataset = "auto"
    data_dir: Path = Path("data")
    output_dir: Path | None = None
    resume: Path | None = None
    epochs: float | None = None
    max_steps: int | None = None
    test_only: bool = False
    batch_size: int | None = None
    drop_last: bool = False
    accumulate: int = 1
    eval_batch_size: int = 256
    eval_epochs: int = 1
    optimizer: Optimizer = "nesterov"
    lr: float | None = None
    find_lr: bool = False
    weight_decay: float | None = None
    decay_norm_bias: bool = True
    bias_lr_factor: float = 1.0
    momentum: float = 0.9
    clip_grad: float | None = None
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = ()
    step_factor: float = 0.1
    triangle_start: float = 0.2
    triangle_peak: float = 0.23
    triangle_end: float = 0.07
    warmup_epochs: float | None = None
    warmup_factor: float | None = None
    ema_decay: float | None = None
    lookahead_period: int | None = None
    lookahead_decay: float = 0.95
    label_smoothing: float = 0.0
    flip: Flip = "auto"
    crop_padding: int | None = None
    crop_border: CropBorder = "zero"
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: tuple[int, ...] = ()
    random_erasing: float = 0.0
    tta: Tta = "none"
    dropout: float | None = None
    zero_init_gamma: bool = False
    whitening_bias_epochs: float | None = None
    stem: Stem = "auto"
    image_size: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    amp: Amp = "none"
    channels_last: bool = True
    reuse_memory: bool = True
    compile: bool = False
    compile_mode: CompileMode = "default"
    sync_bn: bool = False
    fsdp: bool = False
    save_minutes: float = 10.0
    report: bool = True

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether torch.compile makes CUDA graphs of the network, where it is on a GPU."""
        return self.compile and self.compile_mode in ("reduce-overhead", "max-autotune")


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
        ("flip", Flip),
        ("crop_border", CropBorder),
        ("tta", Tta),
        ("compile_mode", CompileMode),
    ):
        _check_choice(name, getattr(config, name), get_args(kind))
    unknown = models.why_unknown(config.model)
    if unknown is not None:
        raise InputError(f"model: {unknown}")
    if config.test_only and config.resume is None and config.pretrained is None:
        raise InputError("test_only: expected a checkpoint (resume) or weights (pretrained) to test, got neither")
    # A resumed run has its checkpoint to agree with, which says more.
    if not config.fused and config.conv_algorithm is not None and config.resume is None:
        raise InputError(
            "conv_algorithm: expected nothing with fused=False (--no-fused), where every convolution is PyTorch's, "
            f"got {config.conv_algorithm!r}"
        )
    if config.uses_cuda_graphs and config.accumulate > 1:
        raise InputError(
            f"accumulate: expected 1 with compile_mode={config.compile_mode!r}, whose CUDA graphs write each part's "
            f"gradients to the same memory, got {config.accumulate}"
        )
    if config.find_lr and config.test_only:
        raise InputError("find_lr: expected nothing with test_only, which takes no training step")
    if config.find_lr and config.resume is not None:
        raise InputError(f"find_lr: tests a run from its first step on, expected no resume, got {str(config.resume)!r}")
    _check_recipe_options(config)
    counts = ("max_steps", "eval_batch_size", "eval_epochs", "threads", "image_size", "accumulate", "lookahead_period")
    for name in counts:
        _check_range(name, getattr(config, name), low=1, high=MOST)
    _check_range("batch_size", config.batch_size, low=2, high=MOST)
    _check_range("workers", config.workers, low=0, high=MOST)
    _check_range("seed", config.seed, low=0, high=2**63 - 1)
    for name in ("lr", "save_minutes"):
        _check_range(name, getattr(config, name), low=0.0, low_included=False)
    for name in ("weight_decay", "warmup_epochs"):
        _check_range(name, getattr(config, name), low=0.0)
    for name in ("momentum", "label_smoothing", "dropout"):
        _check_range(name, getattr(config, name), low=0.0, high=1.0, high_included=False)
    # A resumed run may end within its warm-up.
    limit = config.epochs if config.resume is None else None
    if limit is not None and config.warmup_epochs is not None and config.warmup_epochs > limit:
        raise InputError(f"warmup_epochs: expected at most epochs = {config.epochs}, got {config.warmup_epochs}")
    if config.device != "auto":
        check_device(config.device, "auto, cpu, cuda or cuda:N")


def check_device(name: str, expected: str) -> None:
    """
    Raises:
        InputError: `name` is neither the CPU nor a CUDA device; `expected` says what would do.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected {expected}, got {name!r}")


def _check_recipe_options(config: TrainConfig) -> None:
    """The options of optimizer, schedule, augmentation and averages, each on its own and those that need each other."""
    _check_range("epochs", config.epochs, low=0.0, high=MOST, low_included=False)
    for name in ("width", "bias_lr_factor", "clip_grad", "step_factor", "warmup_factor"):
        _check_range(name, getattr(config, name), low=0.0, low_included=False)
    if config.tta == "flip+shift" and config.image_size == 1:
        raise InputError(
            "tta: expected an image_size of 2 or more with flip+shift, which moves images by a pixel, got 1"
        )
    for name in ("whitening_bias_epochs", "crop_padding", "mixup", "cutmix"):
        _check_range(name, getattr(config, name), low=0)
    for name in ("mixup", "cutmix"):
        if 0 < getattr(config, name) < LEAST_ALPHA:
            raise InputError(f"{name}: expected 0, or a number from {LEAST_ALPHA} on, got {getattr(config, name)}")
    operations, magnitude = config.randaugment if len(config.randaugment) == 2 else (0, 0)
    if config.randaugment and not (operations >= 1 and 0 <= magnitude <= 30):
        raise InputError(
            "randaugment: expected two integers, operations (1 or more) and their magnitude (0 to 30), "
            f"got {config.randaugment}"
        )
    for name in ("triangle_start", "triangle_peak", "triangle_end", "random_erasing"):
        _check_range(name, getattr(config, name), low=0.0, high=1.0)
    for name in ("ema_decay", "lookahead_decay"):
        _check_range(name, getattr(config, name), low=0.0, high=1.0, high_included=False)
    if any(not low < high < math.inf for low, high in itertools.pairwise((0.0, *config.milestones))):
        raise InputError(f"milestones: expected epochs above 0 in rising order, got {config.milestones}")
    if bool(config.milestones) != (config.schedule == "step"):
        raise InputError(
            "milestones: expected with the schedule step, and only there, "
            f"got {config.milestones} with {config.schedule}"
        )
    if config.schedule in ("triangle", "onecycle") and config.warmup_epochs:
        raise InputError(
            f"warmup_epochs: expected 0 with the schedule {config.schedule}, which rises by itself, "
            f"got {config.warmup_epochs}"
        )
    if config.ema_decay is not None and config.lookahead_period is not None:
        raise InputError("ema_decay: expected nothing with lookahead_period, which averages the weights itself")
    for name in ("ema_decay", "lookahead_period", "clip_grad"):
        if config.fsdp and getattr(config, name) is not None:
            raise InputError(f"{name}: expected nothing with fsdp, got {getattr(config, name)}")
    if config.batch_size is not None and config.accumulate > 1 and config.batch_size < 2 * config.accumulate:
        raise InputError(
            f"accumulate: expected parts of 2 images or more of a batch of {config.batch_size}, got {config.accumulate}"
        )


def resolve(config: TrainConfig, *, dataset: Dataset, image_size: int) -> TrainConfig:
    """Fill every field that depends on the data set or the machine, so that config.json says what ran.

    Args:
        config: checked configuration; fields that are neither None nor "auto" stay as they are.
        dataset: the data set in use, never "auto".
        image_size: side of its images in pixels.

    Raises:
        InputError: the environment variable FASTRES_CONV, where it counts, names no algorithm; amp is
            fp16 without CUDA; or an option does not go with what the others are now, as `check_config` has it.
    """
    small = dataset == "digits"
    usual_lr, usual_decay = {
        **dict.fromkeys(("sgd", "momentum", "nesterov"), (0.01 if small else 0.05, 5e-4)),
        "lars": (4.0, 5e-4), "adamw": (1e-3, 0.01), "muon": (4e-3, 0.01),
    }.get(config.optimizer, (1e-3, 1e-4))  # fmt: skip
    epochs = _first(config.epochs, 5 if small else 30)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        conv_algorithm: Any = requested_algorithm(config.conv_algorithm) if config.fused else config.conv_algorithm
    except ValueError as error:
        raise InputError(str(error)) from error
    amp = config.amp
    if amp == "auto":
        amp = choose_amp(torch.device(device))
    if amp == "fp16" and not device.startswith("cuda"):
        raise InputError(f"amp: expected a CUDA device for fp16, got {device}, where bf16 runs")
    resolved = dataclasses.replace(
        config,
        dataset=dataset,
        epochs=epochs,
        batch_size=_first(config.batch_size, 16 if small else 128),
        lr=_first(config.lr, usual_lr),
        weight_decay=_first(config.weight_decay, usual_decay),
        warmup_epochs=_first(
            config.warmup_epochs, min(0.25 if small else 1.0, epochs / 5) if config.schedule == "cosine" else 0.0
        ),
        image_size=image_size,
        stem=("cifar" if image_size <= 64 else "imagenet") if config.stem == "auto" else config.stem,
        device=device,
        workers=_first(config.workers, _usual_workers(device)),
        conv_algorithm=conv_algorithm,
        amp=amp,
    )
    check_config(resolved)
    return resolved


def _usual_workers(device: str) -> int:
    if torch.device(device).type == "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1, 1), 8)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration in plain JSON types."""
    plain = {Path: str, type(Path()): str, tuple: list}
    return {k: plain[type(v)](v) if type(v) in plain else v for k, v in dataclasses.asdict(config).items()}


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Inverse of to_dict.

    Raises:
        InputError: a field is missing or unknown, or has an impossible value.
    """
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    if set(values) != names:
        raise InputError(f"config: missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}")
    paths = {k: Path(values[k]) for k in ("data_dir", "output_dir", "resume", "pretrained") if values[k] is not None}
    tuples = {k: tuple(values[k]) for k in ("milestones", "randaugment")}
    config = TrainConfig(**{**values, **paths, **tuples})
    check_config(config)
    return config


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_type(name: str, value: object, kind: Any) -> None:
    if get_origin(kind) is tuple:
        number = (int, float) if float in get_args(kind) else (int,)
        if not isinstance(value, tuple) or not all(type(v) in number for v in value):
            numbers = "numbers" if float in number else "integers"
            raise TypeError(f"{name}: expected a tuple of {numbers}, got {value!r} ({type(value).__name__})")
        return
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
