"""`python -m benchmarks.serving`: a frozen network beside what else serves a network on the CPU.

The sides are PyTorch in eager mode, torch.compile with inductor's freezing, ONNX Runtime, OpenVINO, and fastres.freeze,
alone and inside torch.compile. All run the same float32 network with the same number of threads; PyTorch's take
images in channels_last. Rounds are interleaved: each runs every side once, and figures are medians over the rounds. A
side whose library is not installed is left out, with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torchvision
import tyro
from torch import Tensor
from tqdm import tqdm

import fastres
from benchmarks.machine import describe_machine
from benchmarks.records import insert_table, number, row, to_json, write_text

Run = Callable[[], object]

EAGER, COMPILE, ONNX, OPENVINO, FROZEN, FROZEN_COMPILE = SIDES = (
    "eager", "compile", "onnxruntime", "openvino", "fastres", "fastres-compile",
)  # fmt: skip
OURS = (FROZEN, FROZEN_COMPILE)
NAMES = {
    EAGER: "eager",
    COMPILE: "compile, freezing",
    ONNX: "ONNX Runtime",
    OPENVINO: "OpenVINO",
    FROZEN: "freeze",
    FROZEN_COMPILE: "freeze in compile",
}


@dataclass(frozen=True)
class Config:
    """Measure a frozen network beside its peers."""

    cases: tuple[str, ...] = (
        "resnet18:32:1", "resnet18:32:128", "resnet18:224:1", "resnet50:224:1", "resnet50:224:16",
    )  # fmt: skip
    """Network of torchvision, side of the images and batch; at 64 pixels and below the stem is the one for CIFAR-10."""
    sides: tuple[str, ...] = SIDES
    """What is measured."""
    seconds: float = 20.0
    """Of measuring a case, after each side's first two runs."""
    threads: int = 0
    """Intra-op threads of every side; 0 for PyTorch's number."""
    processor_time: bool = False
    """Count the processor's time in place of the clock's, for one thread on a machine that others use."""
    json: Path | None = None
    """File for the raw figures."""
    page: Path | None = None
    """Markdown file that takes the table, between `<!-- serving -->` and `<!-- /serving -->`."""


@dataclass(frozen=True)
class Case:
    """A network on images of a given size."""

    network: str
    image: int
    batch: int

    @classmethod
    def of(cls, text: str) -> Case:
        """
        Raises:
            ValueError: not network:image:batch, or a network that torchvision does not have.
        """
        network, *sizes = text.split(":")
        if len(sizes) != 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
            raise ValueError(f"cases: expected network:image:batch, got {text!r}")
        if network not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"cases: expected a network of torchvision, got {network!r}")
        return cls(network, int(sizes[0]), int(sizes[1]))

    @property
    def name(self) -> str:
        return f"{self.network} at {self.image}, batch {self.batch}"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(torchvision.models, self.network)(num_classes=10 if self.image <= 64 else 1000)
        if self.image <= 64:
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return model.eval().to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Measured:
    """Median seconds of each side, and why the others are missing."""

    case: Case
    seconds: dict[str, float]
    missing: dict[str, str]

    def fastest(self, ours: bool) -> str:
        """The fastest side of fastres, or of the others; empty where none ran."""
        sides = [side for side in self.seconds if (side in OURS) == ours]
        return min(sides, key=lambda side: self.seconds[side], default="")

    @property
    def over_the_best_peer(self) -> float:
        """How many times as fast as the fastest peer fastres is; NaN where either is missing."""
        peer, ours = self.fastest(False), self.fastest(True)
        return self.seconds[peer] / self.seconds[ours] if peer and ours else float("nan")


class MissingError(Exception):
    """Why a side cannot be measured here."""


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise MissingError(f"{name} is not installed (pip install {name})") from e


def set_up(side: str, model: nn.Module, x: Tensor) -> Run:
    """A run of one side.

    Raises:
        MissingError: its library is not there.
    """
    if side == EAGER:
        return lambda: model(x)
    if side == FROZEN:
        frozen = fastres.freeze(model)
        return lambda: frozen(x)
    if side in (COMPILE, FROZEN_COMPILE):
        source = fastres.freeze(model) if side == FROZEN_COMPILE else copy.deepcopy(model)
        torch.compiler.reset()
        compiled = torch.compile(source)
        with torch._inductor.config.patch(freezing=True):
            compiled(x)
        return lambda: compiled(x)
    return _onnx(model, x) if side == ONNX else _openvino(model, x)


def _onnx(model: nn.Module, x: Tensor) -> Run:
    runtime = _library("onnxruntime")
    _library("onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Its threads wait for the next call spinning, and would take the cores from whatever side is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        torch.onnx.export(model, (x.contiguous(),), file, dynamo=False)
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    images = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, images)


def _openvino(model: nn.Module, x: Tensor) -> Run:
    openvino = _library("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    network = openvino.convert_model(model, example_input=x)
    request = openvino.Core().compile_model(network, "CPU", settings).create_infer_request()
    images = [x.contiguous().numpy()]
    return lambda: request.infer(images)


def measure(case: Case, config: Config) -> Measured:
    """Time every side, interleaved."""
    clock = time.process_time if config.processor_time else time.perf_counter
    model = case.model()
    x = torch.randn(case.batch, 3, case.image, case.image).contiguous(memory_format=torch.channels_last)
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    with torch.no_grad():
        for side in config.sides:
            try:
                runs[side] = set_up(side, model, x)
            except MissingError as e:
                missing[side] = str(e)
        found: dict[str, list[float]] = {side: [] for side in runs}
        for run in runs.values():
            run()
            run()
        end = time.monotonic() + config.seconds
        while time.monotonic() < end or not all(found.values()):
            for side, run in runs.items():
                start = clock()
                run()
                found[side].append(clock() - start)
    return Measured(case, {side: statistics.median(seconds) for side, seconds in found.items()}, missing)


def table(found: list[Measured]) -> str:
    """Milliseconds of every side, and what fastres gains over the best peer."""
    sides = [side for side in SIDES if any(side in m.seconds for m in found)]
    lines = [
        row("network", *(f"{NAMES[side]}, ms" for side in sides), "over the best peer"),
        row("---", *(["---:"] * (len(sides) + 1))),
    ]
    for m in found:
        times = [number(1e3 * m.seconds[side]) if side in m.seconds else "" for side in sides]
        lines.append(row(m.case.name, *times, number(m.over_the_best_peer, "x")))
    reasons = sorted({f"{NAMES[side]}: {why}" for m in found for side, why in m.missing.items()})
    lines += ["", *reasons] if reasons else []
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Measure and print."""
    unknown = set(config.sides) - set(SIDES)
    if unknown:
        raise ValueError(f"sides: expected some of {SIDES}, got {sorted(unknown)}")
    cases = [Case.of(text) for text in config.cases]
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    machine = describe_machine()
    found = [measure(case, config) for case in tqdm(cases)]
    text = table(found)
    print(text)
    if config.json is not None:
        entries = [dataclasses.asdict(m) for m in found]
        write_text(config.json, to_json({"machine": machine, "serving": entries}))
    if config.page is not None:
        clock = "processor time" if config.processor_time else "milliseconds by the clock"
        head = f"{machine['processor']}, {machine['capability']}, threads: {machine['threads']}, {clock}, medians"
        insert_table(config.page, f"{head}\n\n{text}", "serving")


if __name__ == "__main__":
    main(tyro.cli(Config))
