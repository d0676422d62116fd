"""Networks beside ResNet-18 on a GPU: training steps, by the compiler backend too, and inference of frozen networks.

Compiling takes the processor for minutes and measuring takes the GPU for seconds. So each network has a process of its
own: all of them set their sides up at the same time, and when all are ready they measure one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import fastres
from benchmarks import records, workloads
from benchmarks.gpu import timing
from benchmarks.networks import Unet, plain, preactivation_resnet18, timm_network, training_step, with_ordinary_weights
from benchmarks.sides import BACKEND, COMPILE, COMPILE_GRAPH, EAGER, EAGER_GRAPH, FROZEN_GRAPH, FUSED_COMPILE
from benchmarks.workloads import CLASSES, CUDA, DEVICE, QUICK, Run, Workload
from fastres import models
from fastres.backend import fastres as fastres_backend

STEP, INFERENCE = ("model-network-step", "model-inference")
SIDES = {STEP: (EAGER, COMPILE, BACKEND), INFERENCE: (EAGER_GRAPH, COMPILE_GRAPH, FROZEN_GRAPH)}


@dataclass(frozen=True)
class Case:
    """A network with the images of a run; and, where it is one of ours, the same with fused blocks."""

    make: Callable[[], nn.Module]
    batch: int
    image: int
    group: str = STEP
    fused: Callable[[], nn.Module] | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES[self.group] + ((FUSED_COMPILE,) if self.group == STEP and self.fused else ())


def _ours(model: str, batch: int, image: int, group: str = STEP) -> Case:
    stem = "imagenet" if image > 96 else "cifar"
    fused = functools.partial(models.create, model, num_classes=CLASSES, stem=stem, dropout=0.0)
    return Case(plain(model, stem), batch, image, group, fused)


# The most important first. A step of each takes 10 ms and more, so that the GPU does not wait for the host.
CASES = {
    "ResNet-50": _ours("resnet50", 128, 224),
    "timm resnet50d": Case(timm_network("resnet50d"), 128, 224),
    "ResNet-50, 128 images": _ours("resnet50", 128, 224, INFERENCE),
    "ResNet-50, 1 image": _ours("resnet50", 1, 224, INFERENCE),
    "preactivation ResNet-18": Case(preactivation_resnet18, 512, 32),
    "WRN-28-10": _ours("wrn28-10", 256, 32),
    "timm efficientnet_b0": Case(timm_network("efficientnet_b0"), 128, 224),
    "timm densenet121": Case(timm_network("densenet121"), 64, 224),
    "U-Net": Case(Unet, 64, 128),
}
NAMES = ("U-Net",) if QUICK else tuple(CASES)


def workload(name: str) -> Workload:
    """One of CASES."""
    case = CASES[name]
    batch, image = (2, 16) if QUICK else (case.batch, case.image)
    does = "training step" if case.group == STEP else "inference"
    return Workload(
        group=case.group,
        key=records.slug(name),
        name=f"{name.split(',')[0]} at {image} {does}, batch {batch}",
        images=batch,
        rounds=2 if QUICK else 10 if case.group == STEP else 30,
        set_up=lambda side: _set_up(case, side, workloads.image_batch(batch, image)),
        sides=(EAGER, BACKEND) if QUICK else case.sides,
    )


def _set_up(case: Case, side: str, batch: tuple[torch.Tensor, torch.Tensor]) -> Run:
    torch.manual_seed(0)
    make = case.fused if side == FUSED_COMPILE and case.fused else case.make
    model = with_ordinary_weights(make())
    model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if case.group == INFERENCE:
        frozen = fastres.freeze(model.eval()) if side == FROZEN_GRAPH else model.eval()
        forward = frozen if side == EAGER_GRAPH else torch.compile(frozen, dynamic=False)

        def infer() -> None:
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                forward(batch[0])

        return workloads.graphed(infer)
    forward = model
    if side != EAGER:
        backend = fastres_backend if side == BACKEND else "inductor"
        forward = torch.compile(model, dynamic=False, backend=backend)
    return training_step(forward, model, batch[0], weight_decay=5e-4)


def measure_all(names: Sequence[str], budget: timing.Budget, results: dict[str, Any], file: Path) -> None:
    """Measure networks into `results`, writing `file` after each; one that is not ready in time is named."""
    results |= {"entries": [], "left_out": [], "complete": False}
    records.write_text(file, records.to_json(results))
    context = multiprocessing.get_context("spawn")
    processes = {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(name, budget.left(), theirs), daemon=True)
        process.start()
        theirs.close()
        processes[name] = process, ours
    ready = [name for name, (_, pipe) in processes.items() if _answer(pipe, budget.left()) is not None]
    print(f"{len(ready)} of {len(names)} networks are ready to be measured ({budget.left():.0f} s left)", flush=True)
    for name in names:
        process, pipe = processes[name]
        entry = None
        if name in ready:
            with contextlib.suppress(BrokenPipeError):
                pipe.send("measure")
            entry = _answer(pipe, max(30.0, budget.left()))
        if entry is None:
            results["left_out"].append(name)
        else:
            results["entries"].append(entry)
        process.kill()
        process.join()
        print(f"{name}: {'left out' if entry is None else 'measured'} ({budget.left():.0f} s left)", flush=True)
        missing = any(found["missing"] for found in results["entries"])
        results["complete"] = len(results["entries"]) == len(names) and not missing
        records.write_text(file, records.to_json(results))


def _answer(pipe: Connection, seconds: float) -> Any:
    """What a process sends; None where it sends nothing in time, or has ended."""
    with contextlib.suppress(EOFError):
        return pipe.recv() if pipe.poll(max(0.0, seconds)) else None
    return None


def _serve(name: str, seconds: float, pipe: Connection) -> None:
    """A network's process: set up, say so, wait to be asked, measure, send the entry."""
    budget = timing.Budget(seconds, time.monotonic)
    torch.backends.cudnn.benchmark = True
    timer: timing.Timer = timing.CudaTimer() if CUDA else timing.HostTimer()
    case = workload(name)
    prepared = timing.prepare(timing.Task(case, case.sides, f"{case.group}-{case.key}"), timer, budget)
    pipe.send("ready")
    pipe.recv()
    pipe.send(timing.timed(prepared, timer, budget))
