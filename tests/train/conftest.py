"""A tiny network in place of the real ones, and a tiny data set, so that a whole run takes well under a second."""

import io
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from fastres import models
from fastres.train import Augmentation, ImageData, Split, Summary, TrainConfig, train
from tests.parity import one_thread  # noqa: F401

CLASSES = ("left", "right", "both")


class TinyNet(nn.Sequential):
    """A convolution with BN and dropout, and a linear layer: what training has to handle, at 8 channels."""

    conv_algorithm: str | None = None

    def __init__(self, num_classes: int, dropout: float, stem: str) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2 if stem == "imagenet" else 1, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> list[TinyNet]:
    """Let fastres.models.create make tiny networks; gives the list of those made."""
    made: list[TinyNet] = []

    def create(
        name: str,
        *,
        num_classes: int,
        stem: str = "cifar",
        dropout: float | None = None,
        fused: bool = True,
        conv_algorithm: str | None = None,
        width: float = 1.0,
    ) -> nn.Module:
        default = 0.5 if name == "article" else 0.0
        made.append(TinyNet(num_classes, default if dropout is None else dropout, stem))
        made[-1].conv_algorithm = conv_algorithm
        return made[-1]

    monkeypatch.setattr(models, "create", create)
    return made


@contextmanager
def signal_in_call(calls: int, number: signal.Signals) -> Iterator[None]:
    """Raise a signal in the call of that number of a `TinyNet`, counted from 1 over steps and evaluations."""
    count = 0

    def send(module: nn.Module, inputs: Any) -> None:
        nonlocal count
        if isinstance(module, nn.Conv2d):
            count += 1
            if count == calls:
                signal.raise_signal(number)

    hook = nn.modules.module.register_module_forward_pre_hook(send)
    try:
        yield
    finally:
        hook.remove()


def make_data(train: int = 45, test: int = 12, *, size: int = 8) -> ImageData:
    """Images with a bright half, or all bright; a class is told by where the light is."""
    generator = torch.Generator().manual_seed(5)

    def split(count: int) -> Split:
        labels = torch.arange(count) % len(CLASSES)
        images = torch.randint(0, 60, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            half = (slice(0, size // 2), slice(size // 2, size), slice(0, size))[label]
            image[:, :, half] += 150
        return Split(images, labels)

    return ImageData(
        "digits", split(train), split(test), CLASSES, size, (0.4,) * 3, (0.3,) * 3, Augmentation(padding=1, flip=False)
    )


@pytest.fixture
def data() -> ImageData:
    return make_data()


@pytest.fixture
def run(tiny_models: list[TinyNet], data: ImageData, tmp_path: Path) -> Callable[..., Summary]:
    """Train a tiny network: keyword arguments are the fields of TrainConfig; `to` names the folder."""

    def start(
        to: str = "run",
        *,
        on: ImageData | None = None,
        make_model: Any = None,
        console: Console | None = None,
        **fields: Any,
    ) -> Summary:
        fields = {
            "device": "cpu",
            "batch_size": 8,
            "epochs": 2,
            "reuse_memory": False,
            "report": False,
            "output_dir": tmp_path / to,
            **fields,
        }
        quiet = Console(file=io.StringIO(), width=200)
        return train(TrainConfig(**fields), data=on or data, make_model=make_model, console=console or quiet)

    return start


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """Write an image folder of two classes, with four training images and two test images each."""

    def write(root: Path, *, size: tuple[int, int] = (10, 8), test: str = "test") -> Path:
        random = np.random.default_rng(0)
        for split, count in (("train", 4), (test, 2)):
            for name in ("cat", "dog"):
                (root / split / name).mkdir(parents=True)
                for index in range(count):
                    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / name / f"{index}.png")
        return root

    return write
