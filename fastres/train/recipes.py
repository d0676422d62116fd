"""Recipes: settings that were published, or proved good here, under a name. Any option given besides overrides them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastres.train.config import TrainConfig
from fastres.train.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, where they are from and what they reach there."""

    source: str
    published: str  # on CIFAR-10's test images unless it says otherwise
    settings: dict[str, Any]


def _he2015(depth: int, error: float) -> Recipe:
    # The deepest starts at a tenth of the learning rate: "0.1 is slightly too large to start converging", so "0.01 to
    # warm up the training until the training error is below 80 % (about 400 iterations)".
    slow_start = {"warmup_epochs": 1.0, "warmup_factor": 0.1} if depth == 110 else {}
    return Recipe(
        "He, Zhang, Ren, Sun 2015, Deep residual learning for image recognition, section 4.2 and table 6",
        f"error {error:.2f} %",
        {
            "model": f"resnet{depth}", "dataset": "cifar10", "epochs": 200.0, "batch_size": 128,
            "optimizer": "momentum", "momentum": 0.9, "lr": 0.1, "weight_decay": 1e-4, "schedule": "step",
            "milestones": (100.0, 150.0), "step_factor": 0.1, **slow_start,
        },
    )  # fmt: skip


RECIPES: dict[str, Recipe] = {
    "article": Recipe(
        "the article that started this project",
        "none",
        {
            "model": "article", "dataset": "cifar10", "epochs": 100.0, "batch_size": 128, "optimizer": "adam",
            "lr": 1e-3, "weight_decay": 1e-4, "schedule": "constant",
        },
    ),
    "resnet18-cifar": Recipe(
        "github.com/kuangliu/pytorch-cifar; Nesterov's momentum where it has the plain one",
        "accuracy about 95 %",
        {
            "model": "resnet18", "dataset": "cifar10", "epochs": 200.0, "batch_size": 128, "optimizer": "nesterov",
            "momentum": 0.9, "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine", "warmup_epochs": 0.0,
        },
    ),
    **{
        f"resnet{depth}-he2015": _he2015(depth, error)
        for depth, error in ((20, 8.75), (32, 7.51), (44, 7.17), (56, 6.97), (110, 6.43))
    },
    "wrn28-10": Recipe(
        "Zagoruyko and Komodakis 2016, Wide residual networks, sections 2.4 and 3, table 6",
        "error 3.89 %",
        {
            "model": "wrn28-10", "dataset": "cifar10", "epochs": 200.0, "batch_size": 128, "optimizer": "nesterov",
            "momentum": 0.9, "lr": 0.1, "weight_decay": 5e-4, "schedule": "step", "milestones": (60.0, 120.0, 160.0),
            "step_factor": 0.2, "dropout": 0.3, "crop_border": "reflect",
        },
    ),
    # The source gives its learning rate of 11.5 and weight decay of 0.0153 "for 1024 images", decoupled from momentum:
    # it divides both by 1 + 1 / (1 - momentum) = 7.667. Ours is then 1.5 for a mean loss; the decay of a step,
    # lr * weight_decay = 0.0153 / 7.667, is the same.
    "fast": Recipe(
        "Jordan 2024, 94% on CIFAR-10 in 3.29 seconds on a single GPU (airbench94), section 3",
        "accuracy 94.0 % (airbench94)",
        {
            "model": "fast", "dataset": "cifar10", "epochs": 9.9, "batch_size": 1024, "drop_last": True,
            "eval_batch_size": 1000, "eval_epochs": 5, "optimizer": "nesterov", "momentum": 0.85, "lr": 1.5,
            "bias_lr_factor": 64.0, "weight_decay": 0.0153 / 11.5, "schedule": "triangle", "triangle_start": 0.2,
            "triangle_peak": 0.23, "triangle_end": 0.07, "label_smoothing": 0.2, "flip": "alternating",
            "crop_padding": 2, "crop_border": "reflect", "lookahead_period": 5, "lookahead_decay": 0.95,
            "tta": "flip+shift", "whitening_bias_epochs": 3.0,
        },
    ),
    # Running statistics are an average of about the last ten batches'. With 22 batches of 64 in an epoch, and a warm-up
    # over the whole of it, the weights changed fastest just before the first evaluation, which used statistics that
    # were not those of the weights: test loss 111. With 90 batches, a fifth of the learning rate and a warm-up that
    # ends early, the statistics follow: 0.75. The settings are the data set's defaults.
    "digits": Recipe(
        "chosen here, for a computer without a network: scikit-learn's handwritten digits",
        "accuracy about 99 % (of 360 test images)",
        {
            "dataset": "digits", "model": "resnet18", "epochs": 5.0, "batch_size": 16, "optimizer": "nesterov",
            "lr": 0.01, "warmup_epochs": 0.25,
        },
    ),
}  # fmt: skip


def recipe_config(name: str) -> TrainConfig:
    """The configuration that a recipe starts from.

    Raises:
        InputError: no recipe has this name.
    """
    if name not in RECIPES:
        raise InputError(f"recipe: expected list, or one of {', '.join(RECIPES)}, got {name!r}")
    return dataclasses.replace(TrainConfig(), recipe=name, **RECIPES[name].settings)


def describe_recipes() -> str:
    """A paragraph for each recipe: its settings as options, its source and the published figure."""
    return "\n\n".join(
        f"{name}: published: {recipe.published}\n  {recipe.source}\n  {_options(recipe.settings)}"
        for name, recipe in RECIPES.items()
    )


def _options(settings: dict[str, Any]) -> str:
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words.append(f"--{flag} {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}")
    return " ".join(words)
