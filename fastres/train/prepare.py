"""What a run needs, made and checked before anything is written: data, network, optimizer, the state to go on from."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fastres import _extension, models
from fastres.memory import reuse_cpu_memory
from fastres.train import checkpoint as ckpt
from fastres.train.config import TrainConfig, check_config, resolve, to_dict
from fastres.train.data import fingerprint, fingerprint_differences, left_out, load_data
from fastres.train.distributed import SINGLE, Group, rank_device, restarts_left, start_group, was_restarted
from fastres.train.errors import InputError, RunError, first_line
from fastres.train.folder import writing
from fastres.train.image_data import ImageData
from fastres.train.optim import make_optimizer
from fastres.train.parallel import OptimizerState, check_job, of_rank, shard, smallest_batch
from fastres.train.report import SUMMARY
from fastres.train.weights import start_weights

RUN_FILES = ("config.json", "metrics.jsonl", "steps.jsonl", SUMMARY, ckpt.LAST, ckpt.PREVIOUS, ckpt.BEST)
SITTING_FIELDS = ("resume", "output_dir", "data_dir", "epochs", "max_steps", "eval_batch_size", "device", "threads",
                  "workers", "reuse_memory", "compile", "compile_mode", "save_minutes", "report",
                  "test_only")  # fmt: skip
"""Fields in which a resumed run may differ from its checkpoint; the others decide what is computed."""
TEST_FIELDS = ("fused", "conv_algorithm", "amp", "channels_last", "tta", "sync_bn", "fsdp")
"""Fields in which an evaluation (test_only) may differ as well: the same weights, computed in another way."""


@dataclasses.dataclass
class Run:
    """Everything a run needs, made before anything is written."""

    config: TrainConfig  # resolved
    data: ImageData
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # order and augmentation
    resumed: dict[str, Any] | None  # the checkpoint
    backend: str
    group: Group = SINGLE
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the data


class Plan(NamedTuple):
    """How the training images fall into batches and epochs."""

    smallest_batch: int  # images; fewer at the end of an epoch are left out
    epoch_images: int
    steps_per_epoch: int
    total_steps: int


def plan_of(run: Run) -> Plan:
    """
    Raises:
        InputError: too few images for a batch.
    """
    config, count = run.config, len(run.data.train)
    if config.batch_size is None or config.epochs is None:
        raise ValueError("config: expected a resolved one")
    smallest = config.batch_size if config.drop_last else smallest_batch(run.group, sync_bn=config.sync_bn)
    images = count - left_out(count, config.batch_size, smallest)
    if not images:
        raise InputError(f"data: expected {smallest} training images or more for a batch, got {count}")
    steps = math.ceil(images / config.batch_size)
    # Of the number as it was written: 2.2 epochs of 25 steps are 55, where 2.2 * 25 is a little more.
    return Plan(smallest, images, steps, math.ceil(Fraction(str(config.epochs)) * steps))


def prepare(
    config: TrainConfig,
    data: ImageData | None,
    make_model: Callable[[TrainConfig, int], nn.Module],
    console: Console,
) -> Run:
    """Make everything that can fail. Seeds torch's global generators, and sets the number of threads.

    Raises:
        TypeError, InputError, RunError: as `fastres.train.train`.
    """
    check_config(config)

    def notify(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    device = pick_device(config.device)
    group = start_group(device)
    if not group.is_main:
        console = Console(quiet=True)  # all have the same to say
    with group.agreed():
        device = rank_device(device, group)
        config = _after_restart(ckpt.resolve_resume(config))
        resumed = None
        if config.resume is not None:
            resumed = ckpt.load_checkpoint(config.resume, notify=notify)
            config = _inherit(config, resumed["config"])
        if config.test_only:
            # Each process evaluates the whole network.
            config = dataclasses.replace(config, fsdp=False, sync_bn=False)
        else:
            _check_output_dir(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if data is None:
        data = _load(config, group, notify)
    if len(data.classes) < 2:
        raise InputError(f"data: expected 2 classes or more, got {list(data.classes)}")
    if len(data.train) < 2 or len(data.test) < 1:
        raise InputError(
            f"data: expected 2 training images and 1 test image or more, got {len(data.train)}, {len(data.test)}"
        )
    config = resolve(config, dataset=data.name, image_size=data.image_size)
    print_of_data = fingerprint(data)
    if resumed is not None:
        _check_same_run(config, resumed, data, print_of_data)
    if not config.test_only:
        check_job(config, group, resumed)
    if device.type == "cpu" and config.reuse_memory:
        reuse_cpu_memory()
    torch.manual_seed(config.seed)
    model = make_model(config, len(data.classes)).to(device)
    if config.channels_last and not config.fsdp:  # FSDP2 refuses parameters that are not contiguous
        model = model.to(memory_format=torch.channels_last)
    if resumed is None and (note := start_weights(model, config, data)) is not None:
        if config.test_only:
            raise InputError(f"pretrained: expected weights to test, but {note}")
        notify(note)
    if resumed is not None and config.resume is not None:
        ckpt.load_state(model, resumed["model"], what=f"model {config.model}", path=config.resume)
    if config.fsdp:
        model = shard(model, group, device, sync_bn=config.sync_bn)
    optimizer = make_optimizer(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    if group.size > 1:
        torch.manual_seed(config.seed + group.rank)
    if resumed is not None and config.resume is not None and not config.test_only:
        optimizer_state = OptimizerState(model, optimizer)
        ckpt.load_state(optimizer_state, resumed["optimizer"], what=f"optimizer {config.optimizer}", path=config.resume)
        generator.set_state(resumed["generator"])
        torch.set_rng_state(of_rank(resumed["torch_rng"], group))
        cuda_rng = of_rank(resumed["cuda_rng"], group)
        if device.type == "cuda" and cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng, device)
    if config.output_dir is None:
        config = dataclasses.replace(config, output_dir=group.broadcast(_default_output_dir(config)))
    if device.type == "cuda":
        data = _to_device(data, device)
    backend = _backend(config, device)
    return Run(config, data, device, model, optimizer, generator, resumed, backend, group, print_of_data)


def configured_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network that a resolved configuration names.

    Raises:
        InputError: it cannot be made, or is for larger images.
    """
    try:
        model = models.create(
            config.model, num_classes=num_classes, stem=config.stem, dropout=config.dropout, fused=config.fused,
            conv_algorithm=config.conv_algorithm, width=config.width,
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        # Of a stem that it does not have, or what torch says of sizes that no memory holds.
        raise InputError(
            f"model: cannot make {config.model} of width {config.width}, stem {config.stem}: {first_line(error)}"
        ) from error
    smallest = getattr(model, "smallest_image", 1)
    if config.image_size is not None and config.image_size < smallest:
        raise InputError(f"image_size: {config.model} expects {smallest} pixels or more, got {config.image_size}")
    return model


def _after_restart(config: TrainConfig) -> TrainConfig:
    """The same command again, by torchrun after a failure, goes on from the last checkpoint where there is one.

    Raises:
        InputError: torchrun may restart the job, and no folder is named that it would find again.
    """
    if config.test_only or config.find_lr:
        return config
    if config.output_dir is None and config.resume is None and (was_restarted() or restarts_left()):
        raise InputError("output_dir: torchrun --max-restarts needs one, in which a restarted job finds its checkpoint")
    folder = config.output_dir or config.resume
    if not was_restarted() or folder is None or not ckpt.has_checkpoint(folder):
        return config
    return dataclasses.replace(config, resume=folder)


def _load(config: TrainConfig, group: Group, notify: Callable[[str], None]) -> ImageData:
    """The data set, for each process; one on each machine is first where there may be something to download."""
    data: ImageData | None = None

    def load() -> ImageData:
        return load_data(config, notify=notify)

    if group.size > 1 and config.dataset in ("auto", "cifar10", "cifar100"):
        with group.agreed():
            data = load() if group.local_rank == 0 else None
    with group.agreed():
        return load() if data is None else data


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


def _check_same_run(
    config: TrainConfig, resumed: dict[str, Any], data: ImageData, print_of_data: dict[str, Any]
) -> None:
    now = to_dict(config)
    free = (*SITTING_FIELDS, *TEST_FIELDS) if config.test_only else SITTING_FIELDS
    differences = [
        f"{name} was {resumed['config'].get(name)!r}, is {now[name]!r}"
        for name in now
        if name not in free and now[name] != resumed["config"].get(name)
    ]
    if list(data.classes) != resumed["classes"]:
        differences.append(f"classes were {resumed['classes'][:5]}..., are {list(data.classes)[:5]}...")
    elif "data" in resumed:
        differences += fingerprint_differences(resumed["data"], print_of_data)
    order = resumed["order"]
    if not differences and order is not None and len(order) and int(order.max()) >= len(data.train):
        differences.append(f"the training images are fewer than then ({len(data.train)})")
    if differences:
        raise InputError(f"resume: the checkpoint {config.resume} is of another run: {'; '.join(differences)}")


def _check_output_dir(config: TrainConfig) -> None:
    directory = config.output_dir
    if directory is None:
        return
    with writing(directory):
        if directory.exists() and not directory.is_dir():
            raise InputError(f"output_dir: expected a folder, got the file {directory}")
        held = [name for name in RUN_FILES if (directory / name).exists()]
    if was_restarted() and config.resume is None:
        return  # the failed attempt's, which had no checkpoint yet
    if config.resume is not None and directory.resolve() == ckpt.folder_of(config.resume).resolve():
        return
    if held and not _never_saved(directory, held):
        raise InputError(
            f"output_dir: {directory} already holds a run ({', '.join(held)}); choose another, or --resume auto goes on"
        )


def _never_saved(directory: Path, held: list[str]) -> bool:
    """Whether the files are those of a run of ours that ended before its first checkpoint: nothing is lost by them."""
    if SUMMARY in held or any(name.endswith(".pt") for name in held):
        return False
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"fused", "model", "dataset", "optimizer"} <= set(config)


def _default_output_dir(config: TrainConfig) -> Path:
    if config.resume is not None:
        return ckpt.folder_of(config.resume)
    kind = "fused" if config.fused else "plain"
    what = "lr-test-" if config.find_lr else ""
    name = f"{config.dataset}-{config.model}-{kind}-{what}{time.strftime('%Y%m%d-%H%M%S')}"
    directory, number = Path("runs") / name, 1
    while directory.exists():
        number += 1
        directory = Path("runs") / f"{name}-{number}"
    return directory


def pick_device(name: str) -> torch.device:
    """The device of a checked name.

    Raises:
        RunError: it is not there.
    """
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
