"""`python -m benchmarks.compiled.cuda_table`: what nvcc makes of csrc/cuda for each architecture.

The table is written into docs/cuda-kernels.md.

Registers and spills are ptxas's words, shared memory and threads those of the launch plan; from them follow the blocks
that a multiprocessor holds. Nothing is run, so no GPU is needed. Ends with status 1 where a kernel spills, or where
fewer than two blocks of a GEMM fit a multiprocessor of sm_80 or sm_90.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.records import ROOT, insert_table, row
from fastres import _build
from fastres.kernels.compiled import ARCHITECTURES, Architecture

STEPS = ("forward", "inference", "input gradient", "weight gradient")
ARITHMETIC = {"BFloat16": "bfloat16", "Half": "float16", "Tf32": "float32 as tf32", "Float": "float32"}
TWO_BLOCKS = ("sm_80", "sm_90")
# Registers are given to a warp in pieces of 256, and a block's shared memory has 1 KiB of the system beside its own.
REGISTER_UNIT, SYSTEM_SHARED_BYTES = 256, 1024

# The shortcuts of a ResNet-18 for CIFAR at batch 512: (N, Cin, H, W), Cout.
STAGES = (((512, 64, 32, 32), 128), ((512, 128, 16, 16), 256), ((512, 256, 8, 8), 512))

# Prints what the launcher's own header says, as JSON: it is C++, and so is whoever asks it.
CONSTANTS = r"""
#include "projection_shortcut.h"
#include <cstdio>
using namespace fastres::shortcut;
int main() {
  std::printf("{\"gemm\": [%d, %d], ", Tile::kThreads, Tile::kSharedBytes);
  std::printf("\"combine statistics\": [%d, %d], ", Combine::kStatisticsThreads, Combine::kStatisticsBytes);
  std::printf("\"combine weight\": [%d, %d], \"plans\": [", Combine::kWeightThreads, Combine::kWeightBytes);
  const long long stages[][5] = {@STAGES@};
  const char* comma = "";
  for (const auto& s : stages) {
    const Problem p{s[0], s[1], s[2], s[3], s[4], 2, 2, true};
    for (const Step step : {Step::kForward, Step::kInference, Step::kInputGradient, Step::kWeightGradient}) {
      const Plan plan = plan_of(step, Arithmetic::kBFloat16, p, true, true);
      const long long figures[] = {plan.blocks(), plan.splits, plan.second_blocks, plan.workspace * 4};
      std::printf("%s[%lld, %lld, %lld, %lld]", comma, figures[0], figures[1], figures[2], figures[3]);
      comma = ", ";
    }
  }
  std::printf("]}");
}
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile and where to write it.

    Attributes:
        architectures: such as sm_80; all that the table knows by default.
        output: the document; the part between its markers is replaced.
        jobs: compilers at a time; MAX_JOBS, or one a core.
    """

    architectures: tuple[str, ...] = tuple(a.name for a in ARCHITECTURES if a.backend == "cuda")
    output: Path = ROOT / "docs" / "cuda-kernels.md"
    jobs: int = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture: its name in words, registers a thread, bytes spilled, stack bytes."""

    name: str
    registers: int
    spilled: int
    stack: int


def in_words(symbol: str) -> str:
    """The name of a mangled kernel of projection_shortcut.cuh."""
    gemm = re.search(r"4gemmINS0_\d+(\w+?)ELNS0_4StepE(\d)ELb(\d)E", symbol)
    if gemm:
        loads = "16-byte" if gemm[3] == "1" else "element"
        return f"{STEPS[int(gemm[2])]}, {ARITHMETIC[gemm[1]]}, {loads} loads"
    if "combine_statistics" in symbol:
        return "combine statistics"
    weight = re.search(r"combine_weightI(.*?)E", symbol)
    if weight:
        kind = next((v for k, v in (("bf16", "bfloat16"), ("3f16", "float16")) if k in weight[1]), "float32")
        return f"combine weight gradient, {kind}"
    raise ValueError(f"kernel: expected one of projection_shortcut.cuh, got {symbol}")


