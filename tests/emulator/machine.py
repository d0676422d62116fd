"""The emulator of tests/emulator/*.h from Python: builds it, and runs the steps of the CUDA shortcut on CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastres import _build, contract
from fastres.contract import NormParams, output_size

FOLDER = Path(__file__).resolve().parent
CUDA_SOURCES = _build.SOURCES / "cuda"
FLAGS = ("-O2", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-DFASTRES_EMULATOR")

STEPS = ("forward", "inference", "input_gradient", "weight_gradient")
ARITHMETIC = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
SITES = ("barrier", "wait", "predicate", "wait by one group")


class EmulatorError(AssertionError):
    """A kernel did what it must not: the emulator's words."""


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "in_channels", "in_h", "in_w", "out_channels")),
        *((name, ctypes.c_int64) for name in ("stride_h", "stride_w")),
        ("channels_last", ctypes.c_bool),
    ]


class RunningNorm(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("mean", "var", "weight", "bias")), ("eps", ctypes.c_float)]


class Pointers(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("s", "weight", "dproduct", "x", "product", "y", "ds", "dweight")),
        *((name, ctypes.c_void_p) for name in ("mean", "m2", "workspace")),
        ("norm", RunningNorm),
        ("x_norm", RunningNorm),
        ("relu", ctypes.c_bool),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        ("vector_loads", ctypes.c_bool),
        ("vector_stores", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("row_tiles", "column_tiles", "splits", "steps_a_split")),
        ("second_blocks", ctypes.c_int64),
        ("second_threads", ctypes.c_int),
        ("workspace", ctypes.c_int64),
    ]


