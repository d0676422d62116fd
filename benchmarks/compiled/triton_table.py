"""`python -m benchmarks.compiled.triton_table`: what the compilers make of the Triton kernels.

The table is written into docs/kernels.md.

Every launch of a ResNet-18 and of the article's network, in training and evaluation, is compiled for every
architecture, on any machine. Ends with status 1 where a kernel uses local memory, or where fewer than half of a
multiprocessor's threads fit.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import tyro
from tqdm import tqdm

from benchmarks.compiled.launches import model_launches, training_step
from benchmarks.records import ROOT, insert_table, row
from benchmarks.roofline.kernels import kernels_of
from benchmarks.roofline.trace import Step
from benchmarks.workloads import EAGER
from fastres.kernels.activations import FUNCTIONS
from fastres.kernels.compiled import ARCHITECTURES, Architecture, Compiled, compile_launch, distinct
from fastres.kernels.launch import Launch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Config:
    """Compile the Triton kernels and write the table."""

    architectures: tuple[str, ...] = tuple(a.name for a in ARCHITECTURES)
    """Such as sm_90 or gfx942."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """bfloat16, float16, float32."""
    page: Path = ROOT / "docs" / "kernels.md"
    """The part between its marker lines is replaced."""


def label(launch: Launch) -> str:
    """Which work a launch does, in words."""
    given = {name for name, value in launch.arguments.items() if value is not None and value is not False}
    words = [launch.name.removesuffix("_kernel").replace("_", " ")]
    if "other_given_mean_ptr" in given:
        words.append("the residual's statistics given")
    if "VARIANCE" in given:
        words.append("evaluation")
    if "residual_mean_ptr" in given:
        words.append("residual with its own norm")
    elif "residual_ptr" in given or ("dresidual_ptr" in given and "dx_ptr" in given):
        words.append("residual")
    if "seed_ptr" in given:
        words.append("dropout")
    if "ACT_ADD" in given:
        words.append("act_add")
    kind = _kind(launch)
    if launch.name.startswith("backward"):
        words += ["dy in two parts"] * ("dy2_ptr" in given) + ["bits"] * ("bits_ptr" in given)
        words.append(f"{kind} recomputed" if kind else "leaking" if "LEAKS" in given else "")
        if not kind and "bits_ptr" not in given:
            words.append("no bits")
    elif launch.name == "apply_kernel" and kind != "relu":
        words.append(kind or "no relu")
    return ", ".join(filter(None, words))


def _kind(launch: Launch) -> str:
    """Of the activation whose functions a kernel calls; "" where it calls none."""
    called = [launch.arguments.get(name) for name in ("FORWARD", "GRADIENT", "PASSES")]
    function = next((f for f in called if f is not None), None)
    return next((kind for kind, of_kind in FUNCTIONS.items() if function is not None and function in of_kind), "")


def is_good(compiled: Compiled) -> bool:
    """No local memory, and at least half of a multiprocessor's threads resident."""
    return bool(compiled.local_bytes == 0 and compiled.local_accesses == 0 and compiled.occupancy >= 0.5)


def cell(compiled: Compiled) -> str:
    """Registers, shared bytes, widest load and store in bytes, occupancy."""
    words = f"{compiled.registers} / {compiled.shared_bytes} / {compiled.load_bytes}, {compiled.store_bytes}"
    words += f" / {100 * compiled.occupancy:.0f} %"
    return words if is_good(compiled) else f"**{words}, {compiled.local_bytes} local**"


def table(architectures: list[Architecture], dtypes: list[str]) -> tuple[str, bool]:
    """The table, and whether every kernel is good."""
    compiled: dict[tuple[str, str], dict[str, Compiled]] = {}
    work = []
    for architecture in architectures:
        for dtype in dtypes:
            launches = distinct(model_launches(DTYPES[dtype], torch.channels_last, architecture.device))
            work += [(architecture, dtype, launch) for launch in launches]
    for architecture, dtype, launch in tqdm(work, unit="kernel"):
        compiled.setdefault((dtype, label(launch)), {})[architecture.name] = compile_launch(launch, architecture)
    lines = [
        row("dtype", "kernel", *(a.name for a in architectures)),
        row("---", "---", *["---"] * len(architectures)),
        *(
            row(dtype, name, *(cell(of[a.name]) if a.name in of else "" for a in architectures))
            for (dtype, name), of in compiled.items()
        ),
    ]
    return "\n".join(lines) + "\n", all(is_good(c) for of in compiled.values() for c in of.values())


def launch_table() -> str:
    """Launches of the steps of a ResNet-18, ours and eager PyTorch's as benchmarks/roofline/kernels.py counts them."""
    lines = [
        row("ResNet-18 training step", "fastres: forward", "backward", "eager, the same layers: forward", "backward"),
        row("---", *["---:"] * 4),
    ]
    for dropout in (0.0, 0.1):
        trace, _ = training_step(dropout=dropout)
        ours = Counter("backward" if launch.name.startswith("backward") else "forward" for launch in trace.launches)
        eager = Counter[str]()
        for kernel in kernels_of(EAGER, Step(dropout=dropout)):
            if kernel.part == "norm":
                eager[kernel.phase] += kernel.launches
        lines.append(
            row(
                f"dropout {dropout:g}", str(ours["forward"]), str(ours["backward"]), str(eager["forward"]),
                str(eager["backward"]),
            )
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def main(config: Config) -> int:
    """Compile, write, and say whether all is well."""
    known = {a.name: a for a in ARCHITECTURES}
    for name, given, expected in (
        ("architectures", config.architectures, known),
        ("dtypes", config.dtypes, DTYPES),
    ):
        for one in given:
            if one not in expected:
                raise SystemExit(f"{name}: expected some of {', '.join(expected)}, got {one}")
    text, good = table([known[a] for a in config.architectures], list(config.dtypes))
    made = f"torch {torch.__version__}, Triton {triton.__version__}; compiled, not run.\n\n"
    if not insert_table(config.page, made + text, "kernels"):
        print(text)
    insert_table(config.page, launch_table(), "launches")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
