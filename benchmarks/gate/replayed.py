"""What calls of operators do, by replaying them: instructions under callgrind, and scratch by an allocator that counts.

Both in processes of their own, with AVX2 and one thread, so that every machine counts the same.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate.calls import Call, record
from benchmarks.gate.figures import Counted, Unavailable
from benchmarks.machine import environment, in_own_process
from benchmarks.records import ROOT
from fastres import _build, _extension

PROBE = Path(__file__).with_name("probe.cpp")
CAPABILITY = "avx2"
SETTINGS = {
    "ATEN_CPU_CAPABILITY": CAPABILITY, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    "FASTRES_CONV": "auto",
}  # fmt: skip
"""Of a process in which figures of the CPU are counted."""


@dataclass(frozen=True)
class Replayed:
    """What a process found: the file of the CPU module, what it says of itself, and results by the calls' names."""

    module: str
    build: dict[str, str]
    figures: dict[str, int]


def check_cpu() -> None:
    """Check that the kernels for AVX2 run here.

    Raises:
        Unavailable: they do not.
    """
    if platform.system() != "Linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        raise Unavailable(f"expected Linux on x86-64, got {platform.system()} on {platform.machine()}")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise Unavailable(f"expected a processor with AVX2, got {torch.backends.cpu.get_cpu_capability()}")
    if os.environ.get("FASTRES_EXTENSION") == "0":
        raise Unavailable("the CPU module is switched off by FASTRES_EXTENSION=0")


def in_counted_process(function: Any, *arguments: Any) -> Any:
    """`in_own_process` with `SETTINGS`.

    Raises:
        Unavailable: the kernels for AVX2 do not run here.
    """
    check_cpu()
    with environment(**SETTINGS):
        return in_own_process(function, *arguments)


def calls() -> list[Call]:
    """The calls of calls.py, as a process with `SETTINGS` makes them.

    Raises:
        Unavailable: there is no CPU module for them.
    """
    with _folder() as folder:
        file = folder / "calls.pt"
        in_counted_process(_record, file)
        return [Call(*call) for call in torch.load(file, weights_only=True)]


def _record(file: Path) -> None:
    # As a file: a tensor that a process sends lies in memory that goes with the process.
    if _extension.load_cpu() is None or _extension.cpu_capability() != CAPABILITY:
        raise Unavailable(f"CPU module: {_extension.status().cpu}")
    torch.save([tuple(call) for call in record()], file)


def compile_probe(folder: Path, *flags: str) -> str:
    """The path of the compiled probe.

    Raises:
        Unavailable: it does not compile.
    """
    probe = str(folder / "probe.so")
    try:
        command = [*_build.compiler(), "-shared", "-fPIC", "-O2", *flags, str(PROBE), "-o", probe, "-ldl"]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    except _build.Unavailable as error:
        raise Unavailable(str(error)) from error
    if compiled.returncode:
        raise Unavailable(f"probe.cpp: {_build.first_error(compiled.stderr or 'the compiler failed')}")
    return probe


def run_preloaded(command: Sequence[str], probe: str) -> str:
    """What a command prints, run with `SETTINGS` and the probe preloaded.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    # A sanitizer, say, that is preloaded already has an allocator of its own.
    env = os.environ | SETTINGS | {"LD_PRELOAD": probe}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:8])}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def _replay(calls: Sequence[Call], mode: str, folder: Path, probe: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """What replay.py has written."""
    file, found = folder / "calls.pt", folder / "result.json"
    torch.save([(call.operator, call.arguments) for call in calls], file)
    run_preloaded([*prefix, sys.executable, "-m", "benchmarks.gate.replay", mode, probe, str(file), str(found)], probe)
    result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    if result["build"]["capability"].lower() != CAPABILITY:
        raise RuntimeError(f"CPU module: expected one for {CAPABILITY}, got {result['build']['capability']}")
    return result


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastres-gate-") as name:
        yield Path(name)


# ------------------------------------------------------------------------------------------------------ instructions


def _valgrind() -> str:
    found = shutil.which("valgrind")
    if found is None:
        raise Unavailable("valgrind is not installed")
    return found


def instructions(calls: Sequence[Call]) -> Replayed:
    """Instructions that each call executes in the CPU module; those of PyTorch and of the C library do not count.

    Raises:
        Unavailable: valgrind, its header or the compiler is missing.
    """
    valgrind = _valgrind()
    with _folder() as folder:
        probe = compile_probe(folder, "-DGATE_CALLGRIND")
        dumps = folder / "out"
        prefix = [valgrind, "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        result = _replay(calls, "instructions", folder, probe, [*prefix, f"--callgrind-out-file={dumps}"])
        figures = {}
        for number, call in enumerate(calls):
            name, cost = cost_of_module(Path(f"{dumps}.{number + 1}").read_text(encoding="utf-8"), result["module"])
            if name != str(number):
                raise RuntimeError(f"callgrind: expected the dump of call {number}, got that of {name}")
            if cost == 0:
                raise RuntimeError(f"{call.name}: expected instructions in {result['module']}, got none")
            figures[call.name] = cost
    return Replayed(result["module"], result["build"], figures)


def cost_of_module(dump: str, module: str) -> tuple[str, int]:
    """(name of the dump, instructions of functions in an object file), from a dump of callgrind's.

    Format: https://valgrind.org/docs/manual/cl-format.html. Names are written once and stand for numbers from then on.
    """
    name = re.search(r"^desc: Trigger: Client Request: (.*)$", dump, re.MULTILINE)
    objects: dict[str, str] = {}
    current, cost, of_callee = "", 0, False
    for line in dump.splitlines():
        if found := re.match(r"c?ob=\((\d+)\)(?: (.*))?$", line):
            if found[2]:
                objects[found[1]] = found[2]
            if line.startswith("ob="):
                current = objects[found[1]]
        elif line.startswith("calls="):
            of_callee = True  # the next line is what the callee cost, which counts there
        elif re.match(r"[+\-*\d]", line):
            if not of_callee and current == module:
                cost += int(line.split()[-1])
            of_callee = False
    return "" if name is None else name[1], cost


def count_instructions(calls: Sequence[Call]) -> Counted:
    """The group of the baseline."""
    found = instructions(calls)
    return Counted(
        {"compiler": found.build["compiler"], "headers": found.build["torch"], "valgrind": _version(_valgrind())},
        found.figures,
    )


def _version(valgrind: str) -> str:
    run = subprocess.run([valgrind, "--version"], capture_output=True, text=True, check=True)
    return run.stdout.strip().removeprefix("valgrind-")


# ----------------------------------------------------------------------------------------------------------- scratch


def scratch(calls: Sequence[Call]) -> Replayed:
    """The most bytes that each call holds beyond its results, blocks below 4 KiB left out.

    Raises:
        Unavailable: the C library is not glibc, or the compiler is missing.
    """
    if platform.libc_ver()[0] != "glibc":
        raise Unavailable("the allocator that is counted is glibc's")
    with _folder() as folder:
        result = _replay(calls, "scratch", folder, compile_probe(folder))
    figures = dict(zip((call.name for call in calls), result["scratch"], strict=True))
    return Replayed(result["module"], result["build"], figures)


def count_scratch(calls: Sequence[Call]) -> Counted:
    """The group of the baseline."""
    found = scratch(calls)
    # Blocks of a convolution's weights follow the size of the cache; valgrind's processor always has the same.
    command = ["getconf", "LEVEL2_CACHE_SIZE"]  # glibc's; Python's os.sysconf does not know it
    cache = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return Counted({"torch": found.build["torch"], "L2 cache": f"{cache} bytes"}, found.figures)