def build() -> Path:
    """The emulator's shared library, compiled where this version of the sources was not compiled before."""
    sources = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *CUDA_SOURCES.glob("*.*h")])
    digest = hashlib.sha256(repr((FLAGS, _build.compiler(), _build.compiler_version())).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"fastres-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        # Into a file of its own and moved: another process may be building the same.
        temporary = library.with_suffix(f".{os.getpid()}")
        command = [*_build.compiler(), *FLAGS, f"-I{CUDA_SOURCES}", f"-I{FOLDER}"]
        subprocess.run([*command, str(FOLDER / "library.cpp"), "-o", str(temporary)], check=True)
        temporary.replace(library)
    return library


def tf32(t: Tensor) -> Tensor:
    """Rounded to the ten bits of mantissa of tf32, to nearest, ties away from zero."""
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view_as(t)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Machine:
    """Runs steps. Options of every step:

    seed: of the order in which warps, lanes and blocks run.
    detect_races: report races as such; otherwise only their results show.
    take_out: sites that this run goes without: (kind, "file:line").
    """

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.emulator_sites.restype = ctypes.c_char_p
        self.c.emulator_conflicts.restype = ctypes.c_uint64
        for name in ("shortcut_run", "test_exchange", "test_copy", "test_mma", "test_load_matrices"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.plan: Plan | None = None

    def start(
        self,
        inputs: Iterable[Tensor | None],
        outputs: Iterable[Tensor | None],
        *,
        seed: int = 0,
        detect_races: bool = True,
        take_out: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Make known what a run may touch. Outputs are filled with NaN."""
        self.c.emulator_start(ctypes.c_uint64(seed), int(detect_races))
        for kind, place in take_out:
            self.c.emulator_take_out(SITES.index(kind), place.encode())
        for tensors, output in ((inputs, False), (outputs, True)):
            for t in tensors:
                if t is not None and t.numel() > 0:
                    if output:
                        t.fill_(float("nan"))
                    storage = t.numel() * t.element_size()
                    self.c.emulator_buffer(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(storage), int(output))

    def check(self, error: bytes | None) -> None:
        if error is not None:
            raise EmulatorError(error.decode())

    def sites(self) -> dict[tuple[str, str], int]:
        """What the last run passed: (kind, "file:line") -> how often."""
        found = {}
        for text in self.c.emulator_sites().decode().splitlines():
            kind, place, passes = text.split()
            found[SITES[int(kind)], place] = int(passes)
        return found

    def plan_of(
        self, step: str, arithmetic: str, problem: Problem, *, aligned: bool = True, statistics: bool = True
    ) -> Plan:
        plan = Plan()
        self.c.shortcut_plan(
            STEPS.index(step),
            list(ARITHMETIC).index(arithmetic),
            ctypes.byref(problem),
            int(aligned),
            int(statistics),
            ctypes.byref(plan),
        )
        return plan

    def _run(self, step: str, arithmetic: str, problem: Problem, outputs: dict[str, Tensor], options, **inputs) -> None:
        pointers = Pointers()
        statistics = "mean" in outputs
        norms = {name: inputs.pop(name, None) for name in ("norm", "x_norm")}
        pointers.relu = inputs.pop("relu", False)
        for name, t in (inputs | outputs).items():
            setattr(pointers, name, _pointer(t))
        read = list(inputs.values())
        for name, norm in norms.items():
            if norm is not None:
                setattr(pointers, name, RunningNorm(*(_pointer(t) for t in norm[:4]), norm.eps))
                read += norm[:4]
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (inputs | outputs).values())
        self.plan = self.plan_of(step, arithmetic, problem, aligned=aligned, statistics=statistics)
        workspace = torch.empty(self.plan.workspace)
        pointers.workspace = _pointer(workspace)
        outputs = outputs | {"workspace": workspace}
        self.start(read, outputs.values(), **options)
        self.check(
            self.c.shortcut_run(
                STEPS.index(step), list(ARITHMETIC).index(arithmetic), ctypes.byref(problem), ctypes.byref(pointers)
            )
        )
        for name, t in outputs.items():
            if t.numel() > 0 and not self.c.emulator_complete(ctypes.c_void_p(t.data_ptr())):
                raise EmulatorError(f"{name} was not written everywhere")

    def forward(
        self, arithmetic: str, s: Tensor, weight: Tensor, stride: tuple[int, int], *, statistics: bool = True, **options
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = {"product": empty_product(s, weight, stride)}
        vectors = [torch.empty(weight.shape[0]) for _ in range(2)]
        if statistics:
            outputs |= {"mean": vectors[0], "m2": vectors[1]}
        self._run("forward", arithmetic, problem_of(s, weight, stride), outputs, options, s=s, weight=weight)
        return outputs["product"], *vectors

    def inference(
        self,
        arithmetic: str,
        s: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        norm: NormParams,
        x: Tensor | None = None,
        x_norm: NormParams | None = None,
        *,
        relu: bool = True,
        **options,
    ) -> Tensor:
        y = empty_product(s, weight, stride)
        self._run(
            "inference", arithmetic, problem_of(s, weight, stride), {"y": y}, options,
            s=s, weight=weight, x=x, norm=norm, x_norm=x_norm, relu=relu,
        )  # fmt: skip
        return y

    def input_gradient(
        self, arithmetic: str, dproduct: Tensor, s: Tensor, weight: Tensor, stride: tuple[int, int], **options
    ) -> Tensor:
        ds = torch.empty_like(s)
        self._run(
            "input_gradient", arithmetic, problem_of(s, weight, stride), {"ds": ds}, options,
            dproduct=dproduct, weight=weight,
        )  # fmt: skip
        return ds

    def weight_gradient(
        self, arithmetic: str, dproduct: Tensor, s: Tensor, weight: Tensor, stride: tuple[int, int], **options
    ) -> Tensor:
        dweight = torch.empty(weight.shape, dtype=weight.dtype)
        self._run(
            "weight_gradient", arithmetic, problem_of(s, weight, stride), {"dweight": dweight}, options,
            dproduct=dproduct, s=s,
        )  # fmt: skip
        return dweight


def problem_of(s: Tensor, weight: Tensor, stride: tuple[int, int]) -> Problem:
    channels_last = contract.memory_format(s) == torch.channels_last
    return Problem(*s.shape, weight.shape[0], *stride, channels_last)


def empty_product(s: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    n, _, h, w = s.shape
    shape = (n, weight.shape[0], output_size(h, stride[0]), output_size(w, stride[1]))
    return torch.empty(shape, dtype=s.dtype, memory_format=contract.memory_format(s))
