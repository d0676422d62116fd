"""Runs recorded calls of operators one after the other, in a process that does nothing else.

    python -m benchmarks.gate.replay instructions|scratch PROBE CALLS RESULT

`instructions`, under callgrind: writes a dump for each call, named by its number, of a second run. `scratch`, with the
probe preloaded: writes the most bytes that each call held beyond its results, in a thread of its own, so that no
workspace of an earlier call is there to be used again. RESULT is JSON: what the CPU module was compiled with, and those
bytes. The probe is probe.cpp, compiled.

The package is not imported as a whole: its networks and its compiler's backend take as long under valgrind as PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import pkgutil
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LEAST = 4096
"""Bytes of the smallest block that the probe counts."""


def load_kernels() -> Any:
    """Define the operators and load the CPU module; (its path, the library).

    Raises:
        RuntimeError: there is no CPU module.
    """
    spec = importlib.util.find_spec("fastres")
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("fastres: expected it to be installed, or the repository as the working directory")
    package = types.ModuleType("fastres")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["fastres"] = package
    # A mark for the compiler, which it would import.
    torch.compiler.assume_constant_result = lambda function: function
    operators = importlib.import_module("fastres.ops")
    for module in pkgutil.iter_modules(operators.__path__):
        importlib.import_module(f"fastres.ops.{module.name}")
    extension = importlib.import_module("fastres._extension")
    library = extension.load_cpu()
    if library is None:
        raise RuntimeError(str(extension.status().cpu))
    return extension.status().cpu.path, library


def bytes_of_results(results: Any, inputs: Any) -> int:
    """Of the storages that a call has made, without those of its inputs, blocks that the probe does not count left
    out."""
    given = {t.untyped_storage().data_ptr() for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    made = {
        storage.data_ptr(): storage.nbytes()
        for storage in (t.untyped_storage() for t in tree_leaves(results) if isinstance(t, Tensor))
        if storage.data_ptr() not in given and storage.nbytes() >= LEAST
    }
    return sum(made.values())


def scratch(probe: Any, call: Callable[[], Any], inputs: Any) -> int:
    """The most bytes that a call holds beyond its results."""
    found: list[int] = []

    def run() -> None:
        torch.ops.aten.add.Tensor(torch.ones(2), torch.ones(2))  # what PyTorch keeps for a thread
        probe.gate_begin()
        results = call()
        peak = probe.gate_end()
        if peak < 0:
            raise RuntimeError("probe: expected fewer blocks at a time")
        found.append(peak - bytes_of_results(results, inputs))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def main(mode: str, probe_path: str, calls_path: str, result_path: str) -> None:
    probe = ctypes.CDLL(probe_path)
    probe.gate_end.restype = ctypes.c_int64
    path, library = load_kernels()
    bytes_held = []
    runs: list[tuple[Callable[[], Any], Any]] = []
    for operator, arguments in torch.load(calls_path, weights_only=True):
        overload = getattr(torch.ops.fastres, operator).default
        runs.append((functools.partial(overload, *arguments), arguments))
    # Tables and schemas are made at the first call.
    for run, _ in runs:
        run()
    if mode == "instructions":
        if not probe.gate_counts_instructions():
            raise RuntimeError("probe: expected callgrind around this process")
        probe.gate_instrument()
        for number, (run, _) in enumerate(runs):
            probe.gate_toggle()
            run()
            probe.gate_toggle()
            probe.gate_dump(str(number).encode())
    else:
        bytes_held = [scratch(probe, run, arguments) for run, arguments in runs]
    result = {"module": str(Path(path).resolve()), "build": library.build_info(), "scratch": bytes_held}
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
