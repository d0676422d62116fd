"""Why do residual connections cure vanishing gradients? Gradient norms by depth, with and without shortcuts.

The norm of the gradient of the loss with respect to the weight of every 3x3 convolution, on one batch, for networks of
20 to 110 layers, at initialisation and after a few steps of the trainer: with and without shortcuts, with and without
batch normalisation, which alone does part of the cure. The networks are otherwise the same: plain PyTorch, the same
initialisation, the same images.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.experiments import alter
from benchmarks.experiments.study import Interrupted, Place, Settings, Study, network, trainer_config, write
from benchmarks.records import row
from fastres.train import DivergedError, ImageData, TrainConfig, pictures, train
from fastres.train.augment import normalise
from fastres.train.data import batches

DEPTHS = (20, 32, 44, 56, 110)
STEPS = 20
LR = 0.05
KINDS = {
    "shortcuts and BN": (),
    "BN only": (alter.remove_shortcuts,),
    "shortcuts only": (alter.remove_normalisations,),
    "neither": (alter.remove_shortcuts, alter.remove_normalisations),
}


def gradient_norms(model: nn.Module, x: Tensor, labels: Tensor) -> list[float]:
    """L2 norm of d loss / d weight of every 3x3 convolution, from the image to the classifier; the model is unchanged.

    Args:
        x: float32 [N, 3, H, W].
        labels: int64 [N].
    """
    model = copy.deepcopy(model).train()
    torch.autograd.backward(F.cross_entropy(model(x), labels))
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return [w.grad.norm().item() if w.grad is not None else math.nan for w in weights]


def measure(kind: str, depth: int, data: ImageData, settings: Settings, place: Place, steps: int) -> dict[str, Any]:
    """Gradient norms of one network at initialisation and after `steps` steps; None after a loss that is not finite."""
    # The subset lies in the order of its classes, so a batch takes every n-th image.
    order = torch.linspace(0, len(data.train) - 1, settings.batch_size).long()
    ((images, labels),) = batches(data.train, order, settings.batch_size)
    x = normalise(images, data.mean, data.std)
    own = dataclasses.replace(settings, model=f"resnet{depth}")

    def change(model: nn.Module) -> None:
        for step in KINDS[kind]:
            step(model)

    made: list[nn.Module] = []
    first: list[list[float]] = []

    def make(config: TrainConfig, num_classes: int) -> nn.Module:
        made.append(network(own, change)(config, num_classes))
        first.append(gradient_norms(made[0].to(memory_format=torch.channels_last), x, labels))
        return made[0]

    folder = place.output_dir / f"run-{depth}"
    shutil.rmtree(folder, ignore_errors=True)
    options = {"fused": False, "max_steps": steps, "epochs": steps, "lr": LR, "schedule": "constant"}
    config = trainer_config(own, place, folder, options)
    after: list[float] | None = None
    try:
        summary = train(config, data=data, make_model=make, console=Console(file=io.StringIO()))
    except DivergedError:
        pass
    else:
        if not summary.finished:
            raise Interrupted
        after = gradient_norms(made[0], x, labels)
    shutil.rmtree(folder, ignore_errors=True)
    return {"initial": first[0], "after": after}


def run(study: Study, data: ImageData, settings: Settings, place: Place) -> None:
    """Measure what is missing."""
    for kind in KINDS:
        for depth in DEPTHS:
            name = f"{kind}, {depth}"
            if name not in study.cases:
                print(f"{name} ...", flush=True)
                study.cases[name] = measure(kind, depth, data, settings, place, STEPS)
                write(study, place)


def ratio(norms: list[float] | None) -> float:
    """The gradient of the first block's first convolution over that of the last convolution; NaN where there is none.

    The convolution at the image is left out: its weight is of another size.
    """
    return norms[1] / norms[-1] if norms and norms[-1] > 0 else math.nan


def body(study: Study) -> list[str]:
    """The table: first over last gradient, at initialisation and after the steps."""
    lines = [
        "Norm of the first block's weight gradient over that of the last convolution's: 1 where all layers learn alike,"
        f" near 0 where gradients vanish, large where they explode. At initialisation → after {STEPS} steps.",
        "",
        row("", *(f"{depth} layers" for depth in DEPTHS)),
        row("---", *["---:"] * len(DEPTHS)),
    ]
    for kind in KINDS:
        cells = []
        for depth in DEPTHS:
            result = study.cases[f"{kind}, {depth}"]
            ratios = [ratio(result[when]) for when in ("initial", "after")]
            cells.append(" → ".join("diverged" if math.isnan(r) else f"{r:.2g}" for r in ratios))
        lines.append(row(kind, *cells))
    return lines


def draw(study: Study, path: Path) -> None:
    """Gradient norms along each network, one panel a kind."""
    figure = pictures.new_figure(10, 7.2)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, kind in zip(panels.flat, KINDS, strict=True):
        for depth, colour in zip(DEPTHS, pictures.COLOURS, strict=False):
            result = study.cases[f"{kind}, {depth}"]
            for norms, dash in ((result["initial"], "-"), (result["after"], ":")):
                points = [(i / (len(norms) - 1), v) for i, v in enumerate(norms) if v > 0] if norms else []
                if points:
                    label = f"{depth} layers" if dash == "-" else None
                    axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.4, label=label)
        pictures.tidy(axes, kind[0].upper() + kind[1:])
        axes.set_yscale("log")
    for axes in panels[1]:
        axes.set_xlabel("place in the network, from the image (0) to the classifier (1)", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("norm of the weight's gradient", fontsize=9)
    handles, words = panels[0, 0].get_legend_handles_labels()
    title = f"solid: at initialisation; dotted: after {STEPS} steps"
    figure.legend(handles, words, loc="outside lower left", ncols=len(DEPTHS), fontsize=9, frameon=False, title=title,
                  title_fontsize=9, alignment="left")  # fmt: skip
    pictures.save(figure, path)