def parse(text: str) -> list[Compiled]:
    """The kernels in what ptxas printed under -v."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return [
        Compiled(in_words(found[1]), int(found[5]), int(found[3]) + int(found[4]), int(found[2]))
        for found in re.finditer(pattern, text, re.DOTALL)
    ]


def compile_source(source: Path, architecture: str, folder: Path) -> tuple[list[Compiled], float]:
    """Compile for one architecture with the flags of the build; kernels, and the seconds it took.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's first error.
    """
    home = _build.cuda_home()
    if home is None:
        raise RuntimeError("nvcc was not found (set CUDA_HOME to the CUDA toolkit's folder)")
    _, flags = _build.compile_flags(_build.cuda_module())
    output = folder / f"{source.stem}.{architecture}.cubin"
    command = [str(home / "bin" / "nvcc"), *flags, f"-arch={architecture}", "-cubin", "-Xptxas=-v", "-o", str(output)]
    start = time.monotonic()
    run = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{source.name} for {architecture}: {_build.first_error(run.stderr or run.stdout)}")
    return parse(run.stderr + run.stdout), time.monotonic() - start


def constants(folder: Path) -> dict[str, Any]:
    """Threads, shared memory and the plans of STAGES, from the header that the launcher uses."""
    stages = ", ".join("{" + ", ".join(map(str, (*shape, cout))) + "}" for shape, cout in STAGES)
    source, program = folder / "constants.cpp", folder / "constants"
    source.write_text(CONSTANTS.replace("@STAGES@", stages), encoding="utf-8")
    include = f"-I{_build.SOURCES / 'cuda'}"
    subprocess.run([*_build.compiler(), "-std=c++20", include, str(source), "-o", str(program)], check=True)
    said: dict[str, Any] = json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    return said


def resident_blocks(architecture: Architecture, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at a time. Its four parts hold whole warps."""
    warps = threads // 32
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = architecture.registers // 4 // of_a_warp * 4 // warps
    by_shared = architecture.shared_bytes // (shared_bytes + SYSTEM_SHARED_BYTES)
    most: int = min(by_registers, by_shared, architecture.threads // threads, architecture.blocks)
    return most


def threads_and_shared(name: str, said: dict[str, Any]) -> tuple[int, int]:
    threads, shared = said[next((k for k in said if name.startswith(k)), "gemm")]
    return threads, shared


def order(name: str) -> tuple[int, str]:
    return (next((i for i, step in enumerate(STEPS) if name.startswith(step)), len(STEPS)), name)


def table(
    compiled: dict[str, dict[str, Compiled]], said: dict[str, Any], architectures: Iterable[Architecture]
) -> tuple[list[str], list[str]]:
    """The rows of the table, and what is wrong."""
    chosen = list(architectures)
    names = sorted({name for kernels in compiled.values() for name in kernels}, key=order)
    lines = [row("kernel", *(a.name for a in chosen)), row("---", *("---:" for _ in chosen))]
    wrong = []
    for name in names:
        cells = []
        threads, shared = threads_and_shared(name, said)
        for architecture in chosen:
            kernel = compiled[architecture.name][name]
            blocks = resident_blocks(architecture, threads, kernel.registers, shared)
            cells.append(f"{kernel.registers} / {blocks}" + (f" / {kernel.spilled} spilled" if kernel.spilled else ""))
            if kernel.spilled or kernel.stack:
                wrong.append(f"{name} on {architecture.name}: {kernel.spilled} bytes spilled, stack {kernel.stack}")
            if architecture.name in TWO_BLOCKS and not name.startswith("combine") and blocks < 2:
                wrong.append(f"{name} on {architecture.name}: {blocks} blocks a multiprocessor, expected at least 2")
        lines.append(row(name, *cells))
    return lines, wrong


def plans(said: dict[str, Any]) -> list[str]:
    """The launches of a ResNet-18's shortcuts at batch 512 in bfloat16."""
    lines = [
        row(
            "shortcut, batch 512", "step", "blocks", "splits of K", "blocks of the second stage", "partial results, KiB"
        ),
        row("---", "---", *["---:"] * 4),
    ]
    figures = iter(said["plans"])
    for (_, cin, h, w), cout in STAGES:
        for step in STEPS:
            blocks, splits, second, workspace = next(figures)
            cells = (str(blocks), str(splits), str(second or ""), str(workspace // 1024 or ""))
            lines.append(row(f"{cin} to {cout}, {h} x {w}, stride 2", step, *cells))
    return lines


def main(config: Config) -> int:
    """Compile, write the document, and say what is wrong."""
    known = {a.name: a for a in ARCHITECTURES if a.backend == "cuda"}
    for name in config.architectures:
        if name not in known:
            raise SystemExit(f"architectures: expected some of {', '.join(known)}, got {name}")
    sources = sorted((_build.SOURCES / "cuda").glob("projection_shortcut_*.cu"))
    compiled: dict[str, dict[str, Compiled]] = {name: {} for name in config.architectures}
    jobs = [(source, name) for source in sources for name in config.architectures]
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(config.jobs) as pool:
        said = constants(Path(folder))
        results = pool.map(lambda job: compile_source(job[0], job[1], Path(folder)), jobs)
        for (_, name), (kernels, took) in tqdm(zip(jobs, results, strict=True), total=len(jobs), desc="nvcc"):
            compiled[name] |= {kernel.name: kernel for kernel in kernels}
            seconds += took
    rows, wrong = table(compiled, said, (known[name] for name in config.architectures))
    text = [
        f"nvcc {_build.nvcc_version()}; {len(jobs)} compilations, {seconds:.0f} s together. A cell: registers a "
        f"thread / blocks that a multiprocessor holds. A GEMM's block has {said['gemm'][0]} threads and "
        f"{said['gemm'][1] // 1024} KiB of shared memory."
        + ("" if wrong else " No kernel spills a register or uses a stack."),
        "",
        *rows,
        "",
        "What is launched (`plan_of` in projection_shortcut.h, which the launcher calls):",
        "",
        *plans(said),
    ]
    if not insert_table(config.output, "\n".join(text) + "\n", "kernels"):
        raise SystemExit(
            f"output: expected a document with <!-- kernels --> and <!-- /kernels -->, got {config.output}"
        )
    for words in wrong:
        print(f"wrong: {words}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
