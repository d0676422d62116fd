"""`python -m benchmarks.pointwise`: batch_norm_act at the stages of ResNet-18 by instruction set and number of threads,
and what one call costs where there is nearly nothing to compute.

Every instruction set and number of threads has a process of its own, and so has PyTorch there: ATEN_CPU_CAPABILITY
chooses both sides' kernels. Sides are interleaved and figures are medians over the rounds, as in `benchmarks.results`.
With one thread they are the process's CPU time, which other work on the machine lengthens least.
"""

from __future__ import annotations

import dataclasses
import time
import timeit
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

import fastres
from benchmarks import records, workloads
from benchmarks.machine import describe_machine, environment, in_own_process
from benchmarks.records import PUBLISHED, ROOT, insert_table, number, row
from benchmarks.results import Measurement, interleave
from benchmarks.workloads import EAGER, FUSED
from fastres.contract import Act, Norm, NormParams
from fastres.functional import batch_norm_act
from fastres.functional.norm import run as run_checked
from fastres.ops import batch_norm_act as ops

CALL_SHAPE = (2, 64, 8, 8)


@dataclass(frozen=True)
class Config:
    """Measure the operator against eager."""

    capabilities: tuple[str, ...] = ("avx512", "avx2")
    """Values of ATEN_CPU_CAPABILITY; those that the processor lacks are left out."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of threads."""
    rounds: int = 40
    """Rounds of every shape."""
    output_dir: Path = PUBLISHED
    """Folder for the raw figures, pointwise-<processor>-<date>.json."""
    page: Path | None = ROOT / "docs" / "benchmarks.md"
    """Markdown file that takes the tables, between `<!-- pointwise -->` and `<!-- /pointwise -->`."""


@dataclass(frozen=True)
class Measured:
    """One instruction set with a number of threads: the shapes of the stages, and the parts of a small call."""

    capability: str
    threads: int
    stages: list[Measurement]
    call: dict[str, float]


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(threads: int, rounds: int) -> Measured:
    """In this process, with the instruction set that it has."""
    fastres.reuse_cpu_memory()
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    stages = [
        interleave(dataclasses.replace(workload, sides=(EAGER, FUSED)), rounds, clock)
        for workload in workloads.op_workloads()
    ]
    return Measured(torch.backends.cpu.get_cpu_capability(), threads, stages, parts_of_a_call())


def measure_alone(capability: str, threads: int, rounds: int) -> Measured:
    """`measure` in a process of its own, started with the instruction set."""
    with environment(ATEN_CPU_CAPABILITY=capability):
        return in_own_process(measure, threads, rounds)


class _Nothing(torch.autograd.Function):
    """What every torch.autograd.Function with these inputs and results costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight), dy


def parts_of_a_call(repeats: int = 15, calls: int = 100) -> dict[str, float]:
    """Microseconds of relu(bn(x) + r) at CALL_SHAPE with one thread: the least of some repeats, interleaved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, r, dy = (torch.randn(CALL_SHAPE).contiguous(memory_format=torch.channels_last) for _ in range(3))
    channels = CALL_SHAPE[1]
    weight, bias = torch.rand(channels), torch.randn(channels)
    leaves = [t.requires_grad_() for t in (x, weight, bias, r)]
    mean, var = torch.zeros(channels), torch.ones(channels)
    norm, act = NormParams(mean, var, weight, bias), Act("relu", 0.0, 0.0, "add_act")
    x0, weight0, bias0, r0 = (t.detach() for t in leaves)
    norm0 = norm._replace(weight=weight0, bias=bias0)
    call = ops.Call(norm, None, None, None, None, act, True)
    _, saved_mean, saved_rstd, *_, bits = ops.training(x0, norm0, None, r0, None, None, None, act)
    saved = Norm(saved_mean, saved_rstd, weight0, bias0)

    def eager() -> Tensor:
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=True) + r)

    def fused() -> Tensor:
        return batch_norm_act(x, mean, var, weight, bias, training=True, residual=r)

    def whole(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    cases: dict[str, Callable[[], object]] = {
        "eager, forward": eager,
        "eager, forward + backward": whole(eager),
        "fastres, forward": fused,
        "fastres, forward + backward": whole(fused),
        "without the checks of arguments, forward": lambda: run_checked(x, norm, r, act=act, training=True),
        "the torch.autograd.Function, forward": lambda: ops.BatchNormAct.apply(x, weight, bias, r, None, None, call),
        "the operator, forward": lambda: ops.training(x0, norm0, None, r0, None, None, None, act),
        "the operator, backward": lambda: ops.backward(dy, None, x0, saved, None, bits, act, True, [True, True, True]),
        "a torch.autograd.Function that does nothing, forward + backward": whole(
            lambda: _Nothing.apply(x, weight, bias, r)
        ),
    }
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(repeats):
        for name, case in cases.items():
            best[name] = min(best[name], timeit.timeit(case, timer=time.process_time, number=calls) / calls)
    torch.set_num_threads(threads)
    return {name: 1e6 * seconds for name, seconds in best.items()}


# ---------------------------------------------------------------------------------------------------------- reporting


def table(found: Iterable[Measured]) -> str:
    """The stages, then the parts of a call, in Markdown."""
    lines = [
        row("forward + backward, ms", "instructions", "threads", "eager", "fastres", "over eager", "/ byte floor"),
        row("---", "---", *["---:"] * 5),
    ]
    calls = [
        "",
        row(f"one call at {list(CALL_SHAPE)}, µs", *(f"{m.capability}" for m in found if m.threads == 1)),
        row("---", *("---:" for m in found if m.threads == 1)),
    ]
    for entries in zip(*(m.stages for m in found), strict=True):
        for m, entry in zip(found, entries, strict=True):
            times = [entry.median(side) for side in (EAGER, FUSED)]
            cells = [number(1e3 * seconds) for seconds in times]
            floor = number(times[1] / entry.floor())
            lines.append(row(entry.name, m.capability, str(m.threads), *cells, number(times[0] / times[1], "x"), floor))
    alone = [m for m in found if m.threads == 1]
    for part in alone[0].call if alone else ():
        calls.append(row(part, *(number(m.call[part]) for m in alone)))
    return "\n".join(lines + (calls if alone else [])) + "\n"


def main(config: Config) -> None:
    """Measure, print, write."""
    machine = describe_machine()
    supported = ["default", "avx2", "avx512"]
    supported = supported[: supported.index(torch.backends.cpu.get_cpu_capability().lower()) + 1]
    ways = [(c, threads) for c in config.capabilities if c in supported for threads in config.threads]
    found = [measure_alone(capability, threads, config.rounds) for capability, threads in tqdm(ways)]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    name = f"pointwise-{records.slug(machine['processor'])}-{machine['date']}.json"
    data = {"machine": machine, "measured": [dataclasses.asdict(m) for m in found]}
    records.write_text(config.output_dir / name, records.to_json(data))
    how = f"{machine['processor']}; torch {machine['torch']}; float32, channels_last; {machine['date']}. Large buffers"
    how += f" kept. Medians of {config.rounds} interleaved rounds; of a call the least of several runs, in one thread."
    how += " With one thread CPU time."
    if config.page is not None:
        insert_table(config.page, f"{how}\n\n{table(found)}", "pointwise")
    print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Config))
